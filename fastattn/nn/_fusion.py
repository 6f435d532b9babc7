"""When the work of several modules may become one call.

A fused call reads the parameters of a module without calling the module. That is the same computation only if calling it
would do nothing else: no hook, no forward of its own (an adapter, a quantized layer), no weight that is more than numbers
in memory (a sharded or quantized tensor subclass). Everything that does not pass is called as a module, as torch.nn does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_globals

from fastattn.ops._select import asked
from fastattn.ops._validate import PLAIN
from fastattn.ops.linear import linear
from fastattn.ops.loss import linear_cross_entropy
from fastattn.reference.precision import accumulation_dtype


def runs_only(module: Any, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs ``cls.forward`` and nothing else (no hooks, no forward of its own)."""
    return (
        isinstance(module, cls)
        and type(module).forward is cls.forward
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not (
            module_globals._global_forward_hooks
            or module_globals._global_forward_pre_hooks
            or module_globals._global_backward_hooks
            or module_globals._global_backward_pre_hooks
        )
    )


def _are_plain(weight: Any, bias: Any) -> bool:
    """Whether no parameter is a subclass (sharded, quantized), which knows its own product."""
    return type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)


def is_plain_linear(module: Any) -> bool:
    """Whether ``module`` is a Linear whose weight and bias are ordinary tensors and whose call is x Wᵀ + b, no more."""
    return runs_only(module, nn.Linear) and _are_plain(module.weight, module.bias)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether fastattn's linear operations take such tensors: plain ones, not nested."""
    return _are_plain(weight, bias) and not x.is_nested


def project(x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    """``x weightᵀ + bias`` by :func:`fastattn.linear` where that can, else by torch."""
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    return linear(x, weight, bias, implementation=implementation)


def classify(x: Tensor, weight: Tensor, target: Tensor, implementation: str) -> Tensor:
    """The mean cross-entropy of the logits ``x weightᵀ``, x (T, K) and target (T,): -100 is ignored.

    By :func:`fastattn.linear_cross_entropy` where that can, else (there is none in CUDA) by torch from logits in the accumulation
    dtype.
    """
    if not _takes(x, weight, None) or asked(implementation) == "cuda":
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), target.long())
    return linear_cross_entropy(x, weight, target.long(), implementation=implementation)


def dropout_probability(module: Any) -> float | None:
    """The probability with which ``module`` drops now (0 in evaluation), or None if it must be called itself.

    p = 1 is None: it drops everything, which fastattn's operators (p < 1) do not express.
    """
    if not runs_only(module, nn.Dropout):
        return 0.0 if runs_only(module, nn.Identity) else None
    if not module.training:
        return 0.0
    return float(module.p) if module.p < 1 else None


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name ``fastattn.ffn`` has for ``activation`` (a function, a module or a partial), or None if it has none."""
    if isinstance(activation, nn.Module):
        if runs_only(activation, nn.ReLU):
            return "relu"
        if runs_only(activation, nn.SiLU):
            return "silu"
        if runs_only(activation, nn.GELU):
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return None
    if isinstance(activation, functools.partial):
        if activation.func is F.gelu and not activation.args and activation.keywords == {"approximate": "tanh"}:
            return "gelu_tanh"
        return None
    if activation in (F.relu, torch.relu):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    return "silu" if activation is F.silu else None
