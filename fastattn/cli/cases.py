"""The calls that ``check`` and ``bench`` make: shape and options, random tensors, fastattn's call, the same in plain PyTorch.

Plain PyTorch means torch's own functions one after the other in the tensors' dtype, with every intermediate result
rounded to it. The same code on float64 tensors is the exact result, so the oracle shares nothing with fastattn, its
reference included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.philox import attention_dropout, matrix_dropout

Outputs = dict[str, Tensor]
Product = Callable[..., Tensor]

#: What a shape means, per operation.
SHAPES = {
    "attention": "B,H,N,D or B,H,Nq,Nk,D",
    "scaled_dot_product_attention": "B,H,N,D or B,H,Nq,Nk,D",
    "layer_norm": "rows,columns",
    "rms_norm": "rows,columns",
    "ffn": "tokens,model,hidden",
    "glu_ffn": "tokens,model,hidden",
    "rope": "B,H,N,D",
}
OPS = tuple(SHAPES)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("auto", "cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Case:
    """One call. ``options`` are the public function's own keywords, except where a tensor is meant:

    ``nheads_kv`` (int), ``mask`` ("bool" | "additive", drawn at random; "padding": the second half of the keys is hidden),
    ``mask_grad`` (False: the additive mask is a constant), ``alibi``, ``sinks``, ``residual``, ``bias`` (True gives that
    tensor), ``lengths`` (key_lengths drawn at random), ``packed`` (the batch through attention_varlen), ``rotary`` (the number
    of rotated components of a head).
    """

    op: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The options in words: ``causal, window_size=(16, 0)``; "" for the plain call."""
        return ", ".join(
            key if value is True else value if key == "activation" else f"{key}={value}"
            for key, value in self.options.items()
        )

    @property
    def attention_shape(self) -> tuple[int, int, int, int, int]:
        """(B, H, Nq, Nk, D) of an attention case."""
        batch, heads, rows = self.shape[:3]
        return batch, heads, rows, self.shape[-2], self.shape[-1]


def title(op: str, label: str) -> str:
    """``op`` with its label's words, less those that say how a norm or ffn normally is: ``layer_norm residual``."""
    return " ".join([op, *(word for word in label.split(", ") if word not in ("", "weight", "bias"))])


def parse_shape(op: str, text: str) -> tuple[int, ...]:
    """``--shape``'s text as a tuple, or ValueError saying what ``op`` wants."""
    counts = {part.count(",") + 1 for part in SHAPES[op].split(" or ")}
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) not in counts or min(shape) < 0:
        raise ValueError(f"--shape for {op} must be {SHAPES[op]}; got {text!r}")
    return shape


def parse_device(text: str) -> torch.device:
    """``--device``'s text as a device that is there, or ValueError."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"--device: {error}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: this process sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got {text!r}")
    return device


def quick_cases(op: str) -> list[Case]:
    """The cases that catch the most: a plain odd-sized call and the feature that goes wrong first. Below 0.1 s each."""
    return {
        "attention": [
            Case(op, (2, 6, 67, 40), {}),
            Case(op, (1, 6, 33, 129, 64), {"causal": True, "nheads_kv": 2, "return_lse": True}),
        ],
        "scaled_dot_product_attention": [Case(op, (1, 3, 65, 97, 32), {"is_causal": True})],
        "layer_norm": [Case(op, (37, 193), {"weight": True, "bias": True})],
        "rms_norm": [Case(op, (37, 193), {"weight": True})],
        "ffn": [Case(op, (35, 72, 136), {"activation": "gelu", "bias": True})],
        "glu_ffn": [Case(op, (35, 72, 136), {"activation": "swiglu"})],
        "rope": [Case(op, (2, 3, 19, 24), {})],
    }[op]


def full_cases(op: str) -> list[Case]:
    """Every feature of ``op``, in shapes that are no powers of two."""
    more = {
        "attention": [
            Case(op, (2, 3, 1, 77, 128), {"causal": True}),
            Case(op, (1, 2, 200, 200, 80), {"causal": True}),
            Case(op, (2, 4, 61, 85, 64), {"mask": "additive", "nheads_kv": 1}),
            Case(op, (2, 4, 61, 85, 64), {"mask": "bool"}),
            Case(op, (1, 4, 97, 131, 48), {"window_size": (16, 0)}),
            Case(op, (1, 4, 97, 97, 96), {"window_size": (9, 5), "softcap": 20.0}),
            Case(op, (2, 4, 70, 90, 64), {"causal": True, "alibi": True}),
            Case(op, (2, 4, 70, 90, 64), {"sinks": True, "return_lse": True}),
            Case(op, (1, 2, 300, 300, 256), {"softmax_scale": 0.03}),
            Case(op, (2, 4, 70, 90, 64), {"causal": True, "dropout_p": 0.5}),
            Case(op, (3, 4, 70, 90, 64), {"lengths": True, "nheads_kv": 2}),
            Case(op, (3, 4, 61, 85, 40), {"packed": True, "causal": True, "dropout_p": 0.5}),
        ],
        "scaled_dot_product_attention": [
            Case(op, (1, 3, 97, 65, 32), {"is_causal": True}),
            Case(op, (2, 3, 65, 65, 72), {"mask": "additive"}),
        ],
        "layer_norm": [
            Case(op, (5, 768), {}),
            Case(op, (1001, 64), {"weight": True, "bias": True, "residual": True}),
            Case(op, (3, 4096), {"weight": True, "bias": True}),
            Case(op, (37, 193), {"weight": True, "bias": True, "residual": True, "dropout_p": 0.5}),
        ],
        "rms_norm": [
            Case(op, (5, 768), {}),
            Case(op, (1001, 64), {"weight": True, "residual": True}),
            Case(op, (3, 4096), {"weight": True, "eps": 1e-6}),
            Case(op, (37, 193), {"weight": True, "residual": True, "dropout_p": 0.5}),
        ],
        "ffn": [
            Case(op, (35, 72, 136), {"activation": "relu", "bias": True}),
            Case(op, (64, 256, 320), {"activation": "gelu_tanh"}),
            Case(op, (1, 129, 257), {"activation": "silu", "bias": True}),
            Case(op, (35, 72, 136), {"activation": "gelu", "dropout_p": 0.5}),
        ],
        "glu_ffn": [
            Case(op, (64, 256, 320), {"activation": "geglu", "bias": True}),
            Case(op, (35, 72, 136), {"activation": "geglu_tanh"}),
            Case(op, (1, 129, 257), {"activation": "reglu", "bias": True}),
            Case(op, (35, 72, 136), {"activation": "swiglu", "dropout_p": 0.5}),
        ],
        "rope": [
            Case(op, (1, 2, 33, 64), {"interleaved": True}),
            Case(op, (1, 2, 33, 64), {"rotary": 32}),
        ],
    }[op]
    return quick_cases(op) + more


def reduction_length(case: Case) -> int:
    """Terms in the longest sum behind a value of the output or of a gradient."""
    if "attention" in case.op:
        batch, heads, rows, keys, dim = case.attention_shape
        shared = heads // max(1, case.options.get("nheads_kv", heads))  # heads that add to one key's gradient
        return max(batch * rows * keys if case.options.get("alibi") else 0, batch * rows, rows * shared, keys, dim)
    return 1 if case.op == "rope" else max(case.shape)


def work(case: Case, dtype: torch.dtype, direction: str) -> tuple[float, str]:
    """(amount, "GFLOP/s" or "GB/s"): floating-point operations of matrix products, or bytes that must move, per call.

    The count is of the mathematics, not of an implementation: what is recomputed does not count.
    """
    both = direction == "forward+backward"
    size = dtype.itemsize
    if "attention" in case.op:
        batch, heads, rows, keys, dim = case.attention_shape
        if rows == 1 and direction == "forward":
            # Decoding reads K and V once for all heads of a group; q and the output are 1/keys of that.
            return 2 * batch * case.options.get("nheads_kv", heads) * keys * dim * size, "GB/s"
        if case.options.get("mask") == "padding":
            keys //= 2
        pairs = rows * keys
        if case.options.get("causal"):  # bottom-right: row i sees keys - rows + i + 1 keys
            pairs = sum(max(0, min(keys, keys - rows + i + 1)) for i in range(rows))
        elif case.options.get("is_causal"):  # top-left: row i sees i + 1 keys
            pairs = sum(min(keys, i + 1) for i in range(rows))
        # Forward q·kᵀ and p·v: 2 products of 2·D per pair. Backward 5 products (p again, dp, dv, dq, dk): ×2.5.
        passes = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[direction]
        return 4 * batch * heads * pairs * dim * passes, "GFLOP/s"
    if case.op in ("ffn", "glu_ffn"):
        tokens, model, hidden = case.shape
        products = 2 if case.op == "ffn" else 3
        # Backward: the gradient of each product's input and of its weight, ×2.
        return products * 2 * tokens * model * hidden * (3 if both else 1), "GFLOP/s"
    if case.op == "rope":
        elements = case.shape[0] * case.shape[1] * case.shape[2] * case.shape[3]
        # Forward reads x and writes out; backward reads dout and writes dx. The angles (N, R/2) are 1/heads of that or
        # less.
        return (4 if both else 2) * elements * size, "GB/s"
    rows, columns = case.shape
    # Forward reads x and writes y; backward reads dy and x and writes dx. Weights and statistics are 1/rows or
    # 1/columns of it. A residual is one more input, and its sum with x one more output where the backward pass needs
    # it.
    residual = 1 if case.options.get("residual") else 0
    return (5 + 2 * residual if both else 2 + residual) * rows * columns * size, "GB/s"


def make_tensors(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of one case; the differentiable ones require grad. Activations are N(0, 1), weights keep that variance."""
    generator = torch.Generator().manual_seed(seed)
    # Small per-head or per-position vectors have the accumulation dtype (fastattn/ops/_library.py).
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, as_dtype: torch.dtype = dtype) -> None:
        values = torch.randn(*shape, generator=generator).mul_(scale).add_(shift)
        tensors[name] = values.to(device, as_dtype).requires_grad_()

    options = case.options
    if options.get("dropout_p"):
        tensors["rng_state"] = torch.tensor([seed + 1, 5])
    if "attention" in case.op:
        batch, heads, rows, keys, dim = case.attention_shape
        heads_kv = options.get("nheads_kv", heads)
        draw("q", batch, heads, rows, dim)
        draw("k", batch, heads_kv, keys, dim)
        draw("v", batch, heads_kv, keys, dim)
        if options.get("mask") == "additive":
            draw("attn_mask", batch, 1, rows, keys)
            tensors["attn_mask"].requires_grad_(options.get("mask_grad", True))
        elif options.get("mask") == "padding":
            keep = torch.arange(keys) < keys // 2
            tensors["attn_mask"] = keep.expand(batch, 1, 1, keys).contiguous().to(device)
        elif options.get("mask") == "bool":
            keep = torch.rand(batch, 1, rows, keys, generator=generator) < 0.7
            keep[..., 0] = True  # a row that sees nothing is NaN in plain PyTorch, which then measures nothing
            tensors["attn_mask"] = keep.to(device)
        if options.get("lengths"):
            tensors["key_lengths"] = torch.randint(1, keys + 1, (batch,), generator=generator)
        if options.get("alibi"):
            slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
            tensors["alibi_slopes"] = slopes.to(device, wide).requires_grad_()
        if options.get("sinks"):
            draw("sinks", heads, as_dtype=wide)
    elif case.op in ("layer_norm", "rms_norm"):
        rows, columns = case.shape
        draw("x", rows, columns, shift=0.5)
        if options.get("residual"):
            draw("residual", rows, columns)
        if options.get("weight"):
            draw("weight", columns, scale=0.2, shift=1.0)
        if options.get("bias"):
            draw("bias", columns)
    elif case.op in ("ffn", "glu_ffn"):
        tokens, model, hidden = case.shape
        draw("x", tokens, model)
        inner, outer = ("w_in", "w_out") if case.op == "ffn" else ("w_up", "w_down")
        for name in ("w_gate", inner) if case.op == "glu_ffn" else (inner,):
            draw(name, hidden, model, scale=model**-0.5)
        draw(outer, model, hidden, scale=hidden**-0.5)
        if options.get("bias"):
            for name in [name for name in tensors if name.startswith("w_")]:
                draw("b" + name[1:], tensors[name].shape[0], scale=0.1)
    else:
        draw("x", *case.shape)
        rotary = options.get("rotary", case.shape[3])
        frequency = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
        angle = torch.arange(case.shape[2], dtype=torch.float64)[:, None] * frequency
        tensors["cos"], tensors["sin"] = angle.cos().to(device, wide), angle.sin().to(device, wide)
    return tensors


def arguments(case: Case, t: dict[str, Tensor]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """(function, positional, keywords) of fastattn's own call."""
    from fastattn import ops

    spoken = (
        "nheads_kv",
        "mask",
        "mask_grad",
        "lengths",
        "packed",
        "alibi",
        "sinks",
        "residual",
        "weight",
        "bias",
        "rotary",
    )
    keywords = {key: value for key, value in case.options.items() if key not in spoken}
    function = getattr(ops, case.op)
    if "attention" in case.op:
        tensors: dict[str, Any] = {
            key: t[key] for key in ("attn_mask", "key_lengths", "alibi_slopes", "sinks", "rng_state") if key in t
        }
        if case.options.get("packed"):
            function = _packed_attention
        if case.op == "scaled_dot_product_attention" and t["q"].shape[1] != t["k"].shape[1]:
            keywords["enable_gqa"] = True
        return function, [t["q"], t["k"], t["v"]], {**tensors, **keywords}
    if case.op in ("layer_norm", "rms_norm"):
        tensors = {key: t[key] for key in ("weight", "bias", "residual", "rng_state") if key in t}
        return function, [t["x"], (case.shape[1],)], {**tensors, **keywords}
    return function, [], {**t, **keywords}


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    """attention_varlen of the batch entries one after the other, each a sequence."""
    from fastattn import ops

    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    cu_seqlens = [torch.arange(batch + 1, dtype=torch.int32) * length for length in (rows, keys)]
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out: Tensor = ops.attention_varlen(*packed, *cu_seqlens, **keywords)  # type: ignore[assignment]
    return out.unflatten(0, (batch, rows)).transpose(1, 2)


def ours(case: Case, t: dict[str, Tensor], implementation: str) -> Outputs:
    """fastattn's results by name; ``implementation`` as in its functions."""
    function, positional, keywords = arguments(case, t)
    with asked_for(case.op, implementation, keywords):
        result = function(*positional, **keywords)
    return dict(zip(("out", "lse"), result, strict=True)) if isinstance(result, tuple) else {"out": result}


@contextmanager
def asked_for(op: str, implementation: str, keywords: dict[str, Any]) -> Iterator[None]:
    """Within it a call of ``op`` with ``keywords`` runs ``implementation``.

    By keyword; scaled_dot_product_attention has torch's signature and no such keyword, hence by the environment.
    """
    if op != "scaled_dot_product_attention":
        keywords["implementation"] = implementation
        yield
        return
    before = os.environ.get("FASTATTN_IMPLEMENTATION")
    if implementation != "auto":
        os.environ["FASTATTN_IMPLEMENTATION"] = implementation
    try:
        yield
    finally:
        if before is not None:
            os.environ["FASTATTN_IMPLEMENTATION"] = before
        elif implementation != "auto":
            del os.environ["FASTATTN_IMPLEMENTATION"]


def torch_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ (+ bias) as torch computes it in the tensors' dtype."""
    return F.linear(a, b, bias) if b.dim() == 2 else torch.matmul(a, b.mT)


def rounded_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ in float32, rounded once: no less accurate than torch's 16-bit products on CPUs, some of which run at 1 GFLOP/s."""
    return torch_product(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)


def plain(case: Case, t: dict[str, Tensor], product: Product | None = None) -> Outputs:
    """The same call in torch's own functions, by result name."""
    if product is None:
        first = t["q" if "attention" in case.op else "x"]
        slow = first.dtype.itemsize == 2 and first.device.type == "cpu"
        product = rounded_product if slow else torch_product
    if "attention" in case.op:
        return _plain_attention(case, t, product)
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
    x = t["x"]
    return {"out": _plain_rope(x, t["cos"].to(x.dtype), t["sin"].to(x.dtype), bool(case.options.get("interleaved")))}


def plain_by_head(case: Case, t: dict[str, Tensor]) -> Outputs:
    """``plain`` of an attention call, one key-value head after the other: O(B·N²) memory instead of O(B·H·N²).

    Not with dropout, whose counters know the head.
    """
    heads_kv = t["k"].shape[1]
    groups = t["q"].shape[1] // heads_kv
    found: list[Outputs] = []
    for head in range(heads_kv):
        mine = slice(head * groups, (head + 1) * groups)
        part = {**t, "q": t["q"][:, mine], "k": t["k"][:, head : head + 1], "v": t["v"][:, head : head + 1]}
        part |= {name: t[name][mine] for name in ("alibi_slopes", "sinks") if name in t}
        found.append(plain(case, part))
    return {name: torch.cat([outputs[name] for outputs in found], 1) for name in found[0]}


def activate(name: str, x: Tensor) -> Tensor:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[name](x)


def _dropped(case: Case, t: dict[str, Tensor], x: Tensor) -> Tensor:
    """``x`` with the call's dropout. The mask is defined by counters (reference/philox.py); torch has no way to draw it."""
    probability = case.options.get("dropout_p", 0.0)
    if not probability:
        return x
    draw = attention_dropout if x.dim() == 4 else matrix_dropout
    return x * draw(x.shape, probability, t["rng_state"], x.device).to(x.dtype)


def _plain_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def _plain_attention(case: Case, t: dict[str, Tensor], product: Product) -> Outputs:
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
