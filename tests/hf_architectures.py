"""Small random models of Hugging Face transformers, run with eager attention and with fastattn.

``python tests/hf_architectures.py`` writes the table of docs/huggingface.md.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from tolerance import assert_accurate
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fastattn.integrations.huggingface import NAME
from fastattn.nn import convert

VOCABULARY, LENGTH, NEW_TOKENS = 97, 11, 20
# Products behind a logit or a gradient: layers x (projections, attention, feed-forward) of width 32 to 64.
TERMS = 512
_GPT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
_LLAMA = {**_GPT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
_BART = {**_GPT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
         "decoder_start_token_id": 1, "forced_eos_token_id": None}  # fmt: skip


class Architecture(NamedTuple):
    """config: keyword arguments of the model class's configuration. kind: decoder | encoder | seq2seq | audio | image."""

    model: str
    kind: str
    config: dict[str, Any]


ARCHITECTURES = {
    "gpt2": Architecture("GPT2LMHeadModel", "decoder", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": Architecture("BertForMaskedLM", "encoder", _BERT),
    "roberta": Architecture("RobertaForMaskedLM", "encoder", _BERT),
    "distilbert": Architecture(
        "DistilBertForMaskedLM", "encoder",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration", "seq2seq",
        {**_GPT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
    ),
    "bart": Architecture("BartForConditionalGeneration", "seq2seq", _BART),
    "llama": Architecture("LlamaForCausalLM", "decoder", _LLAMA),
    "mistral": Architecture("MistralForCausalLM", "decoder", {**_LLAMA, "sliding_window": 6}),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", "decoder",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": Architecture("Qwen3ForCausalLM", "decoder", _LLAMA),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "decoder",
        {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 1.0},
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM", "decoder",
        {**_GPT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64},
    ),
    "opt": Architecture(
        "OPTForCausalLM", "decoder",
        {**_GPT, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "vit": Architecture(
        "ViTForImageClassification", "image",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
         "patch_size": 4, "num_labels": 7},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration", "audio",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 64, "suppress_tokens": None,
         "begin_suppress_tokens": None},
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM", "decoder",
        {**_LLAMA, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2,
         "experts_implementation": "eager"},
    ),
}  # fmt: skip

COLUMNS = ("logits", "grad", "generate", "padded")


def build(name: str, attn_implementation: str = "eager") -> nn.Module:
    """The model in evaluation, with weights large enough that what attention does shows in the logits."""
    architecture = ARCHITECTURES[name]
    cls = getattr(transformers, architecture.model)
    torch.manual_seed(1)
    model = cls._from_config(cls.config_class(**architecture.config), attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in parameter_name.lower() or parameter.dim() < 2 else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


@contextmanager
def representable_masks() -> Iterator[None]:
    """float64's lowest number, eager's word for masked, is -inf where a model's softmax is in float32, and a row of it NaN."""

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        lowest = eager_mask(*args, **kwargs)
        return None if lowest is None else lowest.clamp(min=-1e30)

    AttentionMaskInterface.register("eager", mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", eager_mask)


def inputs(name: str, padding: str | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of forward for a batch of 2, and which positions of the logits count (bool, None: all)."""
    kind = ARCHITECTURES[name].kind
    generator = torch.Generator().manual_seed(2)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}, torch.ones(2, dtype=torch.bool)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        hidden = slice(0, 4) if padding == "left" else slice(LENGTH - 4, LENGTH)
        mask[1, hidden], ids[1, hidden] = 0, 0
    if kind == "encoder" or kind == "decoder":
        return {"input_ids": ids, "attention_mask": mask}, mask.bool()
    decoder = torch.randint(3, VOCABULARY, (2, LENGTH - 2), generator=generator)
    decoder_mask = mask[:, :-2] if padding == "left" else mask[:, 2:]
    given = {"decoder_input_ids": decoder, "decoder_attention_mask": decoder_mask}
    if kind == "audio":
        return {"input_features": torch.randn(2, 8, 30, generator=generator), **given}, decoder_mask.bool()
    return {"input_ids": ids, "attention_mask": mask, **given}, decoder_mask.bool()


def outcome(model: nn.Module, given: dict[str, Tensor], counting: Tensor) -> dict[str, Tensor]:
    """The logits where they count, and the gradients of a random function of them for every parameter."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    logits = model(**cast, use_cache=False).logits if "pixel_values" not in given else model(**cast).logits
    logits = logits[counting]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights.to(dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def variant(name: str, which: str) -> nn.Module:
    """``exact`` (eager, float64), ``plain`` (eager), ``fastattn`` (attention), ``converted`` (and norms, feed-forward)."""
    # Before transformers 5.20 set_attn_implementation does not reach t5's encoder and decoder.
    model = build(name, NAME if which in ("fastattn", "converted") else "eager")
    if which == "exact":
        return model.double()
    return convert(model) if which == "converted" else model


def check_parity(name: str, padding: str | None = None, which: str = "fastattn", parts: tuple[str, ...] = ()) -> None:
    """Logits and gradients (or only ``parts`` of them) of fastattn are as near to eager's in float64 as eager's in float32."""
    given, counting = inputs(name, padding)
    with representable_masks():
        exact = outcome(variant(name, "exact"), given, counting)
    actual, plain = (outcome(variant(name, v), given, counting) for v in (which, "plain"))
    assert actual.keys() == exact.keys()
    for key in parts or exact:
        keys = [key]
        weight = key.replace(".bias", ".weight")
        if weight in exact and exact[key].abs().max() < 1e-6 * exact[weight].abs().max():
            keys.append(weight)  # zero in mathematics (the bias of keys): judged beside its layer's weights
        together = (torch.cat([of[k].flatten() for k in keys]) for of in (actual, plain, exact))
        assert_accurate(*together, f"{name} {key}", terms=TERMS)


def generate(model: nn.Module, name: str, padding: str | None = None, **options: Any) -> Tensor:
    """20 greedily chosen tokens."""
    given, _ = inputs(name, padding)
    if "decoder_input_ids" in given:
        given = {k: v for k, v in given.items() if not k.startswith("decoder")}
        given["decoder_input_ids"] = torch.ones(2, 1, dtype=torch.long)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return GenerationMixin.generate(model, **given, **options)


def check_generate(name: str, padding: str | None = None, **options: Any) -> None:
    """The same tokens as eager attention, which chooses more than a few different ones."""
    expected = generate(variant(name, "plain"), name, padding, **options)
    actual = generate(variant(name, "fastattn"), name, padding, **options)
    assert expected.shape[1] >= NEW_TOKENS and torch.equal(actual, expected), f"{name}: {actual} != {expected}"


def checks(name: str) -> dict[str, Callable[[], None] | None]:
    """Column of the table -> what proves it; None: there is no such thing."""
    kind = ARCHITECTURES[name].kind
    generates, pads = kind not in ("encoder", "image"), kind != "image"

    def grad() -> None:
        check_parity(name)

    def padded() -> None:
        for side in ("left", "right"):
            check_parity(name, side)
        if generates:
            check_generate(name, "left")

    def generation() -> None:
        check_generate(name)

    def logits() -> None:
        check_parity(name, parts=("logits",))

    return {
        "logits": logits,
        "grad": grad,
        "generate": generation if generates else None,
        "padded": padded if pads else None,
    }


def table() -> str:
    lines = ["| architecture | model | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for name, architecture in ARCHITECTURES.items():
        cells = []
        for column in COLUMNS:
            check = checks(name)[column]
            cell = "–"
            if check is not None:
                try:
                    check()
                    cell = "✓"
                except Exception as error:
                    print(f"{name} {column}: {error}", file=sys.stderr)
                    cell = "✗"
            cells.append(cell)
        lines.append(f"| {name} | `{architecture.model}` | " + " | ".join(cells) + " |")
    lines.append(f"\ntransformers {transformers.__version__}, torch {torch.__version__}, CPU, float32.")
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "huggingface.md"
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    text = page.read_text()
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}{table()}\n{end}", text, flags=re.DOTALL))
