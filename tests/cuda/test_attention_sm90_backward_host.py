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


def _reference(
    call: Call, dout: Tensor, dlse: Tensor, dtype: torch.dtype, dropout_p: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(gradients of q, k, v and slopes, lse, delta)."""
    floats = {
        name: x.detach().to(dtype)
        for name, x in call._asdict().items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    leaves = {f"d{name}": floats[name].requires_grad_() for name in ("q", "k", "v", "alibi_slopes") if name in floats}
    out, lse = forward(call._replace(**floats), dropout_p)
    dlse = dlse.to(lse.dtype).masked_fill(lse.isinf(), 0)
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [dout.to(dtype), dlse])
    delta = (dout.to(lse.dtype) * out).sum(-1) - dlse
    return dict(zip(leaves, grads, strict=True)), lse.detach(), delta.detach()


def _run(
    kernels: ctypes.CDLL,
    call: Call,
    dout: Tensor,
    sums: list[Tensor],
    in_order: bool,
    late_copies: bool,
    dropout_p: float = 0.0,
) -> dict[str, Tensor] | None:
    """Gradients of q, k, v and (in order) slopes, from lse and delta; None: not taken."""
    lse, delta = (x.float().contiguous() for x in sums)
    grads = {
        f"d{name}": torch.full_like(x, math.nan, memory_format=torch.contiguous_format)
        for name, x in zip("qkv", call[:3], strict=True)
    }
    if call.sequences is not None:  # what is no sequence's, as the operator leaves it
        for x in grads.values():
            x.zero_()
    p = AttentionBackwardParams()
    ctypes.memmove(ctypes.byref(p), ctypes.byref(fill(call, dout, lse, dropout_p)), ctypes.sizeof(AttentionParams))
    p.dout, p.dout_stride[:], p.delta = dout.data_ptr(), p.out_stride[:], delta.data_ptr()
    p.dq, p.dk, p.dv = (x.data_ptr() for x in grads.values())
    packed = call.sequences is not None and call.k.shape[0] == 1
    p.key_stride[:] = [0 if packed else p.heads_kv * p.keys, p.keys]
    slope_rows = torch.full(lse.shape, math.nan)
    if call.alibi_slopes is not None and in_order:
        p.slope_rows = slope_rows.data_ptr()
    if not kernels.attention_sm90_backward(ctypes.byref(p), in_order, late_copies):
        return None
    if p.slope_rows:
        parts = slope_rows if call.sequences is None else [slope_rows[0, :, a : a + n] for a, n, *_ in call.sequences]
        total = torch.stack([x.sum(-1) for x in parts])
        grads["dalibi_slopes"] = total.sum_to_size(call.alibi_slopes.shape)
    return grads


def _padded(x: Tensor) -> Tensor:
    """With rows of a multiple of 16 bytes, as TMA reads them; NaN between."""
    if x.shape[-1] % 8 == 0:
        return x
    rows = x.new_full((*x.shape[:-1], x.shape[-1] + -x.shape[-1] % 8), math.nan)
    rows[..., : x.shape[-1]] = x
    return rows[..., : x.shape[-1]]


def _check(
    kernels: ctypes.CDLL,
    call: Call,
    late_copies: bool = False,
    unseen_rows: Tensor | None = None,
    unseen_keys: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Both forms (beyond 128 channels there is one) against float64. Rows and keys that belong to no pair are NaN for them."""
    dout = torch.randn(*call.q.shape[:3], call.v.shape[3]).to(call.q.dtype)
    dlse = torch.randn(call.q.shape[:3])
    (plain, *_), (exact, *sums) = (
        _reference(call, dout, dlse, dtype, dropout_p) for dtype in (call.q.dtype, torch.float64)
    )
    spoilt = [x.clone() for x in (call.q, dout, sums[1], call.k, call.v)]
    for x, unseen in zip(spoilt, [unseen_rows] * 3 + [unseen_keys] * 2, strict=True):
        if unseen is not None:
            x[:, :, unseen] = math.nan
    spoilt[:2], spoilt[3:] = map(_padded, spoilt[:2]), map(_padded, spoilt[3:])
    call = call._replace(q=spoilt[0], k=spoilt[3], v=spoilt[4])
    forms = {}
    wide = max(call.q.shape[3], call.v.shape[3]) > 128
    for form, in_order in (("in order", True), ("by sums", False))[: 1 if wide else 2]:
        actual = forms[form] = _run(kernels, call, spoilt[1], [sums[0], spoilt[2]], in_order, late_copies, dropout_p)
        assert actual is not None, "not taken"
        terms = max(call.q.shape[2], call.k.shape[2])
        for name, ours in actual.items():
            assert_accurate(ours, plain[name], exact[name], f"{name} {form}", terms=terms)
    for name in ("dk", "dv"):  # the same sums in the same order
        assert wide or torch.equal(forms["in order"][name], forms["by sums"][name]), name


@pytest.mark.parametrize("late", [False, True], ids=["late-products", "late-copies"])
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "dims", "dtype"),
    [
        ((1, 1), 70, 200, (64, 64), torch.bfloat16),
        ((4, 2), 150, 90, (40, 64), torch.float16),
        ((1, 1), 65, 130, (96, 80), torch.float16),
        ((2, 1), 130, 140, (128, 128), torch.bfloat16),
        ((2, 1), 150, 90, (200, 256), torch.bfloat16),
        ((1, 1), 65, 130, (192, 128), torch.float16),
        # Gradients whose rows are no multiple of 16 bytes; a warpgroup without channels of its own.
        ((2, 1), 70, 90, (100, 70), torch.float16),
        ((1, 1), 70, 90, (33, 250), torch.bfloat16),
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


@pytest.mark.parametrize(("dims", "late"), [((64, 40), False), ((96, 128), True), ((256, 256), False)], ids=str)
def test_general_scores(kernels: ctypes.CDLL, dims: tuple[int, int], late: bool) -> None:
    q, k, v = projections((2, 1), 70, 140, dims, batch=2)
    call, slopes = Call(q, k, v, softmax_scale=0.15), torch.rand(2, 2) / 8
    additive = torch.randn(1, 2, 70, 140).masked_fill(torch.rand(1, 2, 70, 140) < 0.2, -math.inf)
    _check(kernels, call._replace(attn_mask=additive.to(q.dtype), window_right=5, diagonal=50), late)
    hidden = torch.rand(2, 1, 1, 140) < 0.5
    _check(kernels, call._replace(softcap=2.0, alibi_slopes=slopes, attn_mask=hidden), late, dropout_p=0.3)
    _check(kernels, call._replace(alibi_slopes=slopes[:1], window_left=40, diagonal=20, softmax_scale=-0.15), late)
    rows, keys = torch.arange(70) < 40, torch.arange(140) >= 30
    _check(kernels, call._replace(softcap=5.0, window_right=0, diagonal=-40), late, rows, keys, dropout_p=0.1)
    packed = torch.tensor([(0, 20, 5, 60, 40), (20, 46, 70, 64, -2)])
    one = call._replace(q=q[:1], k=k[:1], v=v[:1], sequences=packed, alibi_slopes=slopes, window_right=0)
    _check(kernels, one, late)


@pytest.mark.parametrize("dims", [(64, 64), (96, 80), (136, 256)], ids=str)
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
    def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
        dout, sums = torch.randn(1, 1, 10, v.shape[3]).to(q.dtype), [torch.zeros(1, 1, 10)] * 2
        return _run(kernels, Call(q, k, v), dout, sums, True, False) is not None

    assert takes(*projections((1, 1), 10, 10, (64, 64))) and not takes(*projections((1, 1), 10, 10, (264, 64)))
