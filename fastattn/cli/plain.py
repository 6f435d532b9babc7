"""The calls of ``fastattn.cli.cases`` in plain PyTorch: torch's own functions one after the other in the tensors' dtype.

Every intermediate result is rounded to that dtype. The same code on float64 tensors is the exact result, so the oracle shares
nothing with fastattn but the definition of the dropout masks (reference/philox.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cli import modules
from fastattn.cli.cases import Case, Outputs, Product, leading
from fastattn.reference.philox import attention_dropout, matrix_dropout


def torch_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ (+ bias) as torch computes it in the tensors' dtype."""
    return F.linear(a, b, bias) if b.dim() == 2 else torch.matmul(a, b.mT)


def rounded_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ in float32, rounded once: no less accurate than torch's 16-bit products on CPUs, some of which run at 1 GFLOP/s."""
    return torch_product(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)


def plain_outputs(case: Case, t: dict[str, Tensor], product: Product | None = None) -> Outputs:
    """The same call in torch's own functions, by result name."""
    if product is None:
        first = leading(t)
        slow = first.dtype.itemsize == 2 and first.device.type == "cpu"
        product = rounded_product if slow else torch_product
    if "attention" in case.op:
        return _attention(case, t, product)
    if case.op in modules.OPS:
        return modules.plain(case, t, product)
    if case.op in ("layer_norm", "rms_norm"):
        x = _dropped(case, t, t["x"])
        x = x + t["residual"] if "residual" in t else x
        if case.op == "layer_norm":
            return {"out": F.layer_norm(x, x.shape[-1:], t.get("weight"), t.get("bias"), case.options.get("eps", 1e-5))}
        return {"out": F.rms_norm(x, x.shape[-1:], t.get("weight"), case.options.get("eps"))}
    if case.op == "ffn":
        hidden = activate(case.options["activation"], product(t["x"], t["w_in"], t.get("b_in")))
        return {"out": product(_dropped(case, t, hidden), t["w_out"], t.get("b_out"))}
    if case.op == "glu_ffn":
        name = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[
            case.options["activation"]
        ]
        hidden = activate(name, product(t["x"], t["w_gate"], t.get("b_gate"))) * product(
            t["x"], t["w_up"], t.get("b_up")
        )
        return {"out": product(_dropped(case, t, hidden), t["w_down"], t.get("b_down"))}
    if case.op == "linear":
        out = product(t["x"], t["weight"], t.get("bias"))
        return {"out": out + t["residual"] if "residual" in t else out}
    if case.op == "cross_entropy":
        return {"out": _cross_entropy(case, t["logits"], t["target"], t.get("weight"))}
    if case.op == "linear_cross_entropy":
        return {"out": _cross_entropy(case, product(t["x"], t["weight"], t.get("bias")), t["target"], None)}
    x = t["x"]
    return {"out": _rope(x, t["cos"].to(x.dtype), t["sin"].to(x.dtype), bool(case.options.get("interleaved")))}


def plain_by_head(case: Case, t: dict[str, Tensor]) -> Outputs:
    """``plain_outputs`` of an attention call, one key-value head after the other: O(B·N²) memory instead of O(B·H·N²).

    Not with dropout, whose counters know the head.
    """
    heads_kv = t["k"].shape[1]
    groups = t["q"].shape[1] // heads_kv
    found: list[Outputs] = []
    for head in range(heads_kv):
        mine = slice(head * groups, (head + 1) * groups)
        part = {**t, "q": t["q"][:, mine], "k": t["k"][:, head : head + 1], "v": t["v"][:, head : head + 1]}
        part |= {name: t[name][mine] for name in ("alibi_slopes", "sinks") if name in t}
        found.append(plain_outputs(case, part))
    return {name: torch.cat([outputs[name] for outputs in found], 1) for name in found[0]}


def activate(name: str, x: Tensor) -> Tensor:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[name](x)


def _dropped(case: Case, t: dict[str, Tensor], x: Tensor) -> Tensor:
    """``x`` with the call's dropout: the mask defined by counters (reference/philox.py), without ``rng_state`` torch's own."""
    probability = case.options.get("dropout_p", 0.0)
    if not probability or "rng_state" not in t:
        return F.dropout(x, probability) if probability else x
    draw = attention_dropout if x.dim() == 4 else matrix_dropout
    return x * draw(x.shape, probability, t["rng_state"], x.device).to(x.dtype)


def _cross_entropy(case: Case, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """F.cross_entropy, with softcap before it and z-loss (Chowdhery et al., "PaLM", 2022, §5) beside it."""
    options, reduction = case.options, case.options.get("reduction", "mean")
    if softcap := options.get("softcap"):
        logits = softcap * torch.tanh(logits / softcap)
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
    if not (factor := options.get("z_loss", 0.0)):
        return loss
    kept = target >= 0
    z = factor * logits.logsumexp(-1).square() * kept
    return loss + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / kept.sum())


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def _attention(case: Case, t: dict[str, Tensor], product: Product) -> Outputs:
    """softmax(scale·q·kᵀ + bias)·v with every (Nq, Nk) intermediate in memory."""
    options, q = case.options, t["q"]
    groups = q.shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(groups, 1) if groups > 1 else t[name] for name in "kv")
    rows, keys = q.shape[2], k.shape[2]
    scores = product(q, k) * options.get("softmax_scale", options.get("scale", 1 / math.sqrt(q.shape[3])))
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    top_left = case.op == "scaled_dot_product_attention"
    distance = torch.arange(keys, device=q.device) - torch.arange(rows, device=q.device)[:, None]
    distance = distance - (0 if top_left else keys - rows)
    if "alibi_slopes" in t:
        scores = scores - (t["alibi_slopes"][:, None, None] * distance.abs()).to(scores.dtype)
    mask = t.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if "key_lengths" in t:
        padding = torch.arange(keys, device=q.device) >= t["key_lengths"].to(q.device)[:, None, None, None]
        scores = scores.masked_fill(padding, -math.inf)
    left, right = options.get("window_size", (-1, -1))
    if options.get("causal") or options.get("is_causal"):
        right = 0
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -math.inf)
    if right >= 0:
        scores = scores.masked_fill(distance > right, -math.inf)
    if "sinks" in t:
        sink = t["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = _dropped(case, t, torch.softmax(scores, -1)[..., :keys])
    outputs = {"out": product(weights, v.mT)}
    if options.get("return_lse"):
        outputs["lse"] = torch.logsumexp(scores, -1)
    return outputs
