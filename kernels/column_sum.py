"""Sums over rows in a fixed order: out[n] = Σ_m x[m, n], accumulated in float32.

Used for the gradients of weights and biases that all rows share. The order depends on the shape alone, never on
scheduling, so two runs give the same bits; no atomics.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels import configs


@triton.jit
def _column_sum_kernel(x, out, rows, columns, x_row, x_column, chunk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (i, j): rows i * chunk .. (i + 1) * chunk of columns j * BLOCK_N .. into out[i, columns]."""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        # [BLOCK_M, BLOCK_N]
        offset = row.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None, :] * x_column
        total += tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    destination = out + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(destination, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < columns)


def column_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N,) in ``dtype``: the sum over the rows of x (M, N) of any strides; in two passes when there are many rows."""
    rows, columns = x.shape
    out = x.new_empty(columns, dtype=dtype)
    if columns == 0 or rows == 0:
        return out.zero_()
    config = configs.column_sum(configs.arch_of(x))
    chunks = configs.row_chunks(rows, config.block_m)
    if chunks > 1:
        partial = x.new_empty(chunks, columns, dtype=torch.float32)
        _launch(x, partial, chunks, config)
        _launch(partial, out, 1, config)
    else:
        _launch(x, out, 1, config)
    return out


def _launch(x: torch.Tensor, out: torch.Tensor, chunks: int, config: configs.ColumnSum) -> None:
    rows, columns = x.shape
    _column_sum_kernel[(chunks, triton.cdiv(columns, config.block_n))](
        x=x,
        out=out,
        rows=rows,
        columns=columns,
        x_row=x.stride(0),
        x_column=x.stride(1),
        chunk=triton.cdiv(rows, chunks),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
