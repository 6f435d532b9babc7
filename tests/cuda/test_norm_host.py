"""The arithmetic of the CUDA norm kernels, run on the CPU: index maps, tails, sums, dropout, against float64.

``norm.cuh`` is compiled by the host compiler over ``host_cuda.h``, where each CUDA thread is a fiber. What a GPU adds (memory
coalescing, registers, real concurrency) is not tested here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastattn.reference.norm import norm_rows
from fastattn.reference.philox import matrix_dropout
from fastattn.reference.precision import accumulation_dtype
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate

RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class Dropout(ctypes.Structure):
    """``Dropout`` of csrc/cpu/params.h."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    ]


def _fields(text: str) -> list[tuple[str, type]]:
    kinds = {"d": ctypes.c_int, "n": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_double, "b": ctypes.c_bool}
    return [
        (name, kinds[kind]) for kind, names in (part.split(":") for part in text.split(";")) for name in names.split()
    ]


class Forward(ctypes.Structure):
    """``NormForwardParams`` of csrc/cpu/params.h."""

    _fields_ = [
        *_fields(
            "d:dtype weight_dtype;n:rows columns;p:x residual;n:x_stride residual_stride;p:weight bias y h mean rstd"
        ),
        *_fields("f:eps;b:rms stream"),
        ("dropout", Dropout),
    ]


class Backward(ctypes.Structure):
    """``NormBackwardParams`` of csrc/cpu/params.h."""

    _fields_ = [
        *_fields("d:dtype weight_dtype;n:rows columns chunk_rows;p:dy dh h;n:dy_stride dh_stride h_stride"),
        *_fields("p:weight mean rstd dh_total dx partial_dweight partial_dbias dweight dbias;b:rms stream"),
        ("dropout", Dropout),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    loaded = compiled("norm_host.cpp", tmp_path_factory.mktemp("cuda"))
    loaded.norm_chunk_rows.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    loaded.norm_chunk_rows.restype = ctypes.c_int64
    loaded.norm_cluster.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_bool]
    yield loaded


def _dropout(p: float) -> Dropout:
    seed, offset = RNG_STATE.tolist()
    return Dropout(seed, offset, int(p * 2**32), 1 / (1 - p)) if p > 0 else Dropout(0, 0, 0, 1.0)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _cluster(kernels: ctypes.CDLL, x: Tensor, clusters: bool, backward: bool) -> int:
    return kernels.norm_cluster(x.shape[1], x.element_size(), backward) if clusters else 0


def _forward(
    kernels: ctypes.CDLL, inputs: list[Tensor | None], eps: float, rms: bool, p: float, clusters: bool = False
) -> list[Tensor]:
    x, residual, weight, bias = inputs
    y, h = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    changed = residual is not None or p > 0
    parameter = weight if weight is not None else x
    call = Forward(
        DTYPES[x.dtype], DTYPES[parameter.dtype], *x.shape, _pointer(x), _pointer(residual), x.stride(0),
        0 if residual is None else residual.stride(0), _pointer(weight), _pointer(bias), _pointer(y),
        _pointer(h) if changed else None, None if rms else _pointer(mean), _pointer(rstd), eps, rms, False, _dropout(p),
    )  # fmt: skip
    kernels.norm_forward(ctypes.byref(call), _cluster(kernels, x, clusters, False))
    return [y, h if changed else x, mean, rstd]


def _backward(
    kernels: ctypes.CDLL,
    upstream: list[Tensor],
    saved: list[Tensor],
    weight: Tensor | None,
    rms: bool,
    p: float,
    clusters: bool = False,
) -> list[Tensor]:
    dy, dh = upstream
    h, mean, rstd = saved
    rows, columns = h.shape
    total, dx = torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    parameter = weight if weight is not None else h
    dweight, dbias = (torch.empty(columns, dtype=parameter.dtype) for _ in range(2))
    chunk_rows = kernels.norm_chunk_rows(rows, columns, h.element_size())
    partial = torch.empty(2, -(-rows // chunk_rows), columns, dtype=accumulation_dtype(h.dtype))
    call = Backward(
        DTYPES[h.dtype], DTYPES[parameter.dtype], rows, columns, chunk_rows, _pointer(dy), _pointer(dh), _pointer(h),
        dy.stride(0), dh.stride(0), h.stride(0), _pointer(weight), None if rms else _pointer(mean), _pointer(rstd),
        _pointer(total), _pointer(dx) if p > 0 else None, _pointer(partial[0]), _pointer(partial[1]),
        _pointer(dweight), _pointer(dbias), rms, False, _dropout(p),
    )  # fmt: skip
    kernels.norm_backward(ctypes.byref(call), _cluster(kernels, h, clusters, True))
    return [total, dx if p > 0 else total, dweight, dbias]


def _check(
    kernels: ctypes.CDLL,
    inputs: list[Tensor | None],
    upstream: list[Tensor],
    rms: bool,
    p: float,
    clusters: bool = False,
) -> None:
    y, h, mean, rstd = _forward(kernels, inputs, 1e-3, rms, p, clusters)
    total, dx, dweight, dbias = _backward(kernels, upstream, [h, mean, rstd], inputs[2], rms, p, clusters)
    ours = [y, h, dx, total, dweight, dbias]

    results = []
    for dtype in (inputs[0].dtype, torch.float64):
        # Leaves for all four, so that every gradient exists; eager PyTorch in the dtype under test sets the tolerance.
        x, residual, weight, bias = (
            (
                t
                if t is not None
                else (torch.ones if i == 2 else torch.zeros)(upstream[0].shape[1:] if i > 1 else upstream[0].shape)
            )
            .to(dtype, copy=True)
            .requires_grad_()
            for i, t in enumerate(inputs)
        )
        if dtype == torch.float64:
            outputs = norm_rows(x, residual, weight, bias, eps=1e-3, rms=rms, dropout_p=p, rng_state=RNG_STATE)
        else:
            kept = x * matrix_dropout(x.shape, p, RNG_STATE, x.device).to(dtype) if p > 0 else x
            plain_h, columns = kept + residual, x.shape[1:]
            if rms:
                outputs = torch.nn.functional.rms_norm(plain_h, columns, weight, 1e-3) + bias, plain_h
            else:
                outputs = torch.nn.functional.layer_norm(plain_h, columns, weight, bias, 1e-3), plain_h
        grads = torch.autograd.grad(outputs, (x, residual, weight, bias), [t.to(dtype) for t in upstream])
        results.append([*outputs, *grads])
    names = ["y", "h", "dx", "dresidual", "dweight", "dbias"]
    for name, actual, plain, exact in zip(names, ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name, terms=max(upstream[0].shape))


# (rows, columns) by what they reach: a warp to a row with tails; several rows to a chunk; 128 threads to a row; 512; rows not kept.
SHAPES = [(7, 33), (1100, 12), (3, 1000), (2, 4104), (2, 8200)]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_against_float64(kernels: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[1]).to(dtype) for _ in range(2))
    _check(kernels, [x, None, weight, bias], [dy, dh], rms=False, p=0.0)
    _check(kernels, [x, residual, weight, None], [dy, dh], rms=True, p=0.3)


@pytest.mark.parametrize(
    ("columns", "dtype", "blocks"),
    [
        (16500, torch.bfloat16, (2, 4)),
        (16391, torch.float32, (4, 8)),
        (8256, torch.float64, (4, 8)),
        (33000, torch.float16, (4, 8)),
    ],
    ids=str,
)
def test_rows_of_a_cluster(kernels: ctypes.CDLL, columns: int, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    x, residual, dy, dh = (torch.randn(2, columns).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(columns).to(dtype) for _ in range(2))
    assert tuple(_cluster(kernels, x, True, backward) for backward in (False, True)) == blocks
    _check(kernels, [x, None, weight, bias], [dy, dh], rms=False, p=0.0, clusters=True)
    _check(kernels, [x, residual, weight, None], [dy, dh], rms=True, p=0.3, clusters=True)


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_a_cluster_is_the_smallest_that_holds_the_row(kernels: ctypes.CDLL, element_size: int, backward: bool) -> None:
    block = 512 * (2 if backward else 4) * 16 // element_size  # columns in the registers of a block
    sizes = [1, block, block + 1, 2 * block, 2 * block + 1, 4 * block, 4 * block + 1, 8 * block, 8 * block + 1]
    found = [kernels.norm_cluster(columns, element_size, backward) for columns in sizes]
    assert found == [0, 0, 2, 2, 4, 4, 8, 8, 0]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_rows_that_are_not_aligned(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    wide = torch.randn(5, 300).to(dtype)
    x, residual, dy, dh = wide[:, 3:67], wide[:, 101:165], wide[:, 200:264], wide[:, 70:134]
    weight = torch.randn(64).to(dtype)
    _check(kernels, [x, residual, weight, None], [dy, dh], rms=False, p=0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_float32_parameters(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    x, dy = torch.randn(6, 72).to(dtype), torch.randn(6, 72).to(dtype)
    weight, bias = torch.randn(72), torch.randn(72)
    y, h, mean, rstd = _forward(kernels, [x, None, weight, bias], 1e-3, False, 0.0)
    _, _, dweight, dbias = _backward(kernels, [dy, torch.zeros_like(dy)], [h, mean, rstd], weight, False, 0.0)
    xhat = torch.nn.functional.layer_norm(x.double(), (72,), eps=1e-3)
    exact = [xhat * weight + bias, (dy.double() * xhat).sum(0), dy.double().sum(0)]
    for name, ours, true in zip(["y", "dweight", "dbias"], [y, dweight, dbias], exact, strict=True):
        assert_accurate(ours, true.to(ours.dtype), true, name, terms=72)


def test_large_mean_cancels_nothing(kernels: ctypes.CDLL) -> None:
    x = 1000 + torch.randn(3, 4096)
    y, _, _, _ = _forward(kernels, [x, None, None, None], 1e-5, False, 0.0)
    exact = torch.nn.functional.layer_norm(x.double(), (4096,))
    assert_accurate(y, torch.nn.functional.layer_norm(x, (4096,)), exact, "y", terms=4096)
