"""Each operation over sequence lengths, compiled and as it is: no graph after the second, the policy under autocast, the same bits
when asked for determinism, the same dropout when a checkpoint replays it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ops._library import has_cpu

pytestmark = pytest.mark.skipif(not has_cpu, reason="needs the C++ core: the reference is plain PyTorch")

E, HEADS, CLASSES = 16, 2, 11
LENGTHS = (5, 8, 9, 16)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W, B = _draw(E), _draw(E)
UP, GATE, DOWN, B_UP = _draw(24, E), _draw(24, E) / 2, _draw(E, 24) / 4, _draw(24)
HEAD = _draw(CLASSES, E)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _weights(x: Tensor) -> Tensor:
    q = _heads(x)
    _, lse = fastattn.attention(q, q, q, causal=True, return_lse=True)
    return fastattn.attention_weights(q, q, lse, causal=True)


def _rope(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1]).unsqueeze(1) * torch.linspace(0.1, 1, E // HEADS // 2)
    return fastattn.rope(_heads(x), angles.cos(), angles.sin())


def _padded(x: Tensor) -> Tensor:
    q = _heads(x)
    return fastattn.attention(q, q, q, key_lengths=torch.tensor([3, 4]), window_size=(3, 0))


def _packed(x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1).unflatten(-1, (HEADS, -1))
    ends = torch.tensor([0, 1, 2], dtype=torch.int32) * x.shape[1]
    return fastattn.attention_varlen(tokens, tokens, tokens, ends, ends, causal=True)


def _cached(x: Tensor) -> Tensor:
    q = _heads(x)
    return fastattn.attention_with_kv_cache(q[:, :, :1], q, q, torch.tensor([3, 5], dtype=torch.int32))


def _targets(x: Tensor) -> Tensor:
    return torch.arange(2 * x.shape[1]) % CLASSES


#: Functions of x (2, N, 16), without dropout, and the dtype of the result under autocast to ``low``: None is x's own.
OPS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "attention": (lambda x: fastattn.attention(*[_heads(x)] * 3, causal=True), "low"),
    "attention, mask": (lambda x: fastattn.attention(*[_heads(x)] * 3, attn_mask=x[:, None, :, :1] > 0), "low"),
    "attention, key_lengths": (_padded, "low"),
    "attention_varlen": (_packed, "low"),
    "attention_with_kv_cache": (_cached, "own"),
    "attention_weights": (_weights, "low"),
    "sdpa": (lambda x: fastattn.scaled_dot_product_attention(*[_heads(x)] * 3, is_causal=True), "low"),
    "layer_norm": (lambda x: fastattn.layer_norm(x, (E,), W, B), "own"),
    "rms_norm": (lambda x: fastattn.rms_norm(x, (E,), W, residual=x), "own"),
    "ffn": (lambda x: fastattn.ffn(x, UP, DOWN, B_UP), "low"),
    "glu_ffn": (lambda x: fastattn.glu_ffn(x, GATE, UP, DOWN), "low"),
    "linear": (lambda x: fastattn.linear(x, UP, B_UP), "low"),
    "rope": (_rope, "own"),
    "cross_entropy": (lambda x: fastattn.cross_entropy(x.flatten(0, 1), _targets(x)), "float32"),
    "linear_cross_entropy": (
        lambda x: fastattn.linear_cross_entropy(x.flatten(0, 1), HEAD, _targets(x)),
        "float32",
    ),
}
DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: fastattn.attention(*[_heads(x)] * 3, dropout_p=0.5),
    "sdpa": lambda x: fastattn.scaled_dot_product_attention(*[_heads(x)] * 3, dropout_p=0.5),
    "layer_norm": lambda x: fastattn.layer_norm(x, (E,), W, B, dropout_p=0.5),  # type: ignore[dict-item, return-value]
    "rms_norm": lambda x: fastattn.rms_norm(x, (E,), W, dropout_p=0.5),  # type: ignore[dict-item, return-value]
    "ffn": lambda x: fastattn.ffn(x, UP, DOWN, B_UP, dropout_p=0.5),
    "glu_ffn": lambda x: fastattn.glu_ffn(x, GATE, UP, DOWN, dropout_p=0.5),
}
EVERY = pytest.mark.parametrize("name", OPS)
#: A cache is written in place and has no gradient.
TRAINED = [name for name in OPS if name != "attention_with_kv_cache"]
_SPREAD = ("attention", "attention_varlen", "layer_norm", "ffn", "linear_cross_entropy")


def _step(function: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return out, torch.autograd.grad(out.float().square().sum(), x)[0]


@EVERY
def test_no_graph_after_the_second_length(name: str) -> None:
    function, _ = OPS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    with torch.no_grad():
        for n in LENGTHS:
            x = _draw(2, n, E)
            torch.testing.assert_close(compiled(x), function(x))
            assert counter.frame_count <= 2, f"compiled again for {n} rows"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _SPREAD else pytest.mark.slow) for n in TRAINED])
def test_no_graph_after_the_second_length_in_training(name: str) -> None:
    function, _ = OPS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in LENGTHS:
        x = _draw(2, n, E)
        for mine, expected in zip(_step(compiled, x), _step(function, x), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2, f"compiled again for {n} rows"


@EVERY
def test_export_for_every_length(name: str) -> None:
    function, _ = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    length = torch.export.Dim("length", min=6, max=64)
    program = torch.export.export(Module(), (_draw(2, 8, E),), dynamic_shapes=({1: length},))
    for n in (6, 17):
        x = _draw(2, n, E)
        torch.testing.assert_close(program.module()(x), function(x))


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_autocast(name: str, low: torch.dtype) -> None:
    """Products run in the low dtype, norms and rope in their input's, losses come out in float32; gradients in the input's."""
    function, policy = OPS[name]
    dtype = {"low": low, "own": torch.float32, "float32": torch.float32}[policy]
    x = _draw(2, 7, E)
    with torch.autocast("cpu", low):
        out, grad = _step(function, x)
    assert out.dtype == dtype and grad.dtype == torch.float32
    exact, exact_grad = _step(function, x)
    # 8 bits, 11 bits; four products one after the other at most.
    assert (out.float() - exact).abs().max() <= 4 * torch.finfo(low).eps * exact.abs().max()
    assert (grad - exact_grad).abs().max() <= 8 * torch.finfo(low).eps * exact_grad.abs().max()


@pytest.mark.parametrize("name", TRAINED)
def test_deterministic(name: str) -> None:
    function, _ = OPS[name]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_step(function, _draw(2, 33, E)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", DROPPED)
def test_a_checkpoint_replays_the_dropout(name: str, reentrant: bool) -> None:
    function = DROPPED[name]
    results = []
    for call in (function, lambda x: checkpoint(function, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        x = _draw(2, 7, E).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)  # type: ignore[arg-type]
