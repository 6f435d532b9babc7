"""The CUDA operators of ``linear`` and ``ffn``, run on CPU tensors: which product runs when, what goes where, all gradients.

``csrc/cuda/{products,linear,ffn,gemm_sm80,gemm_sm90}.cu`` are compiled by the host compiler; their kernels run in the host model of
a thread block, torch's products are its CPU ones (``host_torch/``).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops._library import SCHEMAS
from fastattn.reference.ffn import ACTIVATIONS, ffn_rows
from fastattn.reference.linear import linear as reference_linear
from tests.cuda.host import ROOT, compiled
from tests.tolerance import assert_accurate

RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
#: Compute capability and torch's setting: torch's products, or fastattn's on mma.sync or wgmma.
WAYS = {"torch": (90, False), "sm80": (80, True), "sm90": (90, True)}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, torch_dir = Path(tmp_path_factory.mktemp("cuda")), Path(torch.__file__).parent
    stand_ins = str(ROOT / "tests" / "cuda" / "host_torch")
    flags = ["-iquote", stand_ins, f"-I{stand_ins}", f"-I{ROOT / 'tests' / 'cuda'}"]
    flags += ["-isystem", str(torch_dir / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += ["-DFASTATTN_CUDA_SM90", str(ROOT / "csrc" / "ops" / "tensor.cpp")]
    flags += [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    definitions = torch.library.Library("fastattn_host", "FRAGMENT")
    for op in ("linear_forward", "linear_backward", "ffn_forward", "ffn_backward"):
        definitions.define(op + SCHEMAS[op].replace(") -> ", ", *, bool reduced_precision=False) -> "))
    loaded = compiled("products_host.cpp", folder, *flags)
    loaded.definitions = definitions  # they last as long as their implementations
    return loaded


@pytest.fixture(params=WAYS)
def operators(library: ctypes.CDLL, request: pytest.FixtureRequest):
    library.choose(*WAYS[request.param])
    return torch.ops.fastattn_host


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def _check(names: str, ours: tuple[Tensor, ...], plain, exact, terms: int) -> None:
    for name, actual, p, e in zip(names.split(), ours, plain, exact, strict=True):
        assert_accurate(actual, p, e, name, terms=terms)


@pytest.mark.parametrize("shape", [(70, 40, 136), (1, 33, 20), (600, 24, 40)], ids=lambda s: "x".join(map(str, s)))
def test_linear(operators, shape):
    m, k, n = shape
    # Rows of x lie apart, dy is one row for all.
    x, weight, bias, residual = _random(m, k + 8)[:, :k], _random(n, k), _random(n), _random(m, n + 3)[:, :n]
    dy = _random(1, n).expand(m, n)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = reference_linear(*leaves, residual=residual.to(dtype))
        return y, *torch.autograd.grad(y, leaves, dy.to(dtype))

    y = operators.linear_forward(x, weight, bias, residual)
    grads = operators.linear_backward(dy, x, weight, True, True, True)
    _check("y dx dweight dbias", (y, *grads), expected(x.dtype), expected(torch.float64), max(shape))
    bare = operators.linear_forward(x, weight, None, None)
    assert_accurate(bare, F.linear(x, weight), F.linear(x.double(), weight.double()), terms=k)
    assert [t.numel() for t in operators.linear_backward(dy, x, weight, False, False, False)] == [0, 0, 0]


@pytest.mark.parametrize(("activation", "dropout_p"), [("gelu", 0.0), ("silu", 0.3)])
@pytest.mark.parametrize("gated", [False, True])
def test_ffn(operators, gated, activation, dropout_p):
    m, k, f, o = 130, 40, 72, 56
    x, w_in, b_in, w_out, b_out = _random(m, k), _random(f, k), _random(f), _random(o, f), _random(o)
    w_gate, b_gate = (_random(f, k), _random(f)) if gated else (None, None)
    residual, dout = _random(m, o), _random(m, o)
    options = (ACTIVATIONS.index(activation), dropout_p, RNG_STATE if dropout_p else None)
    inputs = (x, w_in, b_in, w_gate, b_gate, w_out, b_out)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        formula = {"activation": activation, "dropout_p": dropout_p, "rng_state": RNG_STATE}
        out = ffn_rows(*leaves, residual.to(dtype), **formula)
        present = [t for t in leaves if t is not None]
        return out, *torch.autograd.grad(out, present, dout.to(dtype))

    out, pre, gate = operators.ffn_forward(*inputs, residual, *options, True)
    grads = operators.ffn_backward(dout, x, w_in, w_gate, w_out, pre, gate, *options, True, True, True)
    found = (out, *(g for g in grads if g.numel()))
    names = "out dx dw_in db_in dw_gate db_gate dw_out db_out" if gated else "out dx dw_in db_in dw_out db_out"
    _check(names, found, expected(x.dtype), expected(torch.float64), m)

    # Without what backward keeps the output has the same bits, and so has what a backward that kept nothing computes again.
    again, *nothing = operators.ffn_forward(*inputs, residual, *options, False)
    assert torch.equal(again, out)
    assert [t.numel() for t in nothing] == [0, 0]
    _, pre_again, gate_again = operators.ffn_forward(*inputs[:5], w_out[:0], None, None, *options, True)
    assert torch.equal(pre_again, pre) and torch.equal(gate_again, gate)


def test_no_rows(operators):
    x, w_in, w_out = _random(0, 16), _random(24, 16), _random(8, 24)
    out, pre, _ = operators.ffn_forward(x, w_in, None, None, None, w_out, None, None, 0, 0.0, None, True)
    assert out.shape == (0, 8) and pre.shape == (0, 24)
    grads = operators.ffn_backward(out, x, w_in, None, w_out, pre, pre[:0], 0, 0.0, None, True, True, True)
    assert [t.shape[0] for t in grads] == [0, 24, 24, 0, 0, 8, 8]
    assert not any(t.any() for t in grads)


def test_float32_is_refused(operators):
    with pytest.raises(RuntimeError, match="for float16 and bfloat16"):
        operators.linear_forward(torch.randn(2, 3), torch.randn(4, 3), None, None)
