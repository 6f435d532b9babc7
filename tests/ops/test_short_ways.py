"""The short way of a common call gives what the long one gives, and leaves to it what it does not know."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Call = Callable[..., Any]


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _cases(dtype: torch.dtype, *lead: int) -> dict[str, tuple[str, Call, list[Tensor]]]:
    """By name: (the module of fastattn.ops, the call, its differentiable tensors), x (*lead, 24)."""
    x, residual = _draw(dtype, *lead, 24), _draw(dtype, *lead, 40)
    weight, bias, columns = _draw(dtype, 40, 24), _draw(dtype, 40), _draw(dtype, 24)
    w_out, b_out = _draw(dtype, 40, 40), _draw(dtype, 40)
    angles = _draw(torch.float64 if dtype == torch.float64 else torch.float32, 5, 6)
    heads, keys, same = _draw(dtype, 2, 3, 5, 16), _draw(dtype, 2, 1, 9, 16), _draw(dtype, *lead, 24)
    return {
        "linear": ("linear", lambda *t, **k: fastattn.linear(*t[:3], residual=t[3], **k), [x, weight, bias, residual]),
        "ffn": (
            "ffn",
            lambda x, w, b, o, c, r, **k: fastattn.ffn(x, w, o, b, c, residual=r, **k),
            [x, weight, bias, w_out, b_out, residual],
        ),
        "glu_ffn": ("ffn", lambda *t, **k: fastattn.glu_ffn(*t, **k), [x, weight, weight + 1, w_out, bias, bias + 1, b_out]),
        "layer_norm": ("norm", lambda x, *t, **k: fastattn.layer_norm(x, (24,), *t, **k), [x, columns, columns + 1]),
        "rms_norm": (
            "norm",
            lambda x, w, r, **k: fastattn.rms_norm(x, (24,), w, residual=r, return_residual=True, **k),
            [x, columns, same],
        ),
        "zero-centred": (
            "norm",
            lambda x, w, r, **k: fastattn.rms_norm(x, (24,), w, residual=r, zero_centered_weight=True, **k),
            [x, columns, same],
        ),
        "rope": ("rope", lambda x, **k: fastattn.rope(x, angles.cos(), angles.sin(), **k), [heads]),
        "attention": ("attention", lambda *t, **k: fastattn.attention(*t, causal=True, **k), [heads, keys, keys + 1]),
    }  # fmt: skip


NAMES = tuple(_cases(torch.float32, 7))


def _results(call: Call, tensors: list[Tensor], gradients: bool, **keywords: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_(gradients) for t in tensors]
    found = call(*leaves, **keywords)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if not gradients:
        return outputs
    upstream = [_draw(out.dtype, *out.shape) for out in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, upstream))


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("lead", ((7,), (2, 3), (2, 1, 3), (2, 0), ()), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_the_long_way(name: str, dtype: torch.dtype, lead: tuple[int, ...], gradients: bool) -> None:
    _, call, tensors = _cases(dtype, *lead)[name]
    short, long = (_results(call, tensors, gradients, implementation=which) for which in ("auto", "cpu"))
    for mine, other in zip(short, long, strict=True):
        assert mine.dtype == other.dtype and mine.stride() == other.stride()
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above compares the long way with itself."""
    stem, call, tensors = _cases(torch.float32, 7)[name]
    module = importlib.import_module(f"fastattn.ops.{stem}")
    taken, short = [], module._in_short
    monkeypatch.setattr(module, "_in_short", lambda *args: taken.append(short(*args)) or taken[-1])
    _results(call, tensors, True)
    with torch.no_grad():
        call(*tensors)
    assert len(taken) == 2 and all(result is not None for result in taken)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("lead", ((7,), (2, 3), ()), ids=str)
@pytest.mark.parametrize("name", ("linear", "ffn", "glu_ffn"))
def test_derivatives_of_what_was_recorded(name: str, lead: tuple[int, ...], recompute: bool) -> None:
    """Twice differentiated, and for several upstream gradients at once, as the long way, which records matrices."""
    _, call, tensors = _cases(torch.float64, *lead)[name]
    keywords: dict[str, Any] = {} if name == "linear" else {"recompute": recompute}

    def run(implementation: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves, implementation=implementation, **keywords)
        upstream = torch.stack([out.detach(), out.detach().cos()])
        several = torch.autograd.grad(out, leaves, upstream, retain_graph=True, is_grads_batched=True)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        return [*several, *first, *second]

    for mine, other in zip(run("auto"), run("cpu"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("linear", "ffn", "glu_ffn"))
def test_strides(name: str) -> None:
    """Rows that do not lie one after the other, in x, in the residual and in the weights."""
    _, call, tensors = _cases(torch.float32, 2, 3)[name]
    expected = _results(call, tensors, True)
    for i, t in enumerate(tensors):
        apart = torch.stack([t, t], -1)[..., 0]
        assert not apart.is_contiguous()
        leaves = [apart if i == j else other.clone() for j, other in enumerate(tensors)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = call(*leaves)
        found = [out, *torch.autograd.grad(out, leaves, _draw(out.dtype, *out.shape))]
        assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
        with torch.no_grad():
            assert torch.equal(call(*leaves), expected[0])


def test_what_the_operators_refuse() -> None:
    """Called directly, with what would read past a tensor's end or be no number."""
    linear, ffn = torch.ops.fastattn.linear_forward.default, torch.ops.fastattn.ffn_inference.default
    forward = torch.ops.fastattn.ffn_forward.default
    x, w = torch.randn(2, 3, 4), torch.randn(4, 4)
    bad = [
        (x[..., :3], w, None),
        (x.mT, w, None),
        (x[0, 0, 0], w, None),
        (torch.randn(1, 1, 1, 1, 4), w, None),
        (x, w[:, :3], None),
        (x, w.double(), None),
        (x.bool(), w.bool(), None),
        (x.int(), w.int(), None),
        (x, w, x[0]),
        (x, w, x.flatten(0, 1)),
        (x, w, x[:, :2]),
        (x, w, x.mT),
        (x, w, x[..., :3].contiguous()),
        (x, w, x.double()),
        (x, w, x[0, 0, 0]),
    ]
    for x, w, residual in bad:
        for call in (
            lambda x, w, residual: linear(x, w, None, residual),
            lambda x, w, residual: ffn(x, w, None, None, None, w, None, residual, 0),
            lambda x, w, residual: forward(x, w, None, None, None, w, None, residual, 0, 0.0, None, True),
        ):
            with pytest.raises(RuntimeError, match="fastattn: "):
                call(x, w, residual)
    with pytest.raises(RuntimeError, match="unknown activation"):
        ffn(torch.ones(1, 4), torch.ones(4, 4), None, None, None, torch.ones(4, 4), None, None, 4)


@pytest.mark.parametrize("name", ("linear", "ffn", "glu_ffn"))
def test_left_to_the_long_way(name: str) -> None:
    """autocast, a tensor that knows its own operations, and shapes that agree only once they are flattened."""
    _, call, tensors = _cases(torch.float32, 2, 3)[name]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, call(*(t.bfloat16() for t in tensors)))
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in tensors]
    assert call(*fake).shape == out.shape
    with pytest.raises(ValueError, match="expected shape"):
        call(fake[0], fake[1].mT, *fake[2:])
    if name != "glu_ffn":
        with pytest.raises(ValueError, match="residual: expected shape"):
            call(*tensors[:-1], tensors[-1].flatten(0, 1))


def test_attention_left_to_the_long_way() -> None:
    """What the operator would take and the operation does not, or means differently."""
    q, k = _draw(torch.float32, 2, 4, 5, 8), _draw(torch.float32, 2, 2, 7, 8)
    with pytest.raises(ValueError, match="query, key, value"):
        fastattn.scaled_dot_product_attention(q, k, k)
    with pytest.raises(TypeError, match="softmax_scale"):
        fastattn.attention(q, k, k, softmax_scale="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="softmax_scale"):
        fastattn.attention(q, k, k, softmax_scale=-1.0)
    with pytest.raises(ValueError, match="head_dim is 0"):
        fastattn.attention(q[..., :0], k[..., :0], k)
    with pytest.raises(TypeError, match="dtype"):
        fastattn.attention(q.long(), k.long(), k.long())
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, k).dtype == torch.bfloat16
    negative = fastattn.scaled_dot_product_attention(q, q, q, scale=-0.5)
    torch.testing.assert_close(negative, torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=-0.5))


def test_angles_stay_constants() -> None:
    x, angles = _draw(torch.float32, 2, 3, 5, 16), _draw(torch.float32, 5, 6)
    with pytest.raises(NotImplementedError, match="sin: requires a gradient"):
        fastattn.rope(x, angles.cos(), angles.sin().requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_outlived_a_transform(name: str) -> None:
    """What leaked out of torch.func.grad is a wrapper around a tensor."""
    _, call, tensors = _cases(torch.float32, 7)[name]
    kept: list[Tensor] = []

    def leaking(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(leaking)(tensors[0])
    found = _results(call, tensors, False)
    leaked = call(kept[0], *tensors[1:])
    for mine, other in zip(list(leaked) if isinstance(leaked, tuple) else [leaked], found, strict=True):
        assert torch.equal(mine, other)
    weights = [t.clone().requires_grad_() for t in tensors[1:]]
    if weights:
        out = call(kept[0], *weights)
        (grad,) = torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), weights[:1])
        plain = call(tensors[0], *weights)
        (expected,) = torch.autograd.grad((plain[0] if isinstance(plain, tuple) else plain).sum(), weights[:1])
        assert torch.equal(grad, expected)
