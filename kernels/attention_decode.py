"""Attention of few queries (decoding): the keys of a sequence are cut into parts, one program each, and then merged.

A tile holds the queries of *all* heads that read one key head, so that every key and value is loaded once per tile:
line r of it is query r // group of head r % group. A part leaves acc, l and m of the online softmax (``attention_forward.py``), and
a second kernel merges them:
    m = max_t m_t;  l = Σ_t 2^(m_t - m) l_t;  out = Σ_t 2^(m_t - m) acc_t / l;  lse = m ln 2 + ln l
(Dao et al., "Flash-Decoding", 2023). A sink enters there, once.

Parts are PART keys, or more where MOST_PARTS of those would not do: that depends on the sequence's own length alone, so its result
does not depend on the batch. All of it is bound by reading keys and values; a part costs 2 (Dv + 2) floats a query beside them.

``Inputs.fresh``: this call's own keys and values. They take their place in the cache in the same launch; the program of the part
that they fall into writes them, and every tile takes them from ``fresh``, so that nobody waits for that.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels import configs
from fastattn.kernels.attention_forward import attend, first_sums
from fastattn.kernels.attention_score import (
    FEW_ROWS,
    LN2,
    LOG2E,
    Features,
    Inputs,
    find_sequence,
    line_of,
    operand,
    place_of,
    rows_at,
    store_keys,
    visible_range,
)

PART = tl.constexpr(256)
MOST_PARTS = tl.constexpr(64)


class Parts(NamedTuple):
    """What parts leave: acc (slots, H, rows, Dv), l and m (2, slots, H, rows), float32."""

    acc: Any
    sums: Any
    slots: int  # parts of all sequences
    each: int  # of a sequence, where all have the same number
    rows: int


@triton.jit
def _part_length(keys):
    return tl.cdiv(keys, PART * MOST_PARTS) * PART


@triton.jit
def _part_of_program(program, inputs, parts, FEATURES: tl.constexpr):
    """(place, which part of its sequence) of a slot."""
    if FEATURES.k_packed:
        sequence, index = find_sequence(program, inputs.sequences, 2, PART)
    else:
        sequence, index = program // parts.each, program % parts.each
    return place_of(sequence, inputs, FEATURES), index


@triton.jit
def _limited(visit, begin, stop, place, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """``visit`` cut to begin .. stop. Blocks with keys that are not in the cache yet are edges: only those look for them."""
    first, full_first, full_stop, last = visit
    first = tl.minimum(tl.maximum(first, begin), stop)
    full_first = tl.minimum(tl.maximum(full_first, begin), stop)
    full_stop = tl.minimum(tl.maximum(full_stop, begin), stop)
    last = tl.minimum(tl.maximum(last, begin), stop)
    if FEATURES.append:
        full_stop = tl.maximum(full_first, tl.minimum(full_stop, (place.keys - place.rows) // BLOCK_N * BLOCK_N))
    return first, full_first, full_stop, last


@triton.jit
def attention_decode_kernel(inputs, parts, tiles, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc, l and m of one part of the keys for ``BLOCK_M`` lines of one key head. Grid: (tiles · Hk · slots,)."""
    program = tl.program_id(0)
    group = inputs.sizes.group
    heads_k = inputs.sizes.heads // group
    head_k = program // tiles % heads_k
    slot = program // tiles // heads_k
    place, index = _part_of_program(slot, inputs, parts, FEATURES)
    length = _part_length(place.keys)
    begin = index * length
    stop = tl.minimum(begin + length, place.keys)
    line = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row = program % tiles * BLOCK_M // group
    last_row = tl.minimum((program % tiles * BLOCK_M + BLOCK_M - 1) // group, place.rows - 1)
    if (index < 0) | (begin >= stop) | (first_row >= place.rows) | (place.rows > FEW_ROWS):
        return

    if FEATURES.append and program % tiles == 0:
        _append(inputs, place, head_k, begin, stop, FEATURES)
    row = line // group
    head = (head_k * group + line % group)[:, None]
    inside = row < place.rows
    q = rows_at(inputs.q, place.sequence, head, place.row_first + row, inside, FEATURES.head_dim, FEATURES.block_d)
    slope = 0.0
    if FEATURES.alibi:
        slope = tl.load(inputs.slopes + place.sequence * inputs.slopes_batch + head)
    acc, l, m = first_sums(head, inputs, FEATURES, BLOCK_M)
    visit = visible_range(first_row, last_row, place, inputs, FEATURES, BLOCK_N)
    visit = _limited(visit, begin, stop, place, FEATURES, BLOCK_N)
    if FEATURES.mask == "none":
        acc, l, m = attend(
            acc, l, m, q, row, visit, place, head, head_k, slope, inputs, FEATURES, False, BLOCK_M, BLOCK_N
        )
    acc, l, m = attend(acc, l, m, q, row, visit, place, head, head_k, slope, inputs, FEATURES, True, BLOCK_M, BLOCK_N)

    cell = (tl.cast(slot, tl.int64) * inputs.sizes.heads + head_k * group + line % group) * parts.rows + row
    dim = tl.arange(0, FEATURES.block_dv)
    seen = inside & (m > float("-inf"))
    wanted = seen[:, None] & (dim < FEATURES.head_dim_v)[None, :]
    tl.store(parts.acc + cell[:, None] * FEATURES.head_dim_v + dim[None, :], acc, mask=wanted)
    tl.store(parts.sums + cell, l, mask=inside)
    count = tl.cast(parts.slots, tl.int64) * inputs.sizes.heads * parts.rows
    tl.store(parts.sums + count + cell, m, mask=inside)


@triton.jit
def _append(inputs, place, head_k, begin, stop, FEATURES: tl.constexpr):
    """Write the fresh keys and values that fall into begin .. stop to the cache."""
    own = tl.arange(0, FEW_ROWS)
    key = place.keys - place.rows + own
    inside = (own < place.rows) & (key >= begin) & (key < stop)
    k = rows_at(inputs.fresh.k, place.sequence, head_k, own, inside, FEATURES.head_dim, FEATURES.block_d)
    store_keys(inputs.k, place, head_k, key, inside, inputs, k, FEATURES.head_dim, FEATURES.block_d, FEATURES)
    v = rows_at(inputs.fresh.v, place.sequence, head_k, own, inside, FEATURES.head_dim_v, FEATURES.block_dv)
    store_keys(inputs.v, place, head_k, key, inside, inputs, v, FEATURES.head_dim_v, FEATURES.block_dv, FEATURES)


@triton.jit
def attention_combine_kernel(inputs, parts, out, lse, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """out and lse of one row of one head, BLOCK_N parts at a time. Grid: (rows · H · sequences,); with packed queries rows of
    sequences that have more are left alone, else those that no sequence has get zeros and -inf."""
    program = tl.program_id(0)
    head = program // parts.rows % inputs.sizes.heads
    place = place_of(program // parts.rows // inputs.sizes.heads, inputs, FEATURES)
    row = program % parts.rows
    if FEATURES.q_packed:
        if (place.rows > FEW_ROWS) | (row >= place.rows):
            return
    else:
        row -= place.row_first
    length = _part_length(place.keys)
    inside = (row >= 0) & (row < place.rows)
    count = tl.where(inside & (place.keys > 0), tl.cdiv(place.keys, tl.maximum(length, 1)), 0)
    slot = place.key_first // PART + place.sequence if FEATURES.k_packed else place.sequence * parts.each
    step = tl.cast(inputs.sizes.heads, tl.int64) * parts.rows
    cell = slot * step + head * parts.rows + row

    part = tl.arange(0, MOST_PARTS)
    m_part = tl.load(parts.sums + parts.slots * step + cell + part * step, mask=part < count, other=float("-inf"))
    l_part = tl.load(parts.sums + cell + part * step, mask=part < count, other=0.0)
    m = tl.max(m_part, 0)
    if FEATURES.sinks:
        sink = tl.where(inside, tl.load(inputs.sinks + head) * LOG2E, float("-inf"))
        m = tl.maximum(m, sink)
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    l = tl.sum(tl.math.exp2(m_part - m_finite) * l_part, 0)
    if FEATURES.sinks:
        l += tl.math.exp2(sink - m_finite)

    dim = tl.arange(0, FEATURES.block_dv)
    acc = tl.full([FEATURES.block_dv], 0.0, tl.float32)
    for start in tl.range(0, count, BLOCK_N):
        some = start + tl.arange(0, BLOCK_N)
        m_some = tl.load(parts.sums + parts.slots * step + cell + some * step, mask=some < count, other=float("-inf"))
        wanted = (m_some > float("-inf"))[:, None] & (dim < FEATURES.head_dim_v)[None, :]
        values = parts.acc + (cell + some * step)[:, None] * FEATURES.head_dim_v + dim[None, :]
        acc += tl.sum(tl.math.exp2(m_some - m_finite)[:, None] * tl.load(values, mask=wanted, other=0.0), 0)

    l_positive = tl.where(l == 0.0, 1.0, l)
    natural = tl.where(l == 0.0, float("-inf"), m * LN2 + tl.log(l_positive))
    tl.store(lse + line_of(place, head, inputs) + row, natural)
    base = out.ptr + tl.cast(place.sequence, tl.int64) * out.batch + tl.cast(head, tl.int64) * out.head
    base += tl.cast(place.row_first + row, tl.int64) * out.row
    tl.store(base + dim, (acc / l_positive).to(out.ptr.dtype.element_ty), mask=dim < FEATURES.head_dim_v)


def takes(inputs: Inputs, features: Features) -> bool:
    """Whether a sequence of few rows is these kernels': with dropout none is. Packed ones are told apart on the device."""
    return not features.dropout and (features.q_packed or inputs.sizes.rows <= FEW_ROWS.value)


def launch_forward(inputs: Inputs, features: Features, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill out and lse for sequences of few rows; in q with a batch entry for each also the rows that none has."""
    heads, group = inputs.sizes.heads, inputs.sizes.group
    sequences = inputs.sequences.count if inputs.sequences is not None else out.shape[0]
    rows = min(FEW_ROWS.value, inputs.sizes.rows)
    capacity = inputs.sizes.keys * (inputs.pages.row if inputs.pages is not None else 1)
    each = min(MOST_PARTS.value, triton.cdiv(capacity, PART.value))
    slots = capacity // PART.value + sequences if features.k_packed else sequences * each
    parts = Parts(
        acc=out.new_empty((slots, heads, rows, features.head_dim_v), dtype=torch.float32),
        sums=out.new_empty((2, slots, heads, rows), dtype=torch.float32),
        slots=slots,
        each=each,
        rows=rows,
    )
    arch, dtype = configs.arch_of(out), inputs.q.ptr.dtype
    config = configs.attention_decode(max(features.block_d, features.block_dv), dtype, features.extras, arch)
    tiles = triton.cdiv(rows * group, config.block_m)
    if slots:
        attention_decode_kernel[(tiles * (heads // group) * slots,)](
            inputs=inputs,
            parts=parts,
            tiles=tiles,
            FEATURES=dataclasses.replace(features, sinks=False),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    merge = configs.attention_combine(arch)
    attention_combine_kernel[(rows * heads * sequences,)](
        inputs=inputs,
        parts=parts,
        out=operand(out, features.q_packed),
        lse=lse,
        FEATURES=features,
        BLOCK_N=merge.parts,
        num_warps=merge.num_warps,
    )
