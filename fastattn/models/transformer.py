"""A decoder-only Transformer that covers the GPT-2 and Llama families, built on fastattn's operations.

Reads top to bottom: configuration, KV cache, the layers in the order a token meets them, the model, sampling. Shapes use
B batch, N tokens of this call, T = B·N, M tokens visible to it (cache included), E ``dim``, H ``nheads``, Hk ``nheads_kv``,
D ``head_dim``, R ``rope_dim``, F ``ffn_dim``, V ``vocab_size``. Between attentions the tokens are rows of a matrix (T, E).

The stack is pre-norm (Radford et al. 2019; Touvron et al. 2023). A branch's output and the residual stream travel separately,
so that every addition happens inside the next norm: ``h = dropout(x) + residual; y = norm(h)`` is one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._fusion import classify, project
from fastattn.ops._select import IMPLEMENTATIONS
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn, glu_ffn
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.rope import rope
from fastattn.reference.ffn import ACTIVATIONS, GATED_ACTIVATIONS
from fastattn.reference.precision import accumulation_dtype

NORMS = ("rms_norm", "layer_norm")
POSITIONS = ("rope", "learned", "sinusoidal", "none")


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture. The defaults are Llama's choices; ``gpt2()`` shows the other family.

    ``nheads_kv``, ``head_dim`` and ``rope_dim`` left at 0 become ``nheads``, ``dim // nheads`` and ``head_dim``. ``positions``
    is ``rope``, ``learned``, ``sinusoidal`` (Vaswani et al. 2017) or ``none``; ``rope_interleaved`` rotates pairs (2i, 2i+1)
    instead of (i, i + R/2). A gated ``activation`` (swiglu, geglu, geglu_tanh, reglu) makes the FFN three matrices. ``dropout``
    applies to the embeddings, the attention weights and each branch's output. ``implementation`` goes to every operation.

    Raises ValueError naming the field for anything that cannot be built.
    """

    vocab_size: int
    dim: int
    nlayers: int
    nheads: int
    ffn_dim: int
    max_seq_len: int
    nheads_kv: int = 0
    head_dim: int = 0
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_dim: int = 0
    rope_interleaved: bool = False
    activation: str = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    implementation: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "nlayers", "nheads", "ffn_dim", "max_seq_len"):
            _require(_is_int(getattr(self, name)) and getattr(self, name) > 0, name, self, "a positive integer")
        for name, default in (("nheads_kv", self.nheads), ("head_dim", self.dim // self.nheads)):
            _require(_is_int(getattr(self, name)) and getattr(self, name) >= 0, name, self, "0 (default) or positive")
            if getattr(self, name) == 0:
                _require(name != "head_dim" or self.dim % self.nheads == 0, "dim", self, "a multiple of nheads")
                object.__setattr__(self, name, default)
        _require(self.nheads % self.nheads_kv == 0, "nheads_kv", self, f"a divisor of nheads={self.nheads}")
        if self.rope_dim == 0:
            object.__setattr__(self, "rope_dim", self.head_dim - self.head_dim % 2)
        _require(
            _is_int(self.rope_dim) and self.rope_dim % 2 == 0 and 0 <= self.rope_dim <= self.head_dim,
            "rope_dim", self, f"even and at most head_dim={self.head_dim}",
        )  # fmt: skip
        _require(self.positions != "sinusoidal" or self.dim % 2 == 0, "dim", self, "even for sinusoidal positions")
        choices = (
            ("norm", NORMS), ("positions", POSITIONS), ("activation", (*ACTIVATIONS, *GATED_ACTIVATIONS)),
            ("implementation", ("auto", *IMPLEMENTATIONS)),
        )  # fmt: skip
        for name, allowed in choices:
            _require(getattr(self, name) in allowed, name, self, "one of " + ", ".join(allowed))
        _require(self.norm == "layer_norm" or not self.norm_bias, "norm_bias", self, "False with norm='rms_norm'")
        _require(0 < self.norm_eps < math.inf, "norm_eps", self, "positive and finite")
        _require(0 < self.rope_theta < math.inf, "rope_theta", self, "positive and finite")
        _require(0 <= self.dropout < 1, "dropout", self, "in [0, 1)")

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate matrix."""
        return self.activation in GATED_ACTIVATIONS

    @classmethod
    def gpt2(cls, **overrides: Any) -> TransformerConfig:
        """GPT-2 small, 124 M parameters (Radford et al. 2019)."""
        fields: dict[str, Any] = {
            "vocab_size": 50257, "dim": 768, "nlayers": 12, "nheads": 12, "ffn_dim": 3072, "max_seq_len": 1024,
            "norm": "layer_norm", "norm_bias": True, "positions": "learned", "activation": "gelu_tanh",
            "qkv_bias": True, "out_bias": True, "ffn_bias": True,
        }  # fmt: skip
        return cls(**(fields | overrides))

    @classmethod
    def smollm2_135m(cls, **overrides: Any) -> TransformerConfig:
        """SmolLM2-135M (Allal et al. 2025) as GGUF stores it: rotary pairs are neighbours."""
        fields: dict[str, Any] = {
            "vocab_size": 49152, "dim": 576, "nlayers": 30, "nheads": 9, "nheads_kv": 3, "ffn_dim": 1536,
            "max_seq_len": 8192, "rope_theta": 100000.0, "rope_interleaved": True,
        }  # fmt: skip
        return cls(**(fields | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> TransformerConfig:
        """A Llama of 0.4 M parameters over bytes, for tests and examples."""
        fields: dict[str, Any] = {
            "vocab_size": 256, "dim": 96, "nlayers": 3, "nheads": 4, "nheads_kv": 2, "ffn_dim": 256, "max_seq_len": 256,
        }  # fmt: skip
        return cls(**(fields | overrides))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, field: str, config: TransformerConfig, allowed: str) -> None:
    if not condition:
        raise ValueError(f"TransformerConfig: {field} must be {allowed}, got {getattr(config, field)!r}")


class KVCache:
    """Keys and values of every layer, preallocated (B, Hk, capacity, D) and doubled when full.

    ``left_padding`` (B,) counts, per row, the padding slots in front of its first token: they are never attended to and
    positions count from the first real token, so a row gives what it would give without padding. ``length`` slots are in use.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int = 256,
        *,
        left_padding: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"KVCache: batch and capacity must be positive, got {batch} and {capacity}")
        if left_padding is not None and (left_padding.shape != (batch,) or left_padding.is_floating_point()):
            raise ValueError(f"KVCache: left_padding must be ({batch},) integers, got {tuple(left_padding.shape)}")
        shape = (batch, config.nheads_kv, capacity, config.head_dim)
        self.batch = batch
        self.capacity = capacity
        self.length = 0
        self.left_padding = left_padding
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.nlayers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.nlayers)]

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more slots."""
        needed = self.length + tokens
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(*old.shape[:2], self.capacity, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                tensors[layer] = new

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, Hk, N, D) behind the slots in use; return all of the layer's (B, Hk, M, D). Does not move ``length``."""
        tokens = k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, tokens).copy_(k)
        values.narrow(2, self.length, tokens).copy_(v)
        return keys.narrow(2, 0, self.length + tokens), values.narrow(2, 0, self.length + tokens)


@dataclass
class Context:
    """What all layers of one call share. ``rotary``: (cos, sin), each (1 | B, N, R/2). ``mask``: (B, 1, 1, M) bool."""

    batch: int
    rows: int
    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    cache: KVCache | None


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) of ``h = dropout(x) + residual``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.shape = (config.dim,)
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.norm_bias else None

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual (T, E) → (norm(h), h)."""
        config = self.config
        dropout_p = config.dropout if self.training else 0.0
        if config.norm == "rms_norm":
            return rms_norm(  # type: ignore[return-value]
                x, self.shape, self.weight, config.norm_eps, residual=residual, dropout_p=dropout_p,
                return_residual=True, implementation=config.implementation,
            )  # fmt: skip
        return layer_norm(  # type: ignore[return-value]
            x, self.shape, self.weight, self.bias, config.norm_eps, residual=residual, dropout_p=dropout_p,
            return_residual=True, implementation=config.implementation,
        )  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023). One projection gives q, k and v, in this order."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.qkv = nn.Linear(config.dim, (config.nheads + 2 * config.nheads_kv) * config.head_dim, config.qkv_bias)
        self.out = nn.Linear(config.nheads * config.head_dim, config.dim, config.out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (T, E) → (T, E)."""
        config = self.config
        batch, rows, nheads, nheads_kv = context.batch, context.rows, config.nheads, config.nheads_kv
        qkv = project(x, self.qkv.weight, self.qkv.bias, config.implementation)
        # (B, H + 2 Hk, N, D): queries and keys are neighbours, so one call rotates both.
        heads = qkv.view(batch, rows, nheads + 2 * nheads_kv, config.head_dim).transpose(1, 2)
        qk, v = heads.split_with_sizes((nheads + nheads_kv, nheads_kv), 1)
        if context.rotary is not None:
            cos, sin = context.rotary
            qk = rope(qk, cos, sin, interleaved=config.rope_interleaved, implementation=config.implementation)
        q, k = qk.split_with_sizes((nheads, nheads_kv), 1)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        out: Tensor = attention(  # type: ignore[assignment]
            q, k, v, attn_mask=context.mask, causal=rows > 1, dropout_p=config.dropout if self.training else 0.0,
            implementation=config.implementation,
        )  # fmt: skip
        merged = out.transpose(1, 2).reshape(batch * rows, nheads * config.head_dim)
        return project(merged, self.out.weight, self.out.bias, config.implementation)


class FeedForward(nn.Module):
    """``act(x Wu) Wd``, or ``(act(x Wg) · (x Wu)) Wd`` with a gate (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.dim, config.ffn_dim, config.ffn_bias) if config.gated else None
        self.up = nn.Linear(config.dim, config.ffn_dim, config.ffn_bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, E) → (T, E)."""
        config, gate, up, down = self.config, self.gate, self.up, self.down
        if gate is None:
            return ffn(
                x, up.weight, down.weight, up.bias, down.bias, activation=config.activation,
                implementation=config.implementation,
            )  # fmt: skip
        return glu_ffn(
            x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, activation=config.activation,
            implementation=config.implementation,
        )  # fmt: skip


class Block(nn.Module):
    """Norm, attention, norm, FFN."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = Norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x (T, E): the previous branch's output, not yet added to ``residual``. Returns the same pair."""
        y, residual = self.attention_norm(x, residual)
        y, residual = self.ffn_norm(self.attention(y, context), residual)
        return self.ffn(y), residual


class Transformer(nn.Module):
    """The decoder: ``forward`` gives logits, or the loss when there are targets; ``generate`` continues prompts."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.nlayers))
        self.norm = Norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        # Not buffers: `model.to(torch.bfloat16)` must not round the angles.
        self._angles: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """GPT-2's scheme: N(0, 0.02), and 1/√(2 layers) of that where a branch ends, so that the stream's variance stays put."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        for last in (getattr(module, "out", None), getattr(module, "down", None)):
            if isinstance(last, nn.Linear):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * self.config.nlayers))

    def new_cache(self, batch: int, capacity: int = 256, left_padding: Tensor | None = None) -> KVCache:
        """An empty cache in this model's dtype and on its device."""
        weight = self.embedding.weight
        return KVCache(
            self.config, batch, capacity, left_padding=left_padding, dtype=weight.dtype, device=weight.device
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Logits (B, N, V), or with ``targets`` the mean cross-entropy in nats (scalar).

        Args:
            tokens: (B, N) integer ids in [0, V).
            targets: (B, N) the id expected at each place, -100 where none is; excludes ``cache``.
            cache: tokens continue what it holds, and are added to it.
            last_only: logits of the last place only, (B, 1, V): prefilling needs no others.

        Raises:
            ValueError: on wrong shapes, or when the context would exceed ``max_seq_len``.
        """
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be a 2-D integer tensor, got {tokens.dtype} {tuple(tokens.shape)}")
        if targets is not None and (targets.shape != tokens.shape or cache is not None or last_only):
            raise ValueError(
                f"targets must have the shape of tokens {tuple(tokens.shape)}, without cache or last_only; "
                f"got {tuple(targets.shape)}"
            )
        positions, context = self._locate(tokens, cache)
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            x = x + self._sinusoids(positions).to(x.dtype)
        x, residual = x.flatten(0, 1), None
        for block in self.blocks:
            x, residual = block(x, residual, context)
        if cache is not None:
            cache.length += tokens.shape[1]
        batch, rows = tokens.shape
        if last_only and rows > 1:
            x, residual = (t[rows - 1 :: rows] for t in (x, residual))  # type: ignore[index]
        y, _ = self.norm(x, residual)
        head = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        if targets is not None:
            return classify(y, head, targets.flatten(), self.config.implementation)
        return project(y, head, None, self.config.implementation).view(batch, -1, head.shape[0])

    def _locate(self, tokens: Tensor, cache: KVCache | None) -> tuple[Tensor, Context]:
        """Positions (N,), or (B, N) in a padded batch, and what follows from them."""
        batch, rows = tokens.shape
        start = 0
        padding = mask = None
        if cache is not None:
            if cache.batch != batch:
                raise ValueError(f"tokens has a batch of {batch}, the cache one of {cache.batch}")
            start, padding = cache.length, cache.left_padding
        end = start + rows
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens exceed max_seq_len={self.config.max_seq_len}")
        if cache is not None:
            cache.reserve(rows)
        positions = torch.arange(start, end, device=tokens.device)
        if padding is not None:
            mask = (torch.arange(end, device=tokens.device) >= padding[:, None])[:, None, None]
            positions = (positions - padding[:, None]).clamp_(min=0)
        rotary = None
        if self.config.positions == "rope" and self.config.rope_dim > 0:
            cos, sin = self._angle_table(end, self.config.rope_dim, self.config.rope_theta)
            rotary = (
                (cos[None, start:end], sin[None, start:end]) if padding is None else (cos[positions], sin[positions])
            )
        return positions, Context(batch, rows, rotary, mask, cache)

    def _angle_table(self, length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin of ``position · theta^(-2i/dim)``, each (≥ length, dim/2), in the accumulation dtype; grown by doubling."""
        weight = self.embedding.weight
        key = (weight.device, accumulation_dtype(weight.dtype))
        table = self._angles.get(key)
        if table is None or table[0].shape[0] < length:
            rows = min(max(256, 2 * length), self.config.max_seq_len)
            with torch.inference_mode(False):  # generate() may build what training uses later
                frequencies = theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
                angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
                table = (angles.cos().to(*key), angles.sin().to(*key))
            self._angles[key] = table
        return table

    def _sinusoids(self, positions: Tensor) -> Tensor:
        """(…, E): sin at even and cos at odd columns, wavelengths from 2π to 10000·2π."""
        cos, sin = self._angle_table(self.config.max_seq_len, self.config.dim, 10000.0)
        return torch.stack((sin[positions], cos[positions]), dim=-1).flatten(-2)

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continue every prompt; see ``fastattn.models.generate.generate``, whose first argument is this model."""
        from fastattn.models.generate import generate

        return generate(
            self, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop_tokens=stop_tokens,
            seed=seed, on_token=on_token,
        )  # fmt: skip
