"""fastattn in PyTorch's registry of flash attention implementations: for SDPA calls that reach the flash backend.

>>> torch.nn.attention.activate_flash_attention_impl("FASTATTN")   # `import fastattn` has registered it
>>> torch.nn.attention.restore_flash_attention_impl()              # from torch 2.11 on

Activation replaces, for the whole process, the operators behind the backend: on the CPU
``aten::_scaled_dot_product_flash_attention_for_cpu``, where torch sends what has no dropout and one head_dim for keys and values;
on CUDA ``aten::_scaled_dot_product_flash_attention`` (float16, bfloat16, no mask), on the Triton kernels. Forward and backward.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl

from fastattn.ops import _library, _validate
from fastattn.ops.attention import _check_mask

NAME = "FASTATTN"

_forward = _library.products("attention_forward")
_backward = _library.products("attention_backward")
_triton_forward = torch.ops.fastattn.triton_attention_forward.default
_triton_backward = torch.ops.fastattn.triton_attention_backward.default


def _options(query: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    """softmax_scale .. dropout_p of SCHEMAS; torch's causal mask is aligned to the top left."""
    return 1 / math.sqrt(query.shape[3]) if scale is None else scale, -1, 0 if is_causal else -1, 0, 0.0, dropout_p


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp (B, H, Nq))."""
    mask = None if attn_mask is None else _check_mask(attn_mask, query, key)
    options = _options(query, dropout_p, is_causal, scale)
    return _forward(query, key, value, mask, None, None, *options, _validate.rng_state(None, dropout_p, query))[:2]


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = None if attn_mask is None else _check_mask(attn_mask, query, key)
    options = _options(query, dropout_p, is_causal, scale)
    tensors = (grad_out, None, query, key, value, out, logsumexp, mask, None, None)
    return _backward(*tensors, *options, None, False, False, False)[:3]


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """(output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask), as the operator's schema."""
    if return_debug_mask:
        raise NotImplementedError("fastattn: return_debug_mask: probabilities are never in memory")
    rng_state = _validate.rng_state(None, dropout_p, query)
    options = _options(query, dropout_p, is_causal, scale)
    out, lse = _triton_forward(query, key, value, None, None, None, *options, rng_state)[:2]
    nothing = query.new_empty(0)
    state = nothing.to(torch.int64) if rng_state is None else rng_state
    return out, lse, nothing, nothing, query.shape[2], key.shape[2], state, nothing, nothing


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """philox_seed is the rng_state that ``_cuda_forward`` gave."""
    options = _options(query, dropout_p, is_causal, scale)
    tensors = (grad_out, None, query, key, value, out, logsumexp, None, None, None)
    return _triton_backward(*tensors, *options, philox_seed if dropout_p > 0 else None, False, False, False)[:3]


@dataclass
class _Handle:
    library: Library

    def remove(self) -> None:
        self.library._destroy()


def _activate() -> _Handle:
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        # To override is what activation is for.
        warnings.filterwarnings("ignore", ".*other operators may also be overridden", UserWarning)
        if _library.has_cpu:
            library.impl("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, "CPU")
            library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, "CPU")
        if _library.has_triton and torch.cuda.is_available():
            library.impl("_scaled_dot_product_flash_attention", _cuda_forward, "CUDA")
            library.impl("_scaled_dot_product_flash_attention_backward", _cuda_backward, "CUDA")
    return _Handle(library)


def register() -> None:
    """Make ``activate_flash_attention_impl("FASTATTN")`` known to PyTorch; activates nothing."""
    register_flash_attention_impl(NAME, register_fn=_activate)
