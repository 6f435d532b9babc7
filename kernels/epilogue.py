"""What follows a matrix product, written once for both ways of computing it: on the accumulators of ``gemm.py`` before they are
rounded, or as one elementwise kernel over a product in memory (cuBLAS's, or the parts of one that ``gemm.py`` cut along k).

Forward, with pre = product + bias (and gate likewise):
    out = dropout(act(pre)) + residual,   or with a gate   dropout(act(gate) · pre)
Gradient, from dhidden (the product) and the saved pre, gate; d = dhidden times the dropout factor:
    dpre = d · act'(pre),   or with a gate   dpre = d · act(gate), dgate = d · pre · act'(gate);   hidden again, for dW
The sums of dpre and dgate over each block of rows (bias gradients) are taken in the same pass, in float32 before rounding.

Activations (index as in ``fastattn.reference.ffn.ACTIVATIONS``, -1: none): relu; gelu = x Φ(x); gelu_tanh, its approximation by
tanh (Hendrycks & Gimpel 2016); silu = x σ(x). GLU variants: Shazeer 2020.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.elementary import tanh
from fastattn.kernels.philox import Dropout, keep_tile

IDENTITY = -1
_RELU = tl.constexpr(0)
_GELU = tl.constexpr(1)
_GELU_TANH = tl.constexpr(2)


class Matrix(NamedTuple):
    """A matrix of any strides, in elements. Triton compiles a stride of 1 in, so contiguous loads stay wide."""

    ptr: Any
    row: int
    column: int


class Parts(NamedTuple):
    """A product in memory as the sum of ``count`` matrices, ``stride`` elements apart, added up in order."""

    ptr: Any
    row: int
    column: int
    stride: int
    count: int


class Forward(NamedTuple):
    """Operands and results of the forward epilogue, each None where absent; ``out`` may be where the product lies."""

    bias: Tensor | None = None
    gate_bias: Tensor | None = None
    residual: Any = None
    pre: Any = None
    gate: Any = None
    out: Any = None
    dropout: Dropout | None = None


class Gradient(NamedTuple):
    """Those of the gradient's, each None where absent; ``pre_sums``, ``gate_sums`` (row blocks, columns) float32."""

    pre: Any
    gate: Any
    dpre: Any
    dgate: Any
    hidden: Any
    pre_sums: Any
    gate_sums: Any
    dropout: Dropout | None


def matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, *x.stride())


def kernel_argument(epilogue: Forward | Gradient) -> Forward | Gradient:
    """``epilogue`` with its matrices as kernels take them. Dropout is an argument of its own: Triton 3.6 fails on it here."""
    epilogue = epilogue._replace(dropout=None)
    return type(epilogue)(*(matrix(x) if isinstance(x, Tensor) and x.dim() == 2 else x for x in epilogue))


def _parts(x: Tensor | None) -> Parts | None:
    """x (parts, rows, columns), or one matrix (rows, columns)."""
    if x is None:
        return None
    return Parts(x, *x.stride(), 0, 1) if x.dim() == 2 else Parts(x, *x.stride()[1:], x.stride(0), x.shape[0])


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) of a float32 tile; what the caller does not use is never computed."""
    if ACTIVATION < 0:
        value = x
        slope = 1.0
    elif ACTIVATION == _RELU:
        value = tl.maximum(x, 0.0)
        # NaN > 0 is false: adding x · 0 keeps it.
        slope = tl.where(x > 0, 1.0, x * 0.0)
        value = tl.where(x != x, x, value)
    elif ACTIVATION == _GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        # d/dx x Φ(x) = Φ(x) + x φ(x)
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == _GELU_TANH:
        # u = sqrt(2/π) (x + 0.044715 x³)
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return value, slope


@triton.jit
def _tile(x, row_start, column_start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(pointers, inside) of a tile of x (rows, columns): 64-bit to its corner, 32-bit within it."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    corner = x.ptr + tl.cast(row_start, tl.int64) * x.row + tl.cast(column_start, tl.int64) * x.column
    inside = (row_start + row < rows)[:, None] & (column_start + column < columns)[None, :]
    return corner + row[:, None] * x.row + column[None, :] * x.column, inside


@triton.jit
def load_tile(x, row_start, column_start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of x (rows, columns), zero outside."""
    pointers, inside = _tile(x, row_start, column_start, rows, columns, ROWS, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(x, row_start, column_start, rows, columns, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pointers, inside = _tile(x, row_start, column_start, rows, columns, ROWS, COLUMNS)
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_bias(acc, bias, column_start, columns, COLUMNS: tl.constexpr):
    if bias is not None:
        column = column_start + tl.arange(0, COLUMNS)
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish(
    pre, gate, epilogue, dropout, row_start, column_start, rows, columns,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``epilogue`` (a Forward) of float32 products pre and, if GATED, gate at a tile."""
    pre = _add_bias(pre, epilogue.bias, column_start, columns, COLUMNS)
    if epilogue.pre is not None:
        store_tile(epilogue.pre, row_start, column_start, rows, columns, pre, ROWS, COLUMNS)
    if GATED:
        gate = _add_bias(gate, epilogue.gate_bias, column_start, columns, COLUMNS)
        if epilogue.gate is not None:
            store_tile(epilogue.gate, row_start, column_start, rows, columns, gate, ROWS, COLUMNS)
    if epilogue.out is not None:
        if GATED:
            value, _ = activate(gate, ACTIVATION)
            value = value * pre
        else:
            value, _ = activate(pre, ACTIVATION)
        if dropout is not None:
            row = row_start + tl.arange(0, ROWS)
            keep = keep_tile(dropout, column_start, row, 0, ROWS, COLUMNS)
            value = tl.where(keep, value * dropout.scale, 0.0)
        if epilogue.residual is not None:
            value += load_tile(epilogue.residual, row_start, column_start, rows, columns, ROWS, COLUMNS).to(tl.float32)
        store_tile(epilogue.out, row_start, column_start, rows, columns, value, ROWS, COLUMNS)


@triton.jit
def _store_column_sums(sums, gradient, row_start, column_start, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if sums is not None:
        column = column_start + tl.arange(0, COLUMNS)
        line = sums.ptr + tl.cast(row_start // ROWS, tl.int64) * sums.row
        tl.store(line + column, tl.sum(gradient, 0), mask=column < columns)


@triton.jit
def finish_gradient(
    dhidden, epilogue, dropout, row_start, column_start, rows, columns,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``epilogue`` (a Gradient) of the float32 product dhidden at a tile."""
    factor = 1.0
    if dropout is not None:
        row = row_start + tl.arange(0, ROWS)
        keep = keep_tile(dropout, column_start, row, 0, ROWS, COLUMNS)
        factor = tl.where(keep, dropout.scale, 0.0)
    dhidden = dhidden * factor
    pre = load_tile(epilogue.pre, row_start, column_start, rows, columns, ROWS, COLUMNS).to(tl.float32)
    if epilogue.gate is not None:
        gate = load_tile(epilogue.gate, row_start, column_start, rows, columns, ROWS, COLUMNS).to(tl.float32)
        value, slope = activate(gate, ACTIVATION)
        hidden = value * pre
        dgate = dhidden * pre * slope
        store_tile(epilogue.dgate, row_start, column_start, rows, columns, dgate, ROWS, COLUMNS)
        _store_column_sums(epilogue.gate_sums, dgate, row_start, column_start, columns, ROWS, COLUMNS)
        dpre = dhidden * value
    else:
        hidden, slope = activate(pre, ACTIVATION)
        dpre = dhidden * slope
    if epilogue.hidden is not None:
        store_tile(epilogue.hidden, row_start, column_start, rows, columns, hidden * factor, ROWS, COLUMNS)
    store_tile(epilogue.dpre, row_start, column_start, rows, columns, dpre, ROWS, COLUMNS)
    _store_column_sums(epilogue.pre_sums, dpre, row_start, column_start, columns, ROWS, COLUMNS)


@triton.jit
def _sum_parts(x, row_start, column_start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pointers, inside = _tile(x, row_start, column_start, rows, columns, ROWS, COLUMNS)
    total = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    for part in tl.range(1, x.count):
        total += tl.load(pointers + tl.cast(part, tl.int64) * x.stride, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def elementwise_kernel(
    product, gate_product, epilogue, dropout, rows, columns,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue of a product in memory (rows, columns). Grid: (row blocks, column blocks)."""
    row_start = tl.program_id(0) * ROWS
    column_start = tl.program_id(1) * COLUMNS
    pre = _sum_parts(product, row_start, column_start, rows, columns, ROWS, COLUMNS)
    if GRADIENT:
        finish_gradient(pre, epilogue, dropout, row_start, column_start, rows, columns, ACTIVATION, ROWS, COLUMNS)
    else:
        gate = pre
        if gate_product is not None:
            gate = _sum_parts(gate_product, row_start, column_start, rows, columns, ROWS, COLUMNS)
        finish(
            pre, gate, epilogue, dropout, row_start, column_start, rows, columns,
            ACTIVATION, gate_product is not None, ROWS, COLUMNS,
        )  # fmt: skip


def elementwise(
    product: Tensor,
    gate_product: Tensor | None,
    epilogue: Forward | Gradient,
    activation: int,
    tile: configs.Elementwise,
) -> None:
    """Apply ``epilogue`` to products (rows, columns), or (parts, rows, columns) that are to be added up."""
    rows, columns = product.shape[-2:]
    elementwise_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
        product=_parts(product),
        gate_product=_parts(gate_product),
        epilogue=kernel_argument(epilogue),
        dropout=epilogue.dropout,
        rows=rows,
        columns=columns,
        ACTIVATION=activation,
        GRADIENT=isinstance(epilogue, Gradient),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.num_warps,
    )
