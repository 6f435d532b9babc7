"""Softmax attention in plain PyTorch: the definition every other implementation must agree with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.philox import attention_dropout
from fastattn.reference.precision import accumulation_dtype


def visible(
    rows: int, columns: int, window_left: int, window_right: int, diagonal: int, device: torch.device
) -> Tensor | None:
    """Boolean (rows, columns), true iff ``-window_left <= j - (i + diagonal) <= window_right`` (-1: no bound on that side).

    None if every key is visible to every row.
    """
    if window_left < 0 and window_right < 0:
        return None
    distance = torch.arange(columns, device=device) - (torch.arange(rows, device=device).unsqueeze(1) + diagonal)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if window_left >= 0:
        allowed &= distance >= -window_left
    if window_right >= 0:
        allowed &= distance <= window_right
    return allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`fastattn.attention`, same shapes and meaning; needs O(Nq · Nk) memory, differentiable to any order."""
    window_left, window_right = window_size
    rows, columns = q.shape[2], k.shape[2]
    sequences = None
    if key_lengths is not None:
        sequences = torch.tensor([[0, rows, 0, length, columns - rows] for length in key_lengths.tolist()]).view(-1, 5)
    out, lse = masked_attention(
        q,
        k,
        v,
        attn_mask,
        alibi_slopes,
        sinks,
        softmax_scale=1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        window_left=window_left,
        window_right=0 if causal else window_right,
        diagonal=columns - rows,
        softcap=softcap,
        dropout_p=dropout_p,
        rng_state=rng_state,
        sequences=sequences,
    )
    return (out, lse) if return_lse else out


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    sequences: Tensor | None = None,
    block_table: Tensor | None = None,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """The operator's form (arguments of ``fastattn::attention_forward``): (out, lse).

    Dropout counts heads from ``first_head`` on.

    ::

        s_ij = softmax_scale * q_i · k_j;   s = softcap * tanh(s / softcap);   s += mask_ij - slope * |i + diagonal - j|
        lse_i = log(Σ_j exp s_ij + exp sink);   out_i = Σ_j dropout_ij * exp(s_ij - lse_i) * v_j

    over the visible j. A row that sees no key gives zeros, lse = -inf and zero gradients. Keys that no row of a head sees are
    never read, so NaN in them reaches nothing.
    """
    if sequences is not None:
        common = {
            "softmax_scale": softmax_scale,
            "window_left": window_left,
            "window_right": window_right,
            "softcap": softcap,
            "dropout_p": dropout_p,
            "rng_state": rng_state,
        }
        return _each_sequence(q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table, common)
    accumulate = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    window = (window_left, window_right, diagonal)
    scores, unseen = _scores(q, k, attn_mask, alibi_slopes, softmax_scale, softcap, window)
    shape = scores.shape
    values = v.to(accumulate).repeat_interleave(heads // k.shape[1] if k.shape[1] else 1, dim=1)
    if unseen is not None:
        values = values.masked_fill(unseen, 0)

    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(accumulate).view(1, -1, 1, 1).expand(batch, heads, rows, 1)], dim=-1)
    if logits.shape[-1] == 0:  # no key and no sink: an empty sum, still part of the graph
        return (scores @ values).to(q.dtype), scores.sum(dim=-1) - torch.inf
    # The largest finite logit, or 0 for a row without one: exp then gives exact zeros and no NaN in either direction.
    peak = logits.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    total = torch.exp(logits - peak).sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    probabilities = torch.exp(scores - peak) / total
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf).squeeze(-1)
    if dropout_p > 0:
        assert rng_state is not None
        factors = attention_dropout(shape, dropout_p, rng_state, q.device, first_head)
        probabilities = probabilities * factors.to(accumulate)
    return (probabilities @ values).to(q.dtype), lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    average: bool,
) -> Tensor:
    """The operator's form (arguments of ``fastattn::attention_weights``): dropout_ij * exp(s_ij - lse_i), zero where not visible.

    (B, H, Nq, Nk) or, averaged over heads, (B, Nq, Nk), in q's dtype.
    """
    window = (window_left, window_right, diagonal)
    scores, _ = _scores(q, k, attn_mask, alibi_slopes, softmax_scale, softcap, window)
    # A row that sees no key has lse = -inf and every score -inf.
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    if dropout_p > 0:
        assert rng_state is not None
        weights = weights * attention_dropout(scores.shape, dropout_p, rng_state, q.device).to(weights.dtype)
    return (weights.mean(dim=1) if average else weights).to(q.dtype)


def _scores(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    softcap: float,
    window: tuple[int, int, int],
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, Nq, Nk), -inf where not visible, and the keys (B, H, Nk, 1) that no row of a head sees: they are not read.

    window: window_left, window_right, diagonal.
    """
    accumulate = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    columns, diagonal = k.shape[2], window[2]
    allowed = visible(rows, columns, *window, q.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask

    keys = k.to(accumulate).repeat_interleave(heads // k.shape[1] if k.shape[1] else 1, dim=1)
    unseen = None
    if allowed is not None and rows > 0:
        unseen = ~allowed.expand(batch, heads, rows, columns).any(dim=2).unsqueeze(-1)
        keys = keys.masked_fill(unseen, 0)

    scores = q.to(accumulate) @ keys.transpose(-1, -2) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(accumulate)
    if alibi_slopes is not None:
        row = torch.arange(rows, device=q.device, dtype=accumulate).unsqueeze(1) + diagonal
        distance = (row - torch.arange(columns, device=q.device, dtype=accumulate)).abs()
        scores = scores - alibi_slopes.to(accumulate)[..., None, None] * distance
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf), unseen


def _each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    sequences: Tensor,
    block_table: Tensor | None,
    common: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """One call per sequence, put together: rows that no sequence has give zeros and lse = -inf."""
    batch, heads, total_rows, _ = q.shape
    if sequences.shape[0] == 0:  # no row of any sequence, still part of the graph
        own_k, own_v = k[:batch, :, :0], v[:batch, :, :0]
        out, lse = masked_attention(q, own_k, own_v, None, alibi_slopes, sinks, diagonal=0, **common)
        return out, lse.masked_fill(lse > -torch.inf, -torch.inf)
    outs, lses, places = [], [], []
    for s, (q_begin, rows, k_begin, keys, diagonal) in enumerate(sequences.tolist()):
        entry = s if batch > 1 else 0
        own_k, own_v = (_keys_of(x, s, k_begin, keys, block_table) for x in (k, v))
        mask = attn_mask
        if mask is not None:
            mask = mask[s : s + 1] if mask.shape[0] > 1 else mask
            mask = mask[..., :keys] if mask.shape[3] > 1 else mask
        slopes = alibi_slopes[s : s + 1] if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else alibi_slopes
        out, lse = masked_attention(
            q[entry : entry + 1, :, q_begin : q_begin + rows],
            own_k,
            own_v,
            mask,
            slopes,
            sinks,
            diagonal=diagonal,
            first_head=s * heads,
            **common,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
        places.append(torch.arange(rows, device=q.device) + (entry * total_rows + q_begin))
    out = q.new_zeros(batch * total_rows, heads, v.shape[3])
    lse = q.new_full((batch * total_rows, heads), -torch.inf, dtype=accumulation_dtype(q.dtype))
    place = torch.cat(places)
    out, lse = out.index_copy(0, place, torch.cat(outs)), lse.index_copy(0, place, torch.cat(lses))
    out, lse = (x.unflatten(0, (batch, total_rows)).transpose(1, 2) for x in (out, lse))
    return out, lse


def _keys_of(x: Tensor, sequence: int, begin: int, keys: int, block_table: Tensor | None) -> Tensor:
    """(1, Hk, keys, D): the keys, or values, of one sequence."""
    if block_table is not None:
        pages = block_table[sequence, : -(-keys // x.shape[2])].to(x.device, torch.int64)
        x = x[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return x[:, :, :keys]
    entry = sequence if x.shape[0] > 1 else 0
    return x[entry : entry + 1, :, begin : begin + keys]
