"""The micro-kernel of every instruction set, product by product, against float64."""

from __future__ import annotations

import math

import pytest
import torch

_native = pytest.importorskip("fastattn._native", reason="the C++ core is not built")

SHAPES = [
    (1, 1, 1),
    (3, 17, 5),
    (17, 3, 40),
    (40, 65, 17),
    (65, 40, 65),
    (14, 32, 64),
    (29, 96, 3),
    (33, 47, 129),
    (64, 64, 64),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def product(
    isa: str, a: torch.Tensor, b: torch.Tensor, transposed: bool, c: torch.Tensor, accumulate: bool = False
) -> None:
    shape = (a.shape[0], c.shape[1], a.shape[1])
    name = str(a.dtype).removeprefix("torch.")
    _native.gemm(
        isa,
        name,
        a.data_ptr(),
        a.stride(0),
        b.data_ptr(),
        b.stride(0),
        transposed,
        c.data_ptr(),
        c.stride(0),
        shape,
        accumulate,
    )


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values whose memory neighbours, in rows and columns, are NaN: a read beyond the edge shows."""
    full = torch.full((rows + 2, columns + 5), float("nan"), dtype=dtype)
    full[1:-1, 2:-3] = torch.randn(rows, columns).to(dtype)
    return full[1:-1, 2:-3]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_product(isa: str, dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for m, n, k in SHAPES:
        a = poisoned(m, k, dtype)
        b = poisoned(n, k, dtype) if transposed else poisoned(k, n, dtype)
        exact = a.double() @ (b.double().T if transposed else b.double())
        # The classical bound of a dot product of length k, plus one rounding: |error| <= (k + 1) eps sum |a||b|.
        # Of float16 in two parts on AMX the product of the small ones is left out: 2^-16 of each term at most.
        left_out = 2.0**-16 if dtype == torch.float16 and isa.startswith("amx") else 0.0
        bound = ((k + 1) * torch.finfo(accumulator).eps + left_out) * (
            a.double().abs() @ (b.double().T if transposed else b.double()).abs()
        )
        around = torch.full((m + 2, n + 7), 5.0, dtype=accumulator)
        c = around[1:-1, 3:-4]
        product(isa, a, b, transposed, c)
        assert ((c.double() - exact).abs() <= bound).all(), (m, n, k)
        product(isa, a, b, transposed, c, accumulate=True)
        assert ((c.double() - 2 * exact).abs() <= 3 * bound).all(), (m, n, k)
        c.fill_(5.0)
        assert (around == 5.0).all(), f"wrote outside C at {(m, n, k)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_a_row_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(45, 67).to(dtype), torch.randn(67, 70).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    whole = torch.empty(45, 70, dtype=accumulator)
    product(isa, a, b, False, whole)
    for begin, end in [(0, 1), (7, 20), (31, 45)]:
        part = torch.empty(end - begin, 70, dtype=accumulator)
        product(isa, a[begin:end], b, False, part)
        assert torch.equal(part, whole[begin:end])


AMX = [isa for isa in _native.available_isas() if isa.startswith("amx")]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("k", [2, 5, 16, 33, 64, 256, 1024, 4096])
@pytest.mark.parametrize("isa", AMX)
def test_float32_in_three_parts_is_more_accurate_than_fused_multiply_adds(isa: str, k: int, positive: bool) -> None:
    torch.manual_seed(k)
    a, b = torch.randn(40, k), torch.randn(k, 50)
    if positive:
        a, b = a.abs(), b.abs()
    exact = a.double() @ b.double()
    parts, chain = torch.empty(40, 50), torch.empty(40, 50)
    product(isa, a, b, False, parts)
    product("scalar", a, b, False, chain)  # one chain of fused multiply-adds per element
    assert (parts - exact).norm() <= (chain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("isa", AMX)
def test_parts_hold_every_number_exactly(isa: str, dtype: torch.dtype) -> None:
    """Times one, every number comes back bit for bit, the largest too; below 2^-110 float32 loses at most 2^-126."""
    top = torch.finfo(dtype).max
    x = torch.randn(64, 70).to(dtype) * torch.logspace(-30 if dtype == torch.float32 else -7, 4, 70).to(dtype)
    if dtype == torch.float32:
        x = torch.cat([x, torch.tensor([top, -top, 3.4e38, 0.999999 * top, 2.0**-109]).expand(64, 5)], dim=1)
    else:
        every = torch.arange(-31743, 31744, dtype=torch.int32)
        x = torch.cat([every.clamp(min=0), (-every).clamp(min=0) | 0x8000], dim=0).to(torch.int16).view(torch.float16)
        x = torch.cat([x, x[: -len(x) % 64]]).reshape(64, -1)
    c = torch.empty(x.shape)
    product(isa, torch.eye(64, dtype=dtype), x.contiguous(), False, c)
    assert torch.equal(c, x.float())
    tiny = torch.randn(64, 40) * torch.logspace(-45, -33, 40)
    if dtype == torch.float32:
        c = torch.empty(64, 40)
        product(isa, torch.eye(64), tiny, False, c)
        assert (c - tiny).abs().max() <= 2.0**-126 * (1 + 2.0**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_infinity_and_nan(isa: str, dtype: torch.dtype) -> None:
    """What is not finite is what a chain of fused multiply-adds gives; everything else keeps its bits."""
    a, b = torch.randn(45, 67), torch.randn(67, 70)
    a[a.abs() < 0.3], b[b.abs() < 0.3] = 1.0, -2.0
    clean = torch.empty(45, 70)
    product(isa, a.to(dtype), b.to(dtype), False, clean)
    b[11, 20], b[12, 21] = 0.0, 0.0
    a[3, 11], a[17, 12], a[18, 66], a[40, 0] = math.inf, -math.inf, math.nan, math.inf
    a[40, 1] = -math.inf
    b[5, 33], b[66, 69] = -math.inf, math.nan
    a, b = a.to(dtype), b.to(dtype)
    actual, chain = torch.empty(45, 70), torch.empty(45, 70)
    product(isa, a, b, False, actual)
    product("scalar", a, b, False, chain)
    torch.testing.assert_close(
        actual[~torch.isfinite(chain)], chain[~torch.isfinite(chain)], rtol=0, atol=0, equal_nan=True
    )
    assert torch.isfinite(actual[torch.isfinite(chain)]).all()
    rows, columns = [3, 17, 18, 40], [20, 21, 33, 69]
    kept = torch.ones(45, 70, dtype=torch.bool)
    kept[rows], kept[:, columns] = False, False
    assert torch.equal(actual[kept], clean[kept])
