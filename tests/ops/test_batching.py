"""vmap: one call of an operator for all samples, with each sample's own results."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops import _library

pytestmark = pytest.mark.skipif(not _library.has_cpu, reason="the C++ core is not built")
SAMPLES = 3


class Calls(TorchDispatchMode):
    """Counts the calls of fastattn's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            self.found[func._schema.name.removeprefix("fastattn::")] += 1
        return func(*args, **(kwargs or {}))


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out, lse = fastattn.attention(q, k, v, attn_mask=mask, causal=True, return_lse=True)
    return out * lse.unsqueeze(-1)


W, B1, RES = _draw(10, 6), _draw(10), _draw(2, 5, 10)
UP, GATE, DOWN = _draw(9, 6), _draw(9, 6) / 2, _draw(6, 9)
COS, SIN = _draw(4, 2).cos(), _draw(4, 2).sin()

#: name: (function, tensors of one sample, dimension of each along which samples are stacked; None: shared)
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[int | None]]] = {
    "attention": (_attention, [_draw(2, 4, 5, 8), _draw(2, 2, 7, 8), _draw(2, 2, 7, 6), _draw(2, 1, 5, 7)], [0] * 4),
    "attention, keys shared": (
        _attention,
        [_draw(1, 4, 5, 8), _draw(1, 2, 7, 8), _draw(1, 2, 7, 6), _draw(1, 1, 5, 7)],
        [2, None, None, None],
    ),
    "attention, mask": (
        _attention,
        [_draw(2, 2, 5, 8), _draw(2, 2, 7, 8), _draw(2, 2, 7, 6), _draw(1, 2, 1, 7)],
        [None, None, None, 1],
    ),
    "attention, bfloat16": (
        lambda q, k, v: fastattn.attention(q, k, v),
        [_draw(2, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3)],
        [0, 1, 3],
    ),
    "layer_norm": (lambda x: fastattn.layer_norm(x, (6,), W[0], W[1]), [_draw(2, 5, 6)], [1]),
    "rms_norm": (
        lambda x, r: torch.cat(fastattn.rms_norm(x, (6,), W[0], residual=r, return_residual=True)),  # type: ignore[arg-type]
        [_draw(4, 6), _draw(4, 6)],
        [0, None],
    ),
    "linear": (lambda x: fastattn.linear(x, W, B1, residual=RES), [_draw(2, 5, 6)], [2]),
    "ffn": (lambda x: fastattn.ffn(x, UP, DOWN), [_draw(5, 6)], [0]),
    "glu_ffn": (lambda x, r: fastattn.glu_ffn(x, GATE, UP, DOWN, residual=r), [_draw(5, 6), _draw(5, 6)], [0, 1]),
    "rope": (lambda x: fastattn.rope(x, COS, SIN), [_draw(2, 3, 4, 8)], [3]),
}
TARGETS = torch.tensor([[3, 0, -100, 5, 9], [1, 1, 2, -100, -100], [9, 8, 7, 6, 5]])
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}
CLASS_WEIGHT = _draw(10).abs() + 0.1
CASES |= {
    f"cross_entropy, {reduction}": (
        lambda x, r=reduction: fastattn.cross_entropy(x, TARGETS[0], CLASS_WEIGHT, reduction=r, **OPTIONS),
        [_draw(5, 10)],
        [1],
    )
    for reduction in ("none", "sum", "mean")
}
CASES |= {
    f"linear_cross_entropy, {reduction}": (
        lambda x, r=reduction: fastattn.linear_cross_entropy(x, W, TARGETS[1], B1, reduction=r, **OPTIONS),
        [_draw(5, 6)],
        [2],
    )
    for reduction in ("none", "sum", "mean")
}


def _sinks(q: Tensor, k: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
    out, lse = fastattn.attention(q, k, k, alibi_slopes=slopes, sinks=sinks, causal=True, softcap=3.0, return_lse=True)
    return out * lse.unsqueeze(-1)


#: Functions of tensors that all samples share but the first; gradients of each sample with respect to every one of them.
PARAMETERS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "attention": (_sinks, [_draw(2, 4, 5, 8), _draw(2, 2, 7, 8), _draw(4).abs(), _draw(4)]),
    "attention, one sequence": (_sinks, [_draw(1, 4, 5, 8), _draw(1, 2, 7, 8), _draw(1, 4).abs(), _draw(4)]),
    "attention, mask": (_attention, [_draw(2, 4, 5, 8), _draw(2, 2, 7, 8), _draw(2, 2, 7, 6), _draw(1, 4, 1, 7)]),
    "layer_norm": (lambda x, w, b: fastattn.layer_norm(x, (6,), w, b), [_draw(2, 5, 6), W[0], W[1]]),
    "rms_norm": (
        lambda x, w, r: fastattn.rms_norm(x, (6,), w, residual=r),
        [_draw(5, 6), W[0], _draw(5, 6) / 3],
    ),
    "linear": (lambda x, w, b: fastattn.linear(x, w, b), [_draw(2, 5, 6), W, B1]),
    **{
        f"ffn, {activation}": (
            lambda x, a, b, c, d, act=activation: fastattn.ffn(x, a, b, c, d, activation=act),
            [_draw(5, 6), UP, DOWN, _draw(9), _draw(6)],
        )
        for activation in ("relu", "gelu", "gelu_tanh", "silu")
    },
    "glu_ffn": (
        lambda x, g, u, d, c: fastattn.glu_ffn(x, g, u, d, c),
        [_draw(5, 6), GATE, UP, DOWN, _draw(9)],
    ),
}


def _stacked(case: str) -> tuple[Callable[..., Tensor], list[Tensor], list[int | None], list[list[Tensor]]]:
    function, tensors, dims = CASES[case]
    samples = [
        [t if d is None else (t.float() * (1 + i) - i).to(t.dtype) for t, d in zip(tensors, dims, strict=True)]
        for i in range(SAMPLES)
    ]
    stacked = [samples[0][j] if d is None else torch.stack([s[j] for s in samples], d) for j, d in enumerate(dims)]
    return function, stacked, dims, samples


@pytest.mark.parametrize("case", CASES)
def test_forward_in_one_call(case: str) -> None:
    function, stacked, dims, samples = _stacked(case)
    with Calls() as calls:
        found = torch.func.vmap(function, in_dims=tuple(dims))(*stacked)
    assert max(calls.found.values()) == 1, calls.found
    torch.testing.assert_close(found, torch.stack([function(*sample) for sample in samples]))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """Per-sample gradients of the tensors that differ between samples, in one call where none is a sum over it."""
    function, stacked, dims, samples = _stacked(case)
    moving = tuple(i for i, d in enumerate(dims) if d is not None)
    gradient = torch.func.grad(lambda *tensors: function(*tensors).float().square().sum(), argnums=moving)
    with Calls() as calls:
        found = torch.func.vmap(gradient, in_dims=tuple(dims))(*stacked)
    # rope's gradient is rope again
    assert max(calls.found.values()) == (2 if case == "rope" else 1), calls.found
    for i, sample in enumerate(samples):
        for mine, expected in zip(found, gradient(*sample), strict=True):
            torch.testing.assert_close(mine[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", PARAMETERS)
def test_gradients_of_shared_parameters(case: str, dtype: torch.dtype) -> None:
    """What differential privacy and influence functions ask for: each sample's gradient of the weights, without a call for it."""
    function, tensors = PARAMETERS[case]
    tensors = [t.to(dtype) for t in tensors]
    samples = torch.stack([tensors[0] * (1 + i) - i for i in range(SAMPLES)])
    every = tuple(range(len(tensors)))
    gradient = torch.func.grad(lambda *t: function(*t).float().square().sum(), argnums=every)
    with Calls() as calls:
        found = torch.func.vmap(gradient, in_dims=(0, *[None] * (len(tensors) - 1)))(samples, *tensors[1:])
    assert max(calls.found.values()) == 1, calls.found
    for i in range(SAMPLES):
        exact = gradient(*(t.double() for t in (samples[i], *tensors[1:])))
        plain = gradient(samples[i], *tensors[1:])
        for mine, alone, reference in zip(found, plain, exact, strict=True):
            assert mine[i].dtype == alone.dtype
            assert_accurate(mine[i], alone, reference, case, terms=400)


def test_targets_and_weights_of_their_own() -> None:
    x, w = _draw(SAMPLES, 5, 6), _draw(SAMPLES, 10, 6)
    for reduction in ("none", "sum", "mean"):
        loss = functools.partial(fastattn.cross_entropy, reduction=reduction)
        logits = _draw(SAMPLES, 5, 10)
        with Calls() as calls:
            found = torch.func.vmap(loss)(logits, TARGETS)
        assert max(calls.found.values()) == 1
        torch.testing.assert_close(found, torch.stack([loss(a, b) for a, b in zip(logits, TARGETS, strict=True)]))
    gradient = torch.func.grad(lambda *t: fastattn.linear(*t).square().sum(), argnums=(0, 1))
    with Calls() as calls:
        found = torch.func.vmap(gradient)(x, w)
    assert not calls.found  # one batched product is PyTorch's
    for i in range(SAMPLES):
        for mine, alone in zip(found, gradient(x[i], w[i]), strict=True):
            torch.testing.assert_close(mine[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_weight", (False, True))
@pytest.mark.parametrize("lead", ((), (4,), (2, 4)), ids=str)
def test_operators_on_rows_of_any_dimensions(lead: tuple[int, ...], own_weight: bool) -> None:
    linear, ffn = torch.ops.fastattn.linear_forward.default, torch.ops.fastattn.ffn_inference.default
    x, weights = _draw(SAMPLES, *lead, 6), torch.stack([W * (1 + i) for i in range(SAMPLES)])
    w = weights if own_weight else W
    for call in (
        lambda x, w: linear(x, w, B1, None),
        lambda x, w: ffn(x, w, B1, w.flip(0), None, w.mT.contiguous(), None, x, 3),
    ):
        found = torch.func.vmap(call, in_dims=(0, 0 if own_weight else None))(x, w)
        expected = torch.stack([call(x[i], w[i] if own_weight else w) for i in range(SAMPLES)])
        torch.testing.assert_close(found, expected)


def test_a_sample_without_tokens_to_count() -> None:
    """Its mean is NaN, its gradient and the others' are not touched by it."""
    target = torch.tensor([[1, 2], [-100, -100]])
    logits = _draw(2, 2, 5)
    losses = torch.func.vmap(fastattn.cross_entropy)(logits, target)
    assert losses[1].isnan() and torch.equal(losses[0], fastattn.cross_entropy(logits[0], target[0]))
    gradient = torch.func.vmap(torch.func.grad(fastattn.cross_entropy))(logits, target)
    expected = torch.stack([torch.func.grad(fastattn.cross_entropy)(logits[i], target[i]) for i in range(2)])
    torch.testing.assert_close(gradient, expected, equal_nan=True)


def test_nested() -> None:
    q = _draw(2, 3, 1, 2, 5, 8)
    found = torch.func.vmap(torch.func.vmap(lambda q: fastattn.attention(q, q, q)))(q)
    torch.testing.assert_close(found, fastattn.attention(*[q.flatten(0, 2)] * 3).view_as(q))


def test_a_call_a_sample_where_samples_cannot_be_joined() -> None:
    x, w = _draw(SAMPLES, 5, 6), _draw(SAMPLES, 6)
    expected = torch.nn.functional.layer_norm(x, (6,)) * w[:, None]
    torch.testing.assert_close(torch.func.vmap(lambda x, w: fastattn.layer_norm(x, (6,), w))(x, w), expected)
    rng = torch.tensor([3, 4])
    q = _draw(SAMPLES, 1, 2, 5, 8)
    dropped = torch.func.vmap(lambda q: fastattn.attention(q, q, q, dropout_p=0.5, rng_state=rng))(q)
    expected = torch.stack([fastattn.attention(x, x, x, dropout_p=0.5, rng_state=rng) for x in q])
    torch.testing.assert_close(dropped, expected)
