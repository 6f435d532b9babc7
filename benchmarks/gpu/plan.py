"""What is checked and what is timed on a GPU, by group.

A check is a call of ``fastattn/cli/cases.py`` whose results and gradients are compared with float64. A measurement is such a call
in a size that matters, in one direction, with the bar of an H100 SXM where one was set: the best published figure of kernels
written in Triton for ``triton``, of any kernels for ``cuda``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.cli import cases
from fastattn.cli.cases import Case

#: Group: the operations in it.
GROUPS = {
    "attention": ("attention", "scaled_dot_product_attention"),
    "norm": ("layer_norm", "rms_norm"),
    "ffn": ("ffn", "glu_ffn"),
    "linear": ("linear",),
    "rope": ("rope",),
    "loss": ("cross_entropy", "linear_cross_entropy"),
}
#: Bars in TFLOP/s of attention (head_dim, causal) forward and backward, in TB/s of norms, in percent of the limit of decoding.
_ATTENTION_BARS: dict[str, dict[tuple[int, bool], tuple[int, int | None]]] = {
    "triton": {(128, False): (610, 560), (128, True): (600, 500), (64, False): (450, None)},
    "cuda": {(128, False): (700, 600), (128, True): (680, 575), (64, False): (500, 500), (256, False): (750, None)},
}
_NORM_BARS = {"triton": (2.9, 2.2), "cuda": (3.0, 2.4)}
_DECODE_BAR = {"triton": 80.0, "cuda": 85.0}
_CUDNN = "sdpa:cudnn"
DTYPES = ("bfloat16", "float16", "float32")
BAR_DEVICE = "H100"
_TERA = 1e3  # rates are in GFLOP/s and GB/s


@dataclass(frozen=True)
class Check:
    """One call to compare with float64. ``tf32``: float32 with torch's matmul precision "high"."""

    case: Case
    dtype: str
    tf32: bool = False


@dataclass(frozen=True)
class Measurement:
    """One call to time. ``memory``: limited by memory, timed with a cold L2; ``rate_bar`` in GFLOP/s or GB/s, ``ratio_bar`` against
    the peer ``against``, ``share_bar`` in percent of the measured limit."""

    group: str
    case: Case
    direction: str = "forward"
    memory: bool = False
    rate_bar: float | None = None
    share_bar: float | None = None
    against: str = ""
    ratio_bar: float | None = None

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.case.shape))
        return f"{cases.title(self.case.op, self.case.label)} {shape} {self.direction}"


def checks(groups: Sequence[str], quick: bool, tiny: bool = False) -> list[Check]:
    """Every feature in every dtype, odd sizes of several tiles; ``quick``: the cases of ``check --quick``; ``tiny``: the same in
    one 16-bit dtype and float32, for the interpreter."""
    found = []
    for op in (op for group in groups for op in GROUPS[group]):
        if quick or tiny:
            found += [Check(case, dtype) for case in cases.quick_cases(op) for dtype in ("bfloat16", "float32")]
            continue
        own = cases.full_cases(op) + _several_tiles(op)
        found += [Check(case, dtype) for case in own for dtype in DTYPES]
        if GROUPS["norm"] != (op,) and op not in ("layer_norm", "rms_norm", "rope", "cross_entropy"):
            found += [Check(case, "float32", tf32=True) for case in cases.quick_cases(op)]
    return found


def _several_tiles(op: str) -> list[Case]:
    """Sizes beyond one tile of every kernel, not multiples of any."""
    everything: dict[str, Any] = {"mask": "additive", "softcap": 20.0, "alibi": True, "dropout_p": 0.2, "nheads_kv": 2}
    return {
        "attention": [
            Case(op, (1, 4, 517, 389, 128), {"causal": True, "nheads_kv": 2}),
            Case(op, (1, 4, 300, 517, 64), everything),
            Case(op, (1, 2, 300, 517, 256), {"causal": True, "window_size": (200, 0)}),
            Case(op, (2, 8, 1, 3001, 128), {"nheads_kv": 2}),
        ],
        "scaled_dot_product_attention": [Case(op, (1, 3, 517, 389, 96), {"is_causal": True})],
        "layer_norm": [Case(op, (67, columns), {"weight": True, "bias": True}) for columns in (8300, 16500, 65537)],
        "rms_norm": [Case(op, (67, columns), {"weight": True, "residual": True}) for columns in (8300, 16500, 65537)],
        "ffn": [Case(op, (300, 520, 1032), {"activation": "gelu", "bias": True, "dropout_p": 0.2})],
        "glu_ffn": [Case(op, (300, 520, 1032), {"activation": "swiglu", "bias": True})],
        "rope": [Case(op, (2, 5, 333, 128), {}), Case(op, (2, 5, 333, 96), {"rotary": 64})],
        "linear": [Case(op, (300, 520, 1032), {"bias": True, "residual": True})],
        "cross_entropy": [Case(op, (67, 50257), {"label_smoothing": 0.1, "ignored": True, "softcap": 30.0})],
        "linear_cross_entropy": [Case(op, (300, 264, 50257), {"z_loss": 1e-4, "ignored": True})],
    }[op]


def measurements(groups: Sequence[str], quick: bool, implementation: str = "triton") -> list[Measurement]:
    """In the order in which they are taken: what has a bar first. ``quick``: one size of each."""
    every = {
        "attention": _attention,
        "norm": _norm,
        "ffn": _ffn,
        "linear": _linear,
        "rope": _rope,
        "loss": _loss,
    }
    found = [m for group in groups for m in every[group](implementation)]
    if quick:
        kinds = {(m.case.op, m.case.label, m.direction): m for m in reversed(found)}
        found = [m for m in found if kinds[m.case.op, m.case.label, m.direction] is m]
    return sorted(found, key=lambda m: m.rate_bar is None and m.share_bar is None and m.ratio_bar is None)


def _attention(implementation: str) -> Iterator[Measurement]:
    """16k tokens and 2048 channels, as published figures have them; decoding one token of 64 sequences on 8192 keys."""
    # The C++ kernels are to be as fast as cuDNN's wherever it has the call too.
    against: dict[str, Any] = {"against": _CUDNN, "ratio_bar": 1.0} if implementation == "cuda" else {}
    for (dim, causal), (forward, backward) in _ATTENTION_BARS[implementation].items():
        case = Case("attention", (1, 2048 // dim, 16384, dim), {"causal": True} if causal else {})
        yield Measurement("attention", case, "forward", rate_bar=forward * _TERA, **against)
        yield Measurement("attention", case, "backward", rate_bar=backward * _TERA if backward else None, **against)
    decode = Case("attention", (64, 32, 1, 8192, 128), {"nheads_kv": 8})
    yield Measurement("attention", decode, memory=True, share_bar=_DECODE_BAR[implementation])
    if implementation == "cuda":
        for tokens, options in ((512, {}), (1024, {"causal": True}), (2048, {}), (2048, {"causal": True})):
            case = Case("attention", (16384 // tokens, 16, tokens, 128), options)
            yield from (Measurement("attention", case, direction, **against) for direction in ("forward", "backward"))
    for tokens, dim, options in (
        (4096, 128, {"causal": True, "nheads_kv": 4}),
        (1024, 64, {"causal": True}),
        (2048, 128, {"mask": "additive", "mask_grad": False}),
        (2048, 128, {"causal": True, "window_size": (512, 0)}),
        (8192, 256, {"causal": True}),
    ):
        case = Case("attention", (16384 // tokens, 2048 // dim, tokens, dim), options)
        yield from (Measurement("attention", case, direction) for direction in ("forward", "backward"))


def _norm(implementation: str) -> Iterator[Measurement]:
    """128 MiB of bf16 in rows of 1024 to 65536, which no L2 holds; and a few rows, where calls cost more than bytes."""
    forward, backward = _NORM_BARS[implementation]
    for op, own in (("rms_norm", {"weight": True}), ("layer_norm", {"weight": True, "bias": True})):
        for columns in (4096, 1024, 16384, 65536):
            case = Case(op, ((1 << 26) // columns, columns), own)
            yield Measurement("norm", case, memory=True, rate_bar=forward * _TERA)
            yield Measurement("norm", case, "backward", memory=True, rate_bar=backward * _TERA)
        yield Measurement("norm", Case(op, (32, 1024), own), against="eager", ratio_bar=1.0)


def _ffn(implementation: str) -> Iterator[Measurement]:
    """The ratio to the two (three) bare matrix products of cuBLAS: 1 / 1.02."""
    for op, shape, activation in (("ffn", (8192, 4096, 16384), "gelu"), ("glu_ffn", (8192, 4096, 14336), "swiglu")):
        case = Case(op, shape, {"activation": activation})
        yield Measurement("ffn", case, against="matmul", ratio_bar=1 / 1.02)
        yield Measurement("ffn", case, "forward+backward")
        small = Case(op, (512, 1024, 4096), {"activation": activation, "bias": True})
        yield Measurement("ffn", small, "forward+backward")


def _linear(implementation: str) -> Iterator[Measurement]:
    for shape in ((8192, 4096, 4096), (512, 1024, 3072)):
        yield Measurement("linear", Case("linear", shape, {"bias": True, "residual": True}), "forward+backward")


def _rope(implementation: str) -> Iterator[Measurement]:
    yield Measurement("rope", Case("rope", (4, 32, 4096, 128), {}), memory=True)
    yield Measurement("rope", Case("rope", (4, 32, 4096, 128), {"interleaved": True}), "forward+backward", memory=True)


def _loss(implementation: str) -> Iterator[Measurement]:
    yield Measurement("loss", Case("cross_entropy", (8192, 32768)), "forward+backward", memory=True)
    yield Measurement("loss", Case("linear_cross_entropy", (4096, 2048, 128256)), "forward+backward")
