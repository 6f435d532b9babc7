"""Attention's C++ kernels beyond test_attention.py: block boundaries, every form of mask, what must hold bitwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import plain
import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference

_native = pytest.importorskip("fastattn._native", reason="the C++ core is not built")

Mask = tuple[str, tuple[bool, bool, bool, bool]]  # bool | same (q's dtype) | float; which extents are full, not 1


@dataclass(frozen=True)
class Case:
    """One problem around the kernels' blocks of 64 queries and 128 keys, and parts of 256 keys for up to 8 queries.

    In backward the 8 queries are those of a kv head."""

    shape: tuple[int, int, int, int, int] = (2, 4, 50, 70, 24)  # batch, heads, Nq, Nk, D
    heads_kv: int = 4
    dv: int = 0  # 0: D
    window: tuple[int, int] = (-1, -1)
    mask: Mask | None = None
    softcap: float = 0.0
    slopes: int = 0  # rows of alibi_slopes
    sinks: bool = False
    dropout: float = 0.0


CASES = {
    "rows_that_see_nothing": Case((1, 2, 200, 150, 16), 2, window=(-1, 0)),
    "window": Case((1, 2, 190, 300, 40), 2, window=(37, 5)),
    "mask_bool_keys": Case((3, 2, 40, 300, 16), 2, mask=("bool", (True, False, False, True))),
    "mask_bool": Case((2, 4, 70, 140, 24), window=(-1, 3), mask=("bool", (False, False, True, True))),
    "mask_softcap": Case((2, 4, 70, 140, 24), mask=("same", (True, True, True, True)), softcap=5.0),
    "mask_float_heads": Case((2, 4, 130, 135, 8), mask=("float", (False, True, True, True))),
    "mask_float_keys": Case((2, 4, 130, 260, 8), window=(-1, 0), mask=("float", (True, False, False, True))),
    "mask_rows_only": Case(mask=("same", (False, True, True, False)), sinks=True),
    "alibi_per_batch": Case(slopes=2, sinks=True, window=(20, -1)),
    "dropout_window": Case((1, 2, 50, 190, 24), 2, dropout=0.1, window=(30, -1), sinks=True),
    "everything": Case(
        (2, 4, 67, 135, 33), 2, 19, (90, 0), ("same", (False, True, True, True)), 3.0, 1, sinks=True, dropout=0.2
    ),
    "wide": Case((1, 1, 35, 40, 300), 1, dv=513),
    "narrow": Case((1, 2, 11, 9, 1), 1, dv=1),
    "step": Case((2, 6, 1, 300, 33), 2, 70),
    "steps": Case((2, 4, 6, 520, 64), 2, 128, (-1, 0), ("same", (True, True, True, True)), 3.0, 2, sinks=True),
    "steps_of_few_rows": Case(
        (2, 4, 4, 520, 64), 2, 128, (40, 0), ("same", (True, True, True, True)), 3.0, 2, sinks=True
    ),
    "steps_that_see_nothing": Case((1, 2, 8, 3, 16), 2, window=(-1, 0), sinks=True),
    "steps_masked": Case((2, 2, 8, 257, 16), 2, window=(100, 0), mask=("bool", (True, False, False, True))),
}


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def make_tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    batch, heads, rows, keys, dim = case.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor | None] = {
        "q": torch.randn(batch, heads, rows, dim).to(dtype),
        "k": torch.randn(batch, case.heads_kv, keys, dim).to(dtype),
        "v": torch.randn(batch, case.heads_kv, keys, case.dv or dim).to(dtype),
        "alibi_slopes": torch.rand(case.slopes, heads).squeeze(0).to(wide) if case.slopes else None,
        "sinks": torch.randn(heads).to(wide) if case.sinks else None,
    }
    if case.mask is not None:
        kind, full = case.mask
        extents = [n if take else 1 for n, take in zip((batch, heads, rows, keys), full, strict=True)]
        mask = torch.rand(extents) < 0.7
        mask[..., 0] = True  # rows that see nothing have cases of their own
        if kind != "bool":
            additive = torch.randn(extents).masked_fill(~mask, -math.inf)
            mask = additive.to(dtype if kind == "same" or dtype == torch.float64 else torch.float32)
        tensors["attn_mask"] = mask
    return {name: x for name, x in tensors.items() if x is not None}


def run(function, case: Case, tensors: dict[str, Tensor], double: bool, upstream: tuple[Tensor, Tensor], **more):  # type: ignore[no-untyped-def]
    """{name: value} of out, lse and every gradient; gradients of lse only where it is finite."""
    leaves = {
        name: x if x.dtype == torch.bool else (x.double() if double else x).detach().requires_grad_()
        for name, x in tensors.items()
    }
    if case.dropout:
        more |= {"dropout_p": case.dropout, "rng_state": torch.tensor([1234567891011, 7])}
    q, k, v, *_ = leaves.values()
    options = {name: x for name, x in leaves.items() if name not in "qkv"}
    out, lse = function(q, k, v, **options, window_size=case.window, softcap=case.softcap, **more)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    seen = torch.isfinite(lse.detach())
    total = (out * upstream[0].to(out.dtype)).sum() + (lse[seen] * upstream[1].to(lse.dtype)[seen]).sum()
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return {"out": out, "lse": lse} | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def check(case: Case, dtype: torch.dtype) -> None:
    tensors = make_tensors(case, dtype)
    batch, heads, rows, keys, dim = case.shape
    upstream = (torch.randn(batch, heads, rows, case.dv or dim).to(dtype), torch.randn(batch, heads, rows))
    actual = run(fastattn.attention, case, tensors, False, upstream, return_lse=True, implementation="cpu")
    exact = run(reference.attention, case, tensors, True, upstream, return_lse=True)
    peer = run(plain.attention, case, tensors, False, upstream)
    for name, value in actual.items():
        assert_accurate(value, peer[name], exact[name], name, terms=max(rows, keys) * dim)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cases(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize(
    "name", ["window", "mask_softcap", "dropout_window", "everything", "steps", "steps_of_few_rows"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("isa", _native.available_isas(), indirect=True)
def test_instruction_sets(isa: str, dtype: torch.dtype, name: str) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("isa", _native.available_isas(), indirect=True)
def test_a_bad_key_reaches_only_the_rows_that_see_it(isa: str, rows: int, dtype: torch.dtype) -> None:
    """NaN and inf in key and value 100 under a causal mask: earlier rows keep every bit, forward and backward."""
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (rows, 150, 150))
    first = 100 - (150 - rows)  # the first row that sees key 100
    dout = torch.randn(1, 2, rows, 24).to(dtype)
    if first > 0:
        dout[:, :, first:] = 0
    before = max(first, 0)

    def step(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        leaf = q.clone().requires_grad_()
        out = fastattn.attention(leaf, k, v, causal=True, implementation="cpu")
        (dq,) = torch.autograd.grad(out, leaf, dout)
        return out.detach(), dq

    clean = step(k, v)
    for bad in (math.nan, math.inf):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, 100], poisoned_v[:, :, 100, 3] = bad, bad
        for a, b in zip(step(poisoned_k, poisoned_v), clean, strict=True):
            assert torch.equal(a[:, :, :before], b[:, :, :before])
        assert not torch.isfinite(step(k, poisoned_v)[0][:, :, before:, 3]).any()
