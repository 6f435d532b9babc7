"""The matrix product of every operation here: a bᵀ for a (M, K) and b (N, K), with what follows it applied to the accumulators.

One kernel: a tile of the result a program, in groups of row blocks so that tiles of b stay in L2; operands by TMA descriptors where
the tile's configuration says so and they are aligned, by pointers (cp.async) otherwise. Either may lie along K or across it, so the
same kernel computes x Wᵀ, dy W and dyᵀ x. Beside a bᵀ a program can compute a second product: b_gateᵀ with the same a (the gated
feed-forward network in one pass over x), or a2 b2ᵀ added to the first (the gradient of that x, rounded once).

A product of few tiles (few rows, or a weight's gradient) is cut along K into parts that are stored in float32 and added up in order
by ``epilogue.elementwise``: no atomics. How many depends on the shape alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels import configs
from fastattn.kernels.epilogue import (
    IDENTITY,
    Forward,
    Gradient,
    elementwise,
    finish,
    finish_gradient,
    kernel_argument,
    matrix,
)

#: Row blocks of the result whose programs run together, so that their tiles of b stay in L2.
_GROUP_M = tl.constexpr(8)
#: Largest stride, in elements, at which the offsets within a tile (at most 256 lines) stay 32-bit.
_LARGEST_STRIDE = 2**31 // 256
#: Programs of a product cut along K: two each on the 108 to 148 multiprocessors of a large GPU.
_PROGRAMS = 264
#: Steps along K that each part keeps at least, and parts at most: the parts are read again in float32.
_STEPS, _PARTS = 4, 32


@triton.jit
def _tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile (first row, first column) in an order that reuses L2: groups of _GROUP_M row blocks, columns inside."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    group = program // (_GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * _GROUP_M, _GROUP_M)
    within = program % (_GROUP_M * blocks_n)
    return (group * _GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _load(
    x, line_start, k_start, lines, inner,
    LINES: tl.constexpr, BLOCK_K: tl.constexpr, ACROSS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[LINES, BLOCK_K] of an operand (lines, inner), zero outside; ACROSS: it lies in memory as (inner, lines)."""
    if TMA:
        tile = x.load([k_start, line_start]).T if ACROSS else x.load([line_start, k_start])
    else:
        line = tl.arange(0, LINES)
        k = tl.arange(0, BLOCK_K)
        corner = x.ptr + tl.cast(line_start, tl.int64) * x.row + tl.cast(k_start, tl.int64) * x.column
        inside = (line_start + line < lines)[:, None]
        if not EVEN_K:
            inside = inside & (k_start + k < inner)[None, :]
        tile = tl.load(corner + line[:, None] * x.row + k[None, :] * x.column, mask=inside, other=0.0)
    return tile


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _finish(
    pre, gate, epilogue, dropout, row_start, column_start, rows, columns,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if GRADIENT:
        finish_gradient(pre, epilogue, dropout, row_start, column_start, rows, columns, ACTIVATION, ROWS, COLUMNS)
    else:
        finish(pre, gate, epilogue, dropout, row_start, column_start, rows, columns, ACTIVATION, GATED, ROWS, COLUMNS)


@triton.jit
def gemm_kernel(
    a, b, b_gate, a2, b2, epilogue, dropout, parts, gate_parts, rows, columns, inner, slice_k,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, ACROSS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """epilogue(a bᵀ + a2 b2ᵀ, a b_gateᵀ), the last two where given: (rows, columns). Grid: (tiles, slices of K).

    With ``parts`` (slices, rows, columns) float32 program (i, j) stores its tile of the products over columns
    j * slice_k .. (j + 1) * slice_k of a instead. ACROSS: for a, b, b_gate, a2, b2 as in ``_load``.
    """
    row_start, column_start = _tile_of(rows, columns, BLOCK_M, BLOCK_N)
    k_begin = tl.program_id(1) * slice_k
    k_end = tl.minimum(k_begin + slice_k, inner)
    pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(k_begin, k_end, BLOCK_K):
        a_tile = _load(a, row_start, k, rows, inner, BLOCK_M, BLOCK_K, ACROSS[0], EVEN_K, TMA)
        b_tile = _load(b, column_start, k, columns, inner, BLOCK_N, BLOCK_K, ACROSS[1], EVEN_K, TMA)
        pre = tl.dot(a_tile, b_tile.T, pre, input_precision=PRECISION)
        if b_gate is not None:
            b_tile = _load(b_gate, column_start, k, columns, inner, BLOCK_N, BLOCK_K, ACROSS[2], EVEN_K, TMA)
            gate = tl.dot(a_tile, b_tile.T, gate, input_precision=PRECISION)
    if a2 is not None:
        for k in tl.range(0, inner, BLOCK_K):
            a_tile = _load(a2, row_start, k, rows, inner, BLOCK_M, BLOCK_K, ACROSS[3], EVEN_K, TMA)
            b_tile = _load(b2, column_start, k, columns, inner, BLOCK_N, BLOCK_K, ACROSS[4], EVEN_K, TMA)
            pre = tl.dot(a_tile, b_tile.T, pre, input_precision=PRECISION)

    if parts is not None:
        row = row_start + tl.arange(0, BLOCK_M)
        column = column_start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        line = (tl.program_id(1).to(tl.int64) * rows + row) * columns
        tl.store(parts + line[:, None] + column[None, :], pre, mask=inside)
        if gate_parts is not None:
            tl.store(gate_parts + line[:, None] + column[None, :], gate, mask=inside)
    elif HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        GATED: tl.constexpr = b_gate is not None
        left, right = _halves(pre, BLOCK_M, BLOCK_N)
        gate_left, gate_right = left, right
        if GATED:
            gate_left, gate_right = _halves(gate, BLOCK_M, BLOCK_N)
        _finish(
            left, gate_left, epilogue, dropout, row_start, column_start, rows, columns,
            ACTIVATION, GRADIENT, GATED, BLOCK_M, HALF,
        )  # fmt: skip
        _finish(
            right, gate_right, epilogue, dropout, row_start, column_start + HALF, rows, columns,
            ACTIVATION, GRADIENT, GATED, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _finish(
            pre, gate, epilogue, dropout, row_start, column_start, rows, columns,
            ACTIVATION, GRADIENT, b_gate is not None, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def _in_memory_order(x: Tensor | None) -> tuple[Tensor | None, bool]:
    """(x, or xᵀ where that is how it lies; whether it is the latter)."""
    if x is None:
        return None, False
    if max(x.stride()) > _LARGEST_STRIDE:
        x = x.contiguous()
    return (x.t(), True) if x.stride(1) != 1 and x.stride(0) == 1 else (x, False)


def _fits_descriptor(x: Tensor | None) -> bool:
    """TMA: unit last stride, the other one and the address multiples of 16 bytes, no extent of 0."""
    if x is None:
        return True
    pitch = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


def _operand(x: Tensor | None, lines: int, across: bool, config: configs.Matmul) -> Any:
    if x is None:
        return None
    if not config.tma:
        return matrix(x.t() if across else x)
    return TensorDescriptor.from_tensor(x, [config.block_k, lines] if across else [lines, config.block_k])


def splits_of_few_rows(config: configs.Matmul, columns: int, inner: int) -> int:
    """Parts along K of a product of at most 16 rows: by columns and K alone, so a row's bits do not depend on the others."""
    return 1 if config.block_m > 16 else _splits(-(-columns // config.block_n), inner, config)


def splits_of_weight_gradient(config: configs.Matmul, rows: int, columns: int, inner: int) -> int:
    """Parts along the tokens (``inner``) of a gradient (rows, columns) with too few tiles for the whole GPU."""
    return _splits(-(-rows // config.block_m) * -(-columns // config.block_n), inner, config)


def _splits(tiles: int, inner: int, config: configs.Matmul) -> int:
    return max(1, min(_PROGRAMS // max(tiles, 1), inner // (_STEPS * config.block_k), _PARTS))


def gemm(
    a: Tensor,
    b: Tensor,
    epilogue: Forward | Gradient,
    config: configs.Matmul,
    *,
    b_gate: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    activation: int = IDENTITY,
    splits: int = 1,
) -> None:
    """``epilogue`` of a bᵀ + a2 b2ᵀ (``second``, of the same shapes) and of a b_gateᵀ; cut along K into ``splits`` parts, not with
    ``second``."""
    rows, inner = a.shape
    columns = b.shape[0]
    if rows == 0 or columns == 0:
        return
    a2, b2 = second if second is not None else (None, None)
    ordered = [_in_memory_order(x) for x in (a, b, b_gate, a2, b2)]
    if not all(_fits_descriptor(x) for x, _ in ordered):
        config = configs.by_pointers(config)
    lines = (config.block_m, config.block_n, config.block_n, config.block_m, config.block_n)
    operands = [_operand(x, n, across, config) for (x, across), n in zip(ordered, lines, strict=True)]
    parts = gate_parts = None
    if splits > 1:
        parts = a.new_empty(splits, rows, columns, dtype=torch.float32)
        gate_parts = None if b_gate is None else torch.empty_like(parts)
    slice_k = triton.cdiv(triton.cdiv(inner, config.block_k), splits) * config.block_k
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    gemm_kernel[(tiles, splits)](
        *operands,
        epilogue=kernel_argument(epilogue),
        dropout=epilogue.dropout,
        parts=parts,
        gate_parts=gate_parts,
        rows=rows,
        columns=columns,
        inner=inner,
        slice_k=slice_k,
        ACTIVATION=activation,
        GRADIENT=isinstance(epilogue, Gradient),
        ACROSS=tuple(across for _, across in ordered),
        EVEN_K=inner % config.block_k == 0,
        TMA=config.tma,
        PRECISION=configs.matmul_precision(a.dtype),
        HALVES=config.halves,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts is not None:
        elementwise(
            parts, gate_parts, epilogue, activation, configs.after_product(rows, isinstance(epilogue, Gradient))
        )
