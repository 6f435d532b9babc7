"""Tile shapes of every Triton kernel, chosen by shape, dtype and architecture.

No GPU has timed them yet: every figure below is a budget (registers without spills, shared memory of the architecture) that
``tests/triton/test_compile.py`` checks. A kernel's choice is a function under ``@choice`` (see ``choice.py``), and what
``python -m fastattn tune`` may try instead are its candidates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastattn.kernels.choice import BOTH, DTYPES, Arch, choice

#: Padded head_dims: every power of two that ``head_block`` gives.
HEAD_DIMS = (16, 32, 64, 128, 256)
#: Row lengths of norms that are told apart; beyond the largest the looped kernels do the rest.
NORM_COLUMNS = tuple(1 << bits for bits in range(4, 16))

#: Numbers of classes that are told apart: up to the largest a tile holds whole rows.
LOSS_COLUMNS = (16, 128, 1024, 2048, 4096)


@dataclass(frozen=True)
class Attention:
    """One attention kernel: ``block_m`` query rows by ``block_n`` keys a step.

    ``registers`` a thread may take. Without it ptxas at times spills a few to have a second program on a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        own = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return own if self.registers is None else own | {"maxnreg": self.registers}


@dataclass(frozen=True)
class AttentionTma:
    """The kernel of ``attention_tma.py``: ``block_n`` keys a step, ``edge_n`` where not every row sees every key.

    ``persistent``: one program per multiprocessor walks over the tiles, else one program a tile.
    """

    block_m: int
    block_n: int
    edge_n: int
    num_warps: int
    num_stages: int
    persistent: bool


@dataclass(frozen=True)
class AttentionGluon:
    """The kernel of ``attention_gluon.py``, which no GPU has run: 128 rows, ``block_n`` keys a step, rings of ``num_stages``."""

    block_n: int
    num_stages: int


@dataclass(frozen=True)
class AttentionPortable:
    """The kernel and tiles of ``attention_forward``, where one that needs more of the architecture could run."""


@dataclass(frozen=True)
class AttentionCombine:
    """The merge of decoding's ``parts`` at a time."""

    parts: int
    num_warps: int


@dataclass(frozen=True)
class Norm:
    """``rows`` rows by ``columns`` columns a step; ``columns`` < N means the looped kernels. ``num_stages`` is of their loops."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Matmul:
    """``block_m`` x ``block_n`` of the result a program, ``block_k`` of the inner dimension a step; ``tma``: aligned operands by
    TMA descriptors; ``halves``: what follows the product takes half of the columns at a time, in half the registers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    halves: bool = False


@dataclass(frozen=True)
class Elementwise:
    """torch's product (cuBLAS), and after it one kernel of ``rows`` x ``columns`` a program."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Rope:
    """``tokens`` positions of ``heads`` heads by ``pairs`` pairs of channels a program."""

    tokens: int
    heads: int
    pairs: int
    num_warps: int


@dataclass(frozen=True)
class Loss:
    """``rows`` rows by ``columns`` logits a step."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ColumnSum:
    block_m: int
    block_n: int
    num_warps: int


def arch_of(tensor: torch.Tensor) -> Arch:
    """The architecture ``tensor`` lives on; CPU tensors are the interpreter's."""
    return arch_of_device(tensor.device)


@functools.cache
def arch_of_device(device: torch.device) -> Arch:
    if device.type != "cuda":
        return Arch("interpreter")
    if torch.version.hip:
        return Arch("hip")
    major, minor = torch.cuda.get_device_capability(device)
    return Arch("cuda", 10 * major + minor)


def multiprocessors(tensor: torch.Tensor) -> int:
    """Programs that run at once on ``tensor``'s device, at one per multiprocessor; in the interpreter a few that take turns."""
    if tensor.device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def matmul_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 follows ``torch.set_float32_matmul_precision()`` as cuBLAS does.

    ``torch.get_float32_matmul_precision()`` would raise where somebody has set the precision of one backend.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def head_block(head_dim: int) -> int:
    """Channels of a tile: the next power of two, at least the 16 that a tensor core instruction takes."""
    return max(16, next_power_of_2(head_dim))


#: The interpreter's time goes by the operation, not the element: middling tiles, and still several of them in a short test.
_INTERPRETED = Attention(64, 64, 4, 1)
_INTERPRETED_MATMUL = Matmul(64, 64, 64, 4, 1, tma=True)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES, extras=BOTH)
def attention_forward(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Attention:
    """Tiles of the forward kernel. ``head_dim``: the larger padded one of q/k and v; ``extras``: ``Features.extras``.

    8 warps for 128 rows: on sm_90 a warpgroup owns the 64 rows of one wgmma. sm_80 keeps operands of mma.sync in registers, which
    halves the keys a step from head_dim 128 on; extras take a quarter of the tile, at 256 an eighth.
    """
    if arch.kind == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        return _float32_attention(head_dim, arch, (32, 16), (16, 32))
    if head_dim > 128:
        if extras:
            return Attention(32, 32, _warps(arch), 1)
        return Attention(64, 16, 8, 1) if _sm120(arch) else Attention(64, 32, _warps(arch), 2)
    if extras:
        return Attention(64, 32, 8, 2)
    if head_dim <= 64:
        return Attention(128, 64, 8, 3)
    return Attention(128, 64, 8, 3) if arch.number == 90 else Attention(128, 32, 8, 2)


def _float32_attention(head_dim: int, arch: Arch, wide: tuple[int, int], widest: tuple[int, int]) -> Attention:
    """float32 on the plain FMA path holds operands in registers, head_dim numbers for each of a thread's rows and keys: (block_m,
    block_n) is ``wide`` at 128 channels, ``widest`` at 256. AMD's lanes are twice as many with up to 512 registers each."""
    block_m, block_n = (32, 32) if head_dim <= 64 else wide if head_dim <= 128 else widest
    return Attention(block_m, block_n, _warps(arch), 1, 255 if arch.kind == "cuda" else None)


def _warps(arch: Arch) -> int:
    """Of a program that needs all registers: 256 threads of 255, on gfx942 as many lanes of 512."""
    return 4 if arch.kind == "hip" else 8


def _sm120(arch: Arch) -> bool:
    """mma.sync and 99 KiB of shared memory, with a number above those that have wgmma and tcgen05."""
    return arch.number >= 120


#: For what the Gluon kernel, once chosen, leaves: tiles of its 128 rows, one a program.
AFTER_GLUON = AttentionTma(128, 64, 32, 8, 2, False)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES, extras=BOTH, windowed=BOTH)
def attention_forward_sm90(
    head_dim: int, dtype: torch.dtype, extras: bool, windowed: bool, arch: Arch
) -> AttentionTma | AttentionGluon | AttentionPortable | None:
    """Which forward kernel sm_90 and sm_100 run where it takes the call (``attention_tma.why_not``); None: the portable one.

    ``windowed``: rows differ in how many keys they see. Then a program a tile, handed out by the hardware as others end: the
    fixed shares of a persistent grid would differ by 15 to 30 % (causal, 1024 to 16384 rows on 132 multiprocessors). A persistent
    grid costs one more tile of results in shared memory (its stores overlap the next tile) and about 30 registers, which 256
    channels and sm_100 have not got; at 256 sm_100 spills with any. Blocks at the edge of what rows see pass their values through
    registers (``dot_visible``), so they are narrower.
    """
    blackwell = arch.number >= 100
    if arch.kind != "cuda" or not 90 <= arch.number < 120 or dtype == torch.float32 or head_dim < 64:
        return None
    if head_dim == 256:
        return None if blackwell else AttentionTma(128, 64, 16 if extras else 32, 8, 2, False)
    keys = 64 if extras else 128
    if blackwell:
        return AttentionTma(128, keys, 32, 8, 2, False)
    persistent = not windowed
    edge = 32 if persistent and head_dim == 128 and not extras else 64
    return AttentionTma(128, keys, edge, 8, 3 if head_dim == 64 else 2, persistent)


@attention_forward_sm90.candidates
def _tma_tiles(
    head_dim: int, dtype: torch.dtype, extras: bool, windowed: bool, arch: Arch
) -> Iterator[AttentionTma | AttentionGluon | AttentionPortable]:
    """The portable kernel, other steps and stages, the other grid, and the only way to the Gluon kernel."""
    yield AttentionPortable()
    if head_dim == 256:
        yield AttentionTma(128, 32, 32, 8, 2, False)
        return
    for keys, stages in itertools.product((64,) if extras else (64, 128), (2, 3)):
        if head_dim == 64 or (keys, stages) != (128, 3):
            yield AttentionTma(128, keys, 32, 8, stages, False)
            if arch.number < 100 and not windowed:
                yield AttentionTma(128, keys, 32, 8, stages, True)
    if arch.number == 90 and not extras:
        yield AttentionGluon(128, 2)
        yield AttentionGluon(128, 3) if head_dim == 64 else AttentionGluon(64, 3)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES, extras=BOTH)
def attention_decode(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Attention:
    """Tiles of the decode kernel: the 16 rows of one mma.sync, whatever the group, so that a row's bits depend on nothing else.

    Reading keys is all the time: narrow steps and few warps, so that several programs with several stages share a multiprocessor.
    float32's FMA keeps rows of q and k in registers, which half as many threads spill (64 and 256 on sm_100, 128 on sm_80).
    """
    if arch.kind == "interpreter":
        return Attention(16, 64, 4, 1)
    if dtype == torch.float32:
        return Attention(16, 32 if head_dim in (32, 64) else 16, _warps(arch) if head_dim > 32 else 4, 1)
    if head_dim <= 64 and not extras:
        return Attention(16, 64, 4, 3)
    return Attention(16, 32, 4, 3 if head_dim <= 128 else 2)


@choice()
def attention_combine(arch: Arch) -> AttentionCombine:
    return AttentionCombine(16, 4)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES, extras=BOTH)
def attention_backward_queries(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Attention:
    """Tiles of the dQ kernel: q, dout and dq stay for all keys, two score-sized tiles live at once.

    At head_dim 256 q and dout of 128 rows are 128 KiB, more than sm_86, sm_89 and sm_120 have.
    """
    if arch.kind == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        tiles = _float32_attention(head_dim, arch, (32, 16), (16, 16))
        if arch.number >= 90 and head_dim == 64:
            return replace(tiles, block_n=16)  # packed sequences spill 8 bytes a thread
        # At 256 channels gfx942 spills 4 bytes a lane, but not with loads a step ahead.
        return replace(tiles, num_stages=2) if arch.kind == "hip" and head_dim > 128 else tiles
    warps = _warps(arch)
    if head_dim > 128 and extras:
        return Attention(32, 32, warps, 1)
    if head_dim > 128:
        return Attention(128, 16, 8, 1) if 90 <= arch.number < 120 else Attention(64, 32, warps, 1)
    if _sm120(arch):
        return Attention(64, 32 if head_dim <= 64 or not extras else 16, 8, 2)
    if head_dim > 64 and extras:
        return Attention(128, 16, warps, 2)
    return Attention(128, 64 if arch.number >= 90 and not extras else 32, warps, 2)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES, extras=BOTH)
def attention_backward_keys(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Attention:
    """Tiles of the dK/dV kernel (``block_n`` keys stay, ``block_m`` rows a step): two accumulators of block_n x head_dim.

    At head_dim 128 they take 128 of the 255 registers of each of 256 threads, and more than 16 rows a step spills (sm_90). At 256
    only 32 keys fit, half of a wgmma's 64 rows: mma.sync there. sm_100 accumulates in tensor memory, but pipelining spills.
    """
    if arch.kind == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        # At 256 channels gfx942 spills with 16 keys, in float32 one step at a time and in TF32 (packed sequences) two.
        return _float32_attention(head_dim, arch, (16, 16), (16, 32) if arch.kind == "hip" else (16, 16))
    if arch.kind == "hip":
        return Attention(16 if extras else 32, 128, 4, 1) if head_dim <= 128 else Attention(16, 32, 4, 1)
    if head_dim <= 64:
        return Attention(16 if extras else 32, 128, 8, 2)
    if head_dim > 128 or (extras and arch.number >= 100):
        return Attention(32, 32, 8, 1)
    if extras:
        return Attention(16, 64, 8, 2)
    if 100 <= arch.number < 120:
        return Attention(64, 64, 8, 1)
    return Attention(16, 128, 8, 2) if arch.number == 90 else Attention(32, 64, 8, 2)


@choice(head_dim=HEAD_DIMS, dtype=DTYPES)
def attention_mask_gradient(head_dim: int, dtype: torch.dtype, arch: Arch) -> Attention:
    """Tiles of the mask's gradient: the sum of dS (block_m x block_n) stays, operands are loaded anew each step."""
    if arch.kind == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32 and head_dim > 128:
        return Attention(16, 32, 4, 1)
    if dtype == torch.float32 or head_dim > 128:
        return Attention(32, 32, 4, 1)
    return Attention(64, 64, 4, 1)


def _attention_tiles(
    head_dim: int, dtype: torch.dtype, arch: Arch, tiles: tuple[tuple[int, int], ...], steps_over_keys: bool
) -> Iterator[Attention]:
    """Candidates of ``tiles`` (block_m, block_n) with 4 and 8 warps and up to 3 stages, where shared memory takes them."""
    for (block_m, block_n), warps, stages in itertools.product(tiles, (4, 8), (1, 2, 3)):
        stays, moves = (block_m, block_n) if steps_over_keys else (block_n, block_m)
        # Two operands of head_dim stay (q and dout, or k and v), two are loaded per stage.
        if (2 * stays + 2 * stages * moves) * head_dim * dtype.itemsize <= arch.shared:
            yield Attention(block_m, block_n, warps, stages)


@attention_forward.candidates
def _forward_tiles(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Iterator[Attention]:
    tiles = ((32, 32), (64, 32)) if dtype == torch.float32 else ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
    yield from _attention_tiles(head_dim, dtype, arch, tiles, True)


@attention_backward_queries.candidates
def _queries_tiles(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Iterator[Attention]:
    tiles = ((32, 32), (64, 32)) if dtype == torch.float32 else ((64, 32), (64, 64), (128, 16), (128, 32), (128, 64))
    yield from _attention_tiles(head_dim, dtype, arch, tiles, True)


@attention_backward_keys.candidates
def _keys_tiles(head_dim: int, dtype: torch.dtype, extras: bool, arch: Arch) -> Iterator[Attention]:
    tiles = ((32, 32), (32, 64)) if dtype == torch.float32 else ((16, 128), (32, 64), (32, 128), (64, 64), (64, 128))
    yield from _attention_tiles(head_dim, dtype, arch, tiles, False)


@choice(columns=NORM_COLUMNS)
def norm_forward(columns: int, arch: Arch) -> Norm:
    """A row in registers up to 16384 columns (32 floats a thread at 16 warps), several short rows a program; else looped."""
    block = next_power_of_2(columns)
    if block > 16384:
        return Norm(1, 4096, 8, _norm_stages(4096, arch))
    # About 2048 elements a program keep a warp's loads 16 bytes wide; the choice depends on N alone, so a row's result does
    # not depend on how many rows there are.
    rows = max(1, min(16, 2048 // block))
    return Norm(rows, block, min(16, max(4, rows * block // 1024)))


@choice(columns=NORM_COLUMNS)
def norm_backward(columns: int, arch: Arch) -> Norm:
    """As forward, but dy, xhat, the weight and two gradient accumulators live at once: half the columns. 4096 elements a step, 16 a
    thread: two programs fit a multiprocessor with 8 warps each, which 32 a thread (226 registers on sm_90) would halve."""
    block = next_power_of_2(columns)
    if block > 8192:
        return Norm(1, 4096, 8, _norm_stages(4096, arch))
    if block < 1024:
        return Norm(min(16, 2048 // block), block, 4)  # ptxas spills when rows of 256 in float32 are pipelined (sm_90)
    if block == 2048 and arch.kind == "cuda" and arch.number >= 100:
        return Norm(
            1, block, 4, _norm_stages(block, arch)
        )  # two rows: ptxas aims at 128 registers and spills in 16 bits
    rows = max(1, 4096 // block)
    return Norm(rows, block, 8, _norm_stages(rows * block, arch))


@choice()
def norm_columns(arch: Arch) -> Norm:
    """Tiles of the gradients of rows longer than ``norm_backward`` holds: 512 bytes of a row in 16 bits."""
    return Norm(16, 256, 8, _norm_stages(4096, arch))


def _norm_stages(elements: int, arch: Arch) -> int:
    """2 where shared memory takes the next step's dy, h, dh and weight in float32 beside the reductions. AMD's go to registers."""
    return 2 if arch.kind == "cuda" and 16 * elements + 8192 <= arch.shared else 1


@norm_forward.candidates
def _norm_forward_tiles(columns: int, arch: Arch) -> Iterator[Norm]:
    yield from _norm_tiles(columns, arch)


@norm_backward.candidates
def _norm_backward_tiles(columns: int, arch: Arch) -> Iterator[Norm]:
    yield from _norm_tiles(columns, arch)


def _norm_tiles(columns: int, arch: Arch) -> Iterator[Norm]:
    """Whole rows of 1024 to 8192 elements a program with 4 to 16 warps, and the looped kernels for rows of 8192 and more."""
    for elements, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
        if columns <= elements:
            yield from (
                Norm(elements // columns, columns, warps, stages) for stages in {1, _norm_stages(elements, arch)}
            )
    if 8192 <= columns <= 32768:
        yield from (Norm(1, columns, warps) for warps in (8, 16, 32))
        for block, warps in itertools.product((2048, 4096), (4, 8, 16)):
            yield from (Norm(1, block, warps, stages) for stages in {1, _norm_stages(block, arch)})


@choice(pairs=(16, 32, 64, 128), heads=(1, 4, 16))
def rope(pairs: int, heads: int, arch: Arch) -> Rope:
    """About 1024 pairs a program: 8 a thread, two loads of 16 bytes in 16 bits. Heads come first, they share the angles; what is
    left are positions. More pairs than 128 (head_dim 256) are more programs."""
    together = min(heads, 1024 // pairs)
    return Rope(1024 // (pairs * together), together, pairs, 4)


@rope.candidates
def _rope_tiles(pairs: int, heads: int, arch: Arch) -> Iterator[Rope]:
    for elements, warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8)):
        for together in {min(heads, elements // pairs), min(heads, 4), 1}:
            yield Rope(elements // (pairs * together), together, pairs, warps)


@choice(columns=LOSS_COLUMNS)
def cross_entropy(columns: int, arch: Arch) -> Loss:
    """A step of 2048 logits: 16 lanes a thread, each with its own maximum and sum, and with smoothing two sums more. The next
    step's loads are under way while this one is computed; several short rows a program. By V alone: a row's lanes are its
    bits."""
    block = min(next_power_of_2(columns), 2048)
    # Short rows: half as many lanes, ptxas spills with two rows of 1024 float32 and all options (sm_90).
    return Loss(max(1, min(16, 1024 // block)), block, 4, 2 if columns > block else 1)


@cross_entropy.candidates
def _cross_entropy_tiles(columns: int, arch: Arch) -> Iterator[Loss]:
    for block, warps, stages in itertools.product((1024, 2048, 4096), (4, 8), (1, 2, 3)):
        if columns > block:
            yield Loss(1, block, warps, stages)


@choice(columns=LOSS_COLUMNS)
def cross_entropy_gradient(columns: int, arch: Arch) -> Loss:
    """2048 independent logits a program, 16 a thread."""
    block = min(next_power_of_2(columns), 2048)
    return Loss(min(16, 2048 // block), block, 4, 1)


@cross_entropy_gradient.candidates
def _cross_entropy_gradient_tiles(columns: int, arch: Arch) -> Iterator[Loss]:
    for block, warps in itertools.product((1024, 2048, 4096), (4, 8)):
        if columns >= block:
            yield Loss(1, block, warps, 1)


@choice()
def loss_reduction(arch: Arch) -> Loss:
    """One program for all rows, whose losses are read once: 4 bytes each beside the row of logits that it came from."""
    return Loss(1, 4096, 16, 1)


@choice()
def column_sum(arch: Arch) -> ColumnSum:
    return ColumnSum(32, 128, 4)


def row_chunks(rows: int, block: int) -> int:
    """Partial sums over rows: at most 256 (two waves of programs on 108 to 132 SMs). By the shape alone: results repeat."""
    return max(1, min(256, -(-rows // (4 * block))))


#: What follows a product of ``kernels/gemm.py``: at most bias and residual; the activation of a feed-forward network, without and
#: with a gate (a second product beside the first); and their derivatives.
USES = ("linear", "activation", "gated", "activation_gradient", "gated_gradient")
#: How operands are multiplied: 16-bit ones and TF32 on tensor cores, float32 exactly by FMA.
PRECISIONS = ("16-bit", "tf32", "ieee")
#: Compute capabilities whose tensor cores read operands from shared memory, where TMA brings them.
_TMA = (90, 100, 103, 110)
#: Rows and columns of a product that choices tell apart: a decoding step, a short prompt, more; a small model's, a large one's.
PRODUCT_ROWS = (16, 512, 8192)
PRODUCT_COLUMNS = (2048, 8192)


def product_precision(dtype: torch.dtype) -> str:
    """The one of ``PRECISIONS`` for operands of ``dtype``."""
    return "16-bit" if dtype.itemsize == 2 else matmul_precision(dtype)


@choice(use=USES, precision=PRECISIONS)
def gemm(use: str, precision: str, arch: Arch) -> Matmul:
    """Tiles of the GEMM where a row's bits must not depend on the number of rows, which this choice therefore does not see.

    8 warps: 128 x 256 accumulators take 128 registers of each thread, and what follows them fits beside only by halves. Gated:
    two accumulators. Gradients also hold pre, gate, dropout factors and two results. Where TMA loads them, 64 of K are a line of
    128 bytes of 16-bit operands; cp.async takes half of that, and one stage more fits. AMD's 64 KiB hold two stages.
    """
    if arch.kind == "interpreter":
        return _INTERPRETED_MATMUL
    if precision == "ieee":
        return Matmul(64, 64, 16, 8, 2)  # 4 warps: ptxas aims at 96 registers and spills (sm_90, sm_100)
    wide = 1 if precision == "16-bit" else 2
    if arch.number in _TMA:
        # tcgen05's accumulators pass through shared memory: 128 x 256 in float32 leave no room for TF32's stages.
        widest = 128 if precision == "tf32" and arch.number >= 100 else 256
        columns = {"linear": widest, "gated_gradient": 64}.get(use, 128)
        halves = use != "activation"
        return Matmul(128, columns, 64 // wide, 8, 4 if use in ("linear", "activation") else 3, True, halves)
    columns = {"linear": 128, "activation": 128, "gated_gradient": 32}.get(use, 64)
    return Matmul(128, columns, 32 // wide, 8, 2 if arch.kind == "hip" else 4)


def by_pointers(config: Matmul) -> Matmul:
    """For operands that TMA does not take: addresses take registers, so half the columns and half of K a step."""
    if not config.tma:
        return config
    return replace(config, block_n=config.block_n // 2, block_k=config.block_k // 2, num_stages=3, tma=False)


@choice(use=USES, rows=PRODUCT_ROWS, columns=PRODUCT_COLUMNS, precision=PRECISIONS)
def product(use: str, rows: int, columns: int, precision: str, arch: Arch) -> Matmul | Elementwise:
    """torch's product and an elementwise kernel, or one GEMM, where both may be taken.

    Without a measurement the former: cuBLAS's product cannot be slower than itself, and the kernel after it passes memory as often
    as plain PyTorch's first one does. Gradients take more rows a program, since each row block's column sums go to memory.
    """
    return Elementwise(64, 64, 4) if use.endswith("gradient") else Elementwise(16, 256, 4)


@gemm.candidates
def _gemm_tiles(use: str, precision: str, arch: Arch) -> Iterator[Matmul]:
    if precision == "ieee":
        yield from (Matmul(m, n, k, 4, 2) for m, n, k in ((32, 32, 32), (64, 32, 16), (64, 32, 32), (128, 32, 16)))
        return
    tma = arch.number in _TMA
    operands = 2 if use == "gated" else 1
    tiles = ((64, 128), (128, 64), (128, 128), (128, 256))
    for (m, n), k, stages, halves in itertools.product(tiles, (32, 64), (2, 3, 4), BOTH):
        accumulators = operands * m * n
        # 256 threads: 64 registers each beside the epilogue's, 128 beside half of it.
        if accumulators > 128 * 256 or (accumulators > 128 * 128 and not halves):
            continue
        if stages * (m + operands * n) * k * (2 if precision == "16-bit" else 4) <= arch.shared:
            yield Matmul(m, n, k, 8, stages, tma, halves)


@product.candidates
def _products(use: str, rows: int, columns: int, precision: str, arch: Arch) -> Iterator[Matmul | Elementwise]:
    """Both ways; and for a decoding step tiles that waste no more than tensor cores must, cut along K (``gemm.py``)."""
    yield from (Elementwise(*tile) for tile in ((16, 128, 4), (32, 128, 8), (64, 64, 4)))
    yield gemm.shipped((use, precision), arch)
    yield from _gemm_tiles(use, precision, arch)
    if rows == min(PRODUCT_ROWS) and precision != "ieee":
        for n, k, stages in itertools.product((32, 64), (64, 128), (3, 4)):
            yield Matmul(16, n, k, 4, stages)


def after_product(rows: int, gradient: bool) -> Elementwise:
    """The kernel after a product that was cut along K."""
    return Elementwise(64, 64, 4) if gradient else Elementwise(min(16, next_power_of_2(rows)), 256, 4)
