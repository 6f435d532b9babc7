"""Philox-4x32-10 dropout masks for Triton kernels, bit-equal to ``csrc/cpu/philox-inl.h``.

Element (x, y, z) of a call draws word ``x % 4`` of ``philox(key=seed, counter=(x // 4, y, z, offset))`` (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) and is dropped iff that word is below ``floor(p * 2**32)``. For
attention x is the key, y the query and z = batch * heads + head; for a matrix x is the column, y the row (z = 0: a matrix
here has fewer than 2**31 rows).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """Kernel argument. ``offset`` and ``threshold`` are uint32 bit patterns in int32, so that their Triton type never varies."""

    seed: int
    offset: int
    threshold: int
    scale: float


def _as_int32(bits: int) -> int:
    bits &= 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits


def dropout_argument(p: float, rng_state: torch.Tensor | None) -> Dropout | None:
    """The kernel argument for drop probability ``p`` in [0, 1) and ``rng_state`` (2,) int64 on the CPU; None if nothing drops."""
    if p <= 0.0:
        return None
    if rng_state is None:
        raise ValueError("dropout_p > 0 needs rng_state, an int64 CPU tensor (seed, offset)")
    seed, offset = rng_state.tolist()
    return Dropout(seed, _as_int32(offset), _as_int32(math.floor(p * 4294967296.0)), 1.0 / (1.0 - p))


@triton.jit
def keep_tile(dropout, x_start, y, z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of columns x_start .. x_start + COLUMNS of lines (y, z) are kept: int1 [ROWS, COLUMNS].

    x_start is a multiple of 4, y int32 [ROWS], z a scalar. One Philox call serves four neighbouring columns.
    """
    quad = x_start // 4 + tl.arange(0, COLUMNS // 4)
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(dropout.seed, zero + quad[None, :], zero + y[:, None], zero + z, zero + dropout.offset)
    threshold = (zero + dropout.threshold).to(tl.uint32, bitcast=True)
    # join interleaves along a new last axis: ((w0, w2), (w1, w3)) unrolls to w0 w1 w2 w3.
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])
