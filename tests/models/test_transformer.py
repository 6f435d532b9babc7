"""The stack against plain PyTorch, against Hugging Face's GPT-2 and Llama, with and without the cache."""

from __future__ import annotations

import pytest
import torch
from model_families import FAMILIES, GPT2, LLAMA, build, with_implementation
from tolerance import assert_accurate
from torch import Tensor

from fastattn.models import KVCache, Transformer, TransformerConfig
from fastattn.models.plain import PlainTransformer


def plain_logits(model: Transformer, tokens: Tensor) -> Tensor:
    plain = PlainTransformer(model.config, model.state_dict())
    plain.reset(*tokens.shape)
    return plain.forward(tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_match_plain_pytorch(family: str, dtype: torch.dtype) -> None:
    model = build(FAMILIES[family]).to(dtype)
    exact = with_implementation(model, "reference", torch.float64)
    tokens = torch.randint(67, (3, 37))
    assert_accurate(model(tokens), plain_logits(model, tokens), exact(tokens), family, terms=64)


@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (5, 1, 30, 1)], ids=["whole", "single", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_changes_nothing(family: str, pieces: tuple[int, ...]) -> None:
    model = build(FAMILIES[family])
    tokens = torch.randint(67, (2, 37))
    cache = model.new_cache(2, capacity=4)
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 37 and cache.capacity >= 37
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_nothing(family: str) -> None:
    model = build(FAMILIES[family])
    rows = [torch.randint(67, (n,)) for n in (11, 3, 1)]
    padding = torch.tensor([11 - len(row) for row in rows])
    cache = model.new_cache(3, left_padding=padding)
    padded = torch.stack([torch.cat((torch.full((int(n),), 66), row)) for n, row in zip(padding, rows, strict=True)])
    logits = torch.cat([model(padded[:, :7], cache=cache), model(padded[:, 7:], cache=cache)], dim=1)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, 11 - len(row) :], model(row[None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_cache(family: str) -> None:
    """A call that fills a cache is differentiable as one without; a later one of any mode continues from it."""
    model = build(FAMILIES[family])
    tokens, cache = torch.randint(67, (2, 9)), model.new_cache(2, 16)
    with torch.no_grad():
        model(tokens[:, :4], cache=model.new_cache(2, 4))
    found = torch.autograd.grad(model(tokens, cache=cache).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-10)
    last = torch.randint(67, (2, 1))
    logits = model(last, cache=cache)
    torch.testing.assert_close(logits, model(torch.cat((tokens, last), 1))[:, -1:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_last_only_is_the_last_place() -> None:
    model = build(LLAMA)
    tokens = torch.randint(67, (2, 9))
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:], rtol=0, atol=1e-13)


@torch.no_grad()
def test_angles_survive_a_cast_and_mixed_grad_modes() -> None:
    model = build(LLAMA).float()
    with torch.inference_mode():
        model(torch.randint(67, (1, 5)))
    with torch.enable_grad():
        model(torch.randint(67, (1, 5)), torch.randint(67, (1, 5))).backward()
    cos, _ = next(iter(model.to(torch.bfloat16)._angles.values()))
    assert cos.dtype == torch.float32


def test_loss_is_the_mean_cross_entropy_and_skips_ignored_targets() -> None:
    model = build(GPT2)
    tokens, targets = torch.randint(67, (2, 13)), torch.randint(67, (2, 13))
    targets[:, 5:9] = -100
    logp = model(tokens).log_softmax(-1)
    kept = targets != -100
    expected = -logp[kept].gather(1, targets[kept][:, None]).mean()
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-13, atol=0)


def test_dropout_is_for_training_only_and_drops_the_expected_share() -> None:
    config = TransformerConfig(**LLAMA.__dict__ | {"dropout": 0.25})
    model = build(config)
    tokens = torch.randint(67, (2, 17))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(5)
    first = model(tokens)
    torch.manual_seed(5)
    assert torch.equal(first, model(tokens))


def test_parameter_counts_of_the_presets() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in Transformer(getattr(TransformerConfig, name)()).parameters())
            for name in ("gpt2", "smollm2_135m", "tiny")
        }
    assert counts["gpt2"] == 124_439_808  # as published
    assert counts["smollm2_135m"] == 134_515_008
    assert counts["tiny"] < 500_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("dim", -1), ("dim", 2.5), ("dim", 97), ("nlayers", 0), ("nheads", 0), ("nheads", 5),
        ("ffn_dim", 0), ("max_seq_len", 0), ("nheads_kv", 3), ("head_dim", -4), ("norm", "batch_norm"),
        ("norm_bias", True), ("norm_eps", 0.0), ("norm_eps", float("nan")), ("positions", "alibi"),
        ("rope_theta", -1.0), ("rope_dim", 7), ("rope_dim", 26), ("activation", "tanh"), ("dropout", 1.0),
        ("dropout", float("nan")), ("implementation", "gpu"),
    ],
)  # fmt: skip
def test_bad_config_names_the_field(field: str, value: object) -> None:
    blamed = {"nheads": "(nheads|dim)"}.get(field, field)
    with pytest.raises(ValueError, match=rf"TransformerConfig: {blamed} must be .*, got"):
        TransformerConfig.tiny(**{field: value})


def test_bad_calls() -> None:
    model = build(LLAMA)
    with pytest.raises(ValueError, match="2-D integer"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="2-D integer"):
        model(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="targets must have the shape"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="81 tokens exceed max_seq_len=80"):
        model(torch.zeros(1, 81, dtype=torch.long))
    with pytest.raises(ValueError, match="batch of 2, the cache one of 1"):
        model(torch.zeros(2, 3, dtype=torch.long), cache=model.new_cache(1))
    with pytest.raises(ValueError, match="left_padding"):
        KVCache(LLAMA, 2, left_padding=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="positive"):
        KVCache(LLAMA, 0)
    with pytest.raises(NotImplementedError, match="cuda"):
        with_implementation(model, "cuda", torch.float64)(torch.zeros(1, 3, dtype=torch.long))


@torch.no_grad()
def test_same_logits_as_hugging_face_llama() -> None:
    transformers = pytest.importorskip("transformers")
    model = build(TransformerConfig.tiny(vocab_size=67, norm_eps=1e-6, rope_theta=5000.0))
    c = model.config
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=67, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.nlayers,
            num_attention_heads=c.nheads, num_key_value_heads=c.nheads_kv, max_position_embeddings=c.max_seq_len,
            rms_norm_eps=1e-6, rope_theta=5000.0, tie_word_embeddings=True, attn_implementation="eager",
        )
    ).double()  # fmt: skip
    state = model.state_dict()
    theirs = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    theirs["lm_head.weight"] = state["embedding.weight"]
    sizes = (c.nheads * c.head_dim, c.nheads_kv * c.head_dim, c.nheads_kv * c.head_dim)
    for i in range(c.nlayers):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", state[here + "attention.qkv.weight"].split(sizes), strict=True):
            theirs[f"{there}self_attn.{name}_proj.weight"] = part
        theirs[there + "self_attn.o_proj.weight"] = state[here + "attention.out.weight"]
        theirs[there + "input_layernorm.weight"] = state[here + "attention_norm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = state[here + "ffn_norm.weight"]
        for name in ("gate", "up", "down"):
            theirs[f"{there}mlp.{name}_proj.weight"] = state[f"{here}ffn.{name}.weight"]
    peer.load_state_dict(theirs)
    tokens = torch.randint(67, (2, 31))
    # Their rotary angles and norms are float32 inside, whatever the model's dtype.
    torch.testing.assert_close(model(tokens), peer(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_same_logits_as_hugging_face_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    model = build(GPT2)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=67, n_embd=48, n_layer=2, n_head=3, n_inner=112, n_positions=80, attn_implementation="eager"
        )
    ).double().eval()  # fmt: skip
    names = {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "ffn_norm": "ln_2",
        "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj", "norm": "transformer.ln_f",
        "embedding": "transformer.wte", "position_embedding": "transformer.wpe",
    }  # fmt: skip
    theirs = {}
    for name, weight in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("blocks."):
            _, layer, stem = stem.split(".", 2)
            transposed = weight.T if weight.dim() == 2 else weight  # their Conv1D keeps (in, out)
            theirs[f"transformer.h.{layer}.{names[stem]}.{kind}"] = transposed
        else:
            theirs[f"{names[stem]}.{kind}"] = weight
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    peer.load_state_dict(theirs)
    tokens = torch.randint(67, (2, 31))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, rtol=0, atol=1e-11)
