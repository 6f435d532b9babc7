"""What every attention kernel shares: arguments, tile loads, the score of a (query, key) pair and which blocks to visit.

Score of row i and key j (``attention_forward`` has the operator's contract):
    s = softmax_scale · q_i·k_j;  s = softcap · tanh(s / softcap);  s += mask_ij;  s -= slope · |i + diagonal - j|
visible iff  -window_left <= j - (i + diagonal) <= window_right, the mask is not False and not -inf.

Blocks of which every pair is visible are visited without any test, those at the edges with all of them, the others never.

A program works on a head of a *sequence*: a batch entry, or with the operator's ``sequences`` a row of that table, which is
read here, on the device. Blocks are counted from a sequence's own first row and key, so that it gives the bits it gives alone.
Of packed sequences, which lie one after the other, s has the blocks from begin_s // BLOCK + s on, as many as it can need: a block
finds its sequence by bisection.
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

#: Up to this many rows of a sequence are a decoding step.
FEW_ROWS = tl.constexpr(8)


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
    """Extents of the tensors."""

    heads: int  # of q
    group: int  # query heads per key head
    rows: int
    keys: int
    line: int  # heads * rows: what a batch entry of lse takes; 0 where all sequences lie in one


class Sequences(NamedTuple):
    """The operator's ``sequences``: (count, 5) int64, contiguous."""

    table: Any
    count: int


class Pages(NamedTuple):
    """The operator's ``block_table``: (sequences, row) int32, contiguous."""

    table: Any
    row: int
    size: int  # keys of a page


class Place(NamedTuple):
    """A sequence inside a kernel; ``row_first`` and ``key_first`` are where it begins in its batch entry."""

    sequence: Any
    rows: Any
    keys: Any
    diagonal: Any
    row_first: Any
    key_first: Any


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
    sequences: bool = False
    q_packed: bool = False  # all sequences lie in one batch entry of q
    k_packed: bool = False
    paged: bool = False
    few_elsewhere: bool = (
        False  # packed sequences of up to FEW_ROWS rows are another kernel's (``attention_decode.py``)
    )
    append: bool = False  # the last keys are those of ``Inputs.fresh``

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


class Fresh(NamedTuple):
    """Keys and values (B, Hk, rows, D) of this call's own tokens, the last of their sequences, not yet in the cache."""

    k: Operand
    v: Operand


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
    sequences: Sequences | None = None
    pages: Pages | None = None
    fresh: Fresh | None = None


def operand(x: torch.Tensor, packed: bool = False) -> Operand:
    """x (B, H, N, D) as a kernel argument; its last stride is 1 (see ``unit_last_stride``). ``packed``: B = 1 for all sequences."""
    return Operand(x, 0 if packed else x.stride(0), x.stride(1), x.stride(2))


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
    sequences: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> tuple[Inputs, Features]:
    """Kernel arguments and compiled features of a call. ``score.left`` and ``score.right`` are the operator's, -1 = unlimited."""
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    dropout = dropout_argument(dropout_p, rng_state)
    several = sequences is not None and sequences.shape[0] > 1
    k_packed = several and k.shape[0] == 1 and block_table is None
    # One sequence in a batch entry of more rows than a decoding step has may have few itself: found as it is among others.
    q_packed = sequences is not None and q.shape[0] == 1 and (several or rows > FEW_ROWS.value)
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
        sequences=sequences is not None,
        q_packed=q_packed,
        k_packed=k_packed,
        paged=block_table is not None,
    )
    inputs = Inputs(
        q=operand(q, q_packed),
        k=operand(k, k_packed),
        v=operand(v, k_packed),
        mask=None if attn_mask is None else mask_operand(attn_mask),
        slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        slopes_batch=heads if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0,
        sinks=None if sinks is None else sinks.contiguous(),
        sizes=Sizes(heads, heads // k.shape[1], rows, keys, 0 if q_packed else heads * rows),
        score=score._replace(left=min(score.left, _UNLIMITED), right=min(score.right, _UNLIMITED)),
        dropout=dropout,
        sequences=None if sequences is None else Sequences(sequences.contiguous(), sequences.shape[0]),
        pages=None if block_table is None else Pages(block_table.contiguous(), block_table.shape[1], keys),
    )
    return inputs, features


@triton.jit
def find_sequence(block, sequences, COLUMN: tl.constexpr, BLOCK: tl.constexpr):
    """Of packed sequences, the one that ``block`` is of, and which of its blocks; COLUMN of the table has the first positions."""
    low = block * 0
    high = low + sequences.count
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(sequences.table + middle * 5 + COLUMN).to(tl.int32)
        if begin // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    begin = tl.load(sequences.table + low * 5 + COLUMN).to(tl.int32)
    return low, block - begin // BLOCK - low


@triton.jit
def place_of(sequence, inputs, FEATURES: tl.constexpr):
    """The ``Place`` of a sequence."""
    if FEATURES.sequences:
        entry = inputs.sequences.table + sequence * 5
        row_first = tl.load(entry).to(tl.int32)
        rows = tl.load(entry + 1).to(tl.int32)
        key_first = tl.load(entry + 2).to(tl.int32)
        keys = tl.load(entry + 3).to(tl.int32)
        diagonal = tl.load(entry + 4).to(tl.int32)
        return Place(sequence, rows, keys, diagonal, row_first, key_first)
    else:
        return Place(sequence, inputs.sizes.rows, inputs.sizes.keys, inputs.score.diagonal, 0, 0)


@triton.jit
def rows_of_program(inputs, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """(place, head, first row) of a program of ``row_programs``: past place.rows if it has nothing to do."""
    program = tl.program_id(0)
    if FEATURES.q_packed:
        blocks = inputs.sizes.rows // BLOCK_M + inputs.sequences.count
        head = program // blocks
        sequence, index = find_sequence(program % blocks, inputs.sequences, 0, BLOCK_M)
        place = place_of(sequence, inputs, FEATURES)
        row_start = (tl.cdiv(place.rows, BLOCK_M) - 1 - index) * BLOCK_M
        row_start = tl.where(row_start < 0, place.rows, row_start)
        if FEATURES.few_elsewhere:
            row_start = tl.where(place.rows <= FEW_ROWS, place.rows, row_start)
        return place, head, row_start
    else:
        blocks = tl.cdiv(inputs.sizes.rows, BLOCK_M)
        head = program // blocks % inputs.sizes.heads
        place = place_of(program // blocks // inputs.sizes.heads, inputs, FEATURES)
        return place, head, (blocks - 1 - program % blocks) * BLOCK_M


def row_programs(inputs: Inputs, features: Features, block_m: int) -> int:
    """One program a block of rows and head: programs of a head are neighbours, the last rows first."""
    heads, rows = inputs.sizes.heads, inputs.sizes.rows
    if features.q_packed:
        return (rows // block_m + inputs.sequences.count) * heads
    return triton.cdiv(rows, block_m) * heads * inputs.q.ptr.shape[0]


@triton.jit
def keys_of_program(inputs, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """(place, key head, first key) of a program of ``key_programs``: past place.keys if it has nothing to do."""
    program = tl.program_id(0)
    if FEATURES.k_packed:
        blocks = inputs.sizes.keys // BLOCK_N + inputs.sequences.count
        head_k = program // blocks
        sequence, index = find_sequence(program % blocks, inputs.sequences, 2, BLOCK_N)
        place = place_of(sequence, inputs, FEATURES)
        return place, head_k, tl.where(index < 0, place.keys, index * BLOCK_N)
    else:
        blocks = tl.cdiv(inputs.sizes.keys, BLOCK_N)
        heads_k = inputs.sizes.heads // inputs.sizes.group
        place = place_of(program // blocks // heads_k, inputs, FEATURES)
        return place, program // blocks % heads_k, program % blocks * BLOCK_N


def key_programs(inputs: Inputs, features: Features, block_n: int) -> int:
    """One program a block of keys and key head."""
    heads_k, keys = inputs.sizes.heads // inputs.sizes.group, inputs.sizes.keys
    if features.k_packed:
        return (keys // block_n + inputs.sequences.count) * heads_k
    return triton.cdiv(keys, block_n) * heads_k * inputs.k.ptr.shape[0]


@triton.jit
def line_of(place, head, inputs):
    """Where a head of a sequence begins in lse (B, H, Nq)."""
    return tl.cast(place.sequence, tl.int64) * inputs.sizes.line + head * inputs.sizes.rows + place.row_first


@triton.jit
def load_rows(
    x, sequence, head, first, start, limit,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of one head of a sequence that begins at ``first``: [ROWS, BLOCK_DIM], zero past DIM and, with
    CHECK, past row ``limit``."""
    row = tl.arange(0, ROWS)
    pointers = _pointers(x, sequence, head, first + start, row, BLOCK_DIM)
    return _load(pointers, start + row < limit, DIM, BLOCK_DIM, CHECK)


@triton.jit
def load_keys(
    x, fresh, place, head, start, inputs,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FEATURES: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """``load_rows`` of keys or values; with FEATURES.paged from the sequence's pages. With FEATURES.append a block with CHECK takes
    the sequence's last ``place.rows`` ones from ``fresh``."""
    row = tl.arange(0, ROWS)
    key = start + row
    inside = key < place.keys
    if FEATURES.append and CHECK:
        inside = key < place.keys - place.rows
    if FEATURES.paged:
        page, line = page_of(key, inside, place, inputs)
        pointers = _pointers(x, page[:, None], head, 0, line, BLOCK_DIM)
    else:
        pointers = _pointers(x, place.sequence, head, place.key_first + start, row, BLOCK_DIM)
    tile = _load(pointers, inside, DIM, BLOCK_DIM, CHECK)
    if FEATURES.append and CHECK:
        own = key - (place.keys - place.rows)
        new = (own >= 0) & (own < place.rows)
        tile = tl.where(new[:, None], rows_at(fresh, place.sequence, head, own, new, DIM, BLOCK_DIM), tile)
    return tile


@triton.jit
def rows_at(x, sequence, head, row, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows ``row`` [ROWS] of a batch entry, zero where not ``inside``; ``head`` is a scalar or [ROWS, 1]."""
    return _load(_pointers(x, sequence, head, 0, row, BLOCK_DIM), inside, DIM, BLOCK_DIM, True)


@triton.jit
def store_keys(
    x, place, head, key, inside, inputs, tile, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FEATURES: tl.constexpr
):
    """Keys or values ``key`` [ROWS] of a sequence, where ``inside``."""
    if FEATURES.paged:
        page, line = page_of(key, inside, place, inputs)
        pointers = _pointers(x, page[:, None], head, 0, line, BLOCK_DIM)
    else:
        pointers = _pointers(x, place.sequence, head, place.key_first, key, BLOCK_DIM)
    tl.store(pointers, tile, mask=inside[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :])


@triton.jit
def page_of(key, inside, place, inputs):
    """(page, line in it) of each key of a sequence, int32; page 0 where not ``inside``."""
    entry = inputs.pages.table + tl.cast(place.sequence, tl.int64) * inputs.pages.row + key // inputs.pages.size
    return tl.load(entry, mask=inside, other=0), key % inputs.pages.size


@triton.jit
def _pointers(x, sequence, head, first, row, BLOCK_DIM: tl.constexpr):
    """[ROWS, BLOCK_DIM] of rows first + row, ``row`` [ROWS]; ``sequence`` is a scalar or [ROWS, 1]. All in 64 bits."""
    base = x.ptr + tl.cast(sequence, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    base += tl.cast(first, tl.int64) * x.row
    return base + row.to(tl.int64)[:, None] * x.row + tl.arange(0, BLOCK_DIM)[None, :]


@triton.jit
def _load(pointers, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    if CHECK:
        tile = tl.load(pointers, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
    elif DIM < BLOCK_DIM:
        tile = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    x, sequence, head, first, start, limit, tile, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """The converse of ``load_rows``, rounding to x's dtype."""
    row = tl.arange(0, ROWS)
    inside = (start + row < limit)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    pointers = _pointers(x, sequence, head, first + start, row, BLOCK_DIM)
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def score_tile(raw, row, key, place, head, slope, inputs, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    """Scores of raw = q·k float32 [R, C] (or its transpose: ``row`` and ``key`` are int32 that broadcast to raw's shape).

    ``head`` and ``slope`` are scalars or broadcast to it as well. Returns (score, tanh factor of the softcap, visible
    int1). Without MASKED every pair is visible.
    """
    score = raw * inputs.score.scale
    capped = score
    if FEATURES.softcap:
        capped = tanh(score / inputs.score.softcap)
        score = capped * inputs.score.softcap
    if FEATURES.alibi:
        score -= slope * tl.abs(row + place.diagonal - key).to(tl.float32)
    visible = (row < place.rows) & (key < place.keys)
    if MASKED:
        if FEATURES.left:
            visible = visible & (key - row >= place.diagonal - inputs.score.left)
        if FEATURES.right:
            visible = visible & (key - row <= place.diagonal + inputs.score.right)
        if FEATURES.mask != "none":
            base = (
                inputs.mask.ptr
                + tl.cast(place.sequence, tl.int64) * inputs.mask.batch
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
def visible_range(first, last, place, inputs, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """``visit_range`` of the keys that rows ``first`` .. ``last`` of a sequence see."""
    before = inputs.score.left - place.diagonal
    after = inputs.score.right + place.diagonal
    masked: tl.constexpr = FEATURES.mask != "none"
    return visit_range(first, last, place.keys, before, after, BLOCK_N, FEATURES.left, FEATURES.right, masked)


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
def keep_pairs(row, key_start, place, head, inputs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Dropout's keep-mask of rows ``row`` (int32 [ROWS]) and keys key_start .. key_start + KEYS: int1 [ROWS, KEYS]."""
    return keep_tile(inputs.dropout, key_start, row, place.sequence * inputs.sizes.heads + head, ROWS, KEYS)
