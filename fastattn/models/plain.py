"""The same Transformer in plain PyTorch operations, to be compared with: same weights, same cache, nothing of fastattn.

Written the way a careful user of PyTorch would: fused q/k/v projection, ``F.scaled_dot_product_attention``, ``F.rms_norm``,
``F.linear``, ``F.silu``, a preallocated KV cache, one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models.transformer import TransformerConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "reglu": F.relu,
    "gelu": F.gelu,
    "geglu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swiglu": F.silu,
}


class PlainTransformer:
    """Reads a ``Transformer``'s state dict; shapes as there (B, N, E, H, Hk, D). Inference only."""

    def __init__(self, config: TransformerConfig, state: Mapping[str, Tensor]) -> None:
        self.config = config
        self.state = state
        self.layers = [
            {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
            for i in range(config.nlayers)
        ]
        self.head = state.get("lm_head.weight", state["embedding.weight"])
        self.length = 0
        self.cache: list[tuple[Tensor, Tensor]] = []

    def reset(self, batch: int, capacity: int) -> None:
        """Empty the cache and make room for ``capacity`` tokens."""
        config, weight = self.config, self.head
        shape = (batch, config.nheads_kv, capacity, config.head_dim)
        self.cache = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(config.nlayers)]
        self.cos, self.sin = self._angles(capacity, config.rope_dim, config.rope_theta)
        self.length = 0

    def forward(self, tokens: Tensor, *, last_only: bool = False) -> Tensor:
        """Logits (B, N or 1, V) of tokens (B, N) that follow what the cache holds."""
        start, end = self.length, self.length + tokens.shape[1]
        x = F.embedding(tokens, self.state["embedding.weight"])
        if self.config.positions == "learned":
            x = x + self.state["position_embedding.weight"][start:end]
        elif self.config.positions == "sinusoidal":
            cos, sin = self._angles(end, self.config.dim, 10000.0)
            x = x + torch.stack((sin, cos), dim=-1).flatten(-2)[start:end].to(x.dtype)
        for weights, (keys, values) in zip(self.layers, self.cache, strict=True):
            x = x + self._attention(self._norm(x, weights, "attention_norm."), weights, keys, values, start, end)
            x = x + self._ffn(self._norm(x, weights, "ffn_norm."), weights)
        self.length = end
        x = x[:, -1:] if last_only else x
        return F.linear(self._norm(x, self.state, "norm."), self.head)

    def greedy(self, prompt: Sequence[int], max_new_tokens: int, stop_tokens: Sequence[int] = ()) -> list[int]:
        """The most probable continuation, token by token, up to a stop token."""
        with torch.inference_mode():
            self.reset(1, len(prompt) + max_new_tokens)
            tokens, result = torch.tensor([list(prompt)]), []
            for _ in range(max_new_tokens):
                tokens = self.forward(tokens, last_only=True)[:, -1].argmax(-1, keepdim=True)
                if int(tokens) in stop_tokens:
                    break
                result.append(int(tokens))
        return result

    def _norm(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        config, weight = self.config, weights[name + "weight"]
        if config.norm == "rms_norm":
            return F.rms_norm(x, (config.dim,), weight, config.norm_eps)
        return F.layer_norm(x, (config.dim,), weight, weights.get(name + "bias"), config.norm_eps)

    def _attention(
        self, x: Tensor, weights: Mapping[str, Tensor], keys: Tensor, values: Tensor, start: int, end: int
    ) -> Tensor:
        config = self.config
        batch, rows, _ = x.shape
        qkv = F.linear(x, weights["attention.qkv.weight"], weights.get("attention.qkv.bias"))
        heads = qkv.view(batch, rows, -1, config.head_dim).transpose(1, 2)
        q, k, v = heads.split((config.nheads, config.nheads_kv, config.nheads_kv), dim=1)
        if config.positions == "rope":
            q, k = self._rotate(q, start, end), self._rotate(k, start, end)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        mask = None
        if rows > 1 and start > 0:  # SDPA's is_causal counts from the first key; a continued prefill needs the offset
            mask = torch.ones(rows, end, dtype=torch.bool).tril(start)
        out = F.scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], mask, is_causal=rows > 1 and start == 0,
            enable_gqa=config.nheads != config.nheads_kv,
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(batch, rows, -1)
        return F.linear(out, weights["attention.out.weight"], weights.get("attention.out.bias"))

    def _ffn(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        hidden = F.linear(x, weights["ffn.up.weight"], weights.get("ffn.up.bias"))
        activation = _ACTIVATIONS[self.config.activation]
        if self.config.gated:
            hidden = activation(F.linear(x, weights["ffn.gate.weight"], weights.get("ffn.gate.bias"))) * hidden
        else:
            hidden = activation(hidden)
        return F.linear(hidden, weights["ffn.down.weight"], weights.get("ffn.down.bias"))

    def _angles(self, length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float64)[:, None]
        angles = positions / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        dtype = torch.float64 if self.head.dtype == torch.float64 else torch.float32
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _rotate(self, x: Tensor, start: int, end: int) -> Tensor:
        cos, sin, rotated = self.cos[start:end], self.sin[start:end], self.config.rope_dim
        x, rest = x[..., :rotated], x[..., rotated:]
        if self.config.rope_interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.config.rope_interleaved else torch.cat(pair, -1)
        return torch.cat((turned.to(rest.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(x.dtype)
