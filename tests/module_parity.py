"""Compares a module of fastattn.nn with the torch.nn module of the same weights: outputs and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tolerance import assert_accurate
from torch import Tensor, nn

Call = Callable[..., Any]


def results(module: nn.Module, call: Call, tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Outputs of ``call(module, *tensors)`` and the gradients of all floating tensors and parameters, by name.

    The incoming gradients are fixed random numbers that bfloat16 represents, so that every dtype gets the same ones.
    """
    module.zero_grad()
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    for leaf in leaves:
        if leaf is not None and leaf.is_floating_point():
            leaf.requires_grad_()
    outputs = call(module, *leaves)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, cotangents)
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x is not None and x.grad is not None}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found


def to_double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


def assert_parity(
    ours: nn.Module, theirs: nn.Module, call: Call, tensors: tuple[Tensor | None, ...], terms: int = 400
) -> None:
    """``ours`` is as accurate as ``theirs`` and gives gradients to the same tensors.

    terms: about the number of roundings behind a value: the chain of reductions over features, keys and tokens.
    """
    actual, plain = results(ours, call, tensors), results(theirs, call, tensors)
    exact = results(copy.deepcopy(theirs).double(), call, tuple(to_double(t) for t in tensors))
    assert actual.keys() == plain.keys() == exact.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype
        assert_accurate(value, plain[name], exact[name], name, terms)


def twins(ours: type[nn.Module], theirs: type[nn.Module], *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """One module of each class from the same seed, with parameters that are neither 0 nor 1."""
    torch.manual_seed(3)
    a = ours(*args, **kwargs)
    torch.manual_seed(3)
    b = theirs(*args, **kwargs)
    assert list(a.state_dict()) == list(b.state_dict())
    for mine, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn_like(p))
    a.load_state_dict(b.state_dict(), strict=True)
    return a, b


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)
