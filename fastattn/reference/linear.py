"""The linear map of a Transformer's projections in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
    """As :func:`fastattn.linear`: x weightᵀ + bias + residual."""
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual
