"""Calls that launch every shipped configuration: a family per operation, a case for each point of its grid.

A new kernel is one function here. ``test_configurations.py`` fails while a point of a choice (``kernels/configs.py``) is launched
by no case.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.kernels import choice, configs
from fastattn.kernels.choice import BOTH

#: float32 in both of the ways that torch's matmul precision can ask for.
PRECISIONS = ("bfloat16", "float32", "tf32")
_RNG = torch.tensor([20, 5])


@dataclass(frozen=True)
class Case:
    family: str
    point: dict[str, Any]
    call: Callable[[], object] = field(compare=False)

    @property
    def name(self) -> str:
        return " ".join([self.family, *(f"{key}={value}" for key, value in self.point.items())])


_FAMILIES: dict[str, tuple[Callable[..., object], dict[str, Sequence[Any]]]] = {}


def family(**grid: Sequence[Any]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorator: the function is called with every point of ``grid``."""

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        _FAMILIES[function.__name__] = (function, grid)
        return function

    return decorate


def cases(families: Sequence[str] = ()) -> Iterator[Case]:
    """Every case, or those of ``families``."""
    for name in families or _FAMILIES:
        function, grid = _FAMILIES[name]
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            yield Case(name, point, _bound(function, point))


def names() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def _bound(function: Callable[..., object], point: dict[str, Any]) -> Callable[[], object]:
    def call() -> object:
        torch.set_float32_matmul_precision("high" if point.get("dtype") == "tf32" else "highest")
        return function(**point)

    return call


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def _empty(*shape: int, dtype: str) -> Tensor:
    return torch.zeros(shape, dtype=_dtype(dtype)).requires_grad_()


def _backward(*outputs: Tensor) -> None:
    """Every gradient: what the launchers would fill is not there, only that they are called matters."""
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


@family(head_dim=configs.HEAD_DIMS, dtype=PRECISIONS, extras=BOTH)
def attention(head_dim: int, dtype: str, extras: bool) -> None:
    """Causal, two query heads on one key head: full and edge blocks and the group loop. ``extras``: every other feature."""
    q, k, v = (_empty(1, heads, 256, head_dim, dtype=dtype) for heads in (2, 1, 1))
    options: dict[str, Any] = {"causal": True}
    if extras:
        options |= {"attn_mask": _empty(1, 2, 256, 256, dtype=dtype), "softcap": 30.0, "dropout_p": 0.1}
        options |= {"rng_state": _RNG, "alibi_slopes": torch.zeros(2, requires_grad=True)}
        options |= {"sinks": torch.zeros(2, requires_grad=True), "window_size": (70, 0)}
    _backward(*fastattn.attention(q, k, v, return_lse=True, implementation="triton", **options))


@family(head_dim=configs.HEAD_DIMS, windowed=BOTH, extras=BOTH, keys=("own", "expanded", "gluon"))
def attention_forward(head_dim: int, windowed: bool, extras: bool, keys: str) -> None:
    """Without mask and dropout, in which sm_90 and sm_100 have kernels of their own; TMA cannot read expanded keys. "gluon": the
    candidates of that kernel, which ships nowhere."""
    q, k, v = (torch.zeros(1, 2, 256, head_dim, dtype=torch.bfloat16) for _ in range(3))
    if keys == "expanded":
        k = v = k[:, :1].expand(1, 2, 256, head_dim)
    options: dict[str, Any] = {"causal": windowed}
    if extras:
        options |= {"softcap": 30.0, "alibi_slopes": torch.zeros(2), "sinks": torch.zeros(2)}
    if keys != "gluon":
        fastattn.attention(q, k, v, implementation="triton", **options)
        return
    chosen, arch = configs.attention_forward_sm90, configs.arch_of(q)
    point = chosen.point(head_dim, torch.bfloat16, extras, windowed)
    for config in chosen.possible(point, arch):
        if isinstance(config, configs.AttentionGluon):
            with choice.trying(chosen, point, arch, config):
                fastattn.attention(q, k, v, implementation="triton", **options)


@family(head_dim=configs.HEAD_DIMS, dtype=PRECISIONS)
def attention_varlen(head_dim: int, dtype: str) -> None:
    """Three packed sequences, causal, with what they add to ``attention``: bisection, sums by sequence."""
    q, k, v = (_empty(512, heads, head_dim, dtype=dtype) for heads in (2, 1, 1))
    cu = torch.tensor([0, 100, 100, 500], dtype=torch.int32)
    slopes = torch.zeros(3, 2, requires_grad=True)
    options = {"causal": True, "alibi_slopes": slopes, "return_lse": True, "implementation": "triton"}
    _backward(*fastattn.attention_varlen(q, k, v, cu, cu, **options))


@family(head_dim=configs.HEAD_DIMS, dtype=PRECISIONS, extras=BOTH)
def attention_decode(head_dim: int, dtype: str, extras: bool) -> None:
    """One token a sequence, appended to a paged cache. ``extras``: contiguous, already there, with every other feature."""
    with torch.no_grad():
        q, new = _empty(2, 4, 1, head_dim, dtype=dtype), _empty(2, 2, 1, head_dim, dtype=dtype)
        options: dict[str, Any] = {"implementation": "triton", "sinks": torch.zeros(4)}
        if extras:
            cache = _empty(2, 2, 512, head_dim, dtype=dtype)
            options |= {"alibi_slopes": torch.zeros(4), "softcap": 30.0, "attn_mask": torch.ones(512, dtype=torch.bool)}
            options |= {"window_size": (70, -1), "key_lengths": torch.tensor([300, 20])}
            fastattn.attention(q, cache, cache, **options)
        else:
            cache, pages = _empty(9, 2, 64, head_dim, dtype=dtype), torch.zeros(2, 8, dtype=torch.int32)
            options |= {"block_table": pages, "k": new, "v": new}
            fastattn.attention_with_kv_cache(q, cache, cache, torch.tensor([300, 20]), **options)


@family(columns=configs.NORM_COLUMNS, dtype=("bfloat16", "float32"), rms=BOTH)
def norm(columns: int, dtype: str, rms: bool) -> None:
    """With residual, dropout and the residual's own gradient."""
    x, residual = (_empty(64, columns, dtype=dtype) for _ in range(2))
    weight, bias = (_empty(columns, dtype=dtype) for _ in range(2))
    options = {"residual": residual, "return_residual": True, "dropout_p": 0.1, "rng_state": _RNG}
    if rms:
        outputs = fastattn.rms_norm(x, (columns,), weight, implementation="triton", **options)
    else:
        outputs = fastattn.layer_norm(x, (columns,), weight, bias, implementation="triton", **options)
    _backward(*outputs)


def _both_ways(call: Callable[[int, int, int], None]) -> None:
    """``call(rows, inner, columns)`` for each class of ``configs.product``, and as one GEMM, the deterministic way."""
    for rows, columns in itertools.product((16, 32, 528), (256, 2064)):
        call(rows, 16, columns)
    torch.use_deterministic_algorithms(True)
    try:
        call(256, 256, 256)
    finally:
        torch.use_deterministic_algorithms(False)


@family(dtype=PRECISIONS)
def linear(dtype: str) -> None:
    """With bias and residual."""

    def call(rows: int, inner: int, columns: int) -> None:
        x, weight, bias = (
            _empty(rows, inner, dtype=dtype),
            _empty(columns, inner, dtype=dtype),
            _empty(columns, dtype=dtype),
        )
        residual = _empty(rows, columns, dtype=dtype)
        _backward(fastattn.linear(x, weight, bias, residual=residual, implementation="triton"))

    _both_ways(call)


@family(activation=("gelu", "swiglu"), dtype=PRECISIONS)
def ffn(activation: str, dtype: str) -> None:
    """With biases and dropout; the gated form has a matrix more."""
    options = {"activation": activation, "dropout_p": 0.1, "rng_state": _RNG, "implementation": "triton"}

    def call(rows: int, inner: int, hidden: int) -> None:
        x, b, b_out = _empty(rows, inner, dtype=dtype), _empty(hidden, dtype=dtype), _empty(inner, dtype=dtype)
        first, second = (_empty(hidden, inner, dtype=dtype) for _ in range(2))
        last = _empty(inner, hidden, dtype=dtype)
        if activation == "gelu":
            _backward(fastattn.ffn(x, first, last, b, b_out, **options))
        else:
            _backward(fastattn.glu_ffn(x, first, second, last, b, b, b_out, **options))

    _both_ways(call)


@family(dtype=("bfloat16", "tf32"))
def few_rows(dtype: str) -> None:
    """A decoding step's tiles, which are candidates: parts along K and what adds them up."""
    x, weight = _empty(16, 2048, dtype=dtype), _empty(256, 2048, dtype=dtype)
    point = configs.product.point("linear", 16, 256, configs.product_precision(x.dtype))
    config = configs.Matmul(16, 64, 64, 4, 3)
    with choice.trying(configs.product, point, configs.arch_of(x), config), torch.no_grad():
        fastattn.linear(x, weight, implementation="triton")


@family(head_dim=(32, 64, 128, 256), heads=(1, 4, 16), dtype=("bfloat16", "float32"), interleaved=BOTH)
def rope(head_dim: int, heads: int, dtype: str, interleaved: bool) -> None:
    """A quarter of the channels is copied in the widest; heads lie as in a QKV product."""
    rotated = 192 if head_dim == 256 else head_dim
    x = _empty(2, 64, heads, head_dim, dtype=dtype).transpose(1, 2)
    angles = torch.zeros(64, rotated // 2)
    _backward(fastattn.rope(x, angles, angles, interleaved=interleaved, implementation="triton"))


@family(classes=(10, 100, 1000, 2000, 32000), dtype=("bfloat16", "float32"), options=BOTH)
def cross_entropy(classes: int, dtype: str, options: bool) -> None:
    """``options``: class weights, smoothing, softcap and z-loss."""
    logits = _empty(64, classes, dtype=dtype)
    target = torch.zeros(64, dtype=torch.int64)
    extras: dict[str, Any] = {}
    if options:
        extras = {"weight": torch.ones(classes), "label_smoothing": 0.1, "softcap": 30.0, "z_loss": 0.1}
    _backward(fastattn.cross_entropy(logits, target, implementation="triton", **extras))


@family(dtype=("bfloat16", "float32"), reduction=("none", "mean"))
def linear_cross_entropy(dtype: str, reduction: str) -> None:
    """The products are torch's own."""
    x, weight, bias = (_empty(*shape, dtype=dtype) for shape in ((64, 64), (4096, 64), (4096,)))
    target = torch.zeros(64, dtype=torch.int64)
    _backward(fastattn.linear_cross_entropy(x, weight, target, bias, reduction=reduction, implementation="triton"))
