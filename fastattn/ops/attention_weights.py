"""Attention's weights beside a fused pass that never had them in memory: validation, autograd and the ladder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _validate
from fastattn.ops._derivatives import apply, beside_sharded, forward_mode, pushforward, wants_gradient
from fastattn.ops._library import products
from fastattn.ops._select import choose
from fastattn.ops.attention import _check_mask, _check_per_head, _check_qkv, _Options, _options
from fastattn.reference.attention import attention_weights as reference_weights
from fastattn.reference.precision import accumulation_dtype

__all__ = ["attention_weights"]

_weights = products("attention_weights")


def _formula(rng_state: Tensor | None, average: bool, options: _Options) -> Any:
    common = options._asdict() | {"rng_state": rng_state, "average": average}
    return lambda *tensors: (reference_weights(*tensors, **common),)


class _AttentionWeights(torch.autograd.Function):
    """(q, k, lse, attn_mask, alibi_slopes) -> weights; its gradient, to any order, is the reference's: O(N²) memory as they are."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        *tensors, rng_state, average = args[:7]
        return _weights(*tensors, *args[7:], rng_state, average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, rng_state, average = inputs[:7]
        ctx.formula, ctx.options = _formula(rng_state, average, _Options(*inputs[7:])), len(inputs[7:])
        ctx.save_for_backward(*tensors)
        if forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Any, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
        moving = [x for x, need in zip(inputs, needs, strict=True) if need]

        def formula(*values: Tensor) -> Tensor:
            arriving = iter(values)
            return ctx.formula(*(next(arriving) if need else x for x, need in zip(inputs, needs, strict=True)))[0]

        with beside_sharded(*inputs):
            _, pull = torch.func.vjp(formula, *moving)  # type: ignore[misc]
            pulled = iter(pull(dweights))
        return (*(next(pulled) if need else None for need in needs), *[None] * (2 + ctx.options))


class _AttentionWeightsDual(_AttentionWeights):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (pushed,) = pushforward(ctx.formula, 1, ctx.saved_tensors, tangents[:5])
        return pushed


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    average_heads: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """The weights exp(score - lse) by which :func:`attention` multiplied its values, zero where a key is not visible.

    >>> out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    >>> weights = fastattn.attention_weights(q, k, lse, causal=True)   # out = weights @ v

    One product and one exponential per score, no softmax: the fused pass is not given up for them. Averaged over heads, only the
    average is ever in memory. Differentiable with respect to q, k, lse, attn_mask and alibi_slopes.

    Args:
        q, k, attn_mask, causal, window_size, softcap, alibi_slopes, softmax_scale: those of the call that gave ``lse`` (B, H, Nq);
            its sinks are in lse.
        dropout_p, rng_state: likewise; the weights are then those after dropout. rng_state must be given with dropout.
        average_heads: the mean over heads.
        implementation: auto | cpu | reference.

    Returns:
        (B, H, Nq, Nk), or (B, Nq, Nk) with ``average_heads``, in q's dtype.

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    q, k = _validate.autocast(getattr(getattr(q, "device", None), "type", "cpu"), q, k)  # type: ignore[assignment]
    _check_qkv(q, k, k)
    _validate.shape("lse", _validate.tensor("lse", lse), tuple(q.shape[:3]))
    _validate.same_device("lse", lse, "q", q)
    if average_heads and q.shape[1] == 0:
        raise ValueError("average_heads: q has no heads")
    options = _options(q, softmax_scale, causal, window_size, k.shape[2] - q.shape[2], softcap, dropout_p)
    if options.dropout_p > 0 and rng_state is None:
        raise ValueError("rng_state: None, but weights after dropout need that of the attention call")
    rng_state = _validate.rng_state(rng_state, options.dropout_p, q)
    accumulate = accumulation_dtype(q.dtype)
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, q, k)
    if alibi_slopes is not None:
        alibi_slopes = _check_per_head("alibi_slopes", alibi_slopes, q, ((q.shape[1],), (q.shape[0], q.shape[1])))
        alibi_slopes = alibi_slopes.to(accumulate).reshape(-1, q.shape[1])
    tensors = (q, k, lse.to(accumulate), attn_mask, alibi_slopes)
    chosen = choose("attention_weights", implementation, q.device, {"cpu": lambda: None})
    if chosen == "reference":
        return _formula(rng_state, average_heads, options)(*tensors)[0]
    if wants_gradient(*tensors):
        function = _AttentionWeightsDual if forward_mode() else _AttentionWeights
        return apply(function, *tensors, rng_state, average_heads, *options)
    return _weights(*tensors, *options, rng_state, average_heads)
