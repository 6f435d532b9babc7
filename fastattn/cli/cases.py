"""The calls that ``check`` and ``bench`` make: shape and options, random tensors, fastattn's call, what it has to compute.

The same calls in torch's functions are in plain.py, those that are whole modules in modules.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.cli import modules
from fastattn.ops._select import replacing_auto

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
    "linear": "rows,inputs,outputs",
    "cross_entropy": "tokens,vocabulary",
    "linear_cross_entropy": "tokens,model,vocabulary",
}
OPS = tuple(SHAPES)
#: Work of matrix products by direction, in forward passes: backward makes two products for each of forward's.
PASSES = {"forward": 1, "backward": 2, "forward+backward": 3}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("auto", "cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Case:
    """One call. ``options`` are the public function's own keywords, except where a tensor is meant:

    ``nheads_kv`` (int), ``mask`` ("bool" | "additive", drawn at random; "padding": the second half of the keys is hidden),
    ``mask_grad`` (False: the additive mask is a constant), ``alibi``, ``sinks``, ``residual``, ``bias``, ``class_weights`` (True
    gives that tensor), ``ignored`` (every third target is ignore_index), ``lengths`` (key_lengths drawn at random), ``packed``
    (the batch through attention_varlen), ``rotary`` (the number of rotated components of a head).
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
        "linear": [Case(op, (35, 72, 136), {"bias": True, "residual": True})],
        "cross_entropy": [Case(op, (35, 201), {"reduction": "none", "ignored": True})],
        "linear_cross_entropy": [Case(op, (35, 72, 201), {"reduction": "none", "ignored": True})],
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
        "linear": [
            Case(op, (64, 256, 320), {}),
            Case(op, (1, 129, 257), {"bias": True}),
        ],
        "cross_entropy": [
            Case(op, (35, 1031), {"class_weights": True, "label_smoothing": 0.1}),
            Case(op, (70, 513), {"softcap": 5.0, "z_loss": 0.01, "reduction": "sum"}),
        ],
        "linear_cross_entropy": [
            Case(op, (35, 129, 1031), {"bias": True, "label_smoothing": 0.1}),
            Case(op, (70, 64, 513), {"softcap": 5.0, "z_loss": 0.01, "reduction": "sum"}),
        ],
    }[op]
    return quick_cases(op) + more


def reduction_length(case: Case) -> int:
    """Terms in the longest sum behind a value of the output or of a gradient."""
    if "attention" in case.op:
        batch, heads, rows, keys, dim = case.attention_shape
        shared = heads // max(1, case.options.get("nheads_kv", heads))  # heads that add to one key's gradient
        return max(batch * rows * keys if case.options.get("alibi") else 0, batch * rows, rows * shared, keys, dim)
    if case.op in modules.OPS:
        return modules.reduction_length(case)
    return 1 if case.op == "rope" else max(case.shape)


def work(case: Case, dtype: torch.dtype, direction: str) -> tuple[float, str]:
    """(amount, "GFLOP/s" or "GB/s"): floating-point operations of matrix products, or bytes that must move, per call.

    The count is of the mathematics, not of an implementation: what is recomputed does not count.
    """
    size = dtype.itemsize
    if case.op in modules.OPS:
        return modules.work(case, size, direction)
    if "attention" in case.op:
        return _attention_work(case, size, direction)
    if case.op in ("ffn", "glu_ffn"):
        tokens, model, hidden = case.shape
        elements = (2 if case.op == "ffn" else 3) * model * hidden
        if (
            tokens == 1 and direction == "forward"
        ):  # every weight takes part in one multiplication: reading it is the work
            return elements * size, "GB/s"
        # Backward: the gradient of each product's input and of its weight, ×2.
        return 2 * tokens * elements * PASSES[direction], "GFLOP/s"
    if case.op in ("linear", "linear_cross_entropy"):
        rows, inputs, outputs = case.shape
        if rows == 1 and direction == "forward":
            return inputs * outputs * size, "GB/s"
        return 2 * rows * inputs * outputs * PASSES[direction], "GFLOP/s"
    if case.op == "cross_entropy":
        # Forward reads the logits; backward reads them again and writes their gradient.
        return PASSES[direction] * case.shape[0] * case.shape[1] * size, "GB/s"
    if case.op == "rope":
        elements = case.shape[0] * case.shape[1] * case.shape[2] * case.shape[3]
        # Forward reads x and writes out; backward reads dout and writes dx. The angles (N, R/2) are 1/heads of that or
        # less.
        return (4 if direction == "forward+backward" else 2) * elements * size, "GB/s"
    rows, columns = case.shape
    # Forward reads x and writes y; backward reads dy and x and writes dx. Weights and statistics are 1/rows or
    # 1/columns of it. A residual is one more input, and its sum with x one more output where the backward pass needs
    # it.
    residual = 1 if case.options.get("residual") else 0
    moved = {"forward": 2 + residual, "backward": 3, "forward+backward": 5 + 2 * residual}[direction]
    return moved * rows * columns * size, "GB/s"


def _attention_work(case: Case, size: int, direction: str) -> tuple[float, str]:
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


def roof(case: Case, direction: str) -> str:
    """What limits a call: "matrix" (products), "copy" (elementwise, of x's size) or "read" (a vector meets every weight or key)."""
    _, unit = work(case, torch.float32, direction)
    if unit == "GFLOP/s":
        return "matrix"
    return "copy" if case.op in ("layer_norm", "rms_norm", "rope", "cross_entropy") else "read"


def make_tensors(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of one case; the differentiable ones require grad. Activations are N(0, 1), weights keep that variance."""
    generator = torch.Generator().manual_seed(seed)
    # Small per-head or per-position vectors have the accumulation dtype (fastattn/ops/_library.py).
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, as_dtype: torch.dtype = dtype) -> None:
        values = torch.randn(*shape, generator=generator).mul_(scale).add_(shift)
        tensors[name] = values.to(device, as_dtype).requires_grad_()

    if case.op in modules.OPS:
        return modules.make_tensors(case, dtype, generator)
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
    elif case.op == "linear":
        rows, inputs, outputs = case.shape
        draw("x", rows, inputs)
        draw("weight", outputs, inputs, scale=inputs**-0.5)
        if options.get("bias"):
            draw("bias", outputs)
        if options.get("residual"):
            draw("residual", rows, outputs)
    elif case.op in ("cross_entropy", "linear_cross_entropy"):
        tokens, vocabulary = case.shape[0], case.shape[-1]
        if case.op == "cross_entropy":
            draw("logits", tokens, vocabulary, scale=2.0)
        else:
            draw("x", tokens, case.shape[1])
            draw("weight", vocabulary, case.shape[1], scale=2.0 * case.shape[1] ** -0.5)
        if options.get("bias"):
            draw("bias", vocabulary)
        if options.get("class_weights"):
            tensors["weight"] = torch.rand(vocabulary, generator=generator).add_(0.5).to(device, dtype)
        target = torch.randint(0, vocabulary, (tokens,), generator=generator)
        if options.get("ignored"):
            target[::3] = -100
        tensors["target"] = target.to(device)
    else:
        draw("x", *case.shape)
        rotary = options.get("rotary", case.shape[3])
        frequency = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
        angle = torch.arange(case.shape[2], dtype=torch.float64)[:, None] * frequency
        tensors["cos"], tensors["sin"] = angle.cos().to(device, wide), angle.sin().to(device, wide)
    return tensors


def leading(t: dict[str, Tensor]) -> Tensor:
    """The tensor whose dtype is the call's."""
    return next(x for x in t.values() if x.is_floating_point())


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
        "class_weights",
        "ignored",
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


def prepare(case: Case, t: dict[str, Tensor], implementation: str) -> Callable[[], Outputs]:
    """fastattn's call on the tensors ``t``, ready to be made again and again; ``implementation`` as in its functions."""
    if case.op in modules.OPS:
        return modules.ours(case, t, implementation)
    function, positional, keywords = arguments(case, t)
    if case.op != "scaled_dot_product_attention":
        call = functools.partial(function, *positional, **keywords, implementation=implementation)
    else:
        call = functools.partial(_with_auto, implementation, function, *positional, **keywords)

    def run() -> Outputs:
        result = call()
        return {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}

    return run


def _with_auto(implementation: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """scaled_dot_product_attention has torch's signature and no keyword ``implementation``."""
    if implementation == "auto":
        return function(*args, **kwargs)
    with replacing_auto(implementation):
        return function(*args, **kwargs)
