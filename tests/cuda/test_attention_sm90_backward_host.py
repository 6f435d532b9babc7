"""The Hopper kernels of attention's gradients, run on the CPU as ``test_attention_sm90_host.py`` runs forward, against float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_call import AttentionBackwardParams, AttentionParams, Call, fill, forward, projections
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled("attention_sm90_host.cpp", tmp_path_factory.mktemp("cuda"))
    library.attention_sm90_backward.restype = ctypes.c_bool
    return library


def _reference(call: Call, dout: Tensor, dlse: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """(gradients of q, k and v, lse, delta)."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in call[:3])
    sinks = call.sinks.to(dtype) if call.sinks is not None else None
    out, lse = forward(call._replace(q=q, k=k, v=v, sinks=sinks))
    dlse = dlse.to(lse.dtype).masked_fill(lse.isinf(), 0)
    grads = torch.autograd.grad([out, lse], [q, k, v], [dout.to(dtype), dlse])
    return list(grads), lse.detach(), ((dout.to(lse.dtype) * out).sum(-1) - dlse).detach()


def _run(
    kernels: ctypes.CDLL, call: Call, dout: Tensor, sums: list[Tensor], in_order: bool, late_copies: bool
) -> list[Tensor] | None:
    """Gradients of q, k and v from lse and delta; None: not taken."""
    lse, delta = (x.float().contiguous() for x in sums)
    grads = [torch.full(x.shape, math.nan, dtype=x.dtype) for x in call[:3]]
    if call.sequences is not None:  # what is no sequence's, as the operator leaves it
        for x in grads:
            x.zero_()
    p = AttentionBackwardParams()
    ctypes.memmove(ctypes.byref(p), ctypes.byref(fill(call, dout, lse)), ctypes.sizeof(AttentionParams))
    p.dout, p.dout_stride[:], p.delta = dout.data_ptr(), p.out_stride[:], delta.data_ptr()
    p.dq, p.dk, p.dv = (x.data_ptr() for x in grads)
    packed = call.sequences is not None and call.k.shape[0] == 1
    p.key_stride[:] = [0 if packed else p.heads_kv * p.keys, p.keys]
    return grads if kernels.attention_sm90_backward(ctypes.byref(p), in_order, late_copies) else None


def _check(
    kernels: ctypes.CDLL,
    call: Call,
    late_copies: bool = False,
    unseen_rows: Tensor | None = None,
    unseen_keys: Tensor | None = None,
) -> None:
    """Both forms against float64. Rows and keys that belong to no pair are NaN for the kernels."""
    dout = torch.randn(*call.q.shape[:3], call.v.shape[3]).to(call.q.dtype)
    dlse = torch.randn(call.q.shape[:3])
    (plain, *_), (exact, *sums) = (_reference(call, dout, dlse, dtype) for dtype in (call.q.dtype, torch.float64))
    spoilt = [x.clone() for x in (call.q, dout, sums[1], call.k, call.v)]
    for x, unseen in zip(spoilt, [unseen_rows] * 3 + [unseen_keys] * 2, strict=True):
        if unseen is not None:
            x[:, :, unseen] = math.nan
    call = call._replace(q=spoilt[0], k=spoilt[3], v=spoilt[4])
    for form, in_order in (("in order", True), ("by sums", False)):
        actual = _run(kernels, call, spoilt[1], [sums[0], spoilt[2]], in_order, late_copies)
        assert actual is not None, "not taken"
        for name, ours, peer, true in zip(("dq", "dk", "dv"), actual, plain, exact, strict=True):
            assert_accurate(ours, peer, true, f"{name} {form}", terms=max(call.q.shape[2], call.k.shape[2]))


@pytest.mark.parametrize("late", [False, True], ids=["late-products", "late-copies"])
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "dims", "dtype"),
    [
        ((1, 1), 70, 200, (64, 64), torch.bfloat16),
        ((4, 2), 150, 90, (40, 64), torch.float16),
        ((1, 1), 65, 130, (96, 80), torch.float16),
        ((2, 1), 130, 140, (128, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_every_tile(
    kernels: ctypes.CDLL,
    heads: tuple[int, int],
    rows: int,
    keys: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    late: bool,
) -> None:
    q, k, v = projections(heads, rows, keys, dims, dtype, batch=2)
    _check(kernels, Call(q, k, v, softmax_scale=dims[0] ** -0.5), late)


def test_windows(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((2, 1), 200, 260, (64, 64))
    for window in (
        {"window_right": 0, "diagonal": 60},
        {"window_left": 70, "window_right": 3, "diagonal": 30},
        {"window_left": 20},
        {"window_right": 0, "diagonal": -100},
    ):
        _check(kernels, Call(q, k, v, softmax_scale=0.125, sinks=torch.randn(2), **window))
    # Rows that see nothing: lse is -inf.
    _check(kernels, Call(q, k, v, softmax_scale=0.125, window_right=0, diagonal=-100))


def test_sequences(kernels: ctypes.CDLL) -> None:
    # Packed: one without rows, one without keys; what lies between them is no one's.
    extents = [(0, 70, 0, 150, 80), (70, 0, 150, 20, 0), (70, 130, 170, 0, 0), (200, 90, 175, 140, 50)]
    q, k, v = projections((2, 1), 300, 330, (64, 64))
    for late in (False, True):
        call = Call(q, k, v, softmax_scale=0.125, window_right=0, sequences=torch.tensor(extents))
        _check(kernels, call, late)


@pytest.mark.parametrize("dims", [(64, 64), (96, 80), (128, 128)], ids=str)
def test_nan_that_no_one_sees(kernels: ctypes.CDLL, dims: tuple[int, int]) -> None:
    q, k, v = projections((2, 1), 200, 260, dims)
    # Rows before the diagonal, keys beyond it.
    call = Call(q, k, v, softmax_scale=0.125, window_right=0, diagonal=-90)
    _check(kernels, call, unseen_rows=torch.arange(200) < 90, unseen_keys=torch.arange(260) >= 110)
    # Keys before every window; what lies before, between and after sequences.
    extents = torch.tensor([(5, 70, 3, 150, 80), (80, 110, 160, 90, 0)])
    rows, keys = torch.ones(200, dtype=torch.bool), torch.ones(260, dtype=torch.bool)
    rows[5:75] = rows[80:190] = keys[63:153] = keys[160:250] = False
    call = Call(q, k, v, softmax_scale=0.125, window_left=20, sequences=extents)
    _check(kernels, call, unseen_rows=rows, unseen_keys=keys)


def test_what_others_take(kernels: ctypes.CDLL) -> None:
    def takes(q: Tensor, k: Tensor, v: Tensor, **options: float) -> bool:
        dout, sums = torch.randn(1, 1, 10, v.shape[3]).to(q.dtype), [torch.zeros(1, 1, 10)] * 2
        return _run(kernels, Call(q, k, v, **options), dout, sums, True, False) is not None

    narrow = projections((1, 1), 10, 10, (64, 64))
    assert takes(*narrow) and not takes(*narrow, softcap=3.0)
    assert not takes(*projections((1, 1), 10, 10, (192, 64)))
