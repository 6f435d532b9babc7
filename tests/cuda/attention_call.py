"""Calls of attention kernels on the model of a GPU: their tensors, ``AttentionParams`` of csrc/cpu/params.h, the reference."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.reference.attention import masked_attention

RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}


class Dropout(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    ]


_KINDS = {"d": ctypes.c_int, "n": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_double, "b": ctypes.c_bool}
_FIELDS = """
d:dtype mask_dtype; n:batch heads heads_kv rows keys head_dim head_dim_v; p:q k v; n3:q_stride k_stride v_stride; p:mask;
n4:mask_stride; p:slopes; n:slopes_stride_batch; p:sinks; f:scale softcap; n:window_left window_right diagonal; dropout;
f:dropout_scale; p:out; n3:out_stride; p:lse statistics; n:statistics_stride; n2:row_stride; p:partial; b:merge; p:sequences
items_before; n:first_row first_key; p:block_table; n:max_pages page_size
"""


_BACKWARD_FIELDS = """
d:stage; p:dout; n3:dout_stride; p:dlse dq dk dv; n2:key_stride; p:dmask; n4:mask_extent; p:dslopes dsinks delta slope_rows
"""


def _fields(text: str) -> list[tuple[str, type]]:
    found: list[tuple[str, type]] = []
    for part in text.replace("\n", " ").split(";"):
        kind, _, names = part.strip().partition(":")
        if kind == "dropout":
            found.append((kind, Dropout))
            continue
        for name in names.split():
            found.append((name, _KINDS[kind[0]] * int(kind[1]) if kind[1:] else _KINDS[kind]))
    return found


class AttentionParams(ctypes.Structure):
    _fields_ = _fields(_FIELDS)


class AttentionBackwardParams(AttentionParams):
    _fields_ = _fields(_BACKWARD_FIELDS)


class Call(NamedTuple):
    """The arguments of ``fastattn::attention_forward`` but those of dropout, whose seed and offset are ``RNG_STATE``."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    softmax_scale: float = 0.3
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    softcap: float = 0.0
    sequences: Tensor | None = None
    block_table: Tensor | None = None


def tensors(
    batch: int, heads: tuple[int, int], rows: int, keys: int, dims: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    """q, k and v, contiguous."""
    torch.manual_seed(rows * keys + dims[0])
    shapes = (batch, heads[0], rows, dims[0]), (batch, heads[1], keys, dims[0]), (batch, heads[1], keys, dims[1])
    return [torch.randn(shape).to(dtype) for shape in shapes]


def projections(
    heads: tuple[int, int],
    rows: int,
    keys: int,
    dims: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
) -> list[Tensor]:
    """q, k and v in the memory order (batch, rows, heads, channels)."""
    torch.manual_seed(rows * keys + dims[0])
    shapes = ((rows, heads[0], dims[0]), (keys, heads[1], dims[0]), (keys, heads[1], dims[1]))
    return [torch.randn(batch, *shape).to(dtype).transpose(1, 2) for shape in shapes]


def forward(call: Call, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """(out, lse) by the reference, in the dtypes that the tensors have."""
    *tensors, scale, left, right, diagonal, softcap, sequences, table = call
    return masked_attention(
        *tensors, softmax_scale=scale, window_left=left, window_right=right, diagonal=diagonal, softcap=softcap,
        dropout_p=dropout_p, rng_state=RNG_STATE, sequences=sequences, block_table=table,
    )  # fmt: skip


def reference(call: Call, dtype: torch.dtype, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """``forward`` of the call in ``dtype``."""
    cast = {name: x.to(dtype) for name, x in call._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}
    return forward(call._replace(**cast), dropout_p)


def fill(call: Call, out: Tensor, lse: Tensor, dropout_p: float = 0.0) -> AttentionParams:
    """What csrc/ops/attention.h makes of a call."""
    q, k, v = call.q, call.k, call.v
    p = AttentionParams()
    p.dtype = p.mask_dtype = DTYPES[q.dtype]
    p.batch, p.heads, p.rows, p.head_dim = q.shape
    p.heads_kv, p.keys, p.head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(p, name, x.data_ptr())
        getattr(p, f"{name}_stride")[:] = x.stride()[:3]
    if call.attn_mask is not None:
        mask = call.attn_mask
        p.mask, p.mask_dtype = mask.data_ptr(), DTYPES[mask.dtype]
        p.mask_stride[:] = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    p.lse, p.row_stride[:] = lse.data_ptr(), [p.heads * p.rows, p.rows]
    if call.sequences is not None:
        p.sequences, p.batch = call.sequences.data_ptr(), call.sequences.shape[0]
        if q.shape[0] == 1:
            p.q_stride[0] = p.out_stride[0] = p.row_stride[0] = 0
        if k.shape[0] == 1:
            p.k_stride[0] = p.v_stride[0] = 0
    if call.block_table is not None:
        table = call.block_table
        p.k_stride[0], p.v_stride[0] = k.stride(0), v.stride(0)
        p.block_table, p.max_pages, p.page_size = table.data_ptr(), table.shape[1], k.shape[2]
        p.keys *= table.shape[1]
    if call.alibi_slopes is not None:
        p.slopes = call.alibi_slopes.data_ptr()
        p.slopes_stride_batch = 0 if call.alibi_slopes.shape[0] == 1 else p.heads
    if call.sinks is not None:
        p.sinks = call.sinks.data_ptr()
    p.scale, p.softcap = call.softmax_scale, call.softcap
    p.window_left, p.window_right, p.diagonal = call.window_left, call.window_right, call.diagonal
    p.dropout, p.dropout_scale = Dropout(0, 0, 0, 1.0), 1.0
    if dropout_p:
        p.dropout = Dropout(*RNG_STATE.tolist(), int(dropout_p * 2**32), 1 / (1 - dropout_p))
        p.dropout_scale = 1 / (1 - dropout_p)
    return p
