"""The linear map of a Transformer's projections, with the residual add in its epilogue: validation, autograd and the ladder."""

from __future__ import annotations

from typing import Any

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
from fastattn.ops._library import products
from fastattn.ops._select import choose, cpu_in_short, cuda_product_why_not, triton_why_not
from fastattn.reference.linear import linear as reference_linear

__all__ = ["linear"]

_forward = products("linear_forward")
_triton_forward = torch.ops.fastattn.triton_linear_forward.default
_backward = products("linear_backward")
_triton_backward = torch.ops.fastattn.triton_linear_backward.default


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor]:
    return (reference_linear(x, weight, bias, residual=residual),)


class _Linear(torch.autograd.Function):
    """(x, weight, bias, residual) -> y: matrices, or of any dimensions where the operator takes them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        *tensors, triton = args
        return (_triton_forward if triton else _forward)(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, residual, ctx.triton = inputs
        ctx.save_for_backward(x, weight)
        if forward_mode():
            ctx.save_for_forward(x, weight, bias, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradient = backward_by(_LinearGradient, _LinearGradientDual)
        grads: tuple[Tensor | None, ...] = (None,) * 3
        if any(needs[:3]):
            rows = _validate.as_matrix(dy), _validate.as_matrix(x)
            dx, *of_parameters = gradient(*rows, weight, *needs[:3], ctx.triton)
            grads = (dx if x.dim() == 2 or not needs[0] else dx.view_as(x), *of_parameters)
        return (*[g if need else None for g, need in zip(grads, needs, strict=False)], dy if needs[3] else None, None)


class _LinearDual(_Linear):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (dy,) = pushforward(_formula, 1, ctx.saved_tensors, tangents[:4])
        return dy


_linear_recorded = first_result(_Linear)


class _LinearGradient(torch.autograd.Function):
    """The backward operator, itself differentiable once more through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        dy, *rest, triton = args
        return (_triton_backward if triton else _backward)(_validate.readable(dy, triton), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted = inputs[3:6]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])
        if forward_mode():
            ctx.save_for_forward(*inputs[:3])
            ctx.shapes = [x.shape for x in output]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        dy, x, weight = ctx.saved_tensors
        bias = dy.new_zeros(dy.shape[1]) if ctx.wanted[2] else None
        inputs, wanted = (x, weight, bias, None), (*ctx.wanted, False)
        onto_inputs, onto_cotangents = pullback_of_gradient(_formula, inputs, wanted, (dy,), (*upstream, None))
        return (*onto_cotangents, *onto_inputs[:2], *[None] * 4)


class _LinearGradientDual(_LinearGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dy, x, weight = ctx.saved_tensors
        bias = dy.new_zeros(dy.shape[1]) if ctx.wanted[2] else None
        return pushforward_of_gradient(
            lambda x, weight, bias: _formula(x, weight, bias, None),
            (x, weight, bias),
            ctx.wanted,
            (dy,),
            (*tangents[1:3], None, tangents[0]),
            ctx.shapes,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """The linear map ``x weightᵀ + bias + residual``.

    Positional arguments as ``torch.nn.functional.linear``. Sums, bias and residual are added in float32 (float64 for float64)
    and rounded once; only where ``triton`` or ``cuda`` leaves the product to cuBLAS is that rounded before the residual is added.

    Args:
        x: (..., K), float64/32/16 or bfloat16; everything below has its dtype and device.
        weight: (N, K), bias: (N,).
        residual: (..., N), x's leading dimensions.
        implementation: auto | cuda | triton | cpu | reference.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    if cpu_in_short(implementation):
        y = _in_short(x, weight, bias, residual)
        if y is not None:
            return y
    _validate.tensor("x", x)
    tensors = _validate.autocast(x.device.type, x, weight, bias, residual)
    x, weight, bias, residual = _check(*tensors)
    why_not = {
        "cuda": lambda: cuda_product_why_not(x),
        "cpu": lambda: None,
        "triton": lambda: triton_why_not(x, weight, residual),
    }
    chosen = choose("linear", implementation, x.device, why_not)
    if chosen == "reference":
        return reference_linear(x, weight, bias, residual=residual)
    triton = chosen == "triton"
    matrices = (_validate.as_matrix(x), weight, bias, None if residual is None else _validate.as_matrix(residual))
    readable = [_validate.readable(t, triton) for t in matrices]
    if wants_gradient(*readable):
        y = apply(_LinearDual if forward_mode() else _Linear, *readable, triton)
    else:
        y = (_triton_forward if triton else _forward)(*readable)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _in_short(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """y of the common call, 5 µs less than by the checks in Python: the operator checks, and what it refuses is None here and
    takes the long way, which does it or says what is wrong."""
    try:
        recorded = records(x, weight, bias, residual)
        # A refusal by the operator takes 20 µs: strides are asked for first.
        if recorded is None or not x.is_contiguous() or torch.is_autocast_enabled("cpu"):
            return None
        if recorded:
            return _linear_recorded(x, weight, bias, residual, False)
        return _forward(x, weight, bias, residual)
    except REFUSALS:
        return None


def _check(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = _validate.tensor("x", x)
    _validate.floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    weight = _validate.tensor("weight", weight, 2)
    outputs = weight.shape[0]
    _validate.shape("weight", weight, (outputs, x.shape[-1]))
    _validate.like("weight", weight, "x", x)
    for name, parameter, expected in (("bias", bias, (outputs,)), ("residual", residual, (*x.shape[:-1], outputs))):
        if parameter is not None:
            _validate.shape(name, _validate.tensor(name, parameter), expected)
            _validate.like(name, parameter, "x", x)
    return x, weight, bias, residual
