"""``AttentionParams`` of csrc/cpu/params.h from the tensors of a call, for attention kernels on the CPU's model of a GPU."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

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


def _fields() -> list[tuple[str, type]]:
    found: list[tuple[str, type]] = []
    for part in _FIELDS.replace("\n", " ").split(";"):
        kind, _, names = part.strip().partition(":")
        if kind == "dropout":
            found.append((kind, Dropout))
            continue
        for name in names.split():
            found.append((name, _KINDS[kind[0]] * int(kind[1]) if kind[1:] else _KINDS[kind]))
    return found


class AttentionParams(ctypes.Structure):
    _fields_ = _fields()


class Call(NamedTuple):
    """The arguments of ``fastattn::attention_forward`` but those of dropout."""

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


def fill(call: Call, out: Tensor, lse: Tensor) -> AttentionParams:
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
    return p
