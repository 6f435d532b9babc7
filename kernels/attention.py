"""Softmax attention in Triton: the launchers of ``fastattn::triton_attention_{forward,backward,append}``.

Contract (shapes, strides, visibility): ``SCHEMAS`` in ``fastattn/ops/_library.py``. The score is defined in ``attention_score.py``,
the forward pass in ``attention_forward.py``, of few queries in ``attention_decode.py``, the gradients in ``attention_backward.py``.

q, k, v and attn_mask are read where they lie (a tensor whose channels are not contiguous is copied first). fp16 and bf16 use
tensor cores with float32 accumulators; float32 follows ``torch.get_float32_matmul_precision()``: "highest" is exact float32
products, "high" and "medium" are TF32.
"""

import dataclasses

import torch
from torch import Tensor

from fastattn.kernels import attention_decode, attention_tma, configs
from fastattn.kernels import attention_forward as attention_tiles
from fastattn.kernels.attention_backward import launch_backward, mask_gradient, sequence_sums
from fastattn.kernels.attention_score import (
    FEW_ROWS,
    Features,
    Fresh,
    Inputs,
    Score,
    operand,
    prepare,
    unit_last_stride,
)


def _output_like(q: Tensor, head_dim_v: int) -> Tensor:
    """(B, H, Nq, Dv) in q's memory order, as the operator's fake announces."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, head_dim_v).transpose(1, 2)
    return q.new_empty(batch, heads, rows, head_dim_v)


def _fill(out: Tensor, lse: Tensor) -> None:
    """What rows have that are no sequence's."""
    out.zero_()
    lse.fill_(float("-inf"))


def _launch_forward(inputs: Inputs, features: Features, out: Tensor, lse: Tensor) -> None:
    """Sequences of few rows to ``attention_decode.py``, the others to one of the two kernels of full tiles."""
    few, many = attention_decode.takes(inputs, features), inputs.sizes.rows > FEW_ROWS.value or features.dropout
    if features.sequences and (many or features.q_packed):
        _fill(out, lse)
    if few:
        attention_decode.launch_forward(inputs, features, out, lse)
        features = dataclasses.replace(features, few_elsewhere=features.q_packed)
    if not many:
        return
    config = attention_tma.chosen(inputs, features, configs.arch_of(out))
    if config is None:
        attention_tiles.launch_forward(inputs, features, out, lse)
    elif isinstance(config, configs.AttentionTma):
        attention_tma.launch_forward(inputs, features, out, lse, config)
    else:
        # Imported only where it runs: Gluon is experimental, and its names change with Triton's versions.
        from fastattn.kernels import attention_gluon

        attention_gluon.launch_forward(inputs, features, out, lse, config)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    sequences: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, H, Nq, Dv) in q's dtype and memory order, lse (B, H, Nq) float32, statistics: not kept here).

    ``sequences`` and ``block_table`` are read on the tensors' device; packed sequences lie one after the other."""
    out = _output_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() and (sequences is None or sequences.shape[0]):
        score = Score(softmax_scale, softcap, window_left, window_right, diagonal)
        inputs, features = prepare(
            q, k, v, attn_mask, alibi_slopes, sinks, score, dropout_p, rng_state, sequences, block_table
        )
        _launch_forward(inputs, features, out, lse)
    elif sequences is not None:
        _fill(out, lse)
    return out, lse, lse.new_zeros((2, *lse.shape) if q.dtype == torch.float32 else 0)


def attention_append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    sequences: Tensor,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention_forward`` after k and v took their place in the caches, in the same launch."""
    if q.shape[2] > FEW_ROWS.value:
        raise ValueError(f"q: {q.shape[2]} rows, allowed are up to {FEW_ROWS.value}")
    out = _output_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel():
        score = Score(softmax_scale, softcap, window_left, window_right, 0)
        inputs, features = prepare(
            q, k_cache, v_cache, None, alibi_slopes, sinks, score, 0.0, None, sequences, block_table
        )
        fresh = Fresh(operand(unit_last_stride(k)), operand(unit_last_stride(v)))
        inputs, features = inputs._replace(fresh=fresh), dataclasses.replace(features, append=True)
        attention_decode.launch_forward(inputs, features, out, lse)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    mask_grad: bool,
    slopes_grad: bool,
    sinks_grad: bool,
    sequences: Tensor | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmask, dslopes, dsinks); the last three are (0,) unless asked for. No atomics: two runs give the same bits."""
    # What no sequence has gets no gradient.
    new = torch.empty_like if sequences is None else torch.zeros_like
    dq, dk, dv = (new(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    nothing = q.new_empty(0)
    dmask = torch.empty_like(attn_mask, memory_format=torch.contiguous_format) if mask_grad else nothing
    dslopes = torch.empty_like(alibi_slopes) if slopes_grad else nothing
    dsinks = torch.empty_like(sinks) if sinks_grad else nothing
    if lse.numel() == 0 or k.shape[2] == 0 or (sequences is not None and sequences.shape[0] == 0):
        for gradient in (dq, dk, dv, dmask, dslopes, dsinks):
            gradient.zero_()
        if sinks_grad and dlse is not None:
            # Without keys lse is the sink itself, of rows that are a sequence's.
            dsinks.copy_(torch.where(lse == float("-inf"), 0.0, dlse).sum((0, 2)))
        return dq, dk, dv, dmask, dslopes, dsinks

    score = Score(softmax_scale, softcap, window_left, window_right, diagonal)
    inputs, features = prepare(q, k, v, attn_mask, alibi_slopes, sinks, score, dropout_p, rng_state, sequences, None)
    dout, out = unit_last_stride(dout), unit_last_stride(out)
    delta, slopes_rows = launch_backward(inputs, features, dout, dlse, out, lse, (dq, dk, dv), slopes_grad)
    if mask_grad:
        mask_gradient(inputs, features, dout, lse, delta, dmask)
    if slopes_grad:
        per_head = sequence_sums(inputs, features, slopes_rows)
        dslopes.copy_(per_head if alibi_slopes.shape[0] > 1 else per_head.sum(0, keepdim=True))
    if sinks_grad:
        # The sink's probability in a row is exp(sink - lse); a row that sees nothing but a sink of -inf has none.
        share = torch.exp(sinks[None, :, None] - lse) * delta
        dsinks.copy_(-torch.where(lse == float("-inf"), 0.0, share).sum((0, 2)))
    return dq, dk, dv, dmask, dslopes, dsinks
