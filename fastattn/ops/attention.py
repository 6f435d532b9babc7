"""Softmax attention: validation, autograd and the ladder.

Flash-style implementations keep O(N) memory: they save q, k, v, out and the log-sum-exp, and recompute probabilities in backward
(Dao et al., "FlashAttention", 2022; Rabe & Staats, "Self-attention does not need O(n²) memory", 2021).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import _sequences, _validate
from fastattn.ops._derivatives import (
    REFUSALS,
    apply,
    backward_by,
    first_result,
    forward_mode,
    pullback_of_gradient,
    pushforward,
    pushforward_of_gradient,
    records,
    wants_gradient,
)
from fastattn.ops._library import products
from fastattn.ops._select import choose, cpu_in_short, triton_why_not
from fastattn.reference.attention import masked_attention
from fastattn.reference.precision import accumulation_dtype

__all__ = ["attention", "scaled_dot_product_attention"]


#: Up to this many query rows of a sequence are a decoding step to the implementations on GPUs.
_FEW_ROWS = 8

#: Defaults, recognized by identity: what is left out needs no check.
_UNLIMITED = (-1, -1)
_OFF = 0.0


class _Options(NamedTuple):
    """The arguments of the operators that are not tensors, in the schema's order."""

    softmax_scale: float
    window_left: int
    window_right: int
    diagonal: int
    softcap: float
    dropout_p: float


_forward = products("attention_forward")
_inference = products("attention_inference")
_triton_forward = torch.ops.fastattn.triton_attention_forward.default
_backward = products("attention_backward")
_append = torch.ops.fastattn.attention_append.default
_triton_append = torch.ops.fastattn.triton_attention_append.default
_triton_backward = torch.ops.fastattn.triton_attention_backward.default


def _formula(
    options: _Options, rng_state: Tensor | None, sequences: Tensor | None, block_table: Tensor | None = None
) -> Any:
    return lambda *tensors: masked_attention(
        *tensors, **options._asdict(), rng_state=rng_state, sequences=sequences, block_table=block_table
    )


def _given(*optional: Tensor | None) -> tuple[Tensor | None, ...]:
    """Trailing arguments of an operator, without what is left at its default: Triton's launchers have none of them."""
    return optional if any(x is not None for x in optional) else ()


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, rng_state, sequences, block_table, triton = args[:10]
        return (_triton_forward if triton else _forward)(
            *tensors, *args[10:], rng_state, *_given(sequences, block_table)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.rng_state, ctx.sequences, ctx.block_table, ctx.triton = inputs[:10]
        ctx.options = inputs[10:]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        if forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, _: None = None) -> tuple[Any, ...]:
        *tensors, out, lse, statistics = ctx.saved_tensors
        if ctx.block_table is not None:
            raise NotImplementedError("block_table: a paged cache has no gradients; gather its pages to train on them")
        if dout is None:
            dout = torch.zeros_like(out)
        gradient = backward_by(_AttentionGradient, _AttentionGradientDual)
        wanted = tuple(ctx.needs_input_grad[3:6])
        state = (ctx.rng_state, ctx.sequences, ctx.triton)
        grads = gradient(dout, dlse, *tensors, out, lse, statistics, *state, *wanted, *ctx.options)
        kept = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:6], strict=True)]
        return (*kept, *[None] * (4 + len(ctx.options)))


class _AttentionDual(_Attention):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        formula = _formula(_Options(*ctx.options), ctx.rng_state, ctx.sequences, ctx.block_table)
        return (*pushforward(formula, 2, ctx.saved_tensors[:6], tangents[:6]), None)


_attend_recorded = first_result(_Attention)


class _AttentionGradient(torch.autograd.Function):
    """The backward operator, itself differentiable once more through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        dout, dlse, q, k, v, attn_mask, alibi_slopes, sinks, out, lse, statistics, *rest = args
        rng_state, sequences, triton, *rest = rest
        wanted, options = rest[:3], rest[3:]
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        return (_triton_backward if triton else _backward)(
            dout, dlse, q, k, v, out, lse, attn_mask, alibi_slopes, sinks, *options, rng_state, *wanted,
            *(_given(sequences) if triton else (sequences, statistics)),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rng_state, ctx.sequences, ctx.wanted, ctx.options = *inputs[11:13], inputs[14:17], inputs[17:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        if forward_mode():
            ctx.save_for_forward(*inputs[:8])
            ctx.shapes = [x.shape for x in output]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        dout, dlse, *inputs = ctx.saved_tensors
        formula = _formula(_Options(*ctx.options), ctx.rng_state, ctx.sequences)
        wanted = (True, True, True, *ctx.wanted)
        onto_inputs, onto_cotangents = pullback_of_gradient(formula, inputs, wanted, (dout, dlse), upstream)
        # out and lse are functions of the inputs here, so their share is already in onto_inputs.
        return (*onto_cotangents, *onto_inputs, *[None] * (9 + len(ctx.options)))


class _AttentionGradientDual(_AttentionGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dout, dlse, *inputs = ctx.saved_tensors
        formula = _formula(_Options(*ctx.options), ctx.rng_state, ctx.sequences)
        moving = (*tangents[2:8], *tangents[:2])
        return pushforward_of_gradient(
            formula, inputs, (True, True, True, *ctx.wanted), (dout, dlse), moving, ctx.shapes
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _UNLIMITED,
    softcap: float = _OFF,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = _OFF,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, softmax(softmax_scale · q kᵀ + …) v, in O(N) memory.

    Row i sees key j iff ``-left <= j - (i + Nk - Nq) <= right``: windows and ``causal`` (right = 0) are aligned to the
    *bottom right*, so that with a KV cache the last query sees the last key. (``scaled_dot_product_attention(is_causal=True)``
    is aligned to the top left, as torch documents.) In order: scores are scaled, capped, the mask and the ALiBi term added.

    Args:
        q: (B, H, Nq, D). k: (B, Hk, Nk, D). v: (B, Hk, Nk, Dv). One dtype of float64/32/16 or bfloat16, one device; D, Dv >= 1.
            H is a multiple of Hk (grouped-query attention: query head h reads key head h // (H / Hk)). Strides are free as long as
            the last dimension is contiguous (otherwise it is copied).
        attn_mask: broadcastable to (B, H, Nq, Nk). Boolean: True = visible. Floating (q's dtype or float32): added to the scores;
            its gradient is computed if it requires one.
        key_lengths: (B,) integers in [0, Nk]: keys from key_lengths[b] on (padding) are neither seen nor read. The alignment of
            ``causal`` and windows stays that of all Nk keys. On the GPU the lengths are not checked: that would wait for it.
        causal: no key after the query's position.
        window_size: (left, right) keys around the query's position, -1 = unlimited (Beltagy et al., "Longformer", 2020).
        softcap: > 0: scores become softcap · tanh(score / softcap) (Gemma 2, 2024). 0: off.
        alibi_slopes: (H,) or (B, H): adds -slope · |i + Nk - Nq - j| (Press et al., "ALiBi", 2021). Differentiable.
        sinks: (H,): one more logit per head in the softmax's denominator, without a value (gpt-oss, 2025). Differentiable.
        softmax_scale: default 1 / sqrt(D). Positive and finite.
        dropout_p: in [0, 1): probability of dropping each attention weight, the others scaled by 1 / (1 - p).
        rng_state: int64 (seed, offset) on the CPU that determines the dropout mask; drawn from torch's CPU generator if None.
        return_lse: also return the log-sum-exp.
        implementation: auto | cuda | triton | cpu | reference. A name computes or raises.

    Returns:
        out (B, H, Nq, Dv) in q's dtype and memory order; with ``return_lse`` also lse (B, H, Nq), natural logarithm of the
        softmax's denominator, float32 (float64 for float64), with its own gradient. A row that sees no key gives zeros,
        lse = -inf (the sink's logit if there is one) and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    plain = attn_mask is None and alibi_slopes is None and sinks is None and key_lengths is None
    if plain and window_size is _UNLIMITED and softcap is _OFF and dropout_p is _OFF and cpu_in_short(implementation):
        found = None if return_lse or rng_state is not None else _in_short(q, k, v, softmax_scale, causal, True)
        if found is not None:
            return found
    q, k, v = _validate.autocast(getattr(getattr(q, "device", None), "type", "cpu"), q, k, v)  # type: ignore[assignment]
    _check_qkv(q, k, v)
    options = _options(q, softmax_scale, causal, window_size, k.shape[2] - q.shape[2], softcap, dropout_p)
    own = _sequences.DENSE
    if key_lengths is not None:
        own = _sequences.Sequences(_sequences.padded(key_lengths, q, k.shape[2]))
    out, lse = _attend(q, k, v, attn_mask, alibi_slopes, sinks, rng_state, options, implementation, own)
    return (out, lse) if return_lse else out


def _in_short(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, bottom_right: bool, grouped: bool = True
) -> Tensor | None:
    """out of the common call, half the time of a call of a few rows less than by the checks in Python: the operator checks,
    and what it refuses is None here and takes the long way, which does it or says what is wrong."""
    try:
        recorded = records(q, k, v)
        if recorded is None or _validate.autocast_dtype("cpu") is not None:
            return None
        scale = 1 / math.sqrt(q.size(3)) if softmax_scale is None else softmax_scale
        if type(scale) is not float or not 0 < scale < math.inf or not (grouped or q.size(1) == k.size(1)):
            return None
        diagonal = k.size(2) - q.size(2) if bottom_right else 0
        options = (scale, -1, 0 if causal else -1, diagonal, 0.0, 0.0)
        if recorded:
            return _attend_recorded(q, k, v, None, None, None, None, None, None, False, *options)
        return _inference(q, k, v, None, None, None, *options, None)
    except (*REFUSALS, ZeroDivisionError):
        return None


def _options(
    q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    diagonal: int,
    softcap: float,
    dropout_p: float,
) -> _Options:
    left, right = (-1, -1) if window_size is _UNLIMITED else _check_window(window_size)
    return _Options(
        1 / math.sqrt(q.shape[-1])
        if softmax_scale is None
        else _validate.positive_finite("softmax_scale", softmax_scale),
        left,
        0 if causal else right,
        diagonal,
        0.0 if softcap is _OFF else _check_softcap(softcap),
        0.0 if dropout_p is _OFF else _validate.dropout(dropout_p),
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, same signature and meaning, on fastattn's implementations.

    query (N, ..., Hq, L, E), key (N, ..., H, S, E), value (N, ..., H, S, Ev): any number of leading dimensions, broadcast against
    each other. ``attn_mask`` broadcasts to (N, ..., Hq, L, S), boolean (True = attend) or floating. ``is_causal`` is aligned to the
    *top left* and excludes ``attn_mask``. ``dropout_p`` applies whenever it is > 0. ``enable_gqa`` lets Hq be a multiple of H.
    A mask of ``torch.nn.attention.bias.causal_upper_left`` or ``causal_lower_right`` is never in memory. See :func:`attention` for
    the bottom-right alignment and the other options.

    One difference: a row whose keys are all masked gives zeros here, where torch's result (NaN or zeros) depends on its backend.
    """
    if attn_mask is None and dropout_p == 0 and cpu_in_short("auto"):
        found = _in_short(query, key, value, scale, is_causal, False, enable_gqa)
        if found is not None:
            return found
    device_type = getattr(getattr(query, "device", None), "type", "cpu")
    query, key, value = _validate.autocast(device_type, query, key, value)  # type: ignore[assignment]
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: must be None when is_causal=True")
    diagonal = 0
    if stands_for_alignment(attn_mask):
        diagonal = _diagonal_of(attn_mask, query.shape[-2], key.shape[-2])
        attn_mask, is_causal = None, True
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, allowed are finite numbers")
    q, k, v, lead = query, key, value, None
    if not _fits(q, k, v) or (q.shape[1] != k.shape[1] and not enable_gqa):
        q, k, v, lead = _broadcast(query, key, value, enable_gqa)
    options = _Options(
        1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        -1,
        0 if is_causal else -1,
        diagonal,
        0.0,
        _validate.dropout(dropout_p),
    )
    mask = attn_mask if attn_mask is None or lead is None else _mask_as_4d(attn_mask, lead, q.shape[2], k.shape[2])
    out, _ = _attend(q, k, v, mask, None, None, None, options, "auto")
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def stands_for_alignment(mask: Any) -> bool:
    """Whether it is a ``torch.nn.attention.bias.CausalBias``; by name, since that module takes seconds to import."""
    return type(mask) is not Tensor and type(mask).__name__ == "CausalBias"


def _diagonal_of(bias: Any, rows: int, keys: int) -> int:
    if (bias.seq_len_q, bias.seq_len_kv) != (rows, keys):
        raise ValueError(f"attn_mask: {bias.seq_len_q} x {bias.seq_len_kv}, expected rows x keys = {rows} x {keys}")
    return keys - rows if bias.variant.name == "LOWER_RIGHT" else 0


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q, k and v with their leading dimensions broadcast against each other, as 4-D, and those dimensions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if _validate.tensor(name, x).dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions, got shape {tuple(x.shape)}")
    heads_dim = 1 if min(query.dim(), key.dim(), value.dim()) >= 3 else 0
    try:
        lead = torch.broadcast_shapes(*(x.shape[: -2 - (heads_dim if enable_gqa else 0)] for x in (query, key, value)))
    except RuntimeError:
        raise ValueError(
            "query, key, value: leading dimensions do not broadcast: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        ) from None
    tail = 3 if enable_gqa and heads_dim else 2
    q, k, v = (_as_4d(x.expand(*lead, *x.shape[-tail:])) for x in (query, key, value))
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"key: {k.shape[1]} heads but query has {q.shape[1]}; pass enable_gqa=True")
    _check_qkv(q, k, v, ("query", "key", "value"))
    return q, k, v, (*lead, query.shape[-3]) if tail == 3 else tuple(lead)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    options: _Options,
    implementation: str,
    own: _sequences.Sequences = _sequences.DENSE,
) -> tuple[Tensor, Tensor]:
    accumulate = accumulation_dtype(q.dtype)
    sequences, block_table, fresh = own
    batch = q.shape[0] if sequences is None else sequences.shape[0]
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, q, k)
    if alibi_slopes is not None:
        alibi_slopes = _check_per_head("alibi_slopes", alibi_slopes, q, ((q.shape[1],), (batch, q.shape[1])))
        alibi_slopes = alibi_slopes.to(accumulate).reshape(-1, q.shape[1])
    if sinks is not None:
        sinks = _check_per_head("sinks", sinks, q, ((q.shape[1],),)).to(accumulate)

    why_not = {
        "cuda": lambda: _cuda_why_not(q, v, options, wants_gradient(q, k, v, attn_mask, alibi_slopes, sinks)),
        "cpu": lambda: None,
        "triton": lambda: _triton_why_not(q, k, v),
    }
    chosen = choose("attention", implementation, q.device, why_not)
    rng_state = _validate.rng_state(rng_state, options.dropout_p, q)
    if fresh is not None:
        if chosen in ("cuda", "triton") and _appends_in_launch(q, k, v, fresh, alibi_slopes, sinks):
            scale, left, right, _, softcap, _ = options
            append = _triton_append if chosen == "triton" else _append
            return append(q, k, v, *fresh, alibi_slopes, sinks, scale, left, right, softcap, sequences, block_table)
        _sequences.append(k, v, own)
    if chosen == "reference":
        return _formula(options, rng_state, sequences, block_table)(q, k, v, attn_mask, alibi_slopes, sinks)
    triton = chosen == "triton"
    if triton:
        q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    tensors = (q, k, v, attn_mask, alibi_slopes, sinks)
    if wants_gradient(*tensors):
        state = (rng_state, sequences, block_table, triton)
        return apply(_AttentionDual if forward_mode() else _Attention, *tensors, *state, *options)[:2]
    forward = _triton_forward if triton else _forward
    return forward(*tensors, *options, rng_state, *_given(sequences, block_table))[:2]


def _appends_in_launch(q: Tensor, k: Tensor, v: Tensor, fresh: tuple[Tensor, Tensor], *more: Tensor | None) -> bool:
    """Whether ``attention_append`` takes a call: caches are written where they lie, and it has no gradient."""
    in_place = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (k, v))
    return q.shape[2] <= _FEW_ROWS and in_place and not wants_gradient(q, k, v, *fresh, *more)


def _too_wide(q: Tensor, v: Tensor) -> str | None:
    widest = max(q.shape[3], v.shape[3])
    return f"head_dim {widest} is over 256" if widest > 256 else None


def _triton_why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return _too_wide(q, v) or triton_why_not(q, k, v)


def _cuda_why_not(q: Tensor, v: Tensor, options: _Options, gradient: bool) -> str | None:
    """Why ``csrc/cuda/attention.cu`` does not take a call, or None."""
    if q.dtype == torch.float64:
        return "float64 (CUDA kernels accumulate in float32)"
    if (reason := _too_wide(q, v)) is not None:
        return reason
    if gradient and q.dtype == torch.float32:
        return "gradients of float32 (tensor cores multiply 16-bit values)"
    if q.dtype == torch.float32 and (options.dropout_p > 0 or q.shape[2] > _FEW_ROWS):
        return f"float32 of more than {_FEW_ROWS} query rows, or with dropout (tensor cores multiply 16-bit values)"
    return None


def _as_4d(x: Tensor) -> Tensor:
    """(..., H, L, E) to (batch, H, L, E); a view where strides allow."""
    if x.dim() == 2:
        return x.unsqueeze(0).unsqueeze(0)
    return x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


def _mask_as_4d(mask: Tensor, lead: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """A mask that broadcasts to (*lead, rows, columns) as 4-D, expanding only what the flattened batch makes necessary."""
    _validate.tensor("attn_mask", mask)
    if mask.dim() <= 4 and len(lead) <= 2:
        return mask
    try:
        return _as_4d(mask.expand(*lead, *mask.shape[-2:]) if mask.dim() >= 2 else mask.expand(*lead, rows, columns))
    except RuntimeError:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to {(*lead, rows, columns)}"
        ) from None


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``_check_qkv`` finds nothing, at a glance: calls of a few rows feel the microseconds of its questions."""
    for x in (q, k, v):
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested or x.dim() != 4:
            return False
    if q.dtype not in _validate.DTYPES or k.dtype is not q.dtype or v.dtype is not q.dtype:
        return False
    if k.device != q.device or v.device != q.device:
        return False
    batch, heads, _, head_dim = q.shape
    batch_k, heads_k, keys, head_dim_k = k.shape
    batch_v, heads_v, keys_v, head_dim_v = v.shape
    alike = batch == batch_k == batch_v and heads_k == heads_v and keys == keys_v and head_dim == head_dim_k
    return alike and head_dim > 0 and head_dim_v > 0 and (heads == heads_k or (heads_k > 0 and heads % heads_k == 0))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    if _fits(q, k, v):
        return
    for name, x in zip(names, (q, k, v), strict=True):
        _validate.floating(name, _validate.tensor(name, x, 4))
        _validate.like(name, x, names[0], q)
        if x.shape[3] < 1:
            raise ValueError(f"{name}: head_dim is 0, shape {tuple(x.shape)}")
    batch, heads, _, head_dim = q.shape
    key_heads = k.shape[1]
    if (heads % key_heads if key_heads else heads) != 0:
        raise ValueError(f"{names[1]}: {key_heads} heads do not divide {names[0]}'s {heads}")
    _validate.shape(names[1], k, (batch, key_heads, k.shape[2], head_dim))
    _validate.shape(names[2], v, (batch, key_heads, k.shape[2], v.shape[3]))


def _check_window(window_size: tuple[int, int]) -> tuple[int, int]:
    try:
        left, right = (int(side) for side in window_size)
        if (left, right) != tuple(window_size):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"window_size: expected two integers (left, right), got {window_size!r}") from None
    if left < -1 or right < -1:
        raise ValueError(f"window_size: got {window_size}, allowed are integers >= 0, or -1 for unlimited")
    return left, right


def _check_softcap(softcap: float) -> float:
    _validate.number("softcap", softcap)
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap: got {softcap}, allowed are finite numbers >= 0 (0 = off)")
    return float(softcap)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as 4-D with each extent 1 or full and a unit last stride."""
    _validate.same_device("attn_mask", _validate.tensor("attn_mask", mask), "q", q)
    allowed = (torch.bool, q.dtype, torch.float32)
    if mask.dtype not in allowed:
        raise TypeError(
            f"attn_mask: got dtype {mask.dtype}, allowed are {', '.join(str(d) for d in dict.fromkeys(allowed))}"
        )
    if mask.dtype == torch.float32 and q.dtype == torch.float64:
        mask = mask.double()
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    given = tuple(mask.shape)
    if mask.dim() > 4 or any(m not in (1, f) for m, f in zip(given[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask: shape {given} does not broadcast to (B, H, Nq, Nk) = {full}")
    mask = mask.reshape((1,) * (4 - mask.dim()) + given)
    if not mask.requires_grad:
        # An expanded dimension is the same line again: read it once.
        for dim in range(4):
            if mask.shape[dim] > 1 and mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
    return mask if mask.stride(3) == 1 or mask.shape[3] == 1 else mask.contiguous()


def _check_per_head(name: str, x: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    _validate.floating(name, _validate.tensor(name, x))
    _validate.same_device(name, x, "q", q)
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    return x
