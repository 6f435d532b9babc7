"""Derivatives beyond the first reverse pass, from the reference formula.

The fast implementations give outputs and first gradients. Forward mode and double backward come from differentiating the
reference, which PyTorch can do to any order: O(Nq · Nk) memory for attention, and the same definition. ``torch.func.vjp`` nests
inside autograd.Function, forward mode and the torch.func transforms alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from fastattn.ops._validate import PLAIN

#: What a call raises that a short way is not for: it then takes the long one, which does it or says what is wrong.
REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)

OptionalTensors = Sequence[Tensor | None]
#: Tensors in, tensors out: the reference with everything that is not a tensor already bound.
Formula = Callable[..., tuple[Tensor, ...]]


def forward_mode() -> bool:
    """Whether a forward-mode AD level is open: tensors may then carry tangents that requires_grad does not show."""
    return torch.autograd.forward_ad._current_level >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function."""
    return forward_mode() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def records(*tensors: Tensor | None) -> bool | None:
    """:func:`wants_gradient` at a glance for dense CPU tensors in eager mode; None where there is more to ask.

    A call whose operator checks shapes and dtypes itself needs no other question: calls of a few rows feel every microsecond.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_mode():
        return None
    wanted = False
    for x in tensors:
        if x is not None:
            if type(x) not in PLAIN or not x.is_cpu:
                return None
            wanted = wanted or x.requires_grad
    return wanted and torch.is_grad_enabled()


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without the signature that it inspects at every call (9 of 14 µs) for keywords and defaults."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, a tensor that is there twice as a view the second time: Dynamo traces no Function of such (``q, q, q``)."""
    found: list[Any] = []
    for x in args:
        twice = isinstance(x, Tensor) and any(x is other for other in found)
        found.append(x.view_as(x) if twice else x)
    return found


def first_result(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """``function.apply(...)[0]`` for calls of which :func:`records` said True: 1 to 2 µs less.

    Results that nobody asked for stay within, instead of becoming tensors of the graph (0.3 µs each); the context is set up where
    the results are; and what :func:`apply` asks is known. ``function.backward`` gets the gradient of the first result alone.
    """
    compute, setup_context = function.forward, function.setup_context

    def forward(ctx: Any, *args: Any) -> Tensor:
        output = compute(*args)
        setup_context(ctx, args, output)
        return output if isinstance(output, Tensor) else output[0]

    # A Function with torch's own setup_context is one whose forward takes the context.
    body = {"forward": staticmethod(forward), "setup_context": staticmethod(_SingleLevelFunction.setup_context)}
    eager = type(function.__name__, (function,), body | {"__module__": function.__module__})
    return super(torch.autograd.Function, eager).apply  # type: ignore[misc]


def beside_sharded(*tensors: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Where the reference computes with sharded tensors (DTensor): what it makes itself (positions, masks) is on every rank."""
    if torch.compiler.is_compiling() or not any(hasattr(x, "placements") for x in tensors):
        return contextlib.nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _of_moving(formula: Formula, inputs: OptionalTensors, moving: Sequence[bool], outputs: Sequence[bool]) -> Formula:
    """``formula`` as a function of the moving inputs only, giving the chosen outputs only."""

    def restricted(*values: Tensor) -> tuple[Tensor, ...]:
        arriving = iter(values)
        results = formula(*(next(arriving) if move else x for x, move in zip(inputs, moving, strict=True)))
        return tuple(out for out, keep in zip(results, outputs, strict=True) if keep)

    return restricted


def pushforward(
    formula: Formula, results: int, inputs: OptionalTensors, tangents: OptionalTensors
) -> tuple[Tensor, ...]:
    """The tangents J·t of the formula's ``results`` outputs by two reverse passes: u ↦ Jᵀu is linear, its transpose is J.

    (J. Townsend, "A new trick for calculating Jacobian vector products", 2017.)
    """
    moving = [t is not None for t in tangents]
    function = _of_moving(formula, inputs, moving, [True] * results)
    outputs, pull = torch.func.vjp(  # type: ignore[misc]
        function, *(x for x, move in zip(inputs, moving, strict=True) if move and x is not None)
    )
    _, push = torch.func.vjp(pull, tuple(torch.zeros_like(out) for out in outputs))  # type: ignore[misc]
    (pushed,) = push(tuple(t for t in tangents if t is not None))
    return pushed


def pullback_of_gradient(
    formula: Formula,
    inputs: OptionalTensors,
    wanted: Sequence[bool],
    cotangents: OptionalTensors,
    upstream: OptionalTensors,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients through g(inputs, cotangents) = Jᵀ·cotangents, for ``upstream`` = the gradients of g's results.

    ``wanted`` says for which inputs g has a result. Returns gradients for the inputs and for the cotangents.
    """
    moving = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
    rising = [c for c in cotangents if c is not None]
    function = _of_moving(formula, inputs, wanted, [c is not None for c in cotangents])

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(function, *values[: len(moving)])  # type: ignore[misc]
        return pull(tuple(values[len(moving) :]))

    with beside_sharded(*moving, *rising):
        results, pull = torch.func.vjp(gradient, *moving, *rising)  # type: ignore[misc]
        arriving = [up for up, want in zip(upstream, wanted, strict=True) if want]
        pulled = iter(
            pull(tuple(torch.zeros_like(r) if up is None else up for r, up in zip(results, arriving, strict=True)))
        )
    onto_inputs = [next(pulled) if want else None for want in wanted]
    return onto_inputs, [None if c is None else next(pulled) for c in cotangents]


def backward_by(gradient: type[torch.autograd.Function], dual: type[torch.autograd.Function]) -> Callable[..., Any]:
    """How a backward pass calls the Function of its operator: by itself where nobody differentiates it once more.

    ``dual`` is ``gradient`` with a tangent rule, for forward over reverse mode (Hessian-vector products).
    """
    if torch.compiler.is_compiling():
        return gradient.forward
    if forward_mode():
        return dual.apply
    return gradient.apply if torch.is_grad_enabled() else gradient.forward


def pushforward_of_gradient(
    formula: Formula,
    inputs: OptionalTensors,
    wanted: Sequence[bool],
    cotangents: OptionalTensors,
    tangents: OptionalTensors,
    shapes: Sequence[torch.Size],
) -> tuple[Tensor, ...]:
    """Tangents of g(inputs, cotangents) = Jᵀ·cotangents, for the tangents of the inputs, then of the cotangents.

    g has a result for every input, of ``shapes``; those of inputs that are not ``wanted`` are constant, often (0,).
    """
    count = len(inputs)

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        own, rising = values[:count], values[count:]
        function = _of_moving(formula, own, wanted, [c is not None for c in rising])
        _, pull = torch.func.vjp(  # type: ignore[misc]
            function, *(x for x, want in zip(own, wanted, strict=True) if want)
        )
        return pull(tuple(c for c in rising if c is not None))

    pushed = iter(pushforward(gradient, sum(wanted), (*inputs, *cotangents), tangents))
    like = next(x for x in (*inputs, *cotangents) if x is not None)
    return tuple(next(pushed) if want else like.new_zeros(shape) for want, shape in zip(wanted, shapes, strict=True))
