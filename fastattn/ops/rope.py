"""Rotary position embedding (Su et al., "RoFormer: enhanced Transformer with rotary position embedding", 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops import _validate
from fastattn.ops._derivatives import REFUSALS, apply, backward_by, forward_mode, records, wants_gradient
from fastattn.ops._select import choose, cpu_in_short, triton_why_not
from fastattn.reference.precision import accumulation_dtype

__all__ = ["rope"]

_rotate = torch.ops.fastattn.rope.default
_rotate_inplace = torch.ops.fastattn.rope_.default
_triton_rotate = torch.ops.fastattn.triton_rope.default
_triton_rotate_inplace = torch.ops.fastattn.triton_rope_.default


class _Rope(torch.autograd.Function):
    """The operator is linear in x: its gradient is the rotation by the opposite angle, its tangent the same rotation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool, triton: bool) -> Tensor:
        return (_triton_rotate if triton else _rotate)(x, cos, sin, interleaved, conjugate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.interleaved, ctx.conjugate, ctx.triton = inputs
        ctx.save_for_backward(cos, sin)
        if forward_mode():
            ctx.save_for_forward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        rotate = backward_by(_Rope, _RopeDual)
        return rotate(dy, cos, sin, ctx.interleaved, not ctx.conjugate, ctx.triton), *[None] * 5


class _RopeDual(_Rope):
    """With a tangent rule: a class of its own, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dcos: Any, dsin: Any, *_: Any) -> Tensor:
        cos, sin = ctx.saved_tensors
        return _Rope.forward(dx.contiguous(), cos, sin, ctx.interleaved, ctx.conjugate, ctx.triton)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Rotate pairs of channels of x by the angles whose cosines and sines are given.

    ``(a, b) -> (a cos - b sin, b cos + a sin)`` with ``(a, b) = (x[i], x[i + R/2])``, or ``(x[2i], x[2i + 1])`` if
    ``interleaved``; i < R/2. Channels from R on are copied (partial rotation).

    Args:
        x: (B, H, N, D), float64/32/16 or bfloat16; any strides with a contiguous last dimension are read in place.
        cos, sin: (N, R/2) or (B, N, R/2) with R ≤ D even, floating; computed with in float32 (float64 for float64 x). They are
            constants: asking for their gradient raises.
        interleaved: pairs of neighbours (GPT-J, the original Llama weights) instead of halves (GPT-NeoX, transformers' Llama).
        inplace: overwrite x and return it. Refused where x requires a gradient, or where its elements share memory.
        implementation: auto | triton | cpu | reference.

    Returns:
        The rotated tensor, (B, H, N, D) in x's dtype and memory order. Its gradient is the rotation by the opposite angle.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device; NotImplementedError: the named implementation cannot.
    """
    if cpu_in_short(implementation):
        y = _in_short(x, cos, sin, interleaved, inplace)
        if y is not None:
            return y
    _validate.floating("x", _validate.tensor("x", x, 4))
    batch, _, rows, head_dim = x.shape
    for name, angle in (("cos", cos), ("sin", sin)):
        _validate.floating(name, _validate.tensor(name, angle))
        _validate.same_device(name, angle, "x", x)
        if angle.requires_grad:
            raise NotImplementedError(f"{name}: requires a gradient, but the angles of rope are constants; detach it")
        fits = angle.dim() in (2, 3) and angle.shape[-2] == rows and 2 * angle.shape[-1] <= head_dim
        if not fits or (angle.dim() == 3 and angle.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name}: expected ({rows}, R/2) or ({batch}, {rows}, R/2) with R <= {head_dim}, got {tuple(angle.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"sin: shape {tuple(sin.shape)} differs from cos's {tuple(cos.shape)}")

    if inplace:
        _check_inplace(x)

    why_not = {"cpu": lambda: None, "triton": lambda: triton_why_not(x)}
    chosen = choose("rope", implementation, x.device, why_not)
    if chosen == "reference":
        y = reference.rope(x, cos, sin, interleaved=interleaved)
        return x.copy_(y) if inplace else y
    accumulate = accumulation_dtype(x.dtype)
    cos, sin = ((a if a.dim() == 3 else a.unsqueeze(0)).to(accumulate).contiguous() for a in (cos, sin))
    triton = chosen == "triton"
    if inplace and x.stride(-1) == 1:
        (_triton_rotate_inplace if triton else _rotate_inplace)(x, cos, sin, interleaved, False)
        if not torch.compiler.is_compiling():  # a compiled graph functionalizes the operator
            torch.autograd.graph.increment_version(x)
        return x
    if inplace:
        return x.copy_(_Rope.forward(x.contiguous(), cos, sin, interleaved, False, triton))
    if x.stride(-1) != 1:
        x = x.contiguous()
    if wants_gradient(x):
        return apply(_RopeDual if forward_mode() else _Rope, x, cos, sin, interleaved, False, triton)
    return _Rope.forward(x, cos, sin, interleaved, False, triton)


def _in_short(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool) -> Tensor | None:
    """The rotated x of the common call, 7 µs less than by the checks in Python: the operator checks, and what it refuses is None
    here and takes the long way, which does it or says what is wrong."""
    try:
        recorded = records(x, cos, sin)
        if recorded is None or cos.requires_grad or sin.requires_grad or not x.is_floating_point():
            return None
        if cos.dim() == 2 and sin.dim() == 2:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        if recorded:
            return None if inplace else apply(_Rope, x, cos, sin, interleaved, False, False)
        if not inplace:
            return _rotate(x, cos, sin, interleaved, False)
        if 0 in x.stride():
            return None
        _rotate_inplace(x, cos, sin, interleaved, False)
        torch.autograd.graph.increment_version(x)
        return x
    except REFUSALS:
        return None


def _check_inplace(x: Tensor) -> None:
    if wants_gradient(x):
        raise ValueError(
            "inplace: x requires a gradient (or forward mode is on): rotate out of place, or under torch.no_grad()"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"inplace: elements of x share memory (strides {x.stride()})")
