"""Attention forward for sm_90 in Gluon: one warp fetches, two warpgroups compute. Compiled and modelled, never run on a GPU.

No GPU has run this kernel: the compiler shows its instructions, registers and spills, and ``tests/triton/test_gluon_model.py``
runs this very source on a model of shared memory, barriers and asynchronous copies and products. Nothing chooses it by
itself; a tuned configuration (``python -m fastattn tune``, which compares its results first) may.

The schedule is FlashAttention-3's (Shah et al., 2024). A program is 128 rows of a head, 64 for each computing warpgroup:

* the producer warp sends, by TMA, q and then each block of keys and of values into rings of ``stages`` buffers. A buffer has a
  barrier that its bytes complete ("ready") and one on which both warpgroups arrive when they have read it ("empty");
* a computing warpgroup starts s(j) = q k(j) and then acc += p(j - 1) v(j - 1), and does the softmax of s(j) while the latter runs;
  p stays in registers. Before it starts a pair of products it waits for its turn, which it then gives to the other warpgroup:
  so one's softmax runs under the other's products.

Blocks at the edge of what rows see come first. In them p is 0 where a row does not see a key, but 0 · NaN = NaN: the program
notes in ``flags`` whether a result is NaN, and ``attention_tma`` computes such tiles again.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn.kernels import attention_tma, configs
from fastattn.kernels.attention_forward import last_sums
from fastattn.kernels.attention_score import (
    LOG2E,
    Features,
    Inputs,
    Operand,
    edge_count,
    edge_start,
    line_of,
    operand,
    place_of,
    score_tile,
    visible_range,
)
from fastattn.kernels.attention_tma import place_of_tile

# Triton 3.9 has other names for the same two instructions than 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

#: Rows of a computing warpgroup: one wgmma.
_ROWS = gl.constexpr(64)


@gluon.jit
def ring_slot(index, STAGES: gl.constexpr):
    """(buffer, parity of its barriers) of the index-th block in a ring: parity p means that phase p, p + 2, ... completes."""
    return index % STAGES, (index // STAGES) & 1


@gluon.jit
def turn_parity(index, CONSUMER: gl.constexpr):
    """Parity of warpgroup CONSUMER's turn to start its index-th products; the first turn of warpgroup 0 comes by itself."""
    return (index + CONSUMER + 1) & 1


@gluon.jit
def block_start(index, begin, full_begin, full_end, end, BLOCK: gl.constexpr):
    """First key of the index-th block: those at the edges, then the full ones."""
    edges = edge_count(begin, full_begin, full_end, end, BLOCK)
    edge = edge_start(index, begin, full_begin, full_end, BLOCK)
    return gl.where(index < edges, edge, full_begin + (index - edges) * BLOCK)


@gluon.jit
def _produce(
    q_tiles, k_tiles, v_tiles, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty,
    batch, head, head_k, row_start, blocks, begin, full_begin, full_end, end,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Everything that the computing warpgroups read, in the order in which they need it."""
    for consumer in gl.static_range(2):
        mbarrier.expect(q_ready.index(consumer), q_tiles.block_type.nbytes)
        row = row_start + consumer * _ROWS
        _load(q_tiles, [batch, head, row, 0], q_ready.index(consumer), q_buffer.index(consumer))
    for index in range(blocks):
        start = block_start(index, begin, full_begin, full_end, end, BLOCK_N)
        slot, parity = ring_slot(index, STAGES)
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        mbarrier.expect(k_ready.index(slot), k_tiles.block_type.nbytes)
        _load(k_tiles, [batch, head_k, start, 0], k_ready.index(slot), k_ring.index(slot))
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        mbarrier.expect(v_ready.index(slot), v_tiles.block_type.nbytes)
        _load(v_tiles, [batch, head_k, start, 0], v_ready.index(slot), v_ring.index(slot))


@gluon.jit
def _softmax_step(
    s, l, m, row, start, place, head, inputs,
    FEATURES: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """``attention_forward.fold_keys`` up to the product: (p, l, m, the factor of what came before)."""
    key = start + gl.arange(0, BLOCK_N, layout=KEYS)
    s, _, visible = score_tile(s, row[:, None], key[None, :], place, head, 0.0, inputs, FEATURES, MASKED)
    s = s * LOG2E
    if MASKED:
        s = gl.where(visible, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    m_finite = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = gl.exp2(s - m_finite[:, None])
    alpha = gl.exp2(m - m_finite)
    l = l * alpha + gl.sum(p, 1)
    return p, l, m_new, alpha


@gluon.jit
def _consume_blocks(
    first, last, acc, l, m, p, q, k_ring, v_ring, k_ready, k_empty, v_ready, v_empty, turns,
    row, place, head, begin, full_begin, full_end, end, inputs,
    CONSUMER: gl.constexpr, FEATURES: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    DIM: gl.constexpr, S_LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Blocks first .. last - 1: start s(j) and acc += p(j - 1) v(j - 1), then the softmax of s(j). Returns also p(last - 1)."""
    KEYS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ACC_ROWS: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    for index in range(first, last):
        slot, parity = ring_slot(index, STAGES)
        slot_before, parity_before = ring_slot(index - 1, STAGES)
        mbarrier.wait(k_ready.index(slot), parity)
        mbarrier.wait(v_ready.index(slot_before), parity_before)
        mbarrier.wait(turns.index(CONSUMER), turn_parity(index - 1, CONSUMER))
        k = k_ring.index(slot).reshape([BLOCK_N, DIM])
        zero = gl.zeros([_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_ring.index(slot_before).reshape([BLOCK_N, DIM]), acc, is_async=True)
        mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        start = block_start(index, begin, full_begin, full_end, end, BLOCK_N)
        weights, l, m, alpha = _softmax_step(s, l, m, row, start, place, head, inputs, FEATURES, MASKED, BLOCK_N, KEYS)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot_before), count=1)
        acc = acc * gl.convert_layout(alpha, ACC_ROWS)[:, None]
        p = gl.convert_layout(weights.to(q.dtype), P_LAYOUT)
    return acc, l, m, p


@gluon.jit
def _consume(
    out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
    batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs,
    CONSUMER: gl.constexpr, FEATURES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Rows 64 CONSUMER .. 64 CONSUMER + 63 of the tile: out, lse, and in flags whether a result is NaN."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC_LAYOUT, k_width=2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ACC_ROWS: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    place = place_of(batch, inputs, FEATURES)
    first_row = row_start + CONSUMER * _ROWS
    row = first_row + gl.arange(0, _ROWS, layout=S_ROWS)
    edges = gl.maximum(edge_count(begin, full_begin, full_end, end, BLOCK_N), 1)

    mbarrier.wait(q_ready.index(CONSUMER), 0)
    q = q_buffer.index(CONSUMER).reshape([_ROWS, DIM])
    mbarrier.wait(k_ready.index(0), 0)
    k = k_ring.index(0).reshape([BLOCK_N, DIM])
    zero = gl.zeros([_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    m = gl.full([_ROWS], float("-inf"), gl.float32, S_ROWS)
    l = gl.zeros([_ROWS], gl.float32, S_ROWS)
    start = block_start(0, begin, full_begin, full_end, end, BLOCK_N)
    weights, l, m, _ = _softmax_step(
        s, l, m, row, start, place, head, inputs, FEATURES, True, BLOCK_N, gl.SliceLayout(0, S_LAYOUT)
    )
    p = gl.convert_layout(weights.to(q.dtype), P_LAYOUT)
    acc = gl.zeros([_ROWS, DIM], gl.float32, ACC_LAYOUT)
    acc, l, m, p = _consume_blocks(
        1, edges, acc, l, m, p, q, k_ring, v_ring, k_ready, k_empty, v_ready, v_empty, turns,
        row, place, head, begin, full_begin, full_end, end, inputs,
        CONSUMER, FEATURES, True, BLOCK_N, STAGES, DIM, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    acc, l, m, p = _consume_blocks(
        edges, blocks, acc, l, m, p, q, k_ring, v_ring, k_ready, k_empty, v_ready, v_empty, turns,
        row, place, head, begin, full_begin, full_end, end, inputs,
        CONSUMER, FEATURES, False, BLOCK_N, STAGES, DIM, S_LAYOUT, ACC_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    slot, parity = ring_slot(blocks - 1, STAGES)
    mbarrier.wait(v_ready.index(slot), parity)
    acc = warpgroup_mma(p, v_ring.index(slot).reshape([BLOCK_N, DIM]), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))

    acc, natural = last_sums(acc, gl.convert_layout(l, ACC_ROWS), gl.convert_layout(m, ACC_ROWS))
    gl.store(flags + 2 * gl.program_id(0) + CONSUMER, gl.max(gl.max((acc != acc).to(gl.int32), 1), 0))
    # The last product has read q long ago: its buffer takes the results.
    q.store(acc.to(q.dtype))
    fence_async_shared()
    _store(out_tiles, [batch, head, first_row, 0], q_buffer.index(CONSUMER))
    out_row = first_row + gl.arange(0, _ROWS, layout=ACC_ROWS)
    gl.store(lse + line_of(place, head, inputs) + out_row, natural, mask=out_row < place.rows)
    tma.store_wait(pendings=0)


@gluon.jit
def _consume_first(
    out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
    batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs,
    FEATURES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    _consume(
        out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
        batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs, 0, FEATURES, BLOCK_N, STAGES, DIM,
    )  # fmt: skip


@gluon.jit
def _consume_second(
    out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
    batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs,
    FEATURES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    _consume(
        out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
        batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs, 1, FEATURES, BLOCK_N, STAGES, DIM,
    )  # fmt: skip


@gluon.jit
def attention_forward_gluon_kernel(
    q_tiles, k_tiles, v_tiles, out_tiles, lse, flags, inputs, lines, section,
    FEATURES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """out (B, H, Nq, D), lse (B, H, Nq) float32 contiguous, flags int32 two a tile. Grid: (row blocks · H · B,)."""
    TILE_ROWS: gl.constexpr = 2 * _ROWS
    block, line = place_of_tile(gl.program_id(0), gl.cdiv(inputs.sizes.rows, TILE_ROWS), lines, section)
    row_start, batch, head = block * TILE_ROWS, line // inputs.sizes.heads, line % inputs.sizes.heads
    head_k = head // inputs.sizes.group
    place = place_of(batch, inputs, FEATURES)
    row_last = gl.minimum(row_start + TILE_ROWS, place.rows) - 1
    begin, full_begin, full_end, end = visible_range(row_start, row_last, place, inputs, FEATURES, BLOCK_N)
    blocks = edge_count(begin, full_begin, full_end, end, BLOCK_N) + (full_end - full_begin) // BLOCK_N
    # Rows that see nothing go through one block of which every pair is hidden.
    blocks = gl.maximum(blocks, 1)

    q_buffer = gl.allocate_shared_memory(q_tiles.dtype, [2, 1, 1, _ROWS, DIM], q_tiles.layout)
    k_ring = gl.allocate_shared_memory(k_tiles.dtype, [STAGES, 1, 1, BLOCK_N, DIM], k_tiles.layout)
    v_ring = gl.allocate_shared_memory(v_tiles.dtype, [STAGES, 1, 1, BLOCK_N, DIM], v_tiles.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(2):
        mbarrier.init(q_ready.index(consumer), count=1)
        mbarrier.init(turns.index(consumer), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (
                _consume_first,
                (
                    out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty,
                    turns, batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs,
                    FEATURES, BLOCK_N, STAGES, DIM,
                ),
            ),
            (
                _consume_second,
                (
                    out_tiles, lse, flags, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty,
                    turns, batch, head, row_start, blocks, begin, full_begin, full_end, end, inputs,
                    FEATURES, BLOCK_N, STAGES, DIM,
                ),
            ),
            (
                _produce,
                (
                    q_tiles, k_tiles, v_tiles, q_buffer, k_ring, v_ring, q_ready, k_ready, k_empty, v_ready, v_empty,
                    batch, head, head_k, row_start, blocks, begin, full_begin, full_end, end, BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        # Registers a thread; the first partition takes what is left, 240 as well.
        [240, 24],
    )  # fmt: skip


def _described(x: Operand, block_rows: int, dim: int) -> TensorDescriptor:
    plain = attention_tma.described(x, block_rows, dim)
    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.ptr.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, element)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def launch_forward(
    inputs: Inputs, features: Features, out: torch.Tensor, lse: torch.Tensor, config: configs.AttentionGluon
) -> None:
    """Fill out and lse, where ``attention_tma.chosen`` gave ``config``."""
    batch, heads, rows, dim = out.shape
    lines, tiles = batch * heads, triton.cdiv(rows, 128) * batch * heads
    flags = torch.empty(tiles, 2, dtype=torch.int32, device=out.device)
    attention_forward_gluon_kernel[(tiles,)](
        q_tiles=_described(inputs.q, 64, dim),
        k_tiles=_described(inputs.k, config.block_n, dim),
        v_tiles=_described(inputs.v, config.block_n, dim),
        out_tiles=_described(operand(out), 64, dim),
        lse=lse,
        flags=flags,
        inputs=inputs,
        lines=lines,
        section=attention_tma.section_lines(inputs, features, lines),
        FEATURES=features,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        DIM=dim,
        num_warps=4,
        # Of 65536 registers for 384 threads; the partitions share them as worker_num_regs says.
        maxnreg=168,
    )
    if features.left or features.right:
        # Beyond a sequence TMA reads zeros: only a window hides values that exist.
        attention_tma.launch_forward(inputs, features, out, lse, configs.AFTER_GLUON, flags)
