"""A training step works: gradients equal the reference's, and the loss on real text goes down."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, build, with_implementation
from tolerance import assert_accurate

from fastattn.models import TransformerConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_tiny.py"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_float64_gradients_equal_the_reference(family: str, dropout: float) -> None:
    config = TransformerConfig(**FAMILIES[family].__dict__ | {"dropout": dropout})
    model = build(config)
    reference = with_implementation(model, "reference", torch.float64)
    tokens, targets = torch.randint(67, (2, 19)), torch.randint(67, (2, 19))
    for each in (model, reference):
        torch.manual_seed(3)  # the same dropout masks
        each.train()(tokens, targets).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_float32_gradients_are_as_accurate_as_the_reference(family: str) -> None:
    model = build(FAMILIES[family]).float()
    tokens, targets = torch.randint(67, (2, 19)), torch.randint(67, (2, 19))
    plain = with_implementation(model, "reference", torch.float32)
    exact = with_implementation(model, "reference", torch.float64)
    for each in (model, plain, exact):
        each(tokens, targets).backward()
    for (name, p), q, r in zip(model.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert_accurate(p.grad, q.grad, r.grad, name, terms=2 * 19)


def test_loss_goes_down_on_real_text() -> None:
    spec = importlib.util.spec_from_file_location("train_tiny", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    text = example.corpus()
    assert len(text) > 300_000 and bytes(text[:400].tolist()).isascii()
    config = TransformerConfig.tiny(dim=64, nlayers=2, nheads=4, ffn_dim=172, max_seq_len=64)
    model, losses = example.train(config, 130, columns=64)
    start, end = losses[0], sum(losses[-10:]) / 10
    assert 5.3 < start < 5.8  # ln 256 = 5.55: untrained
    # Below the entropy of single bytes (about 3.26 nats) the model uses context.
    unigram = torch.bincount(text, minlength=256) / len(text)
    entropy = float(torch.special.entr(unigram).sum())
    assert end < entropy - 0.3, f"loss {start:.2f} -> {end:.2f}, unigram entropy {entropy:.2f}"
    assert len(model.generate([list(b"The ")], 20)[0]) == 20
