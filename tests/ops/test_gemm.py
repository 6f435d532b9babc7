"""The micro-kernel of every instruction set, product by product, against float64."""

from __future__ import annotations

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
        bound = (
            (k + 1)
            * torch.finfo(accumulator).eps
            * (a.double().abs() @ (b.double().T if transposed else b.double()).abs())
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
