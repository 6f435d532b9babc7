"""Attention's features met with each other: per instruction set and dtype, every value of every feature, in combinations.

The full product has half a million members. Each (instruction set, dtype) takes the values of every feature in an order of its own,
so that each value meets each instruction set and dtype, and over all of them each two values meet (the first test counts).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import plain
import pytest
import torch
import torch.nn.functional as F
from ops.test_attention_cpu import Case, Mask, make_tensors, run
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference

_native = pytest.importorskip("fastattn._native", reason="the C++ core is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERYWHERE = (True, True, True, True)

# (B, H, Nq, Nk): blocks are 64 queries by 128 keys; up to 8 queries are a decoding step over parts of 256 keys.
FACTORS: dict[str, list[object]] = {
    "shape": [(2, 4, 37, 53), (1, 4, 70, 33), (3, 4, 1, 65), (2, 4, 5, 300), (1, 4, 129, 131), (2, 4, 66, 260)],
    "dims": [(24, 24), (1, 3), (33, 17), (80, 130), (512, 300)],
    "heads_kv": [4, 2, 1],
    "window": [(-1, -1), (-1, 0), (9, -1), (30, 4)],
    "mask": [
        None,
        ("bool", (True, False, False, True)),
        ("bool", (False, True, True, True)),
        ("bool", (True, False, True, False)),
        ("same", (True, False, False, True)),
        ("same", EVERYWHERE),
        ("float", (False, True, True, True)),
        ("float", (True, True, False, False)),
        ("same", (False, False, False, False)),
    ],
    "mask_order": ["dense", "keys outside", "expanded"],
    "softcap": [0.0, 3.0],
    "slopes": ["none", "per head", "per batch and head"],
    "sinks": [False, True],
    "dropout": [0.0, 0.2],
    "order": ["dense", "heads inside", "gaps"],
}
CASES_EACH = 12  # at least the longest list


def choices(isa: str, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    columns = {}
    for name, values in FACTORS.items():
        order = random.Random(f"{isa} {dtype} {name}").sample(range(len(values)), len(values))
        columns[name] = [values[order[i % len(values)]] for i in range(CASES_EACH)]
        random.Random(f"{name} {dtype} {isa}").shuffle(columns[name])
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def test_every_two_values_meet() -> None:
    met = {
        frozenset(pair)
        for isa in _native.available_isas()
        for dtype in DTYPES
        for chosen in choices(isa, dtype)
        for pair in itertools.combinations([(name, str(value)) for name, value in chosen.items()], 2)
    }
    values = {name: [(name, str(value)) for value in column] for name, column in FACTORS.items()}
    pairs = [pair for a, b in itertools.combinations(values.values(), 2) for pair in itertools.product(a, b)]
    missing = [pair for pair in pairs if frozenset(pair) not in met]
    # A machine with few instruction sets runs fewer combinations.
    assert len(missing) <= (0.01 if len(_native.available_isas()) >= 5 else 0.2) * len(pairs), missing


def _reordered(tensors: dict[str, Tensor], order: str, mask_order: str, full: tuple[int, ...]) -> None:
    for name in "qkv":
        x = tensors[name]
        if order == "heads inside":
            tensors[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif order == "gaps":
            wide = torch.full((*x.shape[:3], x.shape[3] + 3), math.nan, dtype=x.dtype)
            wide[..., 1:-2] = x
            tensors[name] = wide[..., 1:-2]
    if (mask := tensors.get("attn_mask")) is not None:
        if mask_order == "keys outside":
            tensors["attn_mask"] = mask.transpose(1, 3).contiguous().transpose(1, 3)
        elif mask_order == "expanded":
            tensors["attn_mask"] = mask.expand(full)


def _check(chosen: dict[str, object], dtype: torch.dtype) -> None:
    shape, dims, mask = chosen["shape"], chosen["dims"], chosen["mask"]
    batch, heads, rows, keys = shape  # type: ignore[misc]
    case = Case(
        (batch, heads, rows, keys, dims[0]),  # type: ignore[index]
        chosen["heads_kv"],  # type: ignore[arg-type]
        dims[1],  # type: ignore[index]
        chosen["window"],  # type: ignore[arg-type]
        mask,  # type: ignore[arg-type]
        chosen["softcap"],  # type: ignore[arg-type]
        {"none": 0, "per head": 1, "per batch and head": batch}[chosen["slopes"]],  # type: ignore[index]
        bool(chosen["sinks"]),
        chosen["dropout"],  # type: ignore[arg-type]
    )
    tensors = make_tensors(case, dtype)
    if chosen["slopes"] == "per batch and head":
        tensors["alibi_slopes"] = tensors["alibi_slopes"].view(batch, heads)
    _reordered(tensors, str(chosen["order"]), str(chosen["mask_order"]), (batch, heads, rows, keys))
    upstream = (torch.randn(batch, heads, rows, dims[1]).to(dtype), torch.randn(batch, heads, rows))  # type: ignore[index]
    actual = run(fastattn.attention, case, tensors, False, upstream, return_lse=True, implementation="cpu")
    exact = run(reference.attention, case, tensors, True, upstream, return_lse=True)
    peer = run(plain.attention, case, tensors, False, upstream)
    for name, value in actual.items():
        assert_accurate(value, peer[name], exact[name], name, terms=max(rows, keys) * dims[0])  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combinations(compiled: str, dtype: torch.dtype) -> None:
    failures = []
    for chosen in choices(_native.current_isa(), dtype):
        try:
            _check(chosen, dtype)
        except AssertionError as error:
            failures.append(f"{error}\n    {chosen}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upper_left_causal(compiled: str, dtype: torch.dtype) -> None:
    """scaled_dot_product_attention's alignment, where it differs from attention's: Nq and Nk not the same."""
    for rows, keys in ((37, 150), (150, 37), (5, 270), (8, 3)):
        inputs = [torch.randn(2, 3, n, d).to(dtype) for n, d in ((rows, 24), (keys, 24), (keys, 33))]
        dout = torch.randn(2, 3, rows, 33).to(dtype)

        def both(function, dtype, inputs=inputs, dout=dout):  # type: ignore[no-untyped-def]
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            out = function(*leaves, is_causal=True)
            return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

        actual = both(fastattn.scaled_dot_product_attention, dtype)
        peer, exact = (both(F.scaled_dot_product_attention, t) for t in (dtype, torch.float64))
        for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, peer, exact, strict=True):
            assert_accurate(a, p, e, f"{name} {rows} {keys}", terms=max(rows, keys) * 24)


HIDDEN: dict[str, Mask | None] = {
    "bool": ("bool", (False, False, False, True)),
    "additive": ("same", (False, False, False, True)),
    "bool rows": ("bool", (True, True, True, True)),
    "window": None,
}


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_are_never_touched(compiled: str, dtype: torch.dtype, kind: str, rows: int) -> None:
    """NaN and inf in keys and values that no row sees: output and every gradient as without, theirs zero."""
    keys, hidden = 270, torch.zeros(270, dtype=torch.bool)
    case = Case((2, 4, rows, keys, 24), 2, 17, (120, -1) if kind == "window" else (-1, -1), HIDDEN[kind], dropout=0.1)
    tensors = make_tensors(case, dtype)
    if kind == "window":
        hidden[: keys - rows - 120] = True
    else:
        hidden[torch.randperm(keys)[:90]] = True
        tensors["attn_mask"] = tensors["attn_mask"].clone()
        tensors["attn_mask"][..., hidden] = False if kind.startswith("bool") else -math.inf
    upstream = (torch.randn(2, 4, rows, 17).to(dtype), torch.randn(2, 4, rows))
    clean = run(fastattn.attention, case, tensors, False, upstream, return_lse=True, implementation="cpu")
    for bad in (math.nan, math.inf):
        poisoned = tensors | {name: tensors[name].clone() for name in "kv"}
        poisoned["k"][:, :, hidden], poisoned["v"][:, :, hidden] = bad, bad
        result = run(fastattn.attention, case, poisoned, False, upstream, return_lse=True, implementation="cpu")
        for name, value in result.items():
            assert torch.equal(value, clean[name]), f"{name} with {bad}"
        assert result["dk"][:, :, hidden].abs().max() == 0 and result["dv"][:, :, hidden].abs().max() == 0
