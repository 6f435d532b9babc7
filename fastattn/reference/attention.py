"""Softmax attention in plain PyTorch: the definition every other implementation must agree with."""

from __future__ import annotations

import math

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
        diagonal=k.shape[2] - q.shape[2],
        softcap=softcap,
        dropout_p=dropout_p,
        rng_state=rng_state,
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
) -> tuple[Tensor, Tensor]:
    """The operator's form (arguments of ``fastattn::attention_forward``): (out, lse).

    ::

        s_ij = softmax_scale * q_i · k_j;   s = softcap * tanh(s / softcap);   s += mask_ij - slope * |i + diagonal - j|
        lse_i = log(Σ_j exp s_ij + exp sink);   out_i = Σ_j dropout_ij * exp(s_ij - lse_i) * v_j

    over the visible j. A row that sees no key gives zeros, lse = -inf and zero gradients. Keys that no row of a head sees are
    never read, so NaN in them reaches nothing.
    """
    accumulate = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    groups = heads // k.shape[1] if k.shape[1] else 1
    shape = torch.Size((batch, heads, rows, columns))

    allowed = visible(rows, columns, window_left, window_right, diagonal, q.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask

    keys = k.to(accumulate).repeat_interleave(groups, dim=1)
    values = v.to(accumulate).repeat_interleave(groups, dim=1)
    if allowed is not None and rows > 0:
        unseen = ~allowed.expand(shape).any(dim=2).unsqueeze(-1)
        keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)

    scores = q.to(accumulate) @ keys.transpose(-1, -2) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(accumulate)
    if alibi_slopes is not None:
        row = torch.arange(rows, device=q.device, dtype=accumulate).unsqueeze(1) + diagonal
        distance = (row - torch.arange(columns, device=q.device, dtype=accumulate)).abs()
        scores = scores - alibi_slopes.to(accumulate)[..., None, None] * distance
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)

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
        probabilities = probabilities * attention_dropout(shape, dropout_p, rng_state, q.device).to(accumulate)
    return (probabilities @ values).to(q.dtype), lse
