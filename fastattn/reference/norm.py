"""Layer and RMS normalization in plain PyTorch, with dropout and residual add in front."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.philox import matrix_dropout
from fastattn.reference.precision import accumulation_dtype


def default_eps(dtype: torch.dtype) -> float:
    """What ``F.rms_norm(eps=None)`` uses: the epsilon of the dtype it computes in, float32 for 16-bit inputs."""
    return torch.finfo(accumulation_dtype(dtype)).eps


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_residual: bool = False,
    zero_centered_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`fastattn.layer_norm`: y = (h - mean) / sqrt(var + eps) · weight + bias, h = dropout(x) + residual."""
    if zero_centered_weight and weight is not None:
        weight = weight.to(accumulation_dtype(x.dtype)) + 1
    return _norm(x, normalized_shape, weight, bias, eps, False, residual, dropout_p, rng_state, return_residual)


def rms_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_residual: bool = False,
    zero_centered_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`fastattn.rms_norm`: y = h / sqrt(mean(h²) + eps) · weight, h = dropout(x) + residual."""
    eps = default_eps(x.dtype) if eps is None else eps
    if zero_centered_weight and weight is not None:
        weight = weight.to(accumulation_dtype(x.dtype)) + 1
    return _norm(x, normalized_shape, weight, None, eps, True, residual, dropout_p, rng_state, return_residual)


def _norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    return_residual: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    columns = torch.Size(normalized_shape).numel()
    rows = x.shape[: x.dim() - len(normalized_shape)].numel()
    y, h = norm_rows(
        x.reshape(rows, columns),
        None if residual is None else residual.reshape(rows, columns),
        None if weight is None else weight.reshape(columns),
        None if bias is None else bias.reshape(columns),
        eps=eps,
        rms=rms,
        dropout_p=dropout_p,
        rng_state=rng_state,
    )
    y, h = y.reshape(x.shape), h.reshape(x.shape)
    return (y, h) if return_residual else y


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    rms: bool,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator's form on (M, N) rows: (y, h). h is rounded to x.dtype; the norm is taken of the rounded h."""
    accumulate = accumulation_dtype(x.dtype)
    h = x.to(accumulate)
    if dropout_p > 0:
        assert rng_state is not None
        h = h * matrix_dropout(x.shape, dropout_p, rng_state, x.device).to(accumulate)
    if residual is not None:
        h = h + residual.to(accumulate)
    rounded = h.to(x.dtype)
    h = rounded.to(accumulate)
    centred = h if rms else h - h.mean(dim=1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype), rounded
