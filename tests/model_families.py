"""Small models of every kind that the configuration describes, for the tests of the model."""

from __future__ import annotations

import torch

from fastattn.models import Transformer, TransformerConfig

GPT2 = TransformerConfig.gpt2(vocab_size=67, dim=48, nlayers=2, nheads=3, ffn_dim=112, max_seq_len=80)
LLAMA = TransformerConfig.tiny(vocab_size=67, dim=40, nheads=5, nheads_kv=1, head_dim=12, ffn_dim=88, max_seq_len=80)
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama-interleaved-partial": TransformerConfig.tiny(
        vocab_size=67, dim=36, nheads=3, nheads_kv=3, rope_dim=8, ffn_dim=70, max_seq_len=80, rope_interleaved=True,
        tie_embeddings=False, qkv_bias=True, activation="geglu_tanh",
    ),
    "sinusoidal-relu": TransformerConfig.tiny(
        vocab_size=67, dim=36, nheads=4, nheads_kv=2, max_seq_len=80, positions="sinusoidal", norm="layer_norm",
        activation="relu", ffn_bias=True,
    ),
    "no-positions-reglu": TransformerConfig.tiny(vocab_size=67, max_seq_len=80, positions="none", activation="reglu"),
}  # fmt: skip


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A float64 model whose every parameter is random: initial biases of 0 and gains of 1 would hide mistakes."""
    torch.manual_seed(seed)
    model = Transformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def with_implementation(model: Transformer, implementation: str, dtype: torch.dtype) -> Transformer:
    config = TransformerConfig(**model.config.__dict__ | {"implementation": implementation})
    copy = Transformer(config).to(dtype)  # before loading: a float32 stop on the way would round
    copy.load_state_dict(model.state_dict())
    return copy.eval()
