"""What fastattn is measured against on a GPU: the rung below, torch's own ways by name, and the libraries that are importable.

Every peer is a function (case, tensors) -> call; it raises (ImportError, or whatever its library raises at the first call) where it
does not take the case, and that is a line in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.cli import cases
from fastattn.cli.cases import Case, Outputs
from fastattn.cli.plain import plain_outputs, torch_product

Tensors = dict[str, Tensor]
Call = Callable[[], Outputs]
Peer = Callable[[Case, Tensors], Call]


def for_case(case: Case, implementation: str) -> dict[str, Peer]:
    """The peers of ``case`` by name, the rung below first."""
    below = "triton" if implementation == "cuda" else "reference"
    found: dict[str, Peer] = {f"rung below ({below})": functools.partial(ours, implementation=below)}
    if "attention" in case.op:
        for backend in ("flash", "efficient", "cudnn", "math"):
            found[f"sdpa:{backend}"] = functools.partial(_sdpa, backend=backend)
        return found | {"flex": _flex, "flash-attn": _flash_attn, "xformers": _xformers}
    found |= {"eager": _eager, "compile": _compiled}
    if case.op in ("ffn", "glu_ffn", "linear"):
        found["matmul"] = _matmuls
    if case.op in ("rms_norm", "layer_norm", "cross_entropy", "linear_cross_entropy"):
        found["liger"] = _liger
    if case.op in ("rms_norm", "layer_norm", "cross_entropy"):
        found["quack"] = _quack
    return found


def ours(case: Case, t: Tensors, implementation: str) -> Call:
    return cases.prepare(case, t, implementation)


def _plain_only(case: Case, *allowed: str) -> None:
    """ValueError if the case has options beyond ``allowed``."""
    other = set(case.options) - {"nheads_kv", *allowed}
    if other:
        raise ValueError(f"has no {', '.join(sorted(other))}")


def _sdpa(case: Case, t: Tensors, backend: str) -> Call:
    _plain_only(case, "causal", "is_causal", "mask", "mask_grad")
    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    chosen = kind.get(backend, SDPBackend.EFFICIENT_ATTENTION)
    causal = bool(case.options.get("causal") or case.options.get("is_causal"))
    if causal and case.options.get("causal") and t["q"].shape[2] != t["k"].shape[2]:
        raise ValueError("has no bottom-right causal alignment")
    grouped = t["q"].shape[1] != t["k"].shape[1]

    def call() -> Outputs:
        with sdpa_kernel(chosen):
            return {
                "out": F.scaled_dot_product_attention(
                    t["q"], t["k"], t["v"], t.get("attn_mask"), is_causal=causal, enable_gqa=grouped
                )
            }

    return call


@functools.cache
def _flex_compiled() -> Callable[..., Tensor]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # A backward pass is timed again and again from one forward pass, whose results must therefore stay.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case, t: Tensors) -> Call:
    """flex_attention with a block mask for causal and window, and a score_mod for softcap; compiled for each call's shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    _plain_only(case, "causal", "window_size", "softcap")
    rows, keys = t["q"].shape[2], t["k"].shape[2]
    left, right = case.options.get("window_size", (-1, -1))
    right = 0 if case.options.get("causal") else right
    softcap = case.options.get("softcap", 0.0)
    block_mask = None
    if left >= 0 or right >= 0:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = j - (i + keys - rows)
            seen = distance <= (right if right >= 0 else keys)
            return seen & (distance >= -left) if left >= 0 else seen

        block_mask = create_block_mask(visible, None, None, rows, keys, device=t["q"].device.type)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    keywords: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": t["q"].shape[1] != t["k"].shape[1]}
    if softcap:
        keywords["score_mod"] = capped
    function = _flex_compiled()
    return lambda: {"out": function(t["q"], t["k"], t["v"], **keywords)}


def _flash_attn(case: Case, t: Tensors) -> Call:
    """flash-attn 3's interface if it is there, else flash-attn 2's; (batch, seq, heads, dim)."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        from flash_attn import flash_attn_func
    _plain_only(case, "causal", "window_size", "softcap")
    keywords = {name: case.options[name] for name in ("causal", "window_size", "softcap") if name in case.options}
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")

    def call() -> Outputs:
        out = flash_attn_func(q, k, v, **keywords)
        return {"out": (out[0] if isinstance(out, tuple) else out).transpose(1, 2)}

    return call


def _xformers(case: Case, t: Tensors) -> Call:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    _plain_only(case, "causal")
    if t["q"].shape[1] != t["k"].shape[1]:
        raise ValueError("has no grouped heads in (batch, seq, heads, dim)")
    bias = LowerTriangularMask() if case.options.get("causal") else None
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")
    return lambda: {"out": memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)}


def _eager(case: Case, t: Tensors) -> Call:
    own = {name: tensor for name, tensor in t.items() if name != "rng_state"}
    return lambda: plain_outputs(case, own, torch_product)


def _compiled(case: Case, t: Tensors) -> Call:
    import torch._functorch.config

    torch.compiler.reset()  # after 8 shapes of one function, torch.compile quietly runs it eagerly
    torch._functorch.config.donated_buffer = False
    own = {name: tensor for name, tensor in t.items() if name != "rng_state"}
    function = torch.compile(lambda tensors: plain_outputs(case, tensors, torch_product), dynamic=False)
    return lambda: function(own)


def _matmuls(case: Case, t: Tensors) -> Call:
    """The bare products alone: no bias, no activation."""
    if case.op == "linear":
        return lambda: {"out": t["x"] @ t["weight"].mT}
    first, last = ("w_in", "w_out") if case.op == "ffn" else ("w_up", "w_down")

    def call() -> Outputs:
        hidden = t["x"] @ t[first].mT
        if case.op == "glu_ffn":
            t["x"] @ t["w_gate"].mT
        return {"out": hidden @ t[last].mT}

    return call


def _liger(case: Case, t: Tensors) -> Call:
    if case.op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        _plain_only(case, "weight")
        return lambda: {"out": LigerRMSNormFunction.apply(t["x"], t["weight"], 1e-6)}
    if case.op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        _plain_only(case, "weight", "bias")
        return lambda: {"out": LigerLayerNormFunction.apply(t["x"], t["weight"], t["bias"], 1e-5)}
    _plain_only(case)
    if case.op == "cross_entropy":
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        # Its backward pass overwrites the logits, so it works on a copy.
        return lambda: {"out": LigerCrossEntropyFunction.apply(t["logits"].clone(), t["target"], None)[0]}
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda: {"out": LigerFusedLinearCrossEntropyFunction.apply(t["x"], t["weight"], t["target"])[0]}


def _quack(case: Case, t: Tensors) -> Call:
    if case.op == "cross_entropy":
        from quack import cross_entropy

        _plain_only(case)
        return lambda: {"out": cross_entropy(t["logits"], t["target"], reduction="mean")}
    if case.op == "layer_norm":
        from quack import layernorm

        _plain_only(case, "weight", "bias")
        if t["x"].requires_grad:
            raise ValueError("has no backward pass")
        weight, bias = t["weight"].float(), t["bias"].float()
        return lambda: {"out": layernorm(t["x"], weight, bias)}
    from quack import rmsnorm

    _plain_only(case, "weight")
    return lambda: {"out": rmsnorm(t["x"], t["weight"])}
