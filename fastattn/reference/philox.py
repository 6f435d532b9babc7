"""Philox-4x32-10 dropout masks in plain PyTorch (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Every implementation draws the same mask: element ``(x, y, z)`` of a call uses word ``x % 4`` of
``philox(key=seed, counter=(x // 4, y, z, offset))`` and is dropped iff that word is below ``floor(p * 2**32)``. For attention
``x`` is the key, ``y`` the query and ``z = batch * heads + head``; for a matrix ``x`` is the column and ``y``, ``z`` are the low
and high 32 bits of the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit numbers wraps in int64, but its 64 bits are right: the masks pick the unsigned halves.
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64 tensors) of each counter ``(c0, c1, c2, offset)`` under the 64-bit key ``seed``."""
    a, b, c = torch.broadcast_tensors(c0, c1, c2)
    d = torch.full_like(a, offset & _LOW)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi_a, lo_a = _mul_hi_lo(a, 0xD2511F53)
        hi_c, lo_c = _mul_hi_lo(c, 0xCD9E8D57)
        a, b, c, d = hi_c ^ b ^ key0, lo_c, hi_a ^ d ^ key1, lo_a
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return a, b, c, d


def _factors(columns: int, y: Tensor, z: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
    seed, offset = (int(value) for value in rng_state.tolist())
    groups = torch.arange((columns + 3) // 4, device=y.device)
    words = torch.stack(philox(seed, groups, y.unsqueeze(-1), z.unsqueeze(-1), offset), dim=-1)
    kept = words.flatten(-2)[..., :columns] >= int(dropout_p * 2**32)
    return kept.double() / (1 - dropout_p)


def attention_dropout(
    shape: torch.Size, dropout_p: float, rng_state: Tensor, device: torch.device, first_head: int = 0
) -> Tensor:
    """Dropout factors, 0 or 1 / (1 - p), of a probability tensor of ``shape`` (B, H, Nq, Nk); float64.

    Its first head is number ``first_head`` of the call's batch * heads.
    """
    batch, heads, rows, columns = shape
    y = torch.arange(rows, device=device)
    z = first_head + torch.arange(batch * heads, device=device).view(batch, heads, 1)
    return _factors(columns, y, z, dropout_p, rng_state)


def matrix_dropout(shape: torch.Size, dropout_p: float, rng_state: Tensor, device: torch.device) -> Tensor:
    """Dropout factors, 0 or 1 / (1 - p), of a matrix of ``shape`` (M, N); float64."""
    rows, columns = shape
    row = torch.arange(rows, device=device)
    return _factors(columns, row & _LOW, row >> 32, dropout_p, rng_state)
