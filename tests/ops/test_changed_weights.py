"""However a weight changes between calls, the next call sees it: nothing that was derived from one outlives a call.

Rows below and above 512 take products that pack x and such that pack the weight; one row streams it as it lies.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor, nn

import fastattn

WIDTH = 72
ROWS = (1, 40, 520)
DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[Tensor, Tensor], Tensor]
pytestmark = [
    pytest.mark.parametrize("rows", ROWS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("name", ("linear", "ffn", "glu_ffn", "linear_cross_entropy")),
]


def _calls(name: str, x: Tensor) -> tuple[Call, Call]:
    """fastattn's call on x and torch's; the weight is square, and the gated network's w_gate, w_up and w_down are all it."""
    target = torch.arange(x.shape[0]) % WIDTH
    return {
        "linear": (fastattn.linear, F.linear),
        "ffn": (lambda x, w: fastattn.ffn(x, w, w), lambda x, w: F.linear(F.gelu(F.linear(x, w)), w)),
        "glu_ffn": (
            lambda x, w: fastattn.glu_ffn(x, w, w, w),
            lambda x, w: F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), w),
        ),
        "linear_cross_entropy": (
            lambda x, w: fastattn.linear_cross_entropy(x, w, target),
            lambda x, w: F.cross_entropy(F.linear(x, w).to(torch.promote_types(w.dtype, torch.float32)), target),
        ),
    }[name]


def _check(name: str, x: Tensor, weight: Tensor, what: str) -> None:
    """Output and the weight's gradient of a call made now."""
    ours, torchs = _calls(name, x)

    def run(call: Call, dtype: torch.dtype) -> list[Tensor]:
        leaf = weight if dtype == weight.dtype and weight.requires_grad else weight.detach().to(dtype).requires_grad_()
        out = call(x.to(dtype), leaf)
        return [out, *torch.autograd.grad(out.sum(), leaf)]

    with torch.no_grad():
        inference = ours(x, weight)
    found = run(ours, weight.dtype)
    assert torch.equal(inference, found[0]), what
    plain, exact = run(torchs, torch.float32), run(torchs, torch.float64)
    for result, other, wide in zip(found, plain, exact, strict=True):
        assert_accurate(result, other.to(result.dtype), wide, f"{name}, {what}", terms=WIDTH * 3)


def _weight(dtype: torch.dtype) -> Tensor:
    return (torch.randn(WIDTH, WIDTH) / 8).to(dtype)


def test_of_a_module(name: str, dtype: torch.dtype, rows: int) -> None:
    x, layer = torch.randn(rows, WIDTH).to(dtype), nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    _check(name, x, layer.weight, "as it was made")
    layer.weight.data += 0.25  # no version counter sees these two
    _check(name, x, layer.weight, ".data added to")
    layer.weight.data.copy_(_weight(dtype))
    _check(name, x, layer.weight, ".data copied to")
    layer.weight.data = _weight(dtype)
    _check(name, x, layer.weight, ".data swapped")
    layer.load_state_dict({"weight": _weight(dtype)})
    _check(name, x, layer.weight, "load_state_dict")
    layer.load_state_dict({"weight": _weight(dtype)}, assign=True)
    _check(name, x, layer.weight, "load_state_dict, assigned")
    layer.weight.requires_grad_()
    _calls(name, x)[0](x, layer.weight).float().square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    _check(name, x, layer.weight, "a step of the optimizer")
    torch.from_dlpack(layer.weight.detach()).mul_(-1)
    _check(name, x, layer.weight, "written through another tensor's memory")


def test_tied(name: str, dtype: torch.dtype, rows: int) -> None:
    """The output head's weight is the embedding's, and is changed as the embedding's, and the other way round."""
    embedding, head = nn.Embedding(WIDTH, WIDTH, dtype=dtype), nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    head.weight = embedding.weight
    x = torch.randn(rows, WIDTH).to(dtype)
    with torch.no_grad():
        embedding.weight.mul_(0.125)
    _check(name, x, head.weight, "tied")
    embedding(torch.arange(0, WIDTH, 2)).float().square().sum().backward()
    torch.optim.SGD(embedding.parameters(), lr=0.25).step()
    _check(name, x, head.weight, "a step of the embedding's optimizer")
    head.load_state_dict({"weight": _weight(dtype)})
    _check(name, x, embedding.weight, "loaded into the head")
    view = embedding.weight.detach().view(-1)[: WIDTH * WIDTH // 2]
    view.neg_()
    _check(name, x, head.weight, "half of it, through a view")


def test_freed_storage_used_again(name: str, dtype: torch.dtype, rows: int) -> None:
    """Another weight at the same address, of the same shape and version: nothing but its numbers tells them apart."""
    x = torch.randn(rows, WIDTH).to(dtype)
    seen: dict[int, int] = {}
    for turn in range(6):
        weight = _weight(dtype)
        seen[weight.data_ptr()] = seen.get(weight.data_ptr(), 0) + 1
        _check(name, x, weight, f"weight {turn}")
        del weight
        gc.collect()
    memory = _weight(dtype)
    for turn in range(2):  # and certainly: two storages over one piece of memory
        weight = torch.from_dlpack(memory)
        assert weight.data_ptr() == memory.data_ptr() and weight._version == 0
        _check(name, x, weight, f"storage {turn} over the same memory")
        del weight
        memory = torch.from_dlpack(memory.copy_(_weight(dtype)))


def test_two_threads(name: str, dtype: torch.dtype, rows: int) -> None:
    """Both call with one weight, each changes another of its own between calls; every result has the bits of a call alone."""
    x, shared, turns = torch.randn(rows, WIDTH).to(dtype), _weight(dtype), 12
    owned = [[_weight(dtype) for _ in range(turns)] for _ in range(2)]
    ours = _calls(name, x)[0]
    alone = ours(x, shared)
    expected = [[ours(x, weight.clone()) for weight in weights] for weights in owned]

    def work(thread: int) -> list[tuple[Tensor, Tensor]]:
        mine, found = torch.empty_like(shared), []
        for turn in range(turns):
            mine.copy_(owned[thread][turn])
            found.append((ours(x, mine), ours(x, shared)))
        return found

    with ThreadPoolExecutor(2) as pool:
        for thread, found in enumerate(pool.map(work, range(2))):
            for turn, (changed, unchanged) in enumerate(found):
                assert torch.equal(changed, expected[thread][turn]), f"thread {thread}, call {turn}"
                assert torch.equal(unchanged, alone), f"thread {thread}, call {turn}"
