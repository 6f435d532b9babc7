"""The feed-forward network in Triton: the launchers of ``fastattn::triton_ffn_{forward,backward}``.

    pre = x W_inᵀ + b_in;   hidden = dropout(act(pre)), or dropout(act(gate) · pre) with gate = x W_gateᵀ + b_gate
    out = hidden W_outᵀ + b_out
The first product is a tiled GEMM here, with bias, activation, gate and dropout applied to the float32 accumulators before
they are rounded, so that neither pre nor gate goes to memory unless ``save_pre`` asks. With a gate both products share each tile
of x. The backward GEMM dhidden = dout W_out likewise turns its accumulators into dpre and dgate (and the hidden state that dW_out
needs) in place. The other products (out; dx, dW) have nothing to fuse: they are ``torch.addmm`` / ``torch.mm``, cuBLAS on a GPU,
except that under ``torch.use_deterministic_algorithms(True)`` those with a row per token (out, dx) run here too (``_linear``).

Activations (index as in ``fastattn.reference.ffn.ACTIVATIONS``): relu; gelu = x Φ(x); gelu_tanh, its approximation by tanh
(Hendrycks & Gimpel 2016); silu = x σ(x). GLU variants: Shazeer 2020.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.column_sum import column_sum
from fastattn.kernels.elementary import tanh
from fastattn.kernels.philox import dropout_argument, keep_tile

_IDENTITY = -1
_RELU = tl.constexpr(0)
_GELU = tl.constexpr(1)
_GELU_TANH = tl.constexpr(2)

#: Rows of a result tile whose programs run together, so that their tiles of the weights stay in L2.
_GROUP_M = tl.constexpr(8)


class Matrix(NamedTuple):
    """A matrix of any strides, in elements. Triton compiles a stride of 1 in, so contiguous loads stay wide."""

    ptr: Any
    row: int
    column: int


def _matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, *x.stride())


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
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
def _tile(x, row_start, column_start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(pointers, inside) of a tile of x (rows, columns): 64-bit to its corner, 32-bit within it."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    corner = x.ptr + tl.cast(row_start, tl.int64) * x.row + tl.cast(column_start, tl.int64) * x.column
    inside = (row_start + row < rows)[:, None] & (column_start + column < columns)[None, :]
    return corner + row[:, None] * x.row + column[None, :] * x.column, inside


@triton.jit
def _load(x, row_start, column_start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of x (rows, columns), zero outside."""
    pointers, inside = _tile(x, row_start, column_start, rows, columns, ROWS, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(x, row_start, column_start, rows, columns, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pointers, inside = _tile(x, row_start, column_start, rows, columns, ROWS, COLUMNS)
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_bias(acc, bias, column, columns):
    if bias is not None:
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def ffn_forward_kernel(
    x, w_in, b_in, w_gate, b_gate, hidden, pre_out, gate_out, rows, columns, inner, dropout,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden (rows, columns) from x (rows, inner) and weights (columns, inner). Grid: (row blocks · column blocks,)."""
    row_start, column_start = _tile_of(rows, columns, BLOCK_M, BLOCK_N)
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, inner, BLOCK_K):
        x_tile = _load(x, row_start, start, rows, inner, BLOCK_M, BLOCK_K)
        w_tile = _load(w_in, column_start, start, columns, inner, BLOCK_N, BLOCK_K)
        pre = tl.dot(x_tile, tl.trans(w_tile), pre, input_precision=PRECISION)
        if w_gate is not None:
            w_tile = _load(w_gate, column_start, start, columns, inner, BLOCK_N, BLOCK_K)
            gate = tl.dot(x_tile, tl.trans(w_tile), gate, input_precision=PRECISION)
    pre = _add_bias(pre, b_in, column, columns)
    if pre_out is not None:
        _store(pre_out, row_start, column_start, rows, columns, pre, BLOCK_M, BLOCK_N)
    if w_gate is not None:
        gate = _add_bias(gate, b_gate, column, columns)
        if gate_out is not None:
            _store(gate_out, row_start, column_start, rows, columns, gate, BLOCK_M, BLOCK_N)
        value, _ = _activate(gate, ACTIVATION)
        value = value * pre
    else:
        value, _ = _activate(pre, ACTIVATION)
    if dropout is not None:
        value = tl.where(keep_tile(dropout, column_start, row, 0, BLOCK_M, BLOCK_N), value * dropout.scale, 0.0)
    _store(hidden, row_start, column_start, rows, columns, value, BLOCK_M, BLOCK_N)


@triton.jit
def ffn_backward_kernel(
    dout, w_out, pre, gate, hidden, dpre, dgate, db_in, db_gate, rows, columns, inner, dropout,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From dout (rows, inner) and w_out (inner, columns): dpre, dgate and hidden (rows, columns), the last two or None.

    db_in, db_gate: (row blocks, columns) float32, the sum of each row block's dpre and dgate before rounding, or None.
    Grid: (row blocks · column blocks,).
    """
    row_start, column_start = _tile_of(rows, columns, BLOCK_M, BLOCK_N)
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, inner, BLOCK_K):
        dout_tile = _load(dout, row_start, start, rows, inner, BLOCK_M, BLOCK_K)
        w_tile = _load(w_out, start, column_start, inner, columns, BLOCK_K, BLOCK_N)
        dhidden = tl.dot(dout_tile, w_tile, dhidden, input_precision=PRECISION)
    factor = 1.0
    if dropout is not None:
        factor = tl.where(keep_tile(dropout, column_start, row, 0, BLOCK_M, BLOCK_N), dropout.scale, 0.0)
    dhidden = dhidden * factor
    pre_tile = _load(pre, row_start, column_start, rows, columns, BLOCK_M, BLOCK_N).to(tl.float32)
    line = (row_start // BLOCK_M).to(tl.int64) * columns
    if gate is not None:
        value, slope = _activate(
            _load(gate, row_start, column_start, rows, columns, BLOCK_M, BLOCK_N).to(tl.float32), ACTIVATION
        )
        if hidden is not None:
            _store(hidden, row_start, column_start, rows, columns, value * pre_tile * factor, BLOCK_M, BLOCK_N)
        gradient = dhidden * pre_tile * slope
        _store(dgate, row_start, column_start, rows, columns, gradient, BLOCK_M, BLOCK_N)
        if db_gate is not None:
            tl.store(db_gate + line + column, tl.sum(gradient, 0), mask=column < columns)
        gradient = dhidden * value
    else:
        value, slope = _activate(pre_tile, ACTIVATION)
        if hidden is not None:
            _store(hidden, row_start, column_start, rows, columns, value * factor, BLOCK_M, BLOCK_N)
        gradient = dhidden * slope
    _store(dpre, row_start, column_start, rows, columns, gradient, BLOCK_M, BLOCK_N)
    if db_in is not None:
        tl.store(db_in + line + column, tl.sum(gradient, 0), mask=column < columns)


def _project(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    result: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
) -> None:
    """result = dropout(act(x Wᵀ + b)), or act(gate) · (x Wᵀ + b) with two weights; ``saved`` takes pre and gate where given."""
    rows, inner = x.shape
    columns = result.shape[1]
    config = configs.ffn_forward(weights[1] is not None, x.dtype, configs.arch_of(x))
    ffn_forward_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
        x=_matrix(x),
        w_in=_matrix(weights[0]),
        b_in=biases[0],
        w_gate=_matrix(weights[1]),
        b_gate=biases[1],
        hidden=_matrix(result),
        pre_out=_matrix(saved[0]),
        gate_out=_matrix(saved[1]),
        rows=rows,
        columns=columns,
        inner=inner,
        dropout=dropout_argument(dropout_p, rng_state),
        ACTIVATION=activation,
        PRECISION=configs.matmul_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias. cuBLAS, but it picks its algorithm by the number of rows: under
    ``torch.use_deterministic_algorithms(True)`` the tiled kernel, in which a row's result does not depend on the others."""
    if not torch.are_deterministic_algorithms_enabled():
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    result = x.new_empty(x.shape[0], weight.shape[0])
    if result.numel():
        _project(x, (weight, None), (bias, None), result, (None, None), _IDENTITY, 0.0, None)
    return result


def ffn_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (M, O), pre (M, F), gate (M, F)) in x.dtype; the last two (0,) unless ``save_pre``, gate also without w_gate."""
    hidden = x.new_empty(x.shape[0], w_in.shape[0])
    pre = torch.empty_like(hidden) if save_pre else None
    gate = torch.empty_like(hidden) if save_pre and w_gate is not None else None
    if hidden.numel():
        _project(x, (w_in, w_gate), (b_in, b_gate), hidden, (pre, gate), activation, dropout_p, rng_state)
    nothing = x.new_empty(0)
    out = _linear(hidden, w_out, b_out)
    if residual is not None:
        out += residual
    return out, nothing if pre is None else pre, nothing if gate is None else gate


def ffn_backward(
    dout: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    pre: Tensor,
    gate: Tensor,
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
    x_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out), each (0,) unless asked for; biases are summed in float32."""
    gated = w_gate is not None
    dpre = torch.empty_like(pre)
    dgate = torch.empty_like(gate) if gated else None
    hidden = torch.empty_like(pre) if weight_grad else None
    nothing = x.new_empty(0)
    db_in = db_gate = db_out = nothing
    if pre.numel():
        parts = _launch_backward(
            dout, w_out, pre, gate, hidden, dpre, dgate, activation, dropout_p, rng_state, bias_grad
        )
        if bias_grad:
            db_in, db_gate = (nothing if part is None else column_sum(part, x.dtype) for part in parts)
    elif bias_grad:
        db_in = x.new_zeros(pre.shape[1])
        db_gate = x.new_zeros(pre.shape[1]) if gated else nothing
    if bias_grad:
        db_out = column_sum(dout, x.dtype)
    dx = dw_in = dw_gate = dw_out = nothing
    if x_grad:
        dx = _linear(dpre, w_in.t(), None)
        if dgate is not None and w_gate is not None:
            dx += _linear(dgate, w_gate.t(), None)
    if weight_grad and hidden is not None:
        dw_in = torch.mm(dpre.t(), x)
        dw_gate = torch.mm(dgate.t(), x) if dgate is not None else nothing
        dw_out = torch.mm(dout.t(), hidden)
    return dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out


def _launch_backward(
    dout: Tensor,
    w_out: Tensor,
    pre: Tensor,
    gate: Tensor,
    hidden: Tensor | None,
    dpre: Tensor,
    dgate: Tensor | None,
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill hidden, dpre and dgate; returns the per-row-block sums of dpre and dgate, or None."""
    rows, columns = pre.shape
    config = configs.ffn_backward(dgate is not None, pre.dtype, configs.arch_of(pre))
    blocks = triton.cdiv(rows, config.block_m)
    db_in = pre.new_empty(blocks, columns, dtype=torch.float32) if bias_grad else None
    db_gate = torch.empty_like(db_in) if db_in is not None and dgate is not None else None
    ffn_backward_kernel[(blocks * triton.cdiv(columns, config.block_n),)](
        dout=_matrix(dout),
        w_out=_matrix(w_out),
        pre=_matrix(pre),
        gate=None if dgate is None else _matrix(gate),
        hidden=_matrix(hidden),
        dpre=_matrix(dpre),
        dgate=_matrix(dgate),
        db_in=db_in,
        db_gate=db_gate,
        rows=rows,
        columns=columns,
        inner=dout.shape[1],
        dropout=dropout_argument(dropout_p, rng_state),
        ACTIVATION=activation,
        PRECISION=configs.matmul_precision(pre.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return db_in, db_gate
