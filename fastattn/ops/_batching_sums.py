"""What the batching rules add up themselves: results that are sums over a call's rows, wanted for each sample.

The operators give a sum over all rows. For samples that were joined it comes from per-row results of one call (losses), from one
batched product (weights), or from what forward saved (norms, sinks): never from a call a sample. All sums are in the accumulation
dtype. Tensors have the samples in front: (S, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.reference.ffn import ACTIVATIONS, FUNCTIONS
from fastattn.reference.loss import REDUCTIONS
from fastattn.reference.precision import accumulation_dtype

#: (gradient of the result, input) -> gradient of the input. A batching rule cannot ask torch.func for it.
_PULLBACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda d, x: torch.where(x > 0, d, 0),
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": lambda d, x: torch.ops.aten.gelu_backward.default(d, x, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward.default,
}


def wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x (S, M, K) with a weight (S, N, K), bias (S, N) and residual (S, M, N) of each sample: rounded once."""
    y = torch.bmm(wide(x), wide(weight).mT)
    for more in (None if bias is None else bias.unsqueeze(1), residual):
        y = y if more is None else y + wide(more)
    return y.to(x.dtype)


def linear_gradients(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dweight (S, N, K) and dbias (S, N) from dy (S, M, N) and x (S, M, K)."""
    return torch.bmm(wide(dy).mT, wide(x)).to(x.dtype), wide(dy).sum(1).to(x.dtype)


def norm_gradients(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dweight and dbias (S, N) from dy and h (S, M, N), rstd (S, M) and mean, (S, 0) for rms."""
    centred = wide(h) if mean.shape[-1] != h.shape[1] else wide(h) - mean.unsqueeze(-1)
    dweight = (wide(dy) * centred * rstd.unsqueeze(-1)).sum(1)
    return dweight.to(dtype), wide(dy).sum(1).to(dtype)


def ffn_gradients(
    dout: Tensor, x: Tensor, w_out: Tensor, pre: Tensor, gate: Tensor | None, activation: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
    """(dweight, dbias) of the first product, of the gate and of the second, from pre and gate (S, M, F); w_out (O, F)."""
    name = ACTIVATIONS[activation]
    bent = wide(pre if gate is None else gate)
    hidden = active = FUNCTIONS[name](bent)
    onto_hidden = onto_active = wide(dout) @ wide(w_out)
    of_gate = None
    if gate is not None:
        hidden, onto_active = active * wide(pre), onto_hidden * wide(pre)
    onto_bent = linear_gradients(_PULLBACKS[name](onto_active, bent).to(x.dtype), x)
    of_pre = onto_bent
    if gate is not None:
        of_gate, of_pre = onto_bent, linear_gradients((onto_hidden * active).to(x.dtype), x)
    return of_pre, of_gate, linear_gradients(dout, hidden.to(x.dtype))


def sinks_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(S, H) from dout, out (S, B, H, Nq, Dv) and lse (S, B, H, Nq): the sink takes the share e^(sink - lse) and has no value."""
    share = torch.exp(sinks[:, None] - lse)
    onto_lse = -(wide(dout) * wide(out)).sum(-1)
    return (share * (onto_lse if dlse is None else onto_lse + dlse)).sum((1, 3))


def _row_weights(target: Tensor, class_weight: Tensor | None, ignore_index: int, like: Tensor) -> Tensor:
    """What a token counts in the mean: its class's weight, 0 if it is ignored."""
    counts = target != ignore_index
    weights = like.new_ones(()) if class_weight is None else class_weight[torch.where(counts, target, 0)]
    return torch.where(counts, weights, 0)


def reduced(losses: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: int) -> Tensor:
    """Each sample's loss from the losses (S, T) of its tokens."""
    if REDUCTIONS[reduction] == "none":
        return losses
    total = losses.sum(1)
    if REDUCTIONS[reduction] == "sum":
        return total
    return total / _row_weights(target, class_weight, ignore_index, losses).sum(1)


def onto_tokens(
    dloss: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: int
) -> Tensor:
    """The gradient of each token's loss (S, T) from that of each sample's."""
    if REDUCTIONS[reduction] == "none":
        return dloss
    if REDUCTIONS[reduction] == "mean":
        dloss = dloss / _row_weights(target, class_weight, ignore_index, dloss).sum(1)
    return dloss.unsqueeze(1).expand(target.shape)
