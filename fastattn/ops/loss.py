"""Cross-entropy with class indices, of logits and of a linear map to logits: validation, autograd and the ladder.

(Label smoothing: Szegedy et al., "Rethinking the Inception architecture", 2016; softcap: Gemma 2, 2024; z-loss: Chowdhery et
al., "PaLM", 2022; logits never whole: Wijmans et al., "Cut your losses in large-vocabulary language models", 2025.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops import _validate
from fastattn.ops._derivatives import (
    apply,
    backward_by,
    forward_mode,
    pullback_of_gradient,
    pushforward,
    pushforward_of_gradient,
    wants_gradient,
)
from fastattn.ops._library import products
from fastattn.ops._select import choose, triton_why_not
from fastattn.reference.loss import REDUCTIONS
from fastattn.reference.precision import accumulation_dtype

__all__ = ["cross_entropy", "linear_cross_entropy"]

_forward = torch.ops.fastattn.cross_entropy_forward.default
_triton_forward = torch.ops.fastattn.triton_cross_entropy_forward.default
_backward = torch.ops.fastattn.cross_entropy_backward.default
_triton_backward = torch.ops.fastattn.triton_cross_entropy_backward.default
_linear_forward = products("linear_cross_entropy_forward")
_triton_linear_forward = torch.ops.fastattn.triton_linear_cross_entropy_forward.default
_linear_backward = products("linear_cross_entropy_backward")
_triton_linear_backward = torch.ops.fastattn.triton_linear_cross_entropy_backward.default


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float
    reduction: int

    def named(self) -> dict[str, Any]:
        return self._asdict() | {"reduction": REDUCTIONS[self.reduction]}

    def of_sharded(self, rows: Tensor) -> bool:
        """Whether this is a mean over rows on several ranks (DTensor): the sum, which ranks can add, over their number."""
        return REDUCTIONS[self.reduction] == "mean" and hasattr(rows, "placements")


def _formula(target: Tensor, class_weight: Tensor | None, options: _Options) -> Any:
    return lambda logits: (reference.cross_entropy(logits, target, class_weight, **options.named()),)


class _CrossEntropy(torch.autograd.Function):
    """(logits, target, class_weight) -> (loss, statistics); statistics, two numbers a row, are what backward needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(triton: bool, *args: Any) -> tuple[Tensor, ...]:
        return (_triton_forward if triton else _forward)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.triton, logits, target, class_weight, *options = inputs
        ctx.options = _Options(*options)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, class_weight, output[1])
        ctx.save_for_forward(logits, target, class_weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 9
        gradient = backward_by(_CrossEntropyGradient, _CrossEntropyGradientDual)
        return None, gradient(ctx.triton, dloss, *ctx.saved_tensors, *ctx.options), *[None] * 7


class _CrossEntropyDual(_CrossEntropy):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        logits, target, class_weight = ctx.saved_tensors[:3]
        (dloss,) = pushforward(_formula(target, class_weight, ctx.options), 1, (logits,), tangents[1:2])
        return dloss, None


class _CrossEntropyGradient(torch.autograd.Function):
    """The backward operator, itself differentiable once more through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(triton: bool, dloss: Tensor, *args: Any) -> Tensor:
        return (_triton_backward if triton else _backward)(dloss.contiguous(), *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = _Options(*inputs[6:])
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        dloss, logits, target, class_weight = ctx.saved_tensors
        formula = _formula(target, class_weight, ctx.options)
        onto_inputs, onto_cotangents = pullback_of_gradient(formula, (logits,), (True,), (dloss,), upstream)
        return None, *onto_cotangents, *onto_inputs, *[None] * 8


class _CrossEntropyGradientDual(_CrossEntropyGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dloss, logits, target, class_weight = ctx.saved_tensors
        formula, moving = _formula(target, class_weight, ctx.options), (tangents[2], tangents[1])
        (pushed,) = pushforward_of_gradient(formula, (logits,), (True,), (dloss,), moving, (logits.shape,))
        return pushed


def _linear_formula(target: Tensor, options: _Options) -> Any:
    return lambda x, weight, bias: (reference.linear_cross_entropy(x, weight, target, bias, **options.named()),)


class _LinearCrossEntropy(torch.autograd.Function):
    """(x, weight, bias, target) -> (loss, statistics, dx, dweight, dbias): the gradients of a reduced loss come with it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(triton: bool, *args: Any) -> tuple[Tensor, ...]:
        return (_triton_linear_forward if triton else _linear_forward)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.triton, *tensors = inputs[:5]
        ctx.options, ctx.ready = _Options(*inputs[5:10]), inputs[10:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros of dweight's size arrive with every dloss
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 13
        needs = ctx.needs_input_grad[1:4]
        ready = all(made for made, need in zip(ctx.ready, needs, strict=True) if need)
        gradient = backward_by(_LinearCrossEntropyGradient, _LinearCrossEntropyGradientDual)
        once = not (torch.is_grad_enabled() or forward_mode())
        if ready and once and _is_one(dloss):
            grads = ctx.saved_tensors[5:]
        else:
            grads = gradient(ctx.triton, dloss, *ctx.saved_tensors, ready, *ctx.options, *needs)
        return None, *[g if need else None for g, need in zip(grads, needs, strict=True)], *[None] * 9


class _LinearCrossEntropyDual(_LinearCrossEntropy):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        *inputs, target = ctx.saved_tensors[:4]
        (dloss,) = pushforward(_linear_formula(target, ctx.options), 1, inputs, tangents[1:4])
        return dloss, None, None, None, None


def _is_one(dloss: Tensor) -> bool:
    """Whether this is a plain backward() of the loss: the gradients that forward made are then handed over as they are."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(dloss):
        return False
    if dloss.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # the host cannot look at it while a graph is captured
    return dloss.item() == 1


class _LinearCrossEntropyGradient(torch.autograd.Function):
    """dloss times the gradients that forward made, or the backward operator; differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        triton, dloss, x, weight, bias, target, statistics, *made, ready = args[:11]
        if not ready:
            backward = _triton_linear_backward if triton else _linear_backward
            return backward(dloss.contiguous(), x, weight, bias, target, statistics, *args[11:])
        return tuple((g * dloss).to(g.dtype) for g in made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.wanted = _Options(*inputs[11:16]), inputs[16:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:6])
        if forward_mode():
            ctx.save_for_forward(*inputs[1:6])
            ctx.shapes = [x.shape for x in output]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        dloss, *inputs, target = ctx.saved_tensors
        wanted = [asked and t is not None for asked, t in zip(ctx.wanted, inputs, strict=True)]
        formula = _linear_formula(target, ctx.options)
        onto_inputs, onto_cotangents = pullback_of_gradient(formula, inputs, wanted, (dloss,), upstream)
        return None, *onto_cotangents, *onto_inputs, *[None] * 14


class _LinearCrossEntropyGradientDual(_LinearCrossEntropyGradient):
    """With a tangent rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dloss, *inputs, target = ctx.saved_tensors
        wanted = [asked and t is not None for asked, t in zip(ctx.wanted, inputs, strict=True)]
        formula, moving = _linear_formula(target, ctx.options), (*tangents[2:5], tangents[1])
        return pushforward_of_gradient(formula, inputs, wanted, (dloss,), moving, ctx.shapes)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Cross-entropy of rows of logits with class indices.

    With z = logits, or softcap · tanh(logits / softcap), lse = log Σⱼ e^zⱼ and w = weight or 1, a token with target y has
    ``(1 - ε) w[y] (lse - z[y]) + ε/V Σⱼ w[j] (lse - zⱼ) + z_loss · lse²``, ε = label_smoothing. One pass over the logits, one more
    for their gradient; nothing of their size is kept in between.

    Args:
        logits: (tokens, V), float64/32/16 or bfloat16; a contiguous last dimension is read in place.
        target: (tokens,) int64 or int32, in [0, V) or ``ignore_index``, whose tokens have loss and gradient 0.
        weight: (V,) class weights, floating; a constant: asking for its gradient raises.
        reduction: mean (over what is not ignored, by weight: NaN if that is nothing, as in torch) | sum | none.
        label_smoothing: in [0, 1]. softcap: > 0 caps the logits (Gemma 2), 0 does not. z_loss: ≥ 0, the factor of lse² (PaLM).
        implementation: auto | triton | cpu | reference.

    Returns:
        A scalar, or (tokens,) with reduction="none", in float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: naming the argument; IndexError or RuntimeError: a target out of bounds (Triton, which cannot look at
        it without waiting for the GPU, makes the loss NaN); NotImplementedError: the named implementation does not take the call.
    """
    _validate.floating("logits", _validate.tensor("logits", logits, 2))
    tokens, classes = logits.shape
    target = _class_indices(target, (tokens,), logits, "logits")
    options = _options(classes, ignore_index, reduction, label_smoothing, softcap, z_loss)
    if weight is not None:
        _validate.floating("weight", _validate.tensor("weight", weight, 1))
        _validate.shape("weight", weight, (classes,))
        _validate.same_device("weight", weight, "logits", logits)
        if weight.requires_grad:
            raise NotImplementedError("weight: requires a gradient, but class weights are constants; detach it")
        weight = weight.to(accumulation_dtype(logits.dtype)).contiguous()
    why_not = {"cpu": lambda: None, "triton": lambda: triton_why_not(logits)}
    chosen = choose("cross_entropy", implementation, logits.device, why_not)
    if chosen == "reference":
        return reference.cross_entropy(logits, target, weight, **options.named())
    if options.of_sharded(logits):
        total = cross_entropy(logits, target, weight, implementation=chosen, **options.named() | {"reduction": "sum"})
        return total / _number(target, ignore_index, weight, total)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    arguments = (chosen == "triton", logits, target, weight, *options)
    if wants_gradient(logits):
        return apply(_CrossEntropyDual if forward_mode() else _CrossEntropy, *arguments)[0]
    return _CrossEntropy.forward(*arguments)[0]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """:func:`cross_entropy` of the logits ``x weightᵀ + bias``, which are never whole in memory.

    With mean or sum the gradients are computed together with the loss, if they are wanted, and multiplied by the incoming one in
    backward (which rounds 16-bit ones once more, unless it is a power of two); with none the logits are computed again there.
    Scratch memory is a quarter of the logits in x's dtype, at least 16 and at most 512 MiB; Triton's sum of a 16-bit weight's
    gradient over several such parts is float32, twice the weight more.

    Args:
        x: (..., K), float64/32/16 or bfloat16; weight and bias have its dtype and device.
        weight: (V, K), bias: (V,): laid out as ``nn.Linear``'s.
        target: (...) int64 or int32, in [0, V) or ``ignore_index``.
        Everything else as :func:`cross_entropy`; class weights are not taken.

    Returns:
        A scalar, or (...) with reduction="none", in float32 (float64 for float64 x).

    Raises:
        As :func:`cross_entropy`.
    """
    _validate.tensor("x", x)
    x, weight, bias = _validate.autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    _validate.floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    classes, shape = _validate.tensor("weight", weight, 2).shape[0], x.shape[:-1]
    _validate.shape("weight", weight, (classes, x.shape[-1]))
    _validate.like("weight", weight, "x", x)
    if bias is not None:
        _validate.shape("bias", _validate.tensor("bias", bias), (classes,))
        _validate.like("bias", bias, "x", x)
    target = _class_indices(target, tuple(shape), x, "x")
    options = _options(classes, ignore_index, reduction, label_smoothing, softcap, z_loss)
    why_not = {"cpu": lambda: None, "triton": lambda: triton_why_not(x)}
    chosen = choose("linear_cross_entropy", implementation, x.device, why_not)
    if chosen == "reference":
        return reference.linear_cross_entropy(x, weight, target, bias, **options.named())
    if options.of_sharded(x):
        asked = options.named() | {"reduction": "sum", "implementation": chosen}
        total = linear_cross_entropy(x, weight, target, bias, **asked)
        return total / _number(target, ignore_index, None, total)
    matrices = (
        _validate.as_matrix(x).contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    wanted = [False] * 3
    if wants_gradient(*matrices):
        if reduction != "none" and torch.is_grad_enabled():
            wanted = [t is not None and t.requires_grad for t in matrices]
        function = _LinearCrossEntropyDual if forward_mode() else _LinearCrossEntropy
        loss = apply(function, chosen == "triton", *matrices, target.reshape(-1), *options, *wanted)[0]
    else:
        loss = _LinearCrossEntropy.forward(chosen == "triton", *matrices, target.reshape(-1), *options, *wanted)[0]
    return loss.reshape(shape) if reduction == "none" else loss


def _number(target: Tensor, ignore_index: int, class_weight: Tensor | None, like: Tensor) -> Tensor:
    """What the mean divides by: how many tokens are not ignored, by weight."""
    counts = target != ignore_index
    if class_weight is None:
        return counts.sum().to(like.dtype)
    return (class_weight[torch.where(counts, target, 0)] * counts).sum()


def _class_indices(target: Tensor, shape: tuple[int, ...], like: Tensor, like_name: str) -> Tensor:
    _validate.tensor("target", target)
    if target.is_floating_point():
        raise TypeError(
            f"target: got {target.dtype}; class indices (int64, int32) are taken, class probabilities are not"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: got dtype {target.dtype}, allowed are int64, int32")
    _validate.shape("target", target, shape)
    _validate.same_device("target", target, like_name, like)
    return target.to(torch.int64).contiguous()


def _options(
    classes: int, ignore_index: int, reduction: str, label_smoothing: float, softcap: float, z_loss: float
) -> _Options:
    if classes < 1:
        raise ValueError("logits: expected at least one class, got 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, allowed are {', '.join(REDUCTIONS)}")
    for name, value in (("label_smoothing", label_smoothing), ("softcap", softcap), ("z_loss", z_loss)):
        _validate.number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}, allowed are finite numbers >= 0")
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, allowed is 0 <= label_smoothing <= 1")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    return _Options(ignore_index, label_smoothing, softcap, z_loss, REDUCTIONS.index(reduction))
