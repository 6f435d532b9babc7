"""Layer and RMS normalization with dropout and residual add fused in front: validation, autograd and the ladder.

(Ba et al., "Layer normalization", 2016; Zhang & Sennrich, "Root mean square layer normalization", 2019.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import _validate
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
from fastattn.ops._select import choose, cpu_in_short, triton_why_not
from fastattn.reference.norm import default_eps, norm_rows
from fastattn.reference.precision import accumulation_dtype

__all__ = ["layer_norm", "rms_norm"]


class _Options(NamedTuple):
    eps: float
    rms: bool
    dropout_p: float


_inference = torch.ops.fastattn.norm_inference.default
_forward = torch.ops.fastattn.norm_forward.default
_triton_forward = torch.ops.fastattn.triton_norm_forward.default
_backward = torch.ops.fastattn.norm_backward.default
_triton_backward = torch.ops.fastattn.triton_norm_backward.default


def _formula(options: _Options, rng_state: Tensor | None) -> Any:
    return lambda *tensors: norm_rows(*tensors, **options._asdict(), rng_state=rng_state)


class _Norm(torch.autograd.Function):
    """(x, residual, weight, bias) -> (y, h, mean, rstd); h is (0,) where it would equal x. Statistics carry no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        x, residual, weight, bias, rng_state, triton, *options = args
        return (_triton_forward if triton else _forward)(x, residual, weight, bias, *options, rng_state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, ctx.rng_state, ctx.triton, *options = inputs
        _, h, mean, rstd = output
        ctx.options = tuple(options)
        ctx.changed = residual is not None or ctx.options[2] > 0
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, residual, weight, bias, h, mean, rstd)
        if forward_mode():
            ctx.save_for_forward(x, residual, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None, *_: Any) -> tuple[Any, ...]:
        x, residual, weight, bias, h, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        gradient = backward_by(_NormGradient, _NormGradientDual)
        needs = ctx.needs_input_grad
        saved = h if ctx.changed else x
        dh = dh if ctx.changed else None
        grads = gradient(
            dy,
            dh,
            x,
            residual,
            weight,
            bias,
            saved,
            mean,
            rstd,
            ctx.rng_state,
            ctx.triton,
            needs[2],
            needs[3],
            *ctx.options,
        )
        total, dx, dweight, dbias = grads
        dropped = ctx.options[2] > 0
        return (
            (dx if dropped else total) if needs[0] else None,
            total if needs[1] else None,
            dweight if needs[2] else None,
            dbias if needs[3] else None,
            *[None] * (2 + len(ctx.options)),
        )


class _NormDual(_Norm):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        dy, dh = pushforward(_formula(_Options(*ctx.options), ctx.rng_state), 2, ctx.saved_tensors[:4], tangents[:4])
        return dy, dh if ctx.changed else dh.new_zeros(0), None, None


_norm_recorded = first_result(_Norm)


class _NormGradient(torch.autograd.Function):
    """The backward operator, itself differentiable once more through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        dy, dh, x, residual, weight, bias, h, mean, rstd, rng_state, triton, weight_grad, bias_grad, *options = args
        eps, rms, dropout_p = options
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        if dh is not None and dh.stride(-1) != 1:
            dh = dh.contiguous()
        return (_triton_backward if triton else _backward)(
            dy, dh, h, weight, mean, rstd, rms, dropout_p, rng_state, weight_grad, bias_grad
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rng_state, ctx.wanted, ctx.options = inputs[9], inputs[11:13], inputs[13:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])
        if forward_mode():
            ctx.save_for_forward(*inputs[:6])
            ctx.shapes = [x.shape for x in output]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        dy, dh, *inputs = ctx.saved_tensors
        formula = _formula(_Options(*ctx.options), ctx.rng_state)
        total, dx, dweight, dbias = upstream
        dropped = ctx.options[2] > 0
        # The operator's first result is the gradient of h: of the residual if there is one, and of x unless dropout scaled it.
        through_residual = inputs[1] is not None
        arriving = (dx if dropped else (None if through_residual else total), total if through_residual else None)
        wanted = (True, through_residual, *ctx.wanted)
        onto_inputs, onto_cotangents = pullback_of_gradient(
            formula, inputs, wanted, (dy, dh), (*arriving, dweight, dbias)
        )
        return (*onto_cotangents, *onto_inputs, *[None] * (7 + len(ctx.options)))


class _NormGradientDual(_NormGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dy, dh, *inputs = ctx.saved_tensors
        x, residual = inputs[:2]
        formula = _formula(_Options(*ctx.options), ctx.rng_state)
        wanted = (True, residual is not None, *ctx.wanted)
        shapes = (x.shape, x.shape, *ctx.shapes[2:])
        pushed = pushforward_of_gradient(formula, inputs, wanted, (dy, dh), (*tangents[2:6], *tangents[:2]), shapes)
        # Results: the gradient of h, that of x where dropout makes it differ (else (0,)).
        total = pushed[0] if residual is None else pushed[1]
        return total, pushed[0] if ctx.options[2] > 0 else x.new_zeros(0), *pushed[2:]


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_residual: bool = False,
    zero_centered_weight: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization, ``(h - mean(h)) / sqrt(var(h) + eps) · weight + bias`` with ``h = dropout(x) + residual``.

    Positional arguments as ``torch.nn.functional.layer_norm``. Mean and (biased) variance run over the last
    ``len(normalized_shape)`` dimensions, in float32 (float64 for float64).

    Args:
        x: (..., *normalized_shape), float64/32/16 or bfloat16.
        weight, bias: normalized_shape, in x's dtype or float32; None: 1 and 0.
        eps: added to the variance; >= 0.
        residual: x's shape and dtype, added after dropout. Its sum is rounded to x's dtype before the norm, as eager code does.
        dropout_p: in [0, 1), on x. rng_state: as in :func:`fastattn.attention`.
        return_residual: also return h (x itself if there is neither residual nor dropout).
        zero_centered_weight: multiply by 1 + weight, added up in float32 (float64 for float64): weights that start at 0 and that
            weight decay draws to 1 (Gemma, 2024).
        implementation: auto | cuda | triton | cpu | reference.

    Returns:
        y in x's shape and dtype, or (y, h).

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    if dropout_p == 0 and cpu_in_short(implementation):
        found = _in_short(
            x, normalized_shape, weight, bias, residual, return_residual, zero_centered_weight, eps, False
        )
        if found is not None:
            return found
    options = _Options(eps, False, dropout_p)
    return _norm(
        "layer_norm",
        x,
        normalized_shape,
        weight,
        bias,
        residual,
        rng_state,
        return_residual,
        zero_centered_weight,
        implementation,
        options,
    )


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_residual: bool = False,
    zero_centered_weight: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization, ``h / sqrt(mean(h²) + eps) · weight`` with ``h = dropout(x) + residual``.

    Positional arguments as ``torch.nn.functional.rms_norm``: eps None is the machine epsilon of the
    accumulation dtype (float32's for 16-bit x), which is what torch computes; a weight of any floating dtype, taken in that
    of accumulation if it is not x's. Everything else as :func:`layer_norm`.
    """
    if eps is None:
        eps = default_eps(x.dtype) if isinstance(x, Tensor) else 0.0
    if dropout_p == 0 and cpu_in_short(implementation):
        found = _in_short(x, normalized_shape, weight, None, residual, return_residual, zero_centered_weight, eps, True)
        if found is not None:
            return found
    options = _Options(eps, True, dropout_p)
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dtype not in (x.dtype, torch.float32):
        _validate.floating("weight", weight)
        weight = weight.to(accumulation_dtype(x.dtype))
    return _norm(
        "rms_norm",
        x,
        normalized_shape,
        weight,
        None,
        residual,
        rng_state,
        return_residual,
        zero_centered_weight,
        implementation,
        options,
    )


def _about_one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """1 + weight in the accumulation dtype, and bias in the same, as the operators ask: they need to know no more of it."""
    if weight is None:
        raise ValueError("zero_centered_weight: there is no weight to add 1 to")
    accumulate = accumulation_dtype(x.dtype)
    return weight.to(accumulate) + 1, None if bias is None else bias.to(accumulate)


def _in_short(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    return_residual: bool,
    zero_centered: bool,
    eps: float,
    rms: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The results of the common call, a third of the time of the checks in Python for a few rows: the operator checks, and what it
    refuses is None here and takes the long way, which does it or says what is wrong."""
    try:
        (columns,) = normalized_shape
        recorded = records(x, weight, bias, residual)
        if recorded is None:
            return None
        if zero_centered:
            if weight.dtype not in (x.dtype, torch.float32) or not (bias is None or bias.dtype is weight.dtype):  # type: ignore[union-attr]
                return None
            weight, bias = _about_one(x, weight, bias)
        if residual is None and not recorded:
            y = _inference(x, weight, bias, columns, eps, rms)
            return (y, x) if return_residual else y
        shape = x.shape
        if shape[-1] != columns or not (x.is_contiguous() and x.is_floating_point() and 0 <= eps < math.inf):
            return None
        flat, flat_residual = x, residual
        if len(shape) != 2:
            if residual is not None and residual.shape != shape:
                return None
            flat = x.flatten(0, -2)
            flat_residual = None if residual is None else residual.flatten(0, -2)
        if recorded and not return_residual:
            y = _norm_recorded(flat, flat_residual, weight, bias, None, False, eps, rms, 0.0)
            return y if len(shape) == 2 else y.view_as(x)
        if recorded:
            y, h, _, _ = apply(_Norm, flat, flat_residual, weight, bias, None, False, eps, rms, 0.0)
        else:
            y, h, _, _ = _forward(flat, flat_residual, weight, bias, eps, rms, 0.0, None)
        if len(shape) != 2:
            y, h = y.view_as(x), h if residual is None else h.view_as(x)
        if not return_residual:
            return y
        return y, x if residual is None else h
    except REFUSALS:
        return None


def _norm(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rng_state: Tensor | None,
    return_residual: bool,
    zero_centered: bool,
    implementation: str,
    options: _Options,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = _check(x, normalized_shape, weight, bias, residual, options)
    if zero_centered:
        weight, bias = _about_one(x, weight, bias)
    why_not = {"cuda": lambda: None, "cpu": lambda: None, "triton": lambda: triton_why_not(x, residual)}
    chosen = choose(op, implementation, x.device, why_not)
    rng_state = _validate.rng_state(rng_state, options.dropout_p, x)

    as_rows = x.dim() == 2 and len(shape) == 1
    flat, flat_residual, flat_weight, flat_bias = x, residual, weight, bias
    if not as_rows:
        columns, rows = math.prod(shape), math.prod(x.shape[: x.dim() - len(shape)])
        flat = x.reshape(rows, columns)
        flat_residual = None if residual is None else residual.reshape(rows, columns)
        flat_weight = None if weight is None else weight.reshape(columns)
        flat_bias = None if bias is None else bias.reshape(columns)
    if chosen == "reference":
        y, h = norm_rows(flat, flat_residual, flat_weight, flat_bias, **options._asdict(), rng_state=rng_state)
    else:
        tensors = [
            t if t is None or t.stride(-1) == 1 else t.contiguous()
            for t in (flat, flat_residual, flat_weight, flat_bias)
        ]
        triton = chosen == "triton"
        if wants_gradient(*tensors):
            y, h, _, _ = apply(_NormDual if forward_mode() else _Norm, *tensors, rng_state, triton, *options)
        else:
            y, h, _, _ = (_triton_forward if triton else _forward)(*tensors, *options, rng_state)
    if not as_rows:
        y, h = y.reshape(x.shape), h if h.numel() != x.numel() else h.reshape(x.shape)
    if not return_residual:
        return y
    return y, x if residual is None and options.dropout_p == 0 else h


def _check(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: _Options,
) -> tuple[int, ...]:
    _validate.floating("x", _validate.tensor("x", x))
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise _validate.ShapeError(f"normalized_shape: {shape} is not the end of x's shape {tuple(x.shape)}")
    _validate.number("eps", options.eps)
    if not (math.isfinite(options.eps) and options.eps >= 0):
        raise ValueError(f"eps: got {options.eps}, allowed are finite numbers >= 0")
    _validate.dropout(options.dropout_p)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        _validate.shape(name, _validate.tensor(name, parameter), shape)
        _validate.same_device(name, parameter, "x", x)
        if parameter.dtype not in (x.dtype, torch.float32):
            raise _validate.DtypeError(f"{name}: got dtype {parameter.dtype}, allowed are {x.dtype} and torch.float32")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: dtype {bias.dtype} differs from weight's {weight.dtype}")
    if residual is not None:
        _validate.shape("residual", _validate.tensor("residual", residual), tuple(x.shape))
        _validate.like("residual", residual, "x", x)
    return shape
