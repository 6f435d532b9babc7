"""Attention's CUDA operators, run on CPU tensors: which kernels take a call, what goes where, all gradients.

``csrc/cuda/attention.cu`` is compiled by the host compiler; its kernels (decoding, and mma.sync for the rest) run in the host model
of a thread block (``host_torch/`` stands in for torch's CUDA side).
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn.ops._library import GPU_SCHEMAS, SCHEMAS
from fastattn.reference.attention import masked_attention
from tests.cuda.host import ROOT, compiled
from tests.tolerance import assert_accurate

RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
#: softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state.
PLAIN = (0.2, -1, -1, 0, 0.0, 0.0, None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, torch_dir = Path(tmp_path_factory.mktemp("cuda")), Path(torch.__file__).parent
    stand_ins = str(ROOT / "tests" / "cuda" / "host_torch")
    flags = ["-iquote", stand_ins, f"-I{stand_ins}", f"-I{ROOT / 'tests' / 'cuda'}"]
    flags += ["-isystem", str(torch_dir / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += [
        str(ROOT / "csrc" / "ops" / "tensor.cpp"),
        f"-L{torch_dir / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-Wno-attributes",
    ]
    definitions = torch.library.Library("fastattn_host", "FRAGMENT")
    for op in ("attention_forward", "attention_inference", "attention_backward"):
        definitions.define(op + SCHEMAS[op].replace(") -> ", ", *, bool reduced_precision=False) -> "))
    definitions.define("attention_append" + GPU_SCHEMAS["attention_append"])
    loaded = compiled("attention_operators_host.cpp", folder, *flags)
    loaded.hopper_backward.restype = ctypes.c_char_p
    loaded.definitions = definitions  # they last as long as their implementations
    return loaded


@pytest.fixture
def operators(library: ctypes.CDLL):
    return torch.ops.fastattn_host


def _random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def _reference(tensors, options, dtype: torch.dtype, sequences=None, block_table=None):
    cast = [x if x is None or x.dtype == torch.bool else x.detach().to(dtype).requires_grad_() for x in tensors]
    scale, left, right, diagonal, softcap, dropout_p, rng_state = options
    out, lse = masked_attention(
        *cast, softmax_scale=scale, window_left=left, window_right=right, diagonal=diagonal, softcap=softcap,
        dropout_p=dropout_p, rng_state=rng_state, sequences=sequences, block_table=block_table,
    )  # fmt: skip
    return out, lse, [x for x in cast if x is not None and x.requires_grad]


def _check(operators, tensors, options, sequences=None, *, backward: bool = True) -> None:
    q, k, v, mask, slopes, sinks = tensors
    out, lse, _ = operators.attention_forward(*tensors, *options, sequences)
    assert torch.equal(out, operators.attention_inference(*tensors, *options, sequences))
    assert (out.stride(1) < out.stride(2)) == (q.stride(1) < q.stride(2))
    results = [_reference(tensors, options, dtype, sequences) for dtype in (q.dtype, torch.float64)]
    terms = k.shape[2]
    for name, ours, plain, exact in zip(("out", "lse"), (out, lse), results[0], results[1], strict=False):
        assert_accurate(ours, plain, exact, name, terms=terms)
    if not backward:
        return
    dout, dlse = _random(*out.shape), torch.randn(lse.shape)
    additive = mask is not None and mask.dtype != torch.bool
    wanted = (additive, slopes is not None, sinks is not None)
    ours = operators.attention_backward(
        dout, dlse, q, k, v, out, lse, mask, slopes, sinks, *options, *wanted, sequences
    )
    gradients = []
    for o, s, inputs in results:
        seen = s.isfinite()
        total = (o * dout.to(o.dtype)).sum() + (s.where(seen, 0) * dlse.to(s.dtype)).sum()
        gradients.append(torch.autograd.grad(total, inputs))
    names = [
        n for n, w in zip(("dq", "dk", "dv", "dmask", "dslopes", "dsinks"), (True,) * 3 + wanted, strict=True) if w
    ]
    for name, actual, plain, exact in zip(names, [g for g in ours if g.numel()], *gradients, strict=True):
        assert_accurate(actual, plain, exact, name, terms=terms * max(1, q.shape[2]))


def test_full_tiles_with_everything(operators) -> None:
    q, k, v = _random(2, 20, 4, 24).transpose(1, 2), _random(2, 2, 37, 24), _random(2, 2, 37, 16)
    mask, slopes, sinks = _random(1, 4, 1, 37), torch.rand(2, 4), torch.randn(4)
    _check(operators, (q, k, v, mask, slopes, sinks), (0.2, 30, 0, 17, 4.0, 0.2, RNG_STATE))
    _check(operators, (q, k, v, torch.rand(2, 1, 20, 37) < 0.5, slopes[:1], None), PLAIN)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_few_and_more_rows(operators, rows: int) -> None:
    q, k, v = _random(2, 4, rows, 64), _random(2, 1, 300, 64), _random(2, 1, 300, 64)
    _check(operators, (q, k, v, None, None, torch.randn(4)), (0.2, -1, 0, 300 - rows, 0.0, 0.0, None))


@pytest.mark.parametrize(
    ("way", "kernels"), [((90, False), b"by sums"), ((90, True), b"in order"), ((80, False), b"none")], ids=str
)
def test_dq_is_in_a_fixed_order_where_torch_asks_for_it(operators, library, way, kernels: bytes) -> None:
    options = (0.2, -1, 0, 0, 0.0, 0.0, None)
    library.choose(*way)
    try:
        q, k, v = _random(1, 2, 60, 32), _random(1, 1, 70, 32), _random(1, 1, 70, 32)
        table = [[0, 20, 0, 30, 10], [20, 0, 30, 10, 10], [20, 37, 40, 27, -10]]
        _check(operators, (q, k, v, None, None, None), options, torch.tensor(table))
        assert library.hopper_backward() == kernels
        library.choose(*way)
        _check(operators, (q[:, :, :9], k[:, :, :9], v[:, :, :9], _random(1, 1, 9, 9), None, None), options)
        assert library.hopper_backward() == kernels
        library.choose(*way)
        _check(operators, (q, k, v, None, torch.rand(3, 2), None), options, torch.tensor(table))
        assert library.hopper_backward() == (b"in order" if way[0] == 90 else b"none")
    finally:
        library.choose(80, False)


def test_one_query_tensor_for_a_whole_batch(operators) -> None:
    q, k, v = _random(1, 2, 70, 32).expand(3, 2, 70, 32), _random(3, 2, 40, 32), _random(3, 2, 40, 32)
    table = torch.tensor([[0, 70, 0, n, n - 70] for n in (40, 0, 13)])
    _check(operators, (q, k, v, None, None, None), PLAIN, table, backward=False)


def test_packed_sequences(operators) -> None:
    rows, keys = [3, 30, 0, 8], [50, 30, 9, 260]
    first_row, first_key = ([sum(x[:i]) for i in range(4)] for x in (rows, keys))
    q, k, v = _random(1, 2, sum(rows) + 2, 32), _random(1, 1, sum(keys), 32), _random(1, 1, sum(keys), 32)
    table = [[a, n, b, m, m - n] for a, n, b, m in zip(first_row, rows, first_key, keys, strict=True)]
    options = (0.2, -1, 0, 0, 0.0, 0.0, None)
    _check(operators, (q, k, v, None, torch.rand(4, 2), None), options, torch.tensor(table))
    together, lse, _ = operators.attention_forward(q, k, v, None, None, None, *options, torch.tensor(table))
    assert together[:, :, -2:].eq(0).all() and lse[:, :, -2:].eq(-math.inf).all()
    for a, n, b, m, diagonal in table:
        parts = (q[:, :, a : a + n], k[:, :, b : b + m], v[:, :, b : b + m])
        alone, _, _ = operators.attention_forward(*parts, None, None, None, 0.2, -1, 0, diagonal, 0.0, 0.0, None)
        assert torch.equal(together[:, :, a : a + n], alone)


def test_a_paged_cache_that_grows(operators) -> None:
    q, fresh_k, fresh_v = _random(2, 4, 2, 64), _random(2, 2, 2, 64), _random(2, 2, 2, 64)
    k, v = _random(6, 2, 16, 64), _random(6, 2, 16, 64)
    pages = torch.tensor([[4, 1, 0], [5, 2, 3]], dtype=torch.int32)
    lengths = (33, 7)
    table = torch.tensor([[0, 2, 0, n, n - 2] for n in lengths])
    written = [k.clone(), v.clone()]
    for s, n in enumerate(lengths):
        for i in range(2):
            page, line = pages[s, (n - 2 + i) // 16], (n - 2 + i) % 16
            written[0][page, :, line], written[1][page, :, line] = fresh_k[s, :, i], fresh_v[s, :, i]
    out, lse = operators.attention_append(q, k, v, fresh_k, fresh_v, None, None, 0.2, -1, 0, 0.0, table, pages)
    assert torch.equal(k, written[0]) and torch.equal(v, written[1])
    again, lse_again, _ = operators.attention_forward(
        q, k, v, None, None, None, 0.2, -1, 0, 0, 0.0, 0.0, None, table, pages
    )
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    tensors, options = (q, k, v, None, None, None), (0.2, -1, 0, 0, 0.0, 0.0, None)
    plain, exact = (_reference(tensors, options, dtype, table, pages)[0] for dtype in (q.dtype, torch.float64))
    assert_accurate(out, plain, exact, "out", terms=33)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_prompt_in_pages(operators, dropout_p: float) -> None:
    q, k, v = _random(2, 4, 20, 64), _random(6, 2, 16, 64), _random(6, 2, 16, 64)
    pages = torch.tensor([[4, 1, 0], [5, 2, 3]], dtype=torch.int32)
    table = torch.tensor([[0, 20, 0, 40, 20], [0, 20, 0, 27, 7]])
    tensors, options = (q, k, v, None, None, None), (0.2, -1, 0, 0, 0.0, dropout_p, RNG_STATE)
    out, lse, _ = operators.attention_forward(*tensors, *options, table, pages)
    assert torch.equal(out, operators.attention_inference(*tensors, *options, table, pages))
    plain, exact = (_reference(tensors, options, dtype, table, pages) for dtype in (q.dtype, torch.float64))
    for name, ours, peer, true in zip(("out", "lse"), (out, lse), plain, exact, strict=False):
        assert_accurate(ours, peer, true, name, terms=40)


def test_nothing_to_attend_to(operators) -> None:
    for batch, heads, rows, keys in [(0, 2, 20, 5), (1, 0, 20, 5), (1, 2, 0, 5), (1, 2, 20, 0)]:
        q, k, v = (torch.randn(batch, heads, n, 32).bfloat16() for n in (rows, keys, keys))
        sinks, options = torch.randn(heads), PLAIN
        out, lse, _ = operators.attention_forward(q, k, v, None, None, sinks, *options)
        assert out.eq(0).all() and torch.equal(lse, sinks.view(1, -1, 1).expand_as(lse))
        up = (torch.ones_like(out), None, q, k, v, out, lse, None, None, sinks)
        gradients = operators.attention_backward(*up, *options, False, False, True)
        assert all(g.eq(0).all() for g in gradients)
    q, k = torch.randn(1, 2, 5, 32).bfloat16(), torch.randn(1, 2, 9, 32).bfloat16()
    out, lse, _ = operators.attention_forward(q, k, k, None, None, None, *PLAIN, torch.empty(0, 5, dtype=torch.int64))
    assert out.eq(0).all() and lse.eq(-math.inf).all()


def test_what_the_kernels_do_not_take_is_refused(operators) -> None:
    q = torch.randn(1, 1, 9, 16)
    with pytest.raises(RuntimeError, match="do not take float32 of more than 8 query rows"):
        operators.attention_forward(q, q, q, None, None, None, *PLAIN)
    with pytest.raises(RuntimeError, match="no gradients of float32"):
        operators.attention_backward(q, None, q, q, q, q, q[..., 0], None, None, None, *PLAIN, False, False, False)
