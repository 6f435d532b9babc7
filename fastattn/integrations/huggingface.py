"""fastattn in Hugging Face transformers: importing this module makes ``attn_implementation="fastattn"`` a valid choice.

>>> import fastattn.integrations.huggingface
>>> model = AutoModel.from_pretrained(path, attn_implementation="fastattn")   # or model.set_attn_implementation("fastattn")

transformers asks twice: for a mask, once per forward pass of the model, and for attention, in every layer. What the mask function
returns says everything that the layers need and holds no N x N table where a pattern and the padding describe it:

===========================  ======================  ==============================================================
mask                         dtype                   meaning
===========================  ======================  ==============================================================
None                                                 nothing is masked but by causality, which the layer states
(B, 1, Nq | 1, Nk)           bool                    all of it: True = visible
(B, 1, Nq | 1, Nk)           floating                all of it, added to the scores (the user's own)
(B, 1, E, Nk), E strides 0   int8 | uint8            visible keys of each sequence; causal | both directions
(B, 1, E, 1), E strides 0    int32 | int64           number of keys of each sequence, the rest is padding; causal | both
===========================  ======================  ==============================================================

E = 1 is no window, E = left + 2 a window of ``left`` keys before the query (and after it, in both directions). So the pattern
travels in dtype and shape: four-dimensional as models expect, moved between devices like any mask, known while tracing.
Packed calls (``cu_seq_lens_q``) without a mask go to :func:`fastattn.attention_varlen`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from fastattn.ops.attention import attention
from fastattn.ops.attention_sequences import attention_varlen

__all__ = ["NAME", "attention_forward", "attention_mask"]

NAME = "fastattn"

#: What attention cannot express; a value other than None or False is refused.
_REFUSED = {
    "output_attentions": "probabilities are never in memory",
    "head_mask": "weights of single heads",
    "layer_head_mask": "weights of single heads",
    "cache": "paged caches of continuous batching",
    "indices": "sparse selections of keys",
    "block_indices": "sparse selections of keys",
}

_CAUSAL = (torch.int8, torch.int32)
_KEYS = (torch.int8, torch.uint8)
_LENGTHS = (torch.int32, torch.int64)


class _Pattern(NamedTuple):
    """Which keys a query sees, apart from padding; ``window`` None: unlimited."""

    causal: bool
    window: int | None


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars if cells else (), cells, strict=True)
    }


def _overlay(window_function: Callable[[int], Callable[..., Any]]) -> tuple[Any, Any]:
    """The code of transformers' window mask and of the overlay within, to know them again."""
    both = window_function(1)
    return both.__code__, _closed_over(both)["mask_functions"][0].__code__


_CAUSAL_WINDOW = _overlay(sliding_window_causal_mask_function)
_WINDOW = _overlay(sliding_window_bidirectional_mask_function)


def _pattern(mask_function: Callable[..., Any]) -> _Pattern | None:
    """The pattern that transformers' predicate of indices stands for; None: another, to be evaluated."""
    if mask_function is causal_mask_function:
        return _Pattern(True, None)
    if mask_function is bidirectional_mask_function:
        return _Pattern(False, None)
    if getattr(mask_function, "__code__", None) is not _CAUSAL_WINDOW[0]:  # and_masks, in both kinds of window
        return None
    parts = _closed_over(mask_function)["mask_functions"]
    codes = [getattr(part, "__code__", None) for part in parts]
    if len(parts) == 2 and codes[0] is _CAUSAL_WINDOW[1] and parts[1] is causal_mask_function:
        return _Pattern(True, _closed_over(parts[0])["sliding_window"] - 1)
    if len(parts) == 2 and codes[0] is _WINDOW[1] and parts[1] is bidirectional_mask_function:
        return _Pattern(False, _closed_over(parts[0])["sliding_window"])
    return None


def _readable(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(x) is Tensor and not x.is_meta


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that :func:`attention_forward` reads, in the forms of the module's table; transformers calls it.

    Args:
        q_offset, kv_offset: position of the first query and of the first key.
        mask_function: predicate (batch, head, q, k) of positions.
        attention_mask: bool (B, positions), True = no padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for the pattern.
    """
    pattern = _pattern(mask_function)
    # The kernels align causality and windows at the bottom right; a cache with room behind the newest token is not.
    aligned = type(q_offset) is int and q_offset + q_length == kv_offset + kv_length
    positional = pattern is not None and (pattern.causal or pattern.window is not None)
    if pattern is None or kwargs.get("use_vmap", False) or (positional and not aligned):
        # One query and no mask would be all keys, those of a cache's empty room among them.
        skip = allow_is_causal_skip and (aligned or q_length > 1)
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs,
        )  # fmt: skip
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if _readable(padding) and bool(padding.all()):
            padding = None
    window = pattern.window if pattern.window is not None and pattern.window < kv_length - 1 else None
    may_skip = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip
    if padding is None and window is None and may_skip and (q_length in (1, kv_length) or not pattern.causal):
        return None
    return _encode(padding, pattern.causal, window, kwargs.get("device", "cpu"))


def _encode(padding: Tensor | None, causal: bool, window: int | None, device: Any) -> Tensor:
    """padding (B, Nk) bool or None as (B, 1, E, Nk | 1) in the module's table."""
    extent = 1 if window is None else window + 2
    lengths = None
    if padding is None:
        encoded = torch.ones(1, 1, 1, 1, dtype=_KEYS[not causal], device=device)
    else:
        if padding.device.type == "cpu" and _readable(padding):
            lengths = padding.sum(1)
            # Only padding on the right leaves nothing behind the sum.
            if bool(padding[torch.arange(padding.shape[1]) >= lengths[:, None]].any()):
                lengths = None
        if lengths is None:
            encoded = padding.contiguous().view(torch.int8 if causal else torch.uint8)[:, None, None]
        else:
            encoded = lengths.to(_LENGTHS[not causal])[:, None, None, None]
    return encoded.expand(-1, -1, extent, -1)


class _Visible(NamedTuple):
    """The arguments of :func:`fastattn.attention` that say which keys a row sees."""

    attn_mask: Tensor | None
    key_lengths: Tensor | None
    causal: bool
    window_size: tuple[int, int]


def _decode(mask: Tensor, query: Tensor, keys: int) -> _Visible:
    if mask.dim() != 4:
        raise ValueError(f"attention_mask: expected (B, 1, Nq, Nk), got shape {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.dtype is torch.bool:
        mask = mask[..., :keys]
        return _Visible(mask if mask.dtype is torch.bool else mask.to(query.dtype), None, False, (-1, -1))
    if mask.dtype not in (*_KEYS, *_LENGTHS):
        raise TypeError(f"attention_mask: got dtype {mask.dtype}, allowed are bool and floating dtypes")
    causal, left = mask.dtype in _CAUSAL, mask.shape[2] - 2
    window = (left, -1 if causal else left) if left >= 0 else (-1, -1)
    mask = mask[:, :, :1]
    if mask.dtype in _LENGTHS:
        return _Visible(None, mask.reshape(-1).expand(query.shape[0]), causal, window)
    everything = mask.shape[3] == 1 and keys != 1
    return _Visible(None if everything else mask[..., :keys].view(torch.bool), None, causal, window)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer by :func:`fastattn.attention`; transformers calls it.

    Args:
        module: the layer; ``is_causal`` is its own when not given (True where it says nothing).
        query: (B, H, Nq, D). key, value: (B, Hk, Nk, D), H a multiple of Hk.
        attention_mask: what this module's mask function gave, or the user's own boolean or floating (B, 1 | H, Nq, Nk).
        dropout: probability that the layer wants now (0 in evaluation).
        scaling: default 1 / sqrt(D).
        kwargs: ``softcap``, ``s_aux`` (sinks), ``position_bias``, ``cu_seq_lens_q`` are honoured; ``sliding_window`` is already in
            the mask; other libraries' bookkeeping is none of attention's business.

    Returns:
        out (B, Nq, H, Dv), contiguous, and None for the probabilities. Rows that see no key give zeros.

    Raises:
        NotImplementedError: for what would change the result and cannot be computed.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{name}: {what}: not with attn_implementation='fastattn'; model.set_attn_implementation('eager') has it"
            )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    bias = kwargs.get("position_bias")
    options: dict[str, Any] = {
        "softcap": kwargs.get("softcap") or 0.0,
        "sinks": None if sinks is None else sinks.reshape(-1),
        "softmax_scale": scaling,
        "dropout_p": dropout,
    }
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        return _packed(query, key, value, causal, bias, options, kwargs), None
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = causal and rows > 1
        if causal and keys > rows:  # the first tokens in a cache with room: nobody sees what lies behind them
            key, value = key[:, :, :rows], value[:, :, :rows]
            bias = None if bias is None else bias[..., :rows]
        visible = _Visible(None, None, causal, (-1, -1))
    else:
        visible = _decode(attention_mask, query, keys)
    if bias is not None:
        visible = _with_bias(visible, bias, query)
    if visible.attn_mask is not None and query.shape[0] < visible.attn_mask.shape[0]:
        query = query.expand(visible.attn_mask.shape[0], -1, -1, -1)
    out = attention(query, key, value, **visible._asdict(), **options)
    return out.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


def _with_bias(visible: _Visible, bias: Tensor, query: Tensor) -> _Visible:
    """The additive bias beside causality, windows and lengths; only a mask of its own makes a table with it."""
    bias = bias.to(query.dtype)
    mask = visible.attn_mask
    if mask is None:
        return visible._replace(attn_mask=bias)
    if mask.dtype is torch.bool:
        return visible._replace(attn_mask=torch.where(mask, bias, float("-inf")))
    return visible._replace(attn_mask=bias + mask)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    bias: Tensor | None,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Sequences one after the other in a batch of one."""
    if query.shape[0] != 1 or bias is not None:
        raise NotImplementedError("cu_seq_lens_q: only with a batch of 1 and without position_bias")
    window = kwargs.get("sliding_window")
    if window is not None and window > 0:
        # transformers' windows count the query itself; in both directions they do not.
        options["window_size"] = (window - 1, -1) if causal else (window, window)
    cumulative = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    q_lens, k_lens = (cumulative[0] if x is None else x for x in cumulative)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attention_varlen(q, k, v, q_lens.to(torch.int32), k_lens.to(torch.int32), causal=causal, **options)
    return out.unsqueeze(0).contiguous()  # type: ignore[union-attr]


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
