"""torch.nn's Transformer, its layers by fused attention, feed-forward and residual-add-and-normalize operators."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._fusion import dropout_probability, runs_only
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.ffn import run_feed_forward
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.ops._validate import autocast_dtype
from fastattn.ops.attention import attention

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def _take_over(module: nn.Module) -> None:
    """Give torch.nn's modules in ``module`` our classes. Built by torch first, the same seed gives the same weights."""
    for part in module.modules():
        part.__class__ = _CLASSES.get(type(part), type(part))


def _add_and_norm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = residual + dropout(x); one operator if that is the same as calling the modules.

    Under autocast on an accelerator the modules are called: there the sum keeps its dtype and only the norm is float32.
    """
    p = dropout_probability(dropout)
    fusable = p is not None and (runs_only(norm, LayerNorm) or runs_only(norm, RMSNorm))
    fusable = fusable and x.dtype == residual.dtype
    if not fusable or (x.device.type != "cpu" and autocast_dtype(x.device.type) is not None):
        h = residual + dropout(x)
        return norm(h), h
    return norm(x, residual=residual, dropout_p=p, return_residual=True)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` by :func:`fastattn.attention`, ``ffn`` and ``layer_norm(residual=)``.

    Constructor, initialization (same random numbers), parameters, ``state_dict``, ``forward`` and its results are torch's,
    and ``isinstance(m, torch.nn.TransformerEncoderLayer)`` holds; ``self_attn``, ``norm1`` and ``norm2`` are
    fastattn.nn's. torch's inference fast path is never taken: training and evaluation run the same operators. A child that
    has hooks or was replaced (an adapter, a quantized Linear, another norm or dropout) is called as the module it is, with
    the inputs it would have in torch; only the fusion around it is lost. Differences on purpose are those of
    :class:`MultiheadAttention`: rows without a visible key, and NaN in padding.

    Nested tensors (``torch.nn.TransformerEncoder`` makes them from a padding mask in evaluation) keep torch's result, also
    nested: everything that works token by token runs on the packed tokens, only attention sees padded ones. They need what
    torch needs for them: evaluation, ``batch_first``, no masks, nothing that requires a gradient; else torch raises.

    Attributes:
        implementation: "auto", or the name of the implementation of the feed-forward part; ``self_attn``, ``norm1`` and
            ``norm2`` have their own.

    Source: Vaswani et al., arXiv:1706.03762; ``norm_first``: Xiong et al., arXiv:2002.04745.
    """

    implementation: str = "auto"

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer applied to ``src`` (L, E), (B, L, E) with ``batch_first``, else (L, B, E); same shape back.

        Args:
            src_mask: (L, L) or (B·nhead, L, L), boolean with True = hidden, or added to the scores.
            src_key_padding_mask: (B, L) or (L,), boolean with True = padding, or added to the scores.
            is_causal: hint that ``src_mask`` is the causal mask.
        """
        if src.is_nested:
            if self._runs_packed(src, src_mask, src_key_padding_mask):
                return self._forward_packed(src)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self._blocks_overridden():
            return self._forward_by_blocks(src, src_mask, src_key_padding_mask, is_causal)
        attend = functools.partial(self._attend, mask=src_mask, key_padding_mask=src_key_padding_mask, causal=is_causal)
        return self._compose(src, attend)

    def _compose(self, x: Tensor, attend: Any) -> Tensor:
        """The layer around ``attend(x)``, which is self-attention without its dropout and residual."""
        if self.norm_first:
            y, h = _add_and_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return h + self.dropout2(self._feed_forward(y))
        y, _ = _add_and_norm(attend(x), x, self.dropout1, self.norm1)
        return _add_and_norm(self._feed_forward(y), y, self.dropout2, self.norm2)[0]

    def _attend(self, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, causal: bool) -> Tensor:
        return self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=key_padding_mask, need_weights=False, is_causal=causal
        )[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return run_feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2, self.implementation)

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self.dropout1(self._attend(x, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._feed_forward(x))

    def _blocks_overridden(self) -> bool:
        """Whether a subclass changed one of the two methods that torch documents by use as this layer's parts."""
        ours = TransformerEncoderLayer
        return type(self)._sa_block is not ours._sa_block or type(self)._ff_block is not ours._ff_block

    def _forward_by_blocks(
        self, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _runs_packed(self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether a nested ``src`` can be computed here; the conditions are those of torch's own nested path."""
        return (
            mask is None
            and key_padding_mask is None
            and not self.training
            and not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())))
            and src.layout == torch.strided
            and src.is_contiguous()
            and runs_only(self.self_attn, MultiheadAttention)
            and self.self_attn.batch_first
            and self.self_attn.in_proj_weight is not None
            and self.self_attn.bias_k is None
            and not self.self_attn.add_zero_attn
            and not self._blocks_overridden()
        )

    def _forward_packed(self, src: Tensor) -> Tensor:
        """The layer on a nested ``src`` (B, lengths, E): its buffer holds the tokens of all sequences one after another."""
        self_attn: Any = self.self_attn
        lengths = src._nested_tensor_size()[:, 0].to(src.device)
        real = torch.arange(int(lengths.max()), device=src.device) < lengths[:, None]

        def attend(tokens: Tensor) -> Tensor:
            projected = self_attn._project(tokens, self_attn.in_proj_weight, self_attn.in_proj_bias)
            padded = projected.new_zeros(*real.shape, projected.shape[-1])
            padded[real] = projected
            q, k, v = self_attn._split_heads(padded, 3)
            out: Any = attention(q, k, v, attn_mask=real[:, None, None, :], implementation=self_attn.implementation)
            merged = out.transpose(1, 2)[real].flatten(-2)
            return self_attn._project(merged, self_attn.out_proj.weight, self_attn.out_proj.bias)

        out = self._compose(src.values().view(-1, self_attn.embed_dim), attend)
        return torch._nested_view_from_buffer(
            out.reshape(-1),
            src._nested_tensor_size(),
            src._nested_tensor_strides(),
            src._nested_tensor_storage_offsets(),
        )


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` by :func:`fastattn.attention`, ``ffn`` and ``layer_norm(residual=)``.

    Everything said of :class:`TransformerEncoderLayer` holds: constructor, random numbers, parameters, ``state_dict``, ``forward``
    and its results are torch's, replaced or hooked children are called as the modules they are, and the differences on purpose
    are those of :class:`MultiheadAttention`. ``self_attn``, ``multihead_attn`` (over ``memory``) and the norms are fastattn.nn's.

    Attributes:
        implementation: "auto", or the name of the implementation of the feed-forward part; the attentions and norms have
            their own.

    Source: Vaswani et al., arXiv:1706.03762; ``norm_first``: Xiong et al., arXiv:2002.04745.
    """

    implementation: str = "auto"

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer applied to ``tgt`` (L, E), (B, L, E) with ``batch_first``, else (L, B, E); same shape back.

        Args:
            memory: the encoder's output, S rows in tgt's layout.
            tgt_mask: (L, L) or (B·nhead, L, L); memory_mask: (L, S) or (B·nhead, L, S): boolean with True = hidden, or added.
            tgt_key_padding_mask: (B, L) or (L,); memory_key_padding_mask: (B, S) or (S,): boolean with True = padding, or added.
            tgt_is_causal, memory_is_causal: hints that the mask is the causal one.
        """
        masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        memory_masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self._blocks_overridden():
            return self._forward_by_blocks(tgt, memory, masks, memory_masks)
        x = tgt
        if self.norm_first:
            y, h = _add_and_norm(self._attend_self(self.norm1(x), *masks), x, self.dropout1, self.norm2)
            y, h = _add_and_norm(self._attend_memory(y, memory, *memory_masks), h, self.dropout2, self.norm3)
            return h + self.dropout3(self._feed_forward(y))
        y, _ = _add_and_norm(self._attend_self(x, *masks), x, self.dropout1, self.norm1)
        y, _ = _add_and_norm(self._attend_memory(y, memory, *memory_masks), y, self.dropout2, self.norm2)
        return _add_and_norm(self._feed_forward(y), y, self.dropout3, self.norm3)[0]

    def _attend_self(self, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, causal: bool) -> Tensor:
        return self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=key_padding_mask, need_weights=False, is_causal=causal
        )[0]

    def _attend_memory(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, causal: bool
    ) -> Tensor:
        return self.multihead_attn(
            x, memory, memory, attn_mask=mask, key_padding_mask=key_padding_mask, need_weights=False, is_causal=causal
        )[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return run_feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2, self.implementation)

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self.dropout1(self._attend_self(x, attn_mask, key_padding_mask, is_causal))

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.dropout2(self._attend_memory(x, mem, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self._feed_forward(x))

    def _blocks_overridden(self) -> bool:
        """Whether a subclass changed one of the methods that torch documents by use as this layer's parts."""
        ours = TransformerDecoderLayer
        names = ("_sa_block", "_mha_block", "_ff_block")
        return any(getattr(type(self), name) is not getattr(ours, name) for name in names)

    def _forward_by_blocks(
        self, x: Tensor, memory: Tensor, masks: tuple[Any, ...], memory_masks: tuple[Any, ...]
    ) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            x = x + self._mha_block(self.norm2(x), memory, *memory_masks)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *masks))
        x = self.norm2(x + self._mha_block(x, memory, *memory_masks))
        return self.norm3(x + self._ff_block(x))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def _hint(is_causal: bool | None) -> bool | None:
    """The hint that a stack gets for its mask. Without one torch looks whether the mask is the causal one, which no graph can do:
    in a graph the mask is taken as it is, with the same result."""
    return False if is_causal is None and torch.compiler.is_compiling() else is_causal


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` of fastattn's layers: those of torch.nn in the copies of ``encoder_layer`` become ours.

    Everything else is torch's, nested tensors in evaluation included (see :class:`TransformerEncoderLayer`). A mask without
    ``is_causal`` compiles in one graph, where torch's own breaks it.
    """

    @functools.wraps(nn.TransformerEncoder.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch's: the layers one after the other, then ``norm``."""
        return super().forward(src, mask, src_key_padding_mask, _hint(is_causal))


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder`` of fastattn's layers: those of torch.nn in the copies of ``decoder_layer`` become ours.

    A ``tgt_mask`` without ``tgt_is_causal`` compiles in one graph, where torch's own breaks it.
    """

    @functools.wraps(nn.TransformerDecoder.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's: the layers one after the other, then ``norm``."""
        paddings = (tgt_key_padding_mask, memory_key_padding_mask)
        return super().forward(tgt, memory, tgt_mask, memory_mask, *paddings, _hint(tgt_is_causal), memory_is_causal)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` of fastattn's layers; a ``custom_encoder`` or ``custom_decoder`` stays as it is."""

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(nn.Transformer.__init__).bind(self, *args, **kwargs).arguments
        for name, cls in (("encoder", TransformerEncoder), ("decoder", TransformerDecoder)):
            part = getattr(self, name)
            if given.get(f"custom_{name}") is None:
                part.__class__ = cls
                _take_over(part)
