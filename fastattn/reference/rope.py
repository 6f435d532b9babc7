"""Rotary position embedding in plain PyTorch (Su et al., "RoFormer", 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.precision import accumulation_dtype


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """As :func:`fastattn.rope`: the first R channels rotated, pair by pair; the rest copied."""
    accumulate = accumulation_dtype(x.dtype)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos, sin = cos.to(accumulate), sin.to(accumulate)
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].to(accumulate), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
