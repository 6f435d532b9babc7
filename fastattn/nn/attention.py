"""MultiheadAttention: torch.nn's module computed by :func:`fastattn.attention`, in memory linear in the sequence length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.nn._fusion import project
from fastattn.ops import _validate
from fastattn.ops.attention import attention
from fastattn.ops.attention_weights import attention_weights
from fastattn.reference.precision import accumulation_dtype

__all__ = ["MultiheadAttention"]

_HIDDEN = float("-inf")


def _check_mask(name: str, mask: Tensor | None, allowed_dims: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise _validate.DtypeError(f"{name}: expected a Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise _validate.DtypeError(
            f"{name} must be boolean (True = hidden) or floating point (added to the scores), got {mask.dtype}"
        )
    if mask.dim() not in allowed_dims:
        dims = " or ".join(f"{n}-D" for n in allowed_dims)
        raise _validate.ShapeError(f"{name} must be {dims} for these inputs, got shape {tuple(mask.shape)}")


def _merge_masks(key_padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask for :func:`fastattn.attention` out of torch.nn's two.

    Args:
        key_padding: (B, 1, 1, S) or None.
        mask: (1, 1, L, S), (B, H, L, S) or None; like ``key_padding`` boolean with True = hidden, or added to the scores.
        dtype: of the queries.

    Returns:
        Boolean with True = visible if every mask given is boolean, else additive in ``dtype`` or its accumulation dtype.
        Extents of 1 stay 1 as far as broadcasting allows: padding alone is never expanded to (L, S), nothing to heads.
    """
    given = [m for m in (key_padding, mask) if m is not None]
    flags = [m for m in given if m.dtype == torch.bool]
    added = [m for m in given if m.dtype != torch.bool]
    if not given:
        return None
    if not added:
        return (flags[0] if len(flags) == 1 else flags[0] | flags[1]).logical_not()
    merged = added[0] if len(added) == 1 else added[0] + added[1]
    if flags:
        merged = torch.where(flags[0], _HIDDEN, merged)
    return merged if merged.dtype in (dtype, accumulation_dtype(dtype)) else merged.to(dtype)


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` by :func:`fastattn.attention`.

    Constructor, initialization, parameters, ``state_dict``, ``forward`` and its results are torch's, and
    ``isinstance(m, torch.nn.MultiheadAttention)`` holds. What differs from torch on purpose:

    * A row whose keys are all hidden gives zeros (and zero weights) where torch gives NaN or finite noise, depending on the
      path it took; so padding never spreads NaN.
    * Hidden keys are skipped: NaN or infinity in a padded key or value does not reach the output.
    * Masks of different kinds (one boolean, one floating) are merged without torch's deprecation warning.
    * ``is_causal=True`` is a hint, as in torch, that ``attn_mask`` is the causal mask. It replaces the mask when there is no
      ``key_padding_mask``, weights are not asked for and L equals the number of keys; otherwise the mask itself is used.
      (torch also replaces it when L differs, and then hides the key of ``add_bias_kv`` and ``add_zero_attn`` from most rows.)
    * ``add_zero_attn`` is one more exp(0) in the denominator of the softmax: nothing is concatenated.
    * What wrong arguments raise is a TypeError or a ValueError beside the AssertionError or RuntimeError that torch raises.

    With ``need_weights=True``, torch's default, the output has the bits that it has without, from the same fused pass, and the
    weights, which are those after dropout, come from :func:`fastattn.attention_weights`: O(L·S) memory, of all heads only if
    they are not averaged.

    Nested tensors are computed by torch (its inference fast path, or its error).

    Attributes:
        implementation: "auto", or the name of the implementation this module must use; see :func:`fastattn.attention`.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    """

    implementation: str = "auto"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: (L, E), (B, L, E) with ``batch_first``, else (L, B, E). key: the same with S, kdim. value: S, vdim.
            key_padding_mask: (B, S), or (S,) for unbatched inputs: boolean with True = ignore, or added to the scores.
            need_weights: also return the attention weights.
            attn_mask: (L, S) or (B·num_heads, L, S): boolean with True = hidden, or added to the scores (differentiable).
            average_attn_weights: return the mean of the weights over heads.
            is_causal: hint that ``attn_mask`` is the causal mask.

        Returns:
            (output, weights): output shaped as ``query``; weights (B, L, S), or (B, num_heads, L, S) without averaging,
            without B for unbatched inputs (S counts the keys that the module appends), or None.

        Raises:
            ValueError: a shape does not fit. TypeError: a mask is neither boolean nor floating point.
            RuntimeError: ``is_causal`` without ``attn_mask``, as in torch.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint, got attn_mask=None with is_causal=True"
            )
        batched = query.dim() == 3
        q, k, v = self._project_heads(query, key, value)
        keys_given = k.shape[2]
        causal = is_causal and key_padding_mask is None and not need_weights
        causal = causal and q.shape[2] == keys_given and self.bias_k is None
        mask = None if causal else self._mask(key_padding_mask, attn_mask, q, keys_given)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._append_key(k, self.bias_k), self._append_key(v, self.bias_v)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1.0 if mask.dtype == torch.bool else 0.0)

        dropout_p = self.dropout if self.training else 0.0
        everything = dropout_p >= 1.0
        if everything:
            dropout_p = 0.0
        weights: Tensor | None = None
        if need_weights:
            out, weights = self._attend_with_weights(q, k, v, mask, dropout_p, average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        else:
            out = self._attend(q, k, v, mask, causal, dropout_p)
        if everything:
            out, weights = out * 0.0, None if weights is None else weights * 0.0
        return self._merge_heads(out, batched), weights

    def _project_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projected queries (B, H, L, D), keys and values (B, H, S, D): views into the projections, nothing is copied.

        Inputs that are one and the same tensor are projected by one matrix product, as in torch.
        """
        w, b = self.in_proj_weight, self.in_proj_bias
        if w is None:
            bias_parts = (None, None, None) if b is None else b.chunk(3)
            weight_parts = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (
                self._split_heads(self._project(x, wx, bx), 1)[0]
                for x, wx, bx in zip((query, key, value), weight_parts, bias_parts, strict=True)
            )
        elif query is key and key is value:
            q, k, v = self._split_heads(self._project(query, w, b), 3)
        else:
            E = self.embed_dim
            b_q, b_kv = (None, None) if b is None else b.split([E, 2 * E])
            w_q, w_kv = w.split([E, 2 * E])
            (q,) = self._split_heads(self._project(query, w_q, b_q), 1)
            if key is value:
                k, v = self._split_heads(self._project(key, w_kv, b_kv), 2)
            else:
                b_k, b_v = (None, None) if b_kv is None else b_kv.chunk(2)
                w_k, w_v = w_kv.chunk(2)
                (k,) = self._split_heads(self._project(key, w_k, b_k), 1)
                (v,) = self._split_heads(self._project(value, w_v, b_v), 1)
        return q, k, v

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return project(x, weight, bias, self.implementation)

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``x`` (..., parts·E) in the module's layout as ``parts`` views of (B, H, N, D)."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
            batch, tokens = 0, 1
        else:
            batch, tokens = (0, 1) if self.batch_first else (1, 0)
        x = x.view(*x.shape[:2], parts, self.num_heads, self.head_dim)
        return x.permute(2, batch, 3, tokens, 4).unbind()

    def _merge_heads(self, out: Tensor, batched: bool) -> Tensor:
        """The output projection of ``out`` (B, H, L, D), in the module's layout."""
        out = out.transpose(1, 2).flatten(-2)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self._project(out, self.out_proj.weight, self.out_proj.bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> Any:
        return attention(
            q,
            k,
            v,
            attn_mask=mask,
            causal=causal,
            sinks=self._sinks(q),
            dropout_p=dropout_p,
            implementation=self.implementation,
        )

    def _attend_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, average: bool
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, L, D), with the bits of ``_attend``, and the weights after dropout (B, H, L, S) or (B, L, S)."""
        rng_state = _validate.rng_state(None, dropout_p, q)
        sinks = self._sinks(q)
        common: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout_p, "rng_state": rng_state}
        found: Any = attention(q, k, v, **common, sinks=sinks, return_lse=True, implementation=self.implementation)
        out, lse = found
        # No GPU implementation has this operation.
        implementation = "auto" if self.implementation in ("cuda", "triton") else self.implementation
        weights = attention_weights(q, k, lse, **common, average_heads=average, implementation=implementation)
        if sinks is not None:
            zero = F.dropout(torch.exp(-lse), dropout_p).unsqueeze(-1)
            weights = torch.cat([weights, (zero.mean(dim=1) if average else zero).to(weights.dtype)], dim=-1)
        return out, weights

    def _sinks(self, q: Tensor) -> Tensor | None:
        return q.new_zeros(self.num_heads, dtype=accumulation_dtype(q.dtype)) if self.add_zero_attn else None

    def _append_key(self, x: Tensor, extra: Tensor) -> Tensor:
        """``x`` (B, H, S, D) with ``extra`` (1, 1, E) as key S of every sequence."""
        row = extra.view(1, self.num_heads, 1, self.head_dim).to(x.dtype)
        return torch.cat([x, row.expand(x.shape[0], -1, -1, -1)], dim=2)

    def _mask(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """Both masks checked against (B, H, L, S), made 4-D and merged; see :func:`_merge_masks`."""
        batch, heads, rows, _ = q.shape
        if key_padding_mask is not None:
            if key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            if key_padding_mask.shape != (batch, keys):
                raise _validate.ShapeError(
                    f"key_padding_mask must be {(batch, keys)}, got {tuple(key_padding_mask.shape)}"
                )
            key_padding_mask = key_padding_mask[:, None, None, :]
        if attn_mask is not None:
            expected = (rows, keys) if attn_mask.dim() == 2 else (batch * heads, rows, keys)
            if attn_mask.shape != expected:
                raise _validate.ShapeError(
                    f"a {attn_mask.dim()}-D attn_mask must be {expected}, got {tuple(attn_mask.shape)}"
                )
            attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        return _merge_masks(key_padding_mask, attn_mask, q.dtype)

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        dims = query.dim()
        if dims not in (2, 3):
            raise _validate.ShapeError(f"query must be 2-D (unbatched) or 3-D, got shape {tuple(query.shape)}")
        batch_dim = 0 if self.batch_first else 1
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != dims:
                raise _validate.ShapeError(f"{name} must be {dims}-D as query is, got shape {tuple(x.shape)}")
            if x.shape[-1] != width:
                raise _validate.ShapeError(f"{name} must have {width} features, got shape {tuple(x.shape)}")
            if dims == 3 and x.shape[batch_dim] != query.shape[batch_dim]:
                layout = "(batch, seq, features)" if self.batch_first else "(seq, batch, features)"
                raise _validate.ShapeError(
                    f"{name} must have query's batch size {query.shape[batch_dim]} in the layout {layout},"
                    f" got shape {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise _validate.ShapeError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same number of rows"
            )
        _check_mask("key_padding_mask", key_padding_mask, (1,) if dims == 2 else (2,))
        _check_mask("attn_mask", attn_mask, (2, 3))
