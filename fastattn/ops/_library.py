"""The operators: one schema, one fake, any number of implementations.

Every operation crosses into PyTorch's dispatcher once, through an operator of the library ``fastattn``. The schema is
written here and nowhere else; an implementation only registers kernels for it:

* ``fastattn::<op>``         C++ (``csrc/``): the CPU key from ``_C.so``, the CUDA key from ``_cuda.so``;
* ``fastattn::triton_<op>``  the same schema, implemented by ``kernels/<op>.py``.

Everything is registered at import, before anything can be traced (``torch.compile``, ``torch.export``). Optional tensors that
an operator does not produce come back with shape ``(0,)``, since a schema has a fixed number of results.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.precision import accumulation_dtype

SCHEMAS = {
    # q (B, H, Nq, D); k (B, Hk, Nk, D); v (B, Hk, Nk, Dv); attn_mask 4-D with each extent 1 or full, bool | q.dtype | float32;
    # alibi_slopes (1 | B, H), sinks (H,) and lse (B, H, Nq) in the accumulation dtype; rng_state int64 (2,) = (seed, offset), CPU.
    # Key j is visible to row i iff  -window_left <= j - (i + diagonal) <= window_right,  -1 = unlimited.
    # sequences int64 (S, 5), where q lies: (q_begin, rows, k_begin, keys, diagonal) of each, counted in its batch entry. q (and k,
    # v) have S batch entries, or one that all sequences lie in; B = S for alibi_slopes and dropout. Rows outside give out 0, lse
    # -inf. Backward, and kernels on GPUs, need sequences of one batch entry to lie one after the other; those check no value.
    # block_table int32 (S, pages of each), where q lies: k and v are (pages, Hk, page_size, D), key j of sequence s is row
    # j % page_size of page block_table[s, j / page_size].
    # statistics (2, B, H, Nq): m and l of a float32 lse = log(l 2^m), which rounding took digits from; on GPUs zeros that
    # nobody looks at; (0,) for other dtypes of q.
    "attention_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, float softmax_scale,"
        " int window_left, int window_right, int diagonal, float softcap, float dropout_p, Tensor? rng_state,"
        " Tensor? sequences=None, Tensor? block_table=None) -> (Tensor out, Tensor lse, Tensor statistics)"
    ),
    # attention_forward's out alone, on the CPU: each further result costs a call 0.6 µs.
    "attention_inference": (
        "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, float softmax_scale,"
        " int window_left, int window_right, int diagonal, float softcap, float dropout_p, Tensor? rng_state,"
        " Tensor? sequences=None, Tensor? block_table=None) -> Tensor"
    ),
    # dmask has attn_mask's own (unexpanded) shape and dtype; dslopes that of alibi_slopes; dsinks that of sinks.
    "attention_backward": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? attn_mask,"
        " Tensor? alibi_slopes, Tensor? sinks, float softmax_scale, int window_left, int window_right, int diagonal,"
        " float softcap, float dropout_p, Tensor? rng_state, bool mask_grad, bool slopes_grad, bool sinks_grad,"
        " Tensor? sequences=None, Tensor? statistics=None)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dslopes, Tensor dsinks)"
    ),
    # exp(score - lse) after dropout, in q's dtype: (B, H, Nq, Nk), or with average the mean over heads (B, Nq, Nk).
    "attention_weights": (
        "(Tensor q, Tensor k, Tensor lse, Tensor? attn_mask, Tensor? alibi_slopes, float softmax_scale, int window_left,"
        " int window_right, int diagonal, float softcap, float dropout_p, Tensor? rng_state, bool average) -> Tensor"
    ),
    # x, residual (M, N) with unit last stride; weight, bias (N,) in x.dtype or float32. h = dropout(x) + residual, y = norm(h).
    # h is (0,) when it would equal x; mean is (0,) for rms.
    "norm_forward": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, float dropout_p,"
        " Tensor? rng_state) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
    ),
    # norm_forward's y alone, for x (..., columns) with rows of one stride, on the CPU: each further result costs a call 0.6 µs.
    "norm_inference": "(Tensor x, Tensor? weight, Tensor? bias, int columns, float eps, bool rms) -> Tensor",
    # dh is the incoming gradient of h (or None). Results: the total gradient of h, that of x where dropout makes it differ.
    "norm_backward": (
        "(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, bool rms, float dropout_p,"
        " Tensor? rng_state, bool weight_grad, bool bias_grad)"
        " -> (Tensor dh_total, Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    # y = x weightᵀ + bias + residual: x (M, K), weight (N, K), bias (N,), residual (M, N), rounded once. Forward on the CPU also
    # takes M in more dimensions than one, or none.
    "linear_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    "linear_backward": (
        "(Tensor dy, Tensor x, Tensor weight, bool x_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    # x (M, K); w_in, w_gate (F, K); w_out (O, F). hidden = dropout(act(pre)), or dropout(act(gate) * pre) with a gate.
    # out = hidden w_outᵀ + b_out + residual (M, O). pre, gate (M, F) are (0,) unless save_pre; they have the bits of
    # linear_forward with w_in, w_gate. activation indexes fastattn.reference.ffn.ACTIVATIONS. Forward on the CPU also takes x's
    # and residual's M in more dimensions than one, or none: out has them.
    "ffn_forward": (
        "(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out,"
        " Tensor? residual, int activation, float dropout_p, Tensor? rng_state, bool save_pre)"
        " -> (Tensor out, Tensor pre, Tensor gate)"
    ),
    # ffn_forward's out alone, without dropout, on the CPU: each further result costs a call 0.6 µs.
    "ffn_inference": (
        "(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out,"
        " Tensor? residual, int activation) -> Tensor"
    ),
    "ffn_backward": (
        "(Tensor dout, Tensor x, Tensor w_in, Tensor? w_gate, Tensor w_out, Tensor pre, Tensor gate, int activation,"
        " float dropout_p, Tensor? rng_state, bool x_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor dx, Tensor dw_in, Tensor db_in, Tensor dw_gate, Tensor db_gate, Tensor dw_out, Tensor db_out)"
    ),
    # x (B, H, N, D); cos, sin (1 | B, N, R/2) in the accumulation dtype; conjugate rotates back (the gradient).
    "rope": "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool conjugate) -> Tensor",
    "rope_": "(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool conjugate) -> ()",
    # logits (T, V) with unit last stride; target int64 (T,); class_weight (V,) in the accumulation dtype, as are loss, () or
    # without reduction (T,), and statistics (2, T): each row's largest logit and the log of its sum of exponentials relative to it.
    # reduction indexes fastattn.reference.loss.REDUCTIONS.
    "cross_entropy_forward": (
        "(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index, float label_smoothing, float softcap,"
        " float z_loss, int reduction) -> (Tensor loss, Tensor statistics)"
    ),
    "cross_entropy_backward": (
        "(Tensor dloss, Tensor logits, Tensor target, Tensor? class_weight, Tensor statistics, int ignore_index,"
        " float label_smoothing, float softcap, float z_loss, int reduction) -> Tensor dlogits"
    ),
    # logits = x (T, K) · weight (V, K)ᵀ + bias (V,). The gradients are those of a reduced loss.
    "linear_cross_entropy_forward": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing, float softcap,"
        " float z_loss, int reduction, bool x_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor loss, Tensor statistics, Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    "linear_cross_entropy_backward": (
        "(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor statistics, int ignore_index,"
        " float label_smoothing, float softcap, float z_loss, int reduction, bool x_grad, bool weight_grad,"
        " bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
}

#: Operators that only the implementations on GPUs have.
GPU_SCHEMAS = {
    # attention_forward, up to 8 rows, after k and v (B, Hk, Nq, D) took the place of each sequence's last keys.
    "attention_append": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? sinks,"
        " float softmax_scale, int window_left, int window_right, float softcap, Tensor sequences, Tensor? block_table)"
        " -> (Tensor out, Tensor lse)"
    ),
}


def attention_output_like(q: Tensor, head_dim_v: int) -> Tensor:
    """An empty (B, H, Nq, Dv) output in q's memory order: (batch, seq, heads, dim) queries give such an output."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, head_dim_v).transpose(1, 2)
    return q.new_empty(batch, heads, rows, head_dim_v)


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _fake_attention_forward(q, k, v, attn_mask, alibi_slopes, sinks, *_):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    statistics = lse.new_empty((2, *lse.shape) if q.dtype == torch.float32 else 0)
    return attention_output_like(q, v.shape[3]), lse, statistics


def _fake_attention_inference(q, k, v, *_):  # type: ignore[no-untyped-def]
    return attention_output_like(q, v.shape[3])


def _fake_attention_append(q, k_cache, v_cache, *_):  # type: ignore[no-untyped-def]
    return attention_output_like(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_attention_backward(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, out, lse, attn_mask, alibi_slopes, sinks, *rest
):
    mask_grad, slopes_grad, sinks_grad = rest[7:10]
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(attn_mask, memory_format=torch.contiguous_format) if mask_grad else _none(q),
        torch.empty_like(alibi_slopes) if slopes_grad else _none(q),
        torch.empty_like(sinks) if sinks_grad else _none(q),
    )


def _fake_attention_weights(q, k, *rest):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, k.shape[2]) if rest[-1] else (batch, heads, rows, k.shape[2]))


def _fake_norm_forward(x, residual, weight, bias, eps, rms, dropout_p, rng_state):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape)
    h = x.new_empty(x.shape) if residual is not None or dropout_p > 0 else _none(x)
    rstd = x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))
    return y, h, rstd.new_empty(0) if rms else torch.empty_like(rstd), rstd


def _fake_norm_inference(x, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _fake_norm_backward(  # type: ignore[no-untyped-def]
    dy, dh, h, weight, mean, rstd, rms, dropout_p, rng_state, weight_grad, bias_grad
):
    columns = weight if weight is not None else h.new_empty(h.shape[1])
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape) if dropout_p > 0 else _none(h),
        columns.new_empty(columns.shape) if weight_grad else _none(h),
        columns.new_empty(columns.shape) if bias_grad else _none(h),
    )


def _fake_linear_forward(x, weight, bias, residual):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_linear_backward(dy, x, weight, x_grad, weight_grad, bias_grad):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape) if x_grad else _none(x),
        weight.new_empty(weight.shape) if weight_grad else _none(x),
        x.new_empty(weight.shape[0]) if bias_grad else _none(x),
    )


def _fake_ffn_forward(x, w_in, b_in, w_gate, b_gate, w_out, b_out, *rest):  # type: ignore[no-untyped-def]
    hidden = (math.prod(x.shape[:-1]), w_in.shape[0])
    save_pre = rest[-1]
    return (
        x.new_empty(*x.shape[:-1], w_out.shape[0]),
        x.new_empty(hidden) if save_pre else _none(x),
        x.new_empty(hidden) if save_pre and w_gate is not None else _none(x),
    )


def _fake_ffn_inference(x, w_in, b_in, w_gate, b_gate, w_out, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], w_out.shape[0])


def _fake_ffn_backward(dout, x, w_in, w_gate, w_out, pre, gate, *rest):  # type: ignore[no-untyped-def]
    x_grad, weight_grad, bias_grad = rest[-3:]
    gated = w_gate is not None
    return (
        x.new_empty(x.shape) if x_grad else _none(x),
        w_in.new_empty(w_in.shape) if weight_grad else _none(x),
        x.new_empty(w_in.shape[0]) if bias_grad else _none(x),
        w_in.new_empty(w_in.shape) if weight_grad and gated else _none(x),
        x.new_empty(w_in.shape[0]) if bias_grad and gated else _none(x),
        w_out.new_empty(w_out.shape) if weight_grad else _none(x),
        x.new_empty(w_out.shape[0]) if bias_grad else _none(x),
    )


def _fake_rope(x, cos, sin, interleaved, conjugate):  # type: ignore[no-untyped-def]
    return attention_output_like(x, x.shape[3])


def _fake_rope_(*_):  # type: ignore[no-untyped-def]
    return None


def _fake_loss(rows: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    tokens = rows.shape[0]
    wide = accumulation_dtype(rows.dtype)
    return rows.new_empty((tokens,) if reduction == 0 else (), dtype=wide), rows.new_empty((2, tokens), dtype=wide)


def _fake_cross_entropy_forward(logits, target, class_weight, *options):  # type: ignore[no-untyped-def]
    return _fake_loss(logits, options[-1])


def _fake_cross_entropy_backward(dloss, logits, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _fake_linear_gradients(x, weight, wanted):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape) if want else _none(x) for shape, want in zip(shapes, wanted, strict=True))


def _fake_linear_cross_entropy_forward(x, weight, bias, target, *options):  # type: ignore[no-untyped-def]
    return (*_fake_loss(x, options[4]), *_fake_linear_gradients(x, weight, options[5:]))


def _fake_linear_cross_entropy_backward(dloss, x, weight, *rest):  # type: ignore[no-untyped-def]
    return _fake_linear_gradients(x, weight, rest[-3:])


FAKES: dict[str, Callable[..., object]] = {
    "attention_forward": _fake_attention_forward,
    "attention_inference": _fake_attention_inference,
    "attention_append": _fake_attention_append,
    "attention_backward": _fake_attention_backward,
    "attention_weights": _fake_attention_weights,
    "norm_forward": _fake_norm_forward,
    "norm_inference": _fake_norm_inference,
    "norm_backward": _fake_norm_backward,
    "linear_forward": _fake_linear_forward,
    "linear_backward": _fake_linear_backward,
    "ffn_forward": _fake_ffn_forward,
    "ffn_inference": _fake_ffn_inference,
    "ffn_backward": _fake_ffn_backward,
    "rope": _fake_rope,
    "rope_": _fake_rope_,
    "cross_entropy_forward": _fake_cross_entropy_forward,
    "cross_entropy_backward": _fake_cross_entropy_backward,
    "linear_cross_entropy_forward": _fake_linear_cross_entropy_forward,
    "linear_cross_entropy_backward": _fake_linear_cross_entropy_backward,
}

#: Operators whose C++ form takes a keyword more, reduced_precision: whether products of float32 may have relative errors of
#: 2^-16 a term where that is faster (csrc/cpu/gemm_split-inl.h). Triton's launchers look at torch's setting themselves.
PRODUCTS = frozenset(
    f"{op}_{direction}"
    for op in ("attention", "linear", "ffn", "linear_cross_entropy")
    for direction in ("forward", "backward", "inference", "weights")
)

#: Operators that Triton implements, and the module of kernels/ that holds the launcher of the same name.
TRITON_OPS = {
    "attention_forward": "attention",
    "attention_append": "attention",
    "attention_backward": "attention",
    "norm_forward": "norm",
    "norm_backward": "norm",
    "rope": "rope",
    "rope_": "rope",
    "cross_entropy_forward": "loss",
    "cross_entropy_backward": "loss",
    "linear_cross_entropy_forward": "linear_loss",
    "linear_cross_entropy_backward": "linear_loss",
    "linear_forward": "linear",
    "linear_backward": "linear",
    "ffn_forward": "ffn",
    "ffn_backward": "ffn",
}

_PACKAGE = Path(__file__).resolve().parent.parent
_library = torch.library.Library("fastattn", "DEF")
load_errors: dict[str, str] = {}


def _define(name: str, op: str) -> None:
    schema, fake = (SCHEMAS | GPU_SCHEMAS)[op], FAKES[op]
    if name in PRODUCTS:
        schema = schema.replace(") -> ", ", *, bool reduced_precision=False) -> ")
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastattn::{name}", lambda *args, reduced_precision=False: fake(*args), lib=_library)


def _reduced_precision() -> bool:
    return _float32_precision("mkldnn", "matmul") in ("tf32", "bf16")


# ``torch.backends.mkldnn.matmul.fp32_precision``, in a tenth of the 0.8 µs that its Python takes. (get_float32_matmul_precision()
# raises where somebody has set that of one backend.)
_float32_precision = torch._C._get_fp32_precision_getter
# What torch.compiler.assume_constant_result does, which imports the compiler: a graph keeps the setting of its tracing.
_reduced_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def products(op: str) -> Callable[..., Any]:
    """The operator of PRODUCTS, told what ``torch.set_float32_matmul_precision()`` says now."""
    operator = getattr(torch.ops.fastattn, op).default

    def call(*args: object) -> Any:
        return operator(*args, reduced_precision=True) if _reduced_precision() else operator(*args)

    return call


def _triton_stub(op: str, module: str) -> Callable[..., object]:
    """Runs ``fastattn.kernels.<module>.<op>``; Triton is imported on the first call, not with the package."""

    def launch(*args: object) -> object:
        return getattr(importlib.import_module(f"fastattn.kernels.{module}"), op)(*args)

    return launch


def _load(name: str) -> ctypes.CDLL | None:
    """Load ``fastattn/<name>.so``; on failure keep the reason for ``info`` and warn once if the file is there but broken."""
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        load_errors[name] = f"{path.name} is not built"
        if name == "_C":
            warnings.warn("fastattn: the C++ core is not built, CPU tensors take plain PyTorch", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        load_errors[name] = f"{path.name} does not load: {error}"
        warnings.warn(f"fastattn: {load_errors[name]}; `python -m fastattn info` says more", stacklevel=2)
        return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _text(library: ctypes.CDLL | None, function: str) -> str:
    """A fact of a compiled half: one of its ``const char* f()``."""
    assert library is not None
    symbol = getattr(library, function)
    symbol.restype = ctypes.c_char_p
    return symbol().decode()


for _op in SCHEMAS | GPU_SCHEMAS:
    _define(_op, _op)
for _op, _module in TRITON_OPS.items():
    _define(f"triton_{_op}", _op)
    for _key in ("CUDA", "CPU"):
        _library.impl(f"triton_{_op}", _triton_stub(_op, _module), _key)

_core = _load("_C")
#: Which implementations this process can load.
has_cpu = _core is not None
_cuda = _load("_cuda")
has_cuda = _cuda is not None
has_triton = _installed("triton")
triton_interprets = os.environ.get("TRITON_INTERPRET") == "1"
#: Whether `auto` takes the C++ kernels: their scalar form is only for checking.
cpu_is_fast = has_cpu and (_text(_core, "fastattn_best_isa") != "scalar" or os.environ.get("FASTATTN_ISA") == "scalar")
if has_cpu and _text(_core, "fastattn_isa_message").endswith("ignored"):
    warnings.warn(_text(_core, "fastattn_isa_message"), stacklevel=2)


def current_isa() -> str | None:
    """The instruction set that the C++ core uses now, None without the core."""
    return _text(_core, "fastattn_current_isa") if has_cpu else None


def cuda_state() -> str:
    """What the CUDA extension was compiled for, and why this machine cannot run it where that is so."""
    if not has_cuda:
        return load_errors["_cuda"]
    code = f"loaded, code for {_text(_cuda, 'fastattn_cuda_architectures').replace(';', ', ')}"
    obstacle = _text(_cuda, "fastattn_cuda_obstacle")
    if torch.version.cuda is None:
        obstacle = f"this build of torch has no CUDA; {obstacle}".rstrip("; ")
    return f"{code}; not usable here: {obstacle}" if obstacle else code
