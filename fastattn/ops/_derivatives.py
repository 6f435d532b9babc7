"""Derivatives beyond the first reverse pass, from the reference formula.

The fast implementations give outputs and first gradients. Forward mode and double backward come from differentiating the
reference, which PyTorch can do to any order: O(Nq · Nk) memory for attention, and the same definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OptionalTensors = Sequence[Tensor | None]
#: Tensors in, tensors out: the reference with everything that is not a tensor already bound.
Formula = Callable[..., tuple[Tensor, ...]]


def _leaves(inputs: OptionalTensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    return [
        None if x is None else x.detach().requires_grad_() if want else x.detach()
        for x, want in zip(inputs, wanted, strict=True)
    ]


def pushforward(formula: Formula, inputs: OptionalTensors, tangents: OptionalTensors) -> tuple[Tensor, ...]:
    """The output tangents J·t by two reverse passes: u ↦ Jᵀu is linear, and its own gradient along t is J·t.

    (J. Townsend, "A new trick for calculating Jacobian vector products", 2017.) Unlike nested forward mode this works inside
    ``autograd.Function.jvp``.
    """
    moving = [t is not None for t in tangents]
    with torch.enable_grad():
        leaves = _leaves(inputs, moving)
        outputs = formula(*leaves)
        cotangents = [torch.zeros_like(out).requires_grad_() for out in outputs]
        wanted = [x for x, move in zip(leaves, moving, strict=True) if move and x is not None]
        pulled = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True)
        along = [t for t in tangents if t is not None]
        pairs = [(p, t) for p, t in zip(pulled, along, strict=True) if p is not None]
        pushed = torch.autograd.grad([p for p, _ in pairs], cotangents, [t for _, t in pairs], allow_unused=True)
    return tuple(torch.zeros_like(out) if p is None else p for out, p in zip(outputs, pushed, strict=True))


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
    with torch.enable_grad():
        leaves = _leaves(inputs, [x is not None and x.is_floating_point() for x in inputs])
        rising = _leaves(cotangents, [c is not None for c in cotangents])
        outputs = formula(*leaves)
        used = [(out, c) for out, c in zip(outputs, rising, strict=True) if c is not None]
        targets = [x for x, want in zip(leaves, wanted, strict=True) if want and x is not None]
        first = torch.autograd.grad(
            [out for out, _ in used], targets, [c for _, c in used], create_graph=True, allow_unused=True
        )
        arriving = iter(first)
        pairs = []
        for want, up in zip(wanted, upstream, strict=True):
            gradient = next(arriving) if want else None
            if gradient is not None and up is not None and gradient.requires_grad:
                pairs.append((gradient, up))
        sources = [x for x in (*leaves, *rising) if x is not None and x.requires_grad]
        if not pairs:
            return [None] * len(leaves), [None] * len(rising)
        second = torch.autograd.grad(
            [g for g, _ in pairs], sources, [u for _, u in pairs], allow_unused=True, create_graph=False
        )
    found = dict(zip(map(id, sources), second, strict=True))
    return [found.get(id(x)) for x in leaves], [found.get(id(c)) for c in rising]
