"""Ordinary PyTorch in the dtype under test, as eager model code writes it: what an implementation's error is compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.attention import visible
from fastattn.reference.philox import attention_dropout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) with every step in q's dtype; rows that see nothing are set apart, as careful eager code does."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    rows, columns = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask.to(q.dtype)
        )
    if alibi_slopes is not None:
        distance = (torch.arange(rows).unsqueeze(1) + columns - rows - torch.arange(columns)).abs()
        scores = scores - alibi_slopes.to(q.dtype)[..., None, None] * distance
    allowed = visible(rows, columns, window_size[0], 0 if causal else window_size[1], columns - rows, q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0)
    weights = torch.softmax(scores, dim=-1).masked_fill(nothing, 0)[..., :columns]
    if dropout_p:
        assert rng_state is not None
        weights = weights * attention_dropout(weights.shape, dropout_p, rng_state, q.device).to(q.dtype)
    return weights @ v, torch.logsumexp(scores, dim=-1).masked_fill(nothing.squeeze(-1), -torch.inf)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    same = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
    return F.layer_norm(x, x.shape[-1:], *same, eps)


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
