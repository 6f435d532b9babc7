"""fastattn.linear: every implementation and instruction set, output and every gradient, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (M, K, N): one token, a few, odd, over one tile, over one block of rows, columns and k.
SHAPES = [(1, 64, 96), (5, 7, 11), (17, 72, 131), (67, 130, 65), (139, 600, 530)]


def _compare(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype, given: tuple[bool, bool]) -> None:
    rows, width, outputs = shape
    sizes = ((rows, width), (outputs, width), (outputs,) if given[0] else None, (rows, outputs) if given[1] else None)
    scale = (1, 1 / math.sqrt(width), 1, 1)
    tensors = [None if s is None else (torch.randn(s) * f).to(dtype) for s, f in zip(sizes, scale, strict=True)]
    cotangent = torch.randn(rows, outputs).to(dtype)

    def run(function, dtype):  # type: ignore[no-untyped-def]
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves[:3], residual=leaves[3])
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], cotangent.to(dtype))]

    actual = run(lambda *a, **k: fastattn.linear(*a, **k, implementation=implementation), dtype)
    peer, exact = run(reference.linear, dtype), run(reference.linear, torch.float64)
    for index, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert_accurate(a, p, e, "out" if index == 0 else f"gradient {index}", terms=max(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _compare(implementation, shape, dtype, (True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)], ids=["plain", "bias", "residual"])
def test_without(implementation: str, given: tuple[bool, bool], dtype: torch.dtype) -> None:
    _compare(implementation, (19, 40, 70), dtype, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(576, 192), (301, 130), (37, 45), (1, 3)], ids=str)
def test_a_row_has_the_bits_it_has_in_a_batch(compiled: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    width, outputs = sizes
    x, residual = torch.randn(600, width).to(dtype), torch.randn(600, outputs).to(dtype)
    weight, bias = (torch.randn(outputs, width) / math.sqrt(width)).to(dtype), torch.randn(outputs).to(dtype)

    def call(rows: slice) -> Tensor:
        return fastattn.linear(x[rows], weight, bias, residual=residual[rows], implementation=compiled)

    whole = call(slice(None))
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40, 129, 300):
        assert torch.equal(call(slice(7, 7 + rows)), whole[7 : 7 + rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads(compiled: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(size).to(dtype) for size in ((150, 96), (200, 96), (200,), (150, 200))]
    threads = torch.get_num_threads()

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = fastattn.linear(*leaves[:3], residual=leaves[3], implementation=compiled)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    try:
        expected = run()
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def test_partial_gradients(implementation: str) -> None:
    tensors = [torch.randn(size) for size in ((9, 16), (24, 16), (24,), (9, 24))]

    def run(wanted: set[int]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        fastattn.linear(*leaves[:3], residual=leaves[3], implementation=implementation).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(4)]
        return [leaf.grad for i, leaf in enumerate(leaves) if i in wanted]  # type: ignore[misc]

    expected = run({0, 1, 2, 3})
    for index in range(4):
        torch.testing.assert_close(run({index})[0], expected[index])


@pytest.mark.parametrize("shape", [(0, 8, 12), (3, 0, 12), (3, 8, 0)], ids=str)
def test_empty(implementation: str, shape: tuple[int, int, int]) -> None:
    rows, width, outputs = shape
    sizes = ((rows, width), (outputs, width), (outputs,), (rows, outputs))
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = fastattn.linear(*leaves[:3], residual=leaves[3], implementation=implementation)
    exact = reference.linear(*wide[:3], residual=wide[3])
    torch.testing.assert_close(out.double(), exact)
    grads = torch.autograd.grad(out.sum(), leaves)
    for g, e in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_strides() -> None:
    x, weight, residual = torch.randn(2, 5, 3, 8), torch.randn(2, 12, 8), torch.randn(2, 3, 5, 12)
    x, residual = x.transpose(1, 2), residual[..., ::2]
    expected = F.linear(x, weight[0, ::2]) + residual
    torch.testing.assert_close(fastattn.linear(x, weight[0, ::2], residual=residual), expected)
    assert fastattn.linear(x[0, 0, 0], weight[0]).shape == (12,)


BAD = [
    ({"weight": torch.ones(12, 9)}, ValueError, "weight: expected shape (12, 8)"),
    ({"weight": torch.ones(12)}, ValueError, "weight: expected 2 dimensions"),
    ({"weight": torch.ones(12, 8).double()}, TypeError, "weight: dtype"),
    ({"bias": torch.ones(8)}, ValueError, "bias: expected shape (12,)"),
    ({"residual": torch.ones(12)}, ValueError, "residual: expected shape (2, 12)"),
    ({"residual": torch.ones(2, 12).half()}, TypeError, "residual: dtype"),
    ({"x": torch.ones(2, 8).int()}, TypeError, "x: got dtype"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension"),
    ({"implementation": "cuda"}, NotImplementedError, "the tensors are on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(2, 8), "weight": torch.ones(12, 8)} | change
    with pytest.raises(error) as caught:
        fastattn.linear(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
