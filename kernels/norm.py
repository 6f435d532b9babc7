"""LayerNorm and RMSNorm in Triton: the launchers of ``fastattn::triton_norm_{forward,backward}``.

h = dropout(x) + residual, rounded to x's dtype;  y = (h - mean) · rstd · weight + bias,  rstd = 1 / sqrt(var + eps)
(layer: Ba et al. 2016, var = mean((h - mean)²); rms: Zhang & Sennrich 2019, mean = 0, var = mean(h²)). Statistics in float32,
centred so that nothing cancels. With g = dy · weight and x̂ = (h - mean) · rstd:
    dh_total = rstd · (g - mean(g)[layer] - x̂ · mean(g x̂)) + dh;   dx = dh_total through the dropout mask
    dweight = Σ_rows dy · x̂;   dbias = Σ_rows dy
A row up to ``configs.norm_forward`` (backward: ``norm_backward``) columns stays in registers, several short rows a program; a
longer one is read twice, backward in two kernels. dweight and dbias are summed per program over a fixed set of rows, then over
programs in order, both cut by the shape alone: the same bits every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.column_sum import column_sum
from fastattn.kernels.philox import dropout_argument, keep_tile


class Rows(NamedTuple):
    """A (M, N) tensor with unit last stride; None for an absent operand."""

    ptr: Any
    row: int


def _rows(x: Tensor | None) -> Rows | None:
    return None if x is None else Rows(x, x.stride(0))


@triton.jit
def _load(x, row, column, inside):
    """Tile of x at rows ``row`` int64 [R] and columns [C], float32, zero outside."""
    return tl.load(x.ptr + row[:, None] * x.row + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_columns(x, column, columns):
    """x (N,) at ``column``, float32 [1, C]."""
    return tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(x, row, column, inside, tile):
    tl.store(x.ptr + row[:, None] * x.row + column[None, :], tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden(x, residual, dropout, row, start, column, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """h = dropout(x) + residual as it will be stored: rounded to x's dtype, float32 [ROWS, BLOCK]."""
    h = _load(x, row, column, inside)
    if dropout is not None:
        keep = keep_tile(dropout, start, row.to(tl.int32), 0, ROWS, BLOCK)
        h = tl.where(keep, h * dropout.scale, 0.0)
    if residual is not None:
        h += _load(residual, row, column, inside)
    return h.to(x.ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _normalize(h, mean, rstd, weight, bias, column, columns):
    y = (h - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * _load_columns(weight, column, columns)
    if bias is not None:
        y = y + _load_columns(bias, column, columns)
    return y


@triton.jit
def norm_forward_kernel(
    x, residual, weight, bias, y, h_out, mean_out, rstd_out, rows, columns, eps, dropout,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows (BLOCK >= columns). Grid: (row blocks,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    h = _hidden(x, residual, dropout, row, 0, column, inside, ROWS, BLOCK)
    if h_out is not None:
        _store(h_out, row, column, inside, h)
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        mean = tl.sum(h, 1) / columns
        tl.store(mean_out + row, mean, mask=row < rows)
    centred = tl.where(inside, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / columns + eps)
    tl.store(rstd_out + row, rstd, mask=row < rows)
    _store(y, row, column, inside, _normalize(h, mean, rstd, weight, bias, column, columns))


@triton.jit
def norm_forward_looped_kernel(
    x, residual, weight, bias, y, h_out, mean_out, rstd_out, rows, columns, eps, dropout,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As above for rows longer than BLOCK, in two passes, of which the second finds the row in the L2 cache.

    Each lane keeps mean and Σ (h - mean)² of its own columns (Welford, 1962), which are merged at the end (Chan et al., 1983): as
    stable as centring with the whole row's mean, without a pass for it and with nothing exchanged between threads on the way.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane_mean = tl.zeros([ROWS, BLOCK], tl.float32)
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        h = _hidden(x, residual, dropout, row, start, column, inside, ROWS, BLOCK)
        if RMS:
            square += h * h
        else:
            away = h - lane_mean
            moved = lane_mean + away * (1.0 / (start // BLOCK + 1))
            square += tl.where(inside, away * (h - moved), 0.0)
            lane_mean = tl.where(inside, moved, lane_mean)
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        count = tl.cdiv(columns - tl.arange(0, BLOCK), BLOCK).to(tl.float32)[None, :]
        mean = tl.sum(lane_mean * count, 1) / columns
        tl.store(mean_out + row, mean, mask=row < rows)
        between = lane_mean - mean[:, None]
        square += between * between * count
    rstd = 1.0 / tl.sqrt_rn(tl.sum(square, 1) / columns + eps)
    tl.store(rstd_out + row, rstd, mask=row < rows)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        h = _hidden(x, residual, dropout, row, start, column, inside, ROWS, BLOCK)
        if h_out is not None:
            _store(h_out, row, column, inside, h)
        _store(y, row, column, inside, _normalize(h, mean, rstd, weight, bias, column, columns))


@triton.jit
def _input_gradient(dy, h, mean, rstd, weight, column, columns, row, inside):
    """(dy, x̂, g = dy · weight), float32 tiles, zero outside."""
    dy_tile = _load(dy, row, column, inside)
    normal = tl.where(inside, (_load(h, row, column, inside) - mean[:, None]) * rstd[:, None], 0.0)
    g = dy_tile
    if weight is not None:
        g = g * _load_columns(weight, column, columns)
    return dy_tile, normal, g


@triton.jit
def _store_gradients(
    total, dh, dh_total, dx, dropout, row, start, column, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    if dh is not None:
        total += _load(dh, row, column, inside)
    _store(dh_total, row, column, inside, total)
    if dx is not None:
        keep = keep_tile(dropout, start, row.to(tl.int32), 0, ROWS, BLOCK)
        _store(dx, row, column, inside, tl.where(keep, total * dropout.scale, 0.0))


@triton.jit
def norm_backward_kernel(
    dy, dh, h, weight, mean, rstd, dh_total, dx, dweight, dbias, rows, columns, chunk, dropout,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows i * chunk .. (i + 1) * chunk in program i; dweight, dbias (programs, columns) float32 partial sums or None.

    STAGES > 1 copies the next rows to shared memory while these are computed: a program alone on its multiprocessor would else
    leave the memory idle from one load to the next.
    """
    column = tl.arange(0, BLOCK)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    dweight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        rstd_row = tl.load(rstd + row, mask=row < end, other=0.0)
        mean_row = tl.zeros([ROWS], tl.float32)
        if not RMS:
            mean_row = tl.load(mean + row, mask=row < end, other=0.0)
        dy_tile, normal, g = _input_gradient(dy, h, mean_row, rstd_row, weight, column, columns, row, inside)
        total = g - normal * (tl.sum(g * normal, 1) / columns)[:, None]
        if not RMS:
            total -= (tl.sum(g, 1) / columns)[:, None]
        _store_gradients(total * rstd_row[:, None], dh, dh_total, dx, dropout, row, 0, column, inside, ROWS, BLOCK)
        if dweight is not None:
            dweight_sum += dy_tile * normal
        if dbias is not None:
            dbias_sum += dy_tile
    line = tl.program_id(0).to(tl.int64) * columns
    if dweight is not None:
        tl.store(dweight + line + column, tl.sum(dweight_sum, 0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + line + column, tl.sum(dbias_sum, 0), mask=column < columns)


@triton.jit
def norm_row_sums_kernel(
    dy, h, weight, mean, rstd, sums, rows, columns,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mean(g x̂) and for layer norm mean(g) of each row longer than BLOCK, into sums (2, rows) float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rstd_row = tl.load(rstd + row, mask=row < rows, other=0.0)
    mean_row = tl.zeros([ROWS], tl.float32)
    if not RMS:
        mean_row = tl.load(mean + row, mask=row < rows, other=0.0)
    along = tl.zeros([ROWS, BLOCK], tl.float32)
    constant = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        _, normal, g = _input_gradient(dy, h, mean_row, rstd_row, weight, column, columns, row, inside)
        along += g * normal
        constant += g
    tl.store(sums + row, tl.sum(along, 1) / columns, mask=row < rows)
    if not RMS:
        tl.store(sums + rows.to(tl.int64) + row, tl.sum(constant, 1) / columns, mask=row < rows)


@triton.jit
def norm_columns_kernel(
    dy, dh, h, weight, mean, rstd, sums, dh_total, dx, dweight, dbias, rows, columns, chunk, dropout,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of rows whose sums are known. Program (i, j): rows i * chunk .. of columns j * BLOCK ..; its dweight and dbias
    go into line i of (programs, columns), or None."""
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    dweight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        rstd_row = tl.load(rstd + row, mask=row < end, other=0.0)
        mean_row = tl.zeros([ROWS], tl.float32)
        if not RMS:
            mean_row = tl.load(mean + row, mask=row < end, other=0.0)
        dy_tile, normal, g = _input_gradient(dy, h, mean_row, rstd_row, weight, column, columns, row, inside)
        total = g - normal * tl.load(sums + row, mask=row < end, other=0.0)[:, None]
        if not RMS:
            total -= tl.load(sums + rows.to(tl.int64) + row, mask=row < end, other=0.0)[:, None]
        _store_gradients(total * rstd_row[:, None], dh, dh_total, dx, dropout, row, first, column, inside, ROWS, BLOCK)
        if dweight is not None:
            dweight_sum += dy_tile * normal
        if dbias is not None:
            dbias_sum += dy_tile
    line = tl.program_id(0).to(tl.int64) * columns
    if dweight is not None:
        tl.store(dweight + line + column, tl.sum(dweight_sum, 0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + line + column, tl.sum(dbias_sum, 0), mask=column < columns)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): y, h (M, N) in x.dtype; mean, rstd (M,) float32. h is (0,) where it is x, mean (0,) for rms."""
    rows, columns = x.shape
    y = x.new_empty(rows, columns)
    dropout = dropout_argument(dropout_p, rng_state)
    h = x.new_empty(rows, columns) if residual is not None or dropout_p > 0 else x.new_empty(0)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if rows == 0 or columns == 0:
        return y, h, mean, rstd.fill_(float("nan")) if columns == 0 else rstd
    config = configs.norm_forward(columns, configs.arch_of(x))
    arguments = {
        "x": _rows(x),
        "residual": _rows(residual),
        "weight": weight,
        "bias": bias,
        "y": _rows(y),
        "h_out": _rows(h) if h.numel() else None,
        "mean_out": mean,
        "rstd_out": rstd,
        "rows": rows,
        "columns": columns,
        "eps": eps,
        "dropout": dropout,
        "RMS": rms,
        "ROWS": config.rows,
        "BLOCK": config.columns,
        "num_warps": config.num_warps,
    }
    grid = (triton.cdiv(rows, config.rows),)
    if config.columns >= columns:
        norm_forward_kernel[grid](**arguments)
    else:
        norm_forward_looped_kernel[grid](**arguments, STAGES=config.num_stages)
    return y, h, mean, rstd


def norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    dropout_p: float,
    rng_state: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh_total (M, N), dx (M, N) or (0,) without dropout, dweight (N,), dbias (N,); the last two (0,) unless asked for)."""
    rows, columns = h.shape
    dy, dh = _unit_last_stride(dy), None if dh is None else _unit_last_stride(dh)
    dh_total = h.new_empty(rows, columns)
    dropout = dropout_argument(dropout_p, rng_state)
    dx = h.new_empty(0) if dropout is None else h.new_empty(rows, columns)
    parameter_dtype = h.dtype if weight is None else weight.dtype
    parameters = [("dweight", weight_grad), ("dbias", bias_grad)]
    if rows == 0 or columns == 0:
        nothing = h.new_empty(0)
        sums = [h.new_zeros(columns, dtype=parameter_dtype) if wanted else nothing for _, wanted in parameters]
        return dh_total, dx, sums[0], sums[1]

    arch = configs.arch_of(h)
    config = configs.norm_backward(columns, arch)
    whole = config.columns >= columns
    tile = config if whole else configs.norm_columns(arch)
    chunks = configs.row_chunks(rows, tile.rows)
    partial = {
        name: h.new_empty(chunks, columns, dtype=torch.float32) if wanted else None for name, wanted in parameters
    }
    common = {"dy": _rows(dy), "h": _rows(h), "weight": weight, "mean": mean, "rstd": rstd}
    common |= {"rows": rows, "columns": columns, "RMS": rms}
    gradients = {**partial, "dh": _rows(dh), "dh_total": _rows(dh_total), "dx": _rows(dx), "dropout": dropout}
    if dropout is None:
        gradients["dx"] = None
    gradients |= {"chunk": triton.cdiv(rows, chunks)}
    if whole:
        norm_backward_kernel[(chunks,)](**common, **gradients, **_sizes(tile))
    else:
        sums = mean.new_empty(2, rows)
        norm_row_sums_kernel[(triton.cdiv(rows, config.rows),)](**common, sums=sums, **_sizes(config))
        grid = (chunks, triton.cdiv(columns, tile.columns))
        norm_columns_kernel[grid](**common, **gradients, sums=sums, **_sizes(tile))
    dweight, dbias = (
        h.new_empty(0) if partial[name] is None else column_sum(partial[name], parameter_dtype)
        for name, _ in parameters
    )
    return dh_total, dx, dweight, dbias


def _sizes(config: configs.Norm) -> dict[str, int]:
    sizes = {"ROWS": config.rows, "BLOCK": config.columns, "STAGES": config.num_stages}
    return sizes | {"num_warps": config.num_warps}


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
