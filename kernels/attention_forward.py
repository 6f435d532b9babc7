"""Attention forward: out = softmax(score(q, k)) v, one pass over the keys, nothing of size Nq x Nk in memory.

Online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021; FlashAttention-2, Dao 2023) in base 2: with m the running row
maximum of score · log2 e, each block of keys does
    m' = max(m, rowmax);  p = 2^(s - m');  l = l · 2^(m - m') + rowsum(p);  acc = acc · 2^(m - m') + p v
and at the end out = acc / l, lse = m ln 2 + ln l. A sink is one more logit in the denominator: m starts there and l at 1.

One program per block of query rows of one head, in one grid dimension: programs of the same head are neighbours (its keys
stay in L2), the last rows first (under a causal window they see the most keys).
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels import configs
from fastattn.kernels.attention_score import (
    LN2,
    LOG2E,
    Features,
    Inputs,
    dot_visible,
    edge_count,
    edge_start,
    keep_pairs,
    line_of,
    load_keys,
    load_rows,
    operand,
    row_programs,
    rows_of_program,
    score_tile,
    store_rows,
    visible_range,
)


@triton.jit
def fold_keys(
    acc, l, m, raw, v, row, start, place, head, slope, inputs,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: raw = q·k [BLOCK_M, BLOCK_N] of keys from ``start`` on, their v [BLOCK_N, block_dv]."""
    key = start + tl.arange(0, BLOCK_N)
    s, _, visible = score_tile(raw, row[:, None], key[None, :], place, head, slope, inputs, FEATURES, MASKED)
    s = s * LOG2E
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen nothing yet keeps m = -inf; subtracting 0 instead gives 2^-inf = 0.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.math.exp2(s - m_finite[:, None])
    alpha = tl.math.exp2(m - m_finite)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if FEATURES.dropout:
        p = tl.where(keep_pairs(row, start, place, head, inputs, BLOCK_M, BLOCK_N), p, 0.0)
    if MASKED:
        acc = dot_visible(p.to(v.dtype), v, visible, acc, FEATURES)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=FEATURES.precision)
    return acc, l, m_new


@triton.jit
def first_sums(head, inputs, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """acc [BLOCK_M, block_dv], l and m [BLOCK_M] before any key."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if FEATURES.sinks:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(inputs.sinks + head) * LOG2E
        l = l + 1.0
    return tl.full([BLOCK_M, FEATURES.block_dv], 0.0, tl.float32), l, m


@triton.jit
def last_sums(acc, l, m):
    """(out [BLOCK_M, block_dv], lse [BLOCK_M]) after the last key: zeros and -inf for a row that saw none."""
    l_positive = tl.where(l == 0.0, 1.0, l)
    lse = tl.where(l == 0.0, float("-inf"), m * LN2 + tl.log(l_positive))
    return acc / l_positive[:, None], lse


@triton.jit
def attend(
    acc, l, m, q, row, visit, place, head, head_k, slope, inputs,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the full blocks of keys of ``visit`` (or with MASKED the others) into acc [BLOCK_M, block_dv], l and m [BLOCK_M].

    row int32 [BLOCK_M]; head and slope are scalars or [BLOCK_M, 1]; all heads read ``head_k``."""
    begin, full_begin, full_end, end = visit
    fresh_k = inputs.fresh.k if FEATURES.append else None
    fresh_v = inputs.fresh.v if FEATURES.append else None
    blocks = edge_count(begin, full_begin, full_end, end, BLOCK_N) if MASKED else (full_end - full_begin) // BLOCK_N
    for index in tl.range(0, blocks):
        start = edge_start(index, begin, full_begin, full_end, BLOCK_N) if MASKED else full_begin + index * BLOCK_N
        # [BLOCK_N, block_d], [BLOCK_N, block_dv]
        k = load_keys(
            inputs.k, fresh_k, place, head_k, start, inputs,
            BLOCK_N, FEATURES.head_dim, FEATURES.block_d, FEATURES, MASKED,
        )  # fmt: skip
        v = load_keys(
            inputs.v, fresh_v, place, head_k, start, inputs,
            BLOCK_N, FEATURES.head_dim_v, FEATURES.block_dv, FEATURES, MASKED,
        )  # fmt: skip
        raw = tl.dot(q, tl.trans(k), input_precision=FEATURES.precision)
        acc, l, m = fold_keys(
            acc, l, m, raw, v, row, start, place, head, slope, inputs, FEATURES, MASKED, BLOCK_M, BLOCK_N
        )
    return acc, l, m


@triton.jit
def attention_forward_kernel(inputs, out, lse, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (B, H, Nq, Dv) any strides with unit last one; lse (B, H, Nq) float32 contiguous. Grid: ``row_programs``."""
    place, head, row_start = rows_of_program(inputs, FEATURES, BLOCK_M)
    if row_start >= place.rows:
        return
    row = row_start + tl.arange(0, BLOCK_M)
    row_last = tl.minimum(row_start + BLOCK_M, place.rows) - 1
    head_k = head // inputs.sizes.group
    q = load_rows(
        inputs.q, place.sequence, head, place.row_first, row_start, place.rows,
        BLOCK_M, FEATURES.head_dim, FEATURES.block_d, True,
    )  # fmt: skip
    slope = 0.0
    if FEATURES.alibi:
        slope = tl.load(inputs.slopes + place.sequence * inputs.slopes_batch + head)
    acc, l, m = first_sums(head, inputs, FEATURES, BLOCK_M)
    visit = visible_range(row_start, row_last, place, inputs, FEATURES, BLOCK_N)
    if FEATURES.mask == "none":
        acc, l, m = attend(
            acc, l, m, q, row, visit, place, head, head_k, slope, inputs, FEATURES, False, BLOCK_M, BLOCK_N
        )
    acc, l, m = attend(acc, l, m, q, row, visit, place, head, head_k, slope, inputs, FEATURES, True, BLOCK_M, BLOCK_N)

    acc, natural = last_sums(acc, l, m)
    if FEATURES.dropout:
        acc = acc * inputs.dropout.scale
    store_rows(
        out, place.sequence, head, place.row_first, row_start, place.rows,
        acc, BLOCK_M, FEATURES.head_dim_v, FEATURES.block_dv,
    )  # fmt: skip
    tl.store(lse + line_of(place, head, inputs) + row, natural, mask=row < place.rows)


def launch_forward(inputs: Inputs, features: Features, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill the rows of out and lse that a sequence has. Every extent is at least 1, but for the keys, which may be none."""
    widest = max(features.block_d, features.block_dv)
    config = configs.attention_forward(widest, inputs.q.ptr.dtype, features.extras, configs.arch_of(out))
    attention_forward_kernel[(row_programs(inputs, features, config.block_m),)](
        inputs=inputs,
        out=operand(out, features.q_packed),
        lse=lse,
        FEATURES=features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options,
    )
