"""Attention's results depend on the numbers of a row alone: not on run, threads, the batch around it or the place of its head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastattn

pytest.importorskip("fastattn._native", reason="the C++ core is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Problem:
    """(batch, heads, Nq, Nk, D), two query heads to a kv head. rich: mask with gradient, softcap, ALiBi, sinks."""

    shape: tuple[int, int, int, int, int]
    rich: bool
    dropout: float = 0.0


# Blocks are 64 queries by 128 keys, parts of a decoding step 256 keys: several of each, and ends that fill none.
PROBLEMS = {
    "causal": Problem((3, 4, 131, 150, 24), rich=False),
    "features": Problem((3, 4, 67, 135, 33), rich=True),
    "step": Problem((3, 4, 1, 530, 40), rich=False),
    "steps_features": Problem((3, 4, 5, 300, 33), rich=True),
    "few_rows_features": Problem((3, 4, 3, 300, 33), rich=True),
}


def _tensors(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, heads, rows, keys, dim = problem.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "q": torch.randn(batch, heads, rows, dim).to(dtype),
        "k": torch.randn(batch, heads // 2, keys, dim).to(dtype),
        "v": torch.randn(batch, heads // 2, keys, dim + 9).to(dtype),
        "dout": torch.randn(batch, heads, rows, dim + 9).to(dtype),
    }
    if problem.rich:
        hidden = torch.rand(batch, heads, rows, keys) < 0.2
        tensors["attn_mask"] = torch.randn(hidden.shape).masked_fill(hidden, -math.inf).to(dtype)
        tensors["alibi_slopes"] = torch.rand(batch, heads).to(wide)
        tensors["sinks"] = torch.randn(heads).to(wide)
    return tensors


def _run(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name != "dout"}
    q, k, v, *_ = leaves.values()
    options: dict[str, object] = {name: x for name, x in leaves.items() if name not in "qkv"}
    if problem.rich:
        options |= {"softcap": 3.0, "window_size": (190, 0)}
    if problem.dropout:
        options |= {"dropout_p": problem.dropout, "rng_state": torch.tensor([77, 5])}
    causal = not problem.rich
    out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True, implementation="cpu", **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), tensors["dout"])
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named


def _next_group(name: str, x: Tensor) -> Tensor:
    """The two kv heads, and the pairs of query heads that belong to them, change places."""
    dim = 0 if name.endswith("sinks") else 1
    return x.roll(x.shape[dim] // 2, dim)


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], message: str) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{message}: {name}"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_threads_and_runs(compiled: str, threads: None, name: str, dtype: torch.dtype) -> None:
    """One thread takes whole heads, many take blocks of queries and of keys; dropout is drawn where an element is."""
    shape, rich = PROBLEMS[name].shape, PROBLEMS[name].rich
    problem = Problem((1, *shape[1:]), rich, dropout=0.2 if rich else 0.0)
    tensors = _tensors(problem, dtype)
    torch.set_num_threads(1)
    expected = _run(problem, tensors)
    for count in (1, 2, 3, 4, 5, 6, 7, 8):
        torch.set_num_threads(count)
        _assert_same(_run(problem, tensors), expected, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_place_in_the_batch_and_among_the_heads(compiled: str, name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    tensors = _tensors(problem, dtype)
    whole = _run(problem, tensors)

    alone = _run(problem, {key: x if key == "sinks" else x[1:2] for key, x in tensors.items()})
    of_the_batch = {key: x if key == "sinks" else x[1:2] for key, x in whole.items() if key != "dsinks"}
    _assert_same({key: alone[key] for key in of_the_batch}, of_the_batch, "alone")

    flipped = _run(problem, {key: x if key == "sinks" else x.flip(0) for key, x in tensors.items()})
    flipped = {key: x.flip(0) for key, x in flipped.items() if key != "dsinks"}
    _assert_same(flipped, {key: whole[key] for key in flipped}, "another order of the batch")

    # The order within a group stays: dk and dv are sums over it.
    turned = _run(problem, {key: _next_group(key, x) for key, x in tensors.items()})
    _assert_same({key: _next_group(key, x) for key, x in turned.items()}, whole, "another order of the heads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_order_of_the_inputs(compiled: str, dtype: torch.dtype) -> None:
    """(batch, seq, heads, dim), and rows with gaps between them, are read in place: same bits, gradients too."""
    for name in ("causal", "steps_features"):
        tensors = _tensors(PROBLEMS[name], dtype)
        expected = _run(PROBLEMS[name], tensors)
        for key in ("q", "k", "v", "dout"):
            tensors[key] = tensors[key].transpose(1, 2).contiguous().transpose(1, 2)
        _assert_same(_run(PROBLEMS[name], tensors), expected, "(batch, seq, heads, dim)")
        for key in ("q", "k", "v", "dout"):
            wide = torch.full((*tensors[key].shape[:-1], tensors[key].shape[-1] + 5), math.nan, dtype=dtype)
            wide[..., 2:-3] = tensors[key]
            tensors[key] = wide[..., 2:-3]
        if "attn_mask" in tensors:
            tensors["attn_mask"] = tensors["attn_mask"].transpose(1, 3).contiguous().transpose(1, 3)
        _assert_same(_run(PROBLEMS[name], tensors), expected, "with gaps")
