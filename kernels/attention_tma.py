"""Attention forward on GPUs with a tensor memory accelerator (sm_90, sm_100): the same sums as ``attention_forward.py``.

Tiles of q, k and v are fetched by TMA through descriptors made on the host (Luo et al., "Benchmarking and Dissecting the NVIDIA
Hopper GPU Architecture", 2024): no pointer arithmetic and no registers for a load, zeros beyond the tensor's extents, and
the swizzle that wgmma and tcgen05 read straight from shared memory. Score, softmax and the blocks to visit are the portable
kernel's own functions.

Order of the work: a tile is ``block_m`` rows of one line (a head of one sequence). Lines are taken in sections whose keys and
values fit the L2 cache together; within a section the tiles that see the most keys come first.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels import configs
from fastattn.kernels.attention_forward import first_sums, fold_keys, last_sums
from fastattn.kernels.attention_score import (
    Features,
    Inputs,
    Operand,
    edge_count,
    edge_start,
    line_of,
    operand,
    place_of,
    visible_range,
)

#: Bytes of keys and values that a section may have: of H100's 50 MB of L2, what queries and results leave for certain.
SECTION_BYTES = 32 * 1024 * 1024

#: cuTensorMapEncodeTiled: strides are multiples of 16 bytes below 2^40, extents at most 2^32; coordinates are int32.
_ALIGNMENT, _STRIDE_LIMIT = 16, 1 << 40


def why_not(inputs: Inputs, features: Features) -> str | None:
    """Why this kernel does not take a call, or None."""
    if features.mask != "none" or features.dropout:
        return "an explicit mask or dropout"
    if inputs.sizes.keys == 0:
        return "no keys"
    if features.sequences:
        return "sequences with lengths of their own"
    for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        strides = [s for s, n in zip((x.batch, x.head, x.row), x.ptr.shape, strict=False) if n > 1]
        size = x.ptr.element_size()
        if x.ptr.data_ptr() % _ALIGNMENT or any(s * size % _ALIGNMENT or s == 0 for s in strides):
            return f"{name}: TMA reads lines whose starts are multiples of {_ALIGNMENT} bytes"
        if any(s * size >= _STRIDE_LIMIT for s in strides):
            return f"{name}: a stride of 2^40 bytes or more"
    return None


def chosen(
    inputs: Inputs, features: Features, arch: configs.Arch
) -> configs.AttentionTma | configs.AttentionGluon | None:
    """The kernel that takes the call where its tiles can be fetched by TMA, by its configuration; None: the portable one."""
    widest = max(features.block_d, features.block_dv)
    windowed = features.left or features.right
    config = configs.attention_forward_sm90(widest, inputs.q.ptr.dtype, features.extras, windowed, arch)
    if config is None or isinstance(config, configs.AttentionPortable) or why_not(inputs, features) is not None:
        return None
    plain = features.head_dim == features.head_dim_v == widest and not features.sinks
    return configs.AFTER_GLUON if isinstance(config, configs.AttentionGluon) and not plain else config


def described(x: Operand, block_rows: int, block_dim: int) -> TensorDescriptor:
    """x as tiles of block_rows x block_dim of one head."""
    shape = list(x.ptr.shape)
    # The stride of a dimension of one element is never used, but must be valid.
    strides = [s if n > 1 else _ALIGNMENT for s, n in zip((x.batch, x.head, x.row), shape, strict=False)]
    return TensorDescriptor(x.ptr, shape, [*strides, 1], [1, 1, block_rows, block_dim])


def section_lines(inputs: Inputs, features: Features, lines: int) -> int:
    """Lines per section: as many groups of lines with the same keys and values as fit ``SECTION_BYTES``, at least one."""
    channels = features.head_dim + features.head_dim_v
    key_head_bytes = max(1, inputs.sizes.keys) * channels * inputs.k.ptr.element_size()
    return min(lines, max(1, SECTION_BYTES // key_head_bytes) * inputs.sizes.group)


@triton.jit
def place_of_tile(tile, blocks, lines, section):
    """(row block, line) of a tile: section by section, in each the last row blocks of all its lines first."""
    begin = tile // (blocks * section) * section
    count = tl.minimum(section, lines - begin)
    rest = tile - begin * blocks
    return blocks - 1 - rest // count, begin + rest % count


@triton.jit
def _load(tiles, batch, head, start, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    return tiles.load([batch, head, start, 0]).reshape([ROWS, BLOCK_DIM])


@triton.jit
def _attend(
    acc, l, m, q, k_tiles, v_tiles, row_start, visit, place, head, slope, inputs,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``attention_forward.attend`` with k and v by TMA, in steps of BLOCK_N keys."""
    begin, full_begin, full_end, end = visit
    row = row_start + tl.arange(0, BLOCK_M)
    head_k = head // inputs.sizes.group
    blocks = edge_count(begin, full_begin, full_end, end, BLOCK_N) if MASKED else (full_end - full_begin) // BLOCK_N
    for index in tl.range(0, blocks):
        start = edge_start(index, begin, full_begin, full_end, BLOCK_N) if MASKED else full_begin + index * BLOCK_N
        k = _load(k_tiles, place.sequence, head_k, start, BLOCK_N, FEATURES.block_d)
        v = _load(v_tiles, place.sequence, head_k, start, BLOCK_N, FEATURES.block_dv)
        raw = tl.dot(q, tl.trans(k))
        acc, l, m = fold_keys(
            acc, l, m, raw, v, row, start, place, head, slope, inputs, FEATURES, MASKED, BLOCK_M, BLOCK_N
        )
    return acc, l, m


@triton.jit
def _attend_tile(
    block, line, q_tiles, k_tiles, v_tiles, k_edges, v_edges, out_tiles, lse, inputs,
    FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """out and lse of row block ``block`` of ``line``."""
    row_start, batch, head = block * BLOCK_M, line // inputs.sizes.heads, line % inputs.sizes.heads
    place = place_of(batch, inputs, FEATURES)
    row_last = tl.minimum(row_start + BLOCK_M, place.rows) - 1
    q = _load(q_tiles, batch, head, row_start, BLOCK_M, FEATURES.block_d)
    slope = 0.0
    if FEATURES.alibi:
        slope = tl.load(inputs.slopes + batch * inputs.slopes_batch + head)
    acc, l, m = first_sums(head, inputs, FEATURES, BLOCK_M)
    visit = visible_range(row_start, row_last, place, inputs, FEATURES, BLOCK_N)
    acc, l, m = _attend(
        acc, l, m, q, k_tiles, v_tiles, row_start, visit, place, head, slope, inputs,
        FEATURES, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc, l, m = _attend(
        acc, l, m, q, k_edges, v_edges, row_start, visit, place, head, slope, inputs,
        FEATURES, True, BLOCK_M, EDGE_N,
    )  # fmt: skip
    acc, natural = last_sums(acc, l, m)
    tile = acc.to(out_tiles.dtype).reshape([1, 1, BLOCK_M, FEATURES.block_dv])
    out_tiles.store([batch, head, row_start, 0], tile)
    row = row_start + tl.arange(0, BLOCK_M)
    tl.store(lse + line_of(place, head, inputs) + row, natural, mask=row < place.rows)


@triton.jit
def attention_forward_tma_kernel(
    q_tiles, k_tiles, v_tiles, k_edges, v_edges, out_tiles, lse, flags, inputs, lines, section,
    FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out (B, H, Nq, Dv) and lse (B, H, Nq) float32 contiguous. Grid: one program a tile, or if PERSISTENT at most that many.

    flags (tiles, 2) int32 or None: only tiles of which one is set.
    """
    blocks = tl.cdiv(inputs.sizes.rows, BLOCK_M)
    if flags is not None:  # noqa: SIM102  Triton's "and" would evaluate both sides
        if (tl.load(flags + 2 * tl.program_id(0)) | tl.load(flags + 2 * tl.program_id(0) + 1)) == 0:
            return
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), blocks * lines, tl.num_programs(0)):
            block, line = place_of_tile(tile, blocks, lines, section)
            _attend_tile(
                block, line, q_tiles, k_tiles, v_tiles, k_edges, v_edges, out_tiles, lse, inputs,
                FEATURES, BLOCK_M, BLOCK_N, EDGE_N,
            )  # fmt: skip
    else:
        block, line = place_of_tile(tl.program_id(0), blocks, lines, section)
        _attend_tile(
            block, line, q_tiles, k_tiles, v_tiles, k_edges, v_edges, out_tiles, lse, inputs,
            FEATURES, BLOCK_M, BLOCK_N, EDGE_N,
        )  # fmt: skip


def launch_forward(
    inputs: Inputs,
    features: Features,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: configs.AttentionTma,
    flags: torch.Tensor | None = None,
) -> None:
    """Fill out and lse, where ``why_not`` has nothing to say. ``flags`` (tiles, 2) int32: only tiles of which one is set."""
    batch, heads, rows, _ = out.shape
    lines, tiles = batch * heads, triton.cdiv(rows, config.block_m) * batch * heads
    persistent = config.persistent and flags is None
    attention_forward_tma_kernel[(min(tiles, configs.multiprocessors(out)) if persistent else tiles,)](
        q_tiles=described(inputs.q, config.block_m, features.block_d),
        k_tiles=described(inputs.k, config.block_n, features.block_d),
        v_tiles=described(inputs.v, config.block_n, features.block_dv),
        k_edges=described(inputs.k, config.edge_n, features.block_d),
        v_edges=described(inputs.v, config.edge_n, features.block_dv),
        out_tiles=described(operand(out), config.block_m, features.block_dv),
        lse=lse,
        flags=flags,
        inputs=inputs,
        lines=lines,
        section=section_lines(inputs, features, lines),
        FEATURES=features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        EDGE_N=config.edge_n,
        PERSISTENT=persistent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
