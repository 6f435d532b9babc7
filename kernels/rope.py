"""Rotary position embedding in Triton: the launchers of ``fastattn::triton_rope`` and ``triton_rope_`` (in place).

With pair i of a head being (a, b) = (x[i], x[i + P]), or (x[2i], x[2i + 1]) if interleaved, i < P (Su et al., "RoFormer", 2021):
    y = (a cos - b sin, b cos + a sin),  float32, rounded once;  channels from 2P on are copied
The conjugate rotation (sin negated) is the gradient. A program turns TOKENS positions of HEADS heads: an angle is loaded once for
all of its heads. Queries and keys of one QKV product are neighbouring heads of one tensor, so they are one launch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs


class Heads(NamedTuple):
    """A (B, H, N, D) tensor with unit last stride."""

    ptr: Any
    batch: int
    head: int
    row: int


class Angles(NamedTuple):
    """cos and sin (1 | B, N, P) float32; ``batch`` is 0 where all batch entries share them."""

    cos: Any
    sin: Any
    batch: int
    row: int


@triton.jit
def _line(x, batch, head, row):
    """Pointers to channel 0: [TOKENS, HEADS, 1]. All arguments int64."""
    return x.ptr + batch * x.batch + row[:, None, None] * x.row + head[None, :, None] * x.head


@triton.jit
def rope_kernel(
    x, y, angles, rows, heads, direction,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch · blocks of positions, blocks of heads, blocks of BLOCK pairs). y may be x: a program reads only what it writes.

    ``direction``: 1.0, or -1.0 for the conjugate. REST: channels to copy. PAIRS and REST are constants so that the compiler knows
    how far apart a, b and the rest are aligned: loads of 16 bytes for any head_dim divisible by 16.
    """
    blocks = tl.cdiv(rows, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    inside = (row < rows)[:, None, None] & (head < heads)[None, :, None]
    source, destination = _line(x, batch, head, row), _line(y, batch, head, row)
    dtype = y.ptr.dtype.element_ty

    if PAIRS > 0:
        first = tl.program_id(2) * BLOCK
        pair = first + tl.arange(0, BLOCK)
        known = (row < rows)[:, None] & (pair < PAIRS)[None, :]
        at = batch * angles.batch + row[:, None] * angles.row + pair[None, :]
        cos = tl.load(angles.cos + at, mask=known, other=0.0)[:, None, :]
        sin = tl.load(angles.sin + at, mask=known, other=0.0)[:, None, :] * direction
        if INTERLEAVED:
            channel = (2 * first + tl.arange(0, 2 * BLOCK))[None, None, :]
            turned = inside & (channel < 2 * PAIRS)
            both = tl.load(source + channel, mask=turned, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, [TOKENS, HEADS, BLOCK, 2]))
            both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [TOKENS, HEADS, 2 * BLOCK])
            tl.store(destination + channel, both.to(dtype), mask=turned)
        else:
            channel = pair[None, None, :]
            turned = inside & (channel < PAIRS)
            a = tl.load(source + channel, mask=turned, other=0.0).to(tl.float32)
            b = tl.load(source + PAIRS + channel, mask=turned, other=0.0).to(tl.float32)
            tl.store(destination + channel, (a * cos - b * sin).to(dtype), mask=turned)
            tl.store(destination + PAIRS + channel, (b * cos + a * sin).to(dtype), mask=turned)

    if REST > 0:
        for start in tl.range(tl.program_id(2) * BLOCK, REST, tl.num_programs(2) * BLOCK):
            further = (start + tl.arange(0, BLOCK))[None, None, :]
            copied = inside & (further < REST)
            kept = tl.load(source + 2 * PAIRS + further, mask=copied)
            tl.store(destination + 2 * PAIRS + further, kept, mask=copied)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """(B, H, N, D) in x's dtype and memory order: (batch, seq, heads, dim) inputs give such an output."""
    batch, heads, rows, head_dim = x.shape
    if x.stride(1) < x.stride(2):
        y = x.new_empty(batch, rows, heads, head_dim).transpose(1, 2)
    else:
        y = x.new_empty(batch, heads, rows, head_dim)
    _launch(x, y, cos, sin, interleaved, conjugate)
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> None:
    """In place: what is not rotated is not touched."""
    _launch(x, x, cos, sin, interleaved, conjugate)


def _launch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> None:
    batch, heads, rows, head_dim = x.shape
    pairs = cos.shape[2]
    rest = 0 if y is x else head_dim - 2 * pairs
    if x.numel() == 0 or (pairs == 0 and rest == 0):
        return
    config = configs.rope(pairs, heads, configs.arch_of(x))
    grid = (
        batch * triton.cdiv(rows, config.tokens),
        triton.cdiv(heads, config.heads),
        max(1, triton.cdiv(pairs, config.pairs)),
    )
    rope_kernel[grid](
        x=Heads(x, *x.stride()[:3]),
        y=Heads(y, *y.stride()[:3]),
        angles=Angles(cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
        rows=rows,
        heads=heads,
        direction=-1.0 if conjugate else 1.0,
        PAIRS=pairs,
        REST=rest,
        INTERLEAVED=interleaved,
        TOKENS=config.tokens,
        HEADS=config.heads,
        BLOCK=config.pairs,
        num_warps=config.num_warps,
    )
