"""LayerNorm and RMSNorm: torch.nn's modules computed by :mod:`fastattn`, with the residual addition and dropout fused in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.ops._validate import autocast_dtype
from fastattn.ops.norm import layer_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


def _as_autocast(x: Tensor | None) -> Any:
    """``x`` in the dtype in which torch normalizes under autocast: float32 on accelerators, unchanged on the CPU."""
    if x is None or x.device.type == "cpu" or autocast_dtype(x.device.type) is None:
        return x
    return x.float()


def _check_plain(keywords_given: bool, x: Any) -> None:
    """torch has no word for the keywords: what is left to it comes without them."""
    if keywords_given:
        kind = "a nested one" if isinstance(x, Tensor) and x.is_nested else f"{getattr(x, 'dtype', type(x).__name__)}"
        raise NotImplementedError(f"residual, dropout_p and return_residual need a plain floating tensor, got {kind}")


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` by :func:`fastattn.layer_norm`: y = (h - mean(h)) / sqrt(var(h) + eps) · weight + bias.

    Constructor, parameters, ``state_dict`` and ``forward(input)`` are torch's. The keywords of ``forward`` add what
    torch.nn has no module for: h = dropout(input) + residual, in the same pass over memory.

    Attributes:
        implementation: "auto", or the name of the implementation this module must use; see :func:`fastattn.layer_norm`.

    Nested tensors are computed by torch. Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    implementation: str = "auto"

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
    ) -> Any:
        """Normalize ``input`` (..., *normalized_shape), any floating dtype.

        Args:
            input: the tensor to normalize.
            residual: same shape and dtype as ``input``, added to it before normalizing.
            dropout_p: probability of dropping elements of ``input`` before the addition; applied as given, in
                training and evaluation alike.
            return_residual: also return h = dropout(input) + residual.

        Returns:
            y with the shape and dtype of ``input``, or (y, h).
        """
        if not isinstance(input, Tensor) or input.is_nested:
            _check_plain(residual is not None or dropout_p > 0 or return_residual, input)
            return super().forward(input)
        x = _as_autocast(input)
        return layer_norm(
            x,
            self.normalized_shape,
            _as_autocast(self.weight),
            _as_autocast(self.bias),
            self.eps,
            residual=_as_autocast(residual),
            dropout_p=dropout_p,
            return_residual=return_residual,
            implementation=self.implementation,
        )


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` by :func:`fastattn.rms_norm`: y = h / sqrt(mean(h²) + eps) · weight.

    Constructor, parameters, ``state_dict`` and ``forward(x)`` are torch's (``eps=None`` is the machine epsilon of the
    accumulation dtype). The keywords of ``forward`` are those of :class:`LayerNorm`.

    Attributes:
        implementation: "auto", or the name of the implementation this module must use; see :func:`fastattn.rms_norm`.

    Nested and complex tensors are computed by torch.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    implementation: str = "auto"

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
    ) -> Any:
        """Normalize ``x`` (..., *normalized_shape); arguments and results as for :meth:`LayerNorm.forward`."""
        if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
            _check_plain(residual is not None or dropout_p > 0 or return_residual, x)
            return super().forward(x)
        return rms_norm(
            _as_autocast(x),
            self.normalized_shape,
            _as_autocast(self.weight),
            self.eps,
            residual=_as_autocast(residual),
            dropout_p=dropout_p,
            return_residual=return_residual,
            implementation=self.implementation,
        )
