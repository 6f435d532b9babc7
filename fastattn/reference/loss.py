"""Cross-entropy with class indices in plain PyTorch, of logits and of logits that are a linear map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.precision import accumulation_dtype

#: Position = the integer that the operators take.
REDUCTIONS: tuple[str, ...] = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """As :func:`fastattn.cross_entropy`: log Σ e^z - z[target] and its relatives, z = softcap · tanh(logits / softcap)."""
    accumulate = accumulation_dtype(logits.dtype)
    z = logits.to(accumulate)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    counts = target != ignore_index
    index = torch.where(counts, target, 0)
    class_weight = z.new_ones(z.shape[1]) if weight is None else weight.to(accumulate)
    row_weight = class_weight[index]
    lse = torch.logsumexp(z, dim=1)
    loss = (1 - label_smoothing) * row_weight * (lse - z.gather(1, index.unsqueeze(1)).squeeze(1))
    if label_smoothing > 0:
        smooth = lse * class_weight.mean() - (z * class_weight).mean(dim=1)
        loss = loss + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(counts, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / torch.where(counts, row_weight, 0).sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """As :func:`fastattn.linear_cross_entropy`: the cross-entropy of the logits x weightᵀ + bias."""
    loss = cross_entropy(
        F.linear(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias),
        target.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss
