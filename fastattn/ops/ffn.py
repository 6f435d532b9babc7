"""The feed-forward network, plain and gated: validation, autograd and the ladder.

(Vaswani et al., "Attention is all you need", 2017, §3.3; Shazeer, "GLU variants improve Transformer", 2020.)
"""

from __future__ import annotations

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
from fastattn.ops._library import products
from fastattn.ops._select import choose, cpu_in_short, cuda_product_why_not, triton_why_not
from fastattn.reference.ffn import ACTIVATIONS, GATED_ACTIVATIONS, ffn_rows

__all__ = ["ffn", "glu_ffn"]


class _Options(NamedTuple):
    activation: int
    dropout_p: float


_linear = products("linear_forward")
_forward = products("ffn_forward")
_inference = products("ffn_inference")
_triton_forward = torch.ops.fastattn.triton_ffn_forward.default
_backward = products("ffn_backward")
_triton_backward = torch.ops.fastattn.triton_ffn_backward.default


def _formula(options: _Options, rng_state: Tensor | None) -> Any:
    activation = ACTIVATIONS[options.activation]
    return lambda *tensors: (
        ffn_rows(*tensors, activation=activation, dropout_p=options.dropout_p, rng_state=rng_state),
    )


def _preactivations(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """What forward would have saved, bit for bit."""
    if triton or x.is_cuda:
        # No outputs: the first product alone.
        forward = _triton_forward if triton else _forward
        _, pre, gate = forward(x, w_in, b_in, w_gate, b_gate, w_out[:0], None, None, 0, 0.0, None, True)
        return pre, gate
    return _linear(x, w_in, b_in, None), x.new_empty(0) if w_gate is None else _linear(x, w_gate, b_gate, None)


class _FFN(torch.autograd.Function):
    """(x, w_in, b_in, w_gate, b_gate, w_out, b_out, residual) -> (out, pre, gate).

    x, residual and out are matrices, or of any dimensions where the operator takes them. pre and gate are what backward needs;
    with ``recompute`` they are (0,) and backward computes them again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, rng_state, triton, recompute, activation, dropout_p = args
        forward = _triton_forward if triton else _forward
        return forward(*tensors, activation, dropout_p, rng_state, not recompute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.rng_state, ctx.triton, ctx.recompute, activation, dropout_p = inputs
        ctx.options = (activation, dropout_p)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros of their size arrive with every dout
        ctx.save_for_backward(*tensors[:7], *output[1:])
        if forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 13
        needs = ctx.needs_input_grad[:7]
        grads: tuple[Tensor | None, ...] = (None,) * 7
        if any(needs):
            x, *saved = ctx.saved_tensors
            gradient = backward_by(_FFNGradient, _FFNGradientDual)
            wanted = (needs[0], any(needs[i] for i in (1, 3, 5)), any(needs[i] for i in (2, 4, 6)))
            context = (ctx.rng_state, ctx.triton, ctx.recompute)
            rows = _validate.as_matrix(dout), _validate.as_matrix(x)
            dx, *of_parameters = gradient(*rows, *saved, *context, *wanted, *ctx.options)
            grads = (dx if x.dim() == 2 or not needs[0] else dx.view_as(x), *of_parameters)
        onto_residual = dout if ctx.needs_input_grad[7] else None
        return (*[g if need else None for g, need in zip(grads, needs, strict=True)], onto_residual, *[None] * 5)


class _FFNDual(_FFN):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        (dout,) = pushforward(_formula(_Options(*ctx.options), ctx.rng_state), 1, ctx.saved_tensors, tangents[:8])
        return dout, None, None


_feed_forward_recorded = first_result(_FFN)


class _FFNGradient(torch.autograd.Function):
    """The backward operator, itself differentiable once more through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        dout, x, w_in, b_in, w_gate, b_gate, w_out, b_out, pre, gate, rng_state, triton, recompute, *rest = args
        wanted, options = rest[:3], rest[3:]
        if recompute:
            pre, gate = _preactivations(x, w_in, b_in, w_gate, b_gate, w_out, triton)
        return (_triton_backward if triton else _backward)(
            _validate.readable(dout, triton), x, w_in, w_gate, w_out, pre, gate, *options, rng_state, *wanted
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rng_state, ctx.wanted, ctx.options = inputs[10], inputs[13:16], inputs[16:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        if forward_mode():
            ctx.save_for_forward(*inputs[:8])
            ctx.shapes = [x.shape for x in output]

    @staticmethod
    def wanted(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
        """Of x, w_in, b_in, w_gate, b_gate, w_out and b_out."""
        x, weight, bias = ctx.wanted
        asked = (x, weight, bias, weight, bias, weight, bias)
        return [want and t is not None for want, t in zip(asked, inputs, strict=True)]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        dout, *inputs = ctx.saved_tensors
        wanted = _FFNGradient.wanted(ctx, inputs)
        formula = _formula(_Options(*ctx.options), ctx.rng_state)
        onto_inputs, onto_cotangents = pullback_of_gradient(
            formula, (*inputs, None), (*wanted, False), (dout,), (*upstream, None)
        )
        return (*onto_cotangents, *onto_inputs[:7], *[None] * 10)


class _FFNGradientDual(_FFNGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dout, *inputs = ctx.saved_tensors
        formula = _formula(_Options(*ctx.options), ctx.rng_state)
        wanted = _FFNGradient.wanted(ctx, inputs)
        moving = (*tangents[1:8], None, tangents[0])
        none = torch.Size((0,))  # of the residual, whose gradient is dout
        pushed = pushforward_of_gradient(
            formula, (*inputs, None), (*wanted, False), (dout,), moving, (*ctx.shapes, none)
        )
        return pushed[:7]


def ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    recompute: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """The feed-forward network ``dropout(act(x w_inᵀ + b_in)) w_outᵀ + b_out + residual``.

    Args:
        x: (..., K), float64/32/16 or bfloat16; everything below has its dtype and device.
        w_in: (F, K), w_out: (O, F), b_in: (F,), b_out: (O,): laid out as ``nn.Linear``'s.
        residual: (..., O), x's leading dimensions; added before the output is rounded.
        activation: relu | gelu (exact, erf) | gelu_tanh | silu.
        dropout_p: in [0, 1), on the hidden units. rng_state: as in :func:`fastattn.attention`.
        recompute: training keeps x and the weights only, and backward computes the pre-activations (M · F, twice that with a
            gate) again, with the same bits: one product more of the four (six) that follow a forward pass, for their memory.
        implementation: auto | cuda | triton | cpu | reference.

    Returns:
        (..., O) in x's dtype. Training keeps the pre-activations for backward unless ``recompute``.

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, allowed are {', '.join(ACTIVATIONS)}")
    tensors = (x, w_in, b_in, None, None, w_out, b_out, residual)
    index = ACTIVATIONS.index(activation)
    if dropout_p == 0 and cpu_in_short(implementation):
        out = _in_short(tensors, index, recompute)
        if out is not None:
            return out
    names = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
    options = _Options(index, dropout_p)
    return _feed_forward("ffn", names, tensors, options, rng_state, recompute, implementation)


def glu_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "swiglu",
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    recompute: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """The gated feed-forward network ``dropout(act(x w_gateᵀ + b_gate) · (x w_upᵀ + b_up)) w_downᵀ + b_down + residual``.

    w_gate, w_up: (F, K); w_down: (O, F). activation: swiglu | geglu | geglu_tanh | reglu. Everything else as :func:`ffn`.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, allowed are {', '.join(GATED_ACTIVATIONS)}")
    tensors = (x, w_up, b_up, w_gate, b_gate, w_down, b_down, residual)
    index = ACTIVATIONS.index(GATED_ACTIVATIONS[activation])
    if dropout_p == 0 and w_gate is not None and cpu_in_short(implementation):
        out = _in_short(tensors, index, recompute)
        if out is not None:
            return out
    names = ("w_up", "b_up", "w_gate", "b_gate", "w_down", "b_down")
    options = _Options(index, dropout_p)
    return _feed_forward("glu_ffn", names, tensors, options, rng_state, recompute, implementation)


def _feed_forward(
    op: str,
    names: tuple[str, ...],
    tensors: tuple[Tensor | None, ...],
    options: _Options,
    rng_state: Tensor | None,
    recompute: bool,
    implementation: str,
) -> Tensor:
    gated = op == "glu_ffn"
    x = _validate.tensor("x", tensors[0])
    tensors = _validate.autocast(x.device.type, *tensors)
    x = _check(names, tensors, gated)
    _validate.dropout(options.dropout_p)
    why_not = {"cuda": lambda: cuda_product_why_not(x), "cpu": lambda: None, "triton": lambda: triton_why_not(x)}
    chosen = choose(op, implementation, x.device, why_not)
    rng_state = _validate.rng_state(rng_state, options.dropout_p, x)

    *parameters, residual = tensors[1:]
    matrices = (_validate.as_matrix(x), *parameters, None if residual is None else _validate.as_matrix(residual))
    if chosen == "reference":
        (out,) = _formula(options, rng_state)(*matrices)
    else:
        triton = chosen == "triton"
        readable = [_validate.readable(t, triton) for t in matrices]
        if wants_gradient(*readable):
            function = _FFNDual if forward_mode() else _FFN
            out, _, _ = apply(function, *readable, rng_state, triton, recompute, *options)
        else:
            out, _, _ = (_triton_forward if triton else _forward)(*readable, *options, rng_state, False)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _in_short(tensors: tuple[Any, ...], activation: int, recompute: bool) -> Tensor | None:
    """The output of the common call, 10 µs less than by the checks in Python: the operator checks, and what it refuses is None
    here and takes the long way, which does it or says what is wrong."""
    try:
        recorded = records(*tensors)
        # A refusal by the operator takes 20 µs: strides are asked for first.
        if recorded is None or not tensors[0].is_contiguous() or torch.is_autocast_enabled("cpu"):
            return None
        if recorded:
            return _feed_forward_recorded(*tensors, None, False, recompute, activation, 0.0)
        return _inference(*tensors, activation)
    except REFUSALS:
        return None


def _check(names: tuple[str, ...], tensors: tuple[Tensor | None, ...], gated: bool) -> Tensor:
    x, w_in, _, w_gate, _, w_out, _, residual = tensors
    x = _validate.tensor("x", x)
    _validate.floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    hidden = _validate.tensor(names[0], w_in, 2).shape[0]
    outputs = _validate.tensor(names[4], w_out, 2).shape[0]
    expected: dict[int, tuple[int, ...]] = {0: (hidden, x.shape[-1]), 1: (hidden,), 4: (outputs, hidden), 5: (outputs,)}
    if gated:
        _validate.tensor(names[2], w_gate, 2)
        expected |= {2: (hidden, x.shape[-1]), 3: (hidden,)}
    for index, shape in expected.items():
        parameter = tensors[1 + index]
        if parameter is None and index in (1, 3, 5):
            continue
        parameter = _validate.tensor(names[index], parameter)
        _validate.shape(names[index], parameter, shape)
        _validate.like(names[index], parameter, "x", x)
    if residual is not None:
        _validate.shape("residual", _validate.tensor("residual", residual), (*x.shape[:-1], outputs))
        _validate.like("residual", residual, "x", x)
    return x
