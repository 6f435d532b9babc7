"""convert on models of transformers: their norms and feed-forward networks, by what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import hf_architectures as hf
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastattn.integrations import huggingface_modules
from fastattn.nn import conversion_report, convert, revert

#: Classes that convert must swap in each architecture, with how many of each.
SWAPPED = {
    "gpt2": {"LayerNorm": 5},
    "bert": {"LayerNorm": 6},
    "distilbert": {"LayerNorm": 6, "FFN": 2},
    "t5": {"T5LayerNorm": 12, "T5DenseActDense": 4},
    "bart": {"LayerNorm": 12},
    "llama": {"LlamaRMSNorm": 5, "LlamaMLP": 2},
    "mistral": {"MistralRMSNorm": 5, "MistralMLP": 2},
    "qwen2": {"Qwen2RMSNorm": 5, "Qwen2MLP": 2},
    "qwen3": {"Qwen3RMSNorm": 9, "Qwen3MLP": 2},
    "gemma2": {"Gemma2RMSNorm": 9, "Gemma2MLP": 2},
    "gpt_neox": {"LayerNorm": 5, "GPTNeoXMLP": 2},
    "opt": {"LayerNorm": 5},
    "vit": {"LayerNorm": 5},
    "whisper": {"LayerNorm": 12},
    "gpt_oss": {"GptOssRMSNorm": 5},
}


@pytest.mark.parametrize("name", hf.ARCHITECTURES)
def test_converted_models_compute_the_same(name):
    hf.check_parity(name, "left" if hf.checks(name)["padded"] is not None else None, "converted")


@pytest.mark.parametrize("name", SWAPPED)
def test_report_and_revert(name):
    model = hf.build(name)
    before = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    report = conversion_report(convert(model))
    for cls, count in SWAPPED[name].items():
        assert sum(row.class_name == cls for row in report.swapped) == count, f"{cls}\n{report}"
    assert list(model.state_dict()) == keys
    for original in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in revert(original).modules()] == before
        assert not any("_fastattn" in key for m in original.modules() for key in m.__dict__)


def test_report_names_what_is_left():
    reasons = {row.name: row.reason for row in conversion_report(convert(hf.build("gpt2"))).left}
    assert "Conv1D" in reasons["transformer.h.0.mlp"]
    assert "set_attn_implementation('fastattn')" in reasons["transformer.h.0.attn"]
    model = hf.variant("gpt2", "fastattn")
    reasons = {row.name: row.reason for row in conversion_report(model).left}
    assert "fastattn.attention" in reasons["transformer.h.0.attn"]


class SquareRMSNorm(LlamaRMSNorm):
    __module__ = LlamaRMSNorm.__module__

    def forward(self, hidden_states):
        return super().forward(hidden_states).square()


class DroppingMLP(LlamaMLP):
    __module__ = LlamaMLP.__module__

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def _config(**options):
    cls = hf.transformers.LlamaConfig
    return cls(**{**hf.ARCHITECTURES["llama"].config, **options})


def test_what_computes_something_else_is_left():
    for module, reason in (
        (SquareRMSNorm(16), "neither"),
        (DroppingMLP(_config()), "something else"),
        (LlamaMLP(_config(hidden_act="quick_gelu")), "QuickGELU"),
    ):
        before = type(module)
        assert type(convert(module)) is before
        assert reason in str(conversion_report(module))


def test_probing_leaves_no_trace():
    module = LlamaMLP(_config()).eval()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    parameters = {n: (p, p.clone()) for n, p in module.named_parameters()}
    found = huggingface_modules.recognize(module)
    assert found.settings.layers == ("gate_proj", "up_proj", "down_proj")
    assert torch.equal(torch.randn(3), expected) and not module.training
    assert all(p is parameters[n][0] and torch.equal(p, parameters[n][1]) for n, p in module.named_parameters())


def test_where_dropout_stands_is_seen():
    model = hf.build("t5")
    for row in conversion_report(convert(model)).swapped:
        if row.class_name == "T5DenseActDense":
            module = model.get_submodule(row.name)
            settings = module.__dict__["_fastattn_settings"]
            assert (settings.hidden_dropout, settings.out_dropout) == ("dropout", None)
            module.train()
            module.dropout.p = 1 - 1e-7  # everything is dropped before the last product, which has no bias
            assert module(torch.randn(2, 3, 32)).abs().max() == 0


def test_adapters_and_hooks_are_called():
    module = convert(LlamaMLP(_config()))
    x, called = torch.randn(2, 3, 32), []
    expected = module(x)
    handle = module.up_proj.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(module(x), expected)
    assert called
    handle.remove()
    module.up_proj = nn.Sequential(module.up_proj, nn.Identity())
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("cls", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norms_of_another_dtype_than_their_input(cls):
    module = cls(16)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = module(x)
    actual = convert(module)(x)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_frozen_meta_and_named_implementation():
    with torch.device("meta"):
        model = hf.transformers.LlamaForCausalLM(_config())
    convert(model, implementation="reference")
    assert len(conversion_report(model).swapped) == 7
    module = convert(LlamaRMSNorm(16).requires_grad_(False), implementation="reference")
    assert module.implementation == "reference" and not module.weight.requires_grad
