"""What every attention kernel shares: arguments, tile loads, the score of a (query, key) pair and which blocks to visit.

Score of row i and key j (``attention_forward`` has the operator's contract):
    s = softmax_scale · q_i·k_j;  s = softcap · tanh(s / softcap);  s += mask_ij;  s -= slope · |i + diagonal - j|
visible iff  -window_left <= j - (i + diagonal) <= window_right, the mask is not False and not -inf.

Blocks of which every pair is visible are visited without any test, those at the edges with all of them, the others never.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels import configs
from fastattn.kernels.elementary import tanh
from fastattn.kernels.philox import Dropout, dropout_argument, keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# A window bound far beyond any sequence that still leaves int32 room for adding positions.
_UNLIMITED = 1 << 30


class Operand(NamedTuple):
    """A (batch, heads, rows, channels) tensor with unit stride along channels; strides in elements."""

    ptr: Any
    batch: int
    head: int
    row: int


class Mask(NamedTuple):
    """A (batch, heads, rows, keys) mask, uint8 or additive; stride 0 where its extent is 1."""

    ptr: Any
    batch: int
    head: int
    row: int
    key: int


class Sizes(NamedTuple):
    heads: int  # of q
    group: int  # query heads per key head
    rows: int
    keys: int


class Score(NamedTuple):
    """Run-time numbers of the score. ``left`` and ``right`` bound j - i (the diagonal is already added)."""

    scale: float
    softcap: float
    left: int
    right: int
    diagonal: int


@dataclass(frozen=True)
class Features:
    """What is compiled into a kernel."""

    head_dim: int
    head_dim_v: int
    left: bool
    right: bool
    mask: str  # "none", "boolean" or "additive"
    # Whether keys differ in the mask. Not by a stride of 1: inside a loop Triton 3.6 loses the constant that it makes of that.
    mask_keys: bool
    softcap: bool
    alibi: bool
    sinks: bool
    dropout: bool
    precision: str  # of tl.dot

    @property
    def extras(self) -> bool:
        """Whether anything but scale and window touches a score: more score-sized tiles live at once."""
        return self.mask != "none" or self.softcap or self.alibi or self.dropout

    @property
    def block_d(self) -> int:
        return configs.head_block(self.head_dim)

    @property
    def block_dv(self) -> int:
        return configs.head_block(self.head_dim_v)


class Inputs(NamedTuple):
    """The kernel arguments that do not change between the kernels of one call."""

    q: Operand
    k: Operand
    v: Operand
    mask: Mask | None
    slopes: Any  # (1 | batch, heads) float32
    slopes_batch: int
    sinks: Any  # (heads,) float32
    sizes: Sizes
    score: Score
    dropout: Dropout | None


def operand(x: torch.Tensor) -> Operand:
    """x (B, H, N, D) as a kernel argument; its last stride is 1 (see ``unit_last_stride``)."""
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where channels are contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def mask_operand(mask: torch.Tensor) -> Mask:
    """mask 4-D, each extent 1 or full; booleans are read as the bytes they are."""
    strides = (0 if extent == 1 else stride for extent, stride in zip(mask.shape, mask.stride(), strict=True))
    return Mask(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    score: Score,
    dropout_p: float,
    rng_state: torch.Tensor | None,
) -> tuple[Inputs, Features]:
    """Kernel arguments and compiled features of a call. ``score.left`` and ``score.right`` are the operator's, -1 = unlimited."""
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    dropout = dropout_argument(dropout_p, rng_state)
    features = Features(
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        left=score.left >= 0,
        right=score.right >= 0,
        mask="none" if attn_mask is None else "boolean" if attn_mask.dtype == torch.bool else "additive",
        mask_keys=attn_mask is not None and attn_mask.shape[3] > 1,
        softcap=score.softcap > 0,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        dropout=dropout is not None,
        precision=configs.matmul_precision(q.dtype),
    )
    inputs = Inputs(
        q=operand(q),
        k=operand(k),
        v=operand(v),
        mask=None if attn_mask is None else mask_operand(attn_mask),
        slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        slopes_batch=heads if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0,
        sinks=None if sinks is None else sinks.contiguous(),
        sizes=Sizes(heads, heads // k.shape[1], rows, keys),
        score=score._replace(left=min(score.left, _UNLIMITED), right=min(score.right, _UNLIMITED)),
        dropout=dropout,
    )
    return inputs, features


@triton.jit
def load_rows(
    x, batch, head, start, limit, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr
):
    """Rows start .. start + ROWS of one head of x: [ROWS, BLOCK_DIM], zero past ``limit`` (with CHECK) and past DIM."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    base = (
        x.ptr + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head + tl.cast(start, tl.int64) * x.row
    )
    pointers = base + row[:, None] * x.row + dim[None, :]
    if CHECK:
        tile = tl.load(pointers, mask=(start + row < limit)[:, None] & (dim < DIM)[None, :], other=0.0)
    elif DIM < BLOCK_DIM:
        tile = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(x, batch, head, start, limit, tile, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The converse of ``load_rows``, rounding to x's dtype."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    base = (
        x.ptr + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head + tl.cast(start, tl.int64) * x.row
    )
    inside = (start + row < limit)[:, None] & (dim < DIM)[None, :]
    tl.store(base + row[:, None] * x.row + dim[None, :], tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def score_tile(raw, row, key, batch, head, slope, inputs, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    """Scores of raw = q·k float32 [R, C] (or its transpose: ``row`` and ``key`` are int32 that broadcast to raw's shape).

    Returns (score, tanh factor of the softcap, visible int1). Without MASKED every pair is visible.
    """
    score = raw * inputs.score.scale
    capped = score
    if FEATURES.softcap:
        capped = tanh(score / inputs.score.softcap)
        score = capped * inputs.score.softcap
    if FEATURES.alibi:
        score -= slope * tl.abs(row + inputs.score.diagonal - key).to(tl.float32)
    visible = (row < inputs.sizes.rows) & (key < inputs.sizes.keys)
    if MASKED:
        if FEATURES.left:
            visible = visible & (key - row >= inputs.score.diagonal - inputs.score.left)
        if FEATURES.right:
            visible = visible & (key - row <= inputs.score.diagonal + inputs.score.right)
        if FEATURES.mask != "none":
            base = (
                inputs.mask.ptr
                + tl.cast(batch, tl.int64) * inputs.mask.batch
                + tl.cast(head, tl.int64) * inputs.mask.head
            )
            pointers = base + row.to(tl.int64) * inputs.mask.row
            if FEATURES.mask_keys:
                pointers += key
            else:
                pointers += key * 0
            if FEATURES.mask == "boolean":
                visible = visible & (tl.load(pointers, mask=visible, other=0) != 0)
            else:
                bias = tl.load(pointers, mask=visible, other=float("-inf")).to(tl.float32)
                visible = visible & (bias != float("-inf"))
                score += bias
    return score, capped, visible


@triton.jit
def dot_visible(weight, x, visible, acc, FEATURES: tl.constexpr):
    """acc + weight @ x, weight [R, C] zero where not visible, x [C, D]: what is not visible cannot reach a row.

    In a product 0 · NaN = NaN, so lines of x that hold a NaN or an infinity are left out of it, and the rows that do see such a
    line become NaN.
    """
    wide = x.to(tl.float32)
    broken = tl.max((wide - wide != 0.0).to(tl.int32), 1)  # [C]
    acc = tl.dot(weight, tl.where(broken[:, None] > 0, 0.0, wide).to(x.dtype), acc, input_precision=FEATURES.precision)
    poisoned = tl.max(visible.to(tl.int32) * broken[None, :], 1)  # [R]
    # Added, not selected: a select on an accumulator aborts Triton 3.9's compiler for sm_100.
    return acc + tl.where(poisoned > 0, float("nan"), 0.0)[:, None]


@triton.jit
def visit_range(
    first,
    last,
    limit,
    before,
    after,
    BLOCK: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    NONE_FULL: tl.constexpr,
):
    """Blocks that positions first .. last see, when position p sees p - before .. p + after, cut to [0, limit).

    Returns (begin, full_begin, full_end, end): everything in [full_begin, full_end) is seen by all of first .. last. The rest is
    walked by ``edge_count`` and ``edge_start``, both ends in one loop: a third copy of its body would cost registers.
    """
    begin = 0
    full_begin = 0
    end = limit
    full_end = limit // BLOCK * BLOCK
    if HAS_BEFORE:
        begin = tl.maximum(first - before, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last - before, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_AFTER:
        end = tl.minimum(limit, last + after + 1)
        full_end = tl.maximum(tl.minimum(limit, first + after + 1), 0) // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end, full_begin)
    if NONE_FULL:
        full_begin = end
        full_end = end
    return begin, full_begin, full_end, end


@triton.jit
def edge_count(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Number of blocks in [begin, full_begin) and [full_end, end)."""
    return tl.cdiv(full_begin - begin, BLOCK) + tl.cdiv(end - full_end, BLOCK)


@triton.jit
def edge_start(index, begin, full_begin, full_end, BLOCK: tl.constexpr):
    """First position of the index-th of those blocks."""
    left = tl.cdiv(full_begin - begin, BLOCK)
    return tl.where(index < left, begin + index * BLOCK, full_end + (index - left) * BLOCK)


@triton.jit
def keep_pairs(row, key_start, batch, head, inputs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Dropout's keep-mask of rows ``row`` (int32 [ROWS]) and keys key_start .. key_start + KEYS: int1 [ROWS, KEYS]."""
    return keep_tile(inputs.dropout, key_start, row, batch * inputs.sizes.heads + head, ROWS, KEYS)
