"""What fastattn is measured against: PyTorch's own ways of making the same call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastattn.cli import modules
from fastattn.cli.cases import Case, Outputs, leading, roof
from fastattn.cli.plain import plain_outputs, torch_product

#: name: what it is.
PEERS = {
    "eager": "torch's functions one after the other, or its module",
    "sdpa": "F.scaled_dot_product_attention, with the backend that it picks",
    "compile": "torch.compile of eager (all but attention and the language model)",
    "transformers": "the language model of transformers with SDPA",
}


def peer_names(op: str) -> tuple[str, ...]:
    """The peers that exist for ``op``. torch.compile turns written-out attention into SDPA, which is there already."""
    if op == "causal_lm":
        return ("transformers",)
    return ("sdpa", "eager") if "attention" in op else ("eager", "compile")


def peers(case: Case, t: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Callable[[], Outputs]]:
    """The calls among ``wanted`` that exist for this case, by the name to print (``sdpa:flash``).

    ImportError for ``transformers`` where that is not installed.
    """
    found: dict[str, Callable[[], Outputs]] = {}
    wanted = [name for name in wanted if name in peer_names(case.op)]
    if "transformers" in wanted:
        found["transformers:sdpa"] = modules.torchs(case, t)
    if "sdpa" in wanted and _sdpa_can(case):
        mask, keywords = _sdpa_arguments(case, t)
        name = sdpa_backend(t["q"], t["k"], t["v"], mask, **keywords)
        found[f"sdpa:{name}"] = lambda: {
            "out": F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask, **keywords)
        }
    if "eager" in wanted or "compile" in wanted:
        function, arguments = _eager(case, t)
        if "eager" in wanted:
            found["eager"] = lambda: function(*arguments)
        if "compile" in wanted and _can_compile():
            compiled = _compiled(function)
            found["compile"] = lambda: compiled(*arguments)
    return found


def _eager(case: Case, t: dict[str, Tensor]) -> tuple[Callable[..., Outputs], list[Any]]:
    """(function, its arguments): torch's own call. Its dropout is torch's, which draws other masks than ``plain_outputs``."""
    if case.op in modules.OPS:
        return modules.torchs(case, t), []
    if case.op in ("layer_norm", "rms_norm") and not {"residual", "dropout_p"} & set(case.options):
        # Written out, since calls of a few microseconds feel every test that plain_outputs makes.
        shape = (case.shape[1],)
        if case.op == "rms_norm":
            eps = case.options.get("eps")
            return lambda x, weight: {"out": F.rms_norm(x, shape, weight, eps)}, [t["x"], t.get("weight")]
        eps = case.options.get("eps", 1e-5)
        tensors = [t["x"], t.get("weight"), t.get("bias")]
        return lambda x, weight, bias: {"out": F.layer_norm(x, shape, weight, bias, eps)}, tensors
    own = {name: tensor for name, tensor in t.items() if name != "rng_state"}
    return lambda tensors: plain_outputs(case, tensors, torch_product), [own]


def _compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    import torch._functorch.config

    torch.compiler.reset()  # after 8 shapes of one function, torch.compile quietly runs it eagerly
    # A backward pass is timed again and again from one forward pass, whose results must therefore stay.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def compile_helps(t: dict[str, Tensor], case: Case, directions: Sequence[str]) -> bool:
    """Whether torch.compile is worth its time: in float16 on a CPU all of it goes to products, which it leaves as they are."""
    slow = leading(t).dtype == torch.float16 and leading(t).device.type == "cpu"
    return not slow or any(roof(case, direction) != "matrix" for direction in directions)


def _sdpa_can(case: Case) -> bool:
    """SDPA has no window, softcap, ALiBi, sinks or lse."""
    return not any(name in case.options for name in ("window_size", "softcap", "alibi", "sinks", "return_lse"))


def _sdpa_arguments(case: Case, t: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Any]]:
    rows, keys = t["q"].shape[2], t["k"].shape[2]
    mask, causal = t.get("attn_mask"), bool(case.options.get("is_causal") or case.options.get("causal"))
    if case.options.get("causal") and rows != keys:  # bottom-right, which SDPA can only say with a mask
        mask, causal = torch.ones(rows, keys, dtype=torch.bool, device=t["q"].device).tril(keys - rows), False
    scale = case.options.get("softmax_scale", case.options.get("scale"))
    gqa = t["q"].shape[1] != t["k"].shape[1]
    dropout = case.options.get("dropout_p", 0.0)
    return mask, {"dropout_p": dropout, "is_causal": causal, "scale": scale, "enable_gqa": gqa}


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **keywords: Any) -> str:
    """The name of the backend that SDPA picks for this call: flash, efficient, math, cudnn, ..."""
    choice = torch._fused_sdp_choice(q, k, v, mask, **keywords)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


@functools.cache
def _can_compile() -> bool:
    """torch.compile's CPU backend needs a C++ compiler, its CUDA backend needs triton; without them it is no peer."""
    probe = torch.compile(lambda x: x + 1, dynamic=False)
    try:
        probe(torch.zeros(2))
    except Exception:  # inductor raises many kinds
        return False
    return True
