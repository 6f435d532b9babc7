"""Attention backward on mma.sync, run on the CPU (``host_cuda.h``): every gradient against float64, and the tiles it walks.

What a GPU adds (coalescing, registers, real concurrency) is not tested here.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.reference.attention import visible
from tests import plain
from tests.cuda.attention_call import RNG_STATE, AttentionBackwardParams, AttentionParams, Call, fill, forward, tensors
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate

DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("attention_sm80_backward_host.cpp", tmp_path_factory.mktemp("cuda"))


def _plain(call: Call, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Every step in q's dtype, where ``plain`` has words for the call."""
    if call.sequences is not None:
        return _plain_sequences(call)
    if call.diagonal != call.k.shape[2] - call.q.shape[2]:
        return forward(call, dropout_p)
    return plain.attention(
        *call[:3], attn_mask=call.attn_mask, window_size=(call.window_left, call.window_right), softcap=call.softcap,
        alibi_slopes=call.alibi_slopes, sinks=call.sinks, softmax_scale=call.softmax_scale, dropout_p=dropout_p,
        rng_state=RNG_STATE,
    )  # fmt: skip


def _plain_sequences(call: Call) -> tuple[Tensor, Tensor]:
    """Of sequences whose last row sees their last key."""
    q, k, v, mask, slopes = call[:5]
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], -math.inf)
    for s, (q_begin, rows, k_begin, keys, diagonal) in enumerate(call.sequences.tolist()):  # type: ignore[union-attr]
        assert diagonal == keys - rows or rows * keys == 0
        of_q, of_k = (s if x.shape[0] > 1 else 0 for x in (q, k))
        own = slice(q_begin, q_begin + rows)
        own_k, own_v = (x[of_k : of_k + 1, :, k_begin : k_begin + keys] for x in (k, v))
        alone = call._replace(
            q=q[of_q : of_q + 1, :, own], k=own_k, v=own_v, diagonal=keys - rows, sequences=None,
            attn_mask=None if mask is None else mask[s : s + 1, ..., :keys],
            alibi_slopes=None if slopes is None else slopes[s : s + 1],
        )  # fmt: skip
        out[of_q : of_q + 1, :, own], lse[of_q : of_q + 1, :, own] = _plain(alone, 0.0)
    return out, lse


NAMES = ("q", "k", "v", "attn_mask", "alibi_slopes", "sinks")


def _leaves(call: Call, dtype: torch.dtype) -> Call:
    """The call in ``dtype`` (slopes and sinks at least float32), its floating-point tensors leaves that take a gradient."""
    tensors = {
        name: x.to(dtype if dtype == torch.float64 or index < 4 else torch.float32).detach().clone().requires_grad_()
        for index, name in enumerate(NAMES)
        if (x := getattr(call, name)) is not None and x.is_floating_point()
    }
    return call._replace(**tensors)


def _reference(
    forward: Callable[[Call, float], tuple[Tensor, Tensor]],
    call: Call,
    upstream: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    dropout_p: float,
) -> dict[str, Tensor]:
    leaves = _leaves(call, dtype)
    out, lse = forward(leaves, dropout_p)
    dout, dlse = (x.to(y.dtype) for x, y in zip(upstream, (out, lse), strict=True))
    torch.autograd.backward([out, lse.masked_fill(lse == -math.inf, 0)], [dout, dlse])
    tensors = {name: getattr(leaves, name) for name in NAMES}
    return {name: x.grad for name, x in tensors.items() if x is not None and x.requires_grad}


def _run(kernels: ctypes.CDLL, call: Call, upstream: tuple[Tensor, Tensor], dropout_p: float) -> dict[str, Tensor]:
    exact_out, exact_lse = forward(_leaves(call, torch.float64), dropout_p)
    out, lse = exact_out.detach().to(call.q.dtype), exact_lse.detach().float().contiguous()
    dout, dlse = upstream
    p = AttentionBackwardParams.from_buffer_copy(
        bytes(fill(call, out, lse, dropout_p)).ljust(ctypes.sizeof(AttentionBackwardParams), b"\0")
    )
    p.dout, p.dlse, p.dout_stride[:] = dout.data_ptr(), dlse.data_ptr(), dout.stride()[:3]
    # As the operator does: zero where rows are no sequence's.
    start = 0.0 if call.sequences is not None else math.nan
    gradients = {
        name: torch.full(x.shape, start, dtype=x.dtype)
        for name in NAMES
        if (x := getattr(call, name)) is not None and x.is_floating_point()
    }
    p.dq, p.dk, p.dv = (gradients[name].data_ptr() for name in "qkv")
    packed = call.sequences is not None and call.k.shape[0] == 1
    p.key_stride[:] = [0 if packed else p.heads_kv * call.k.shape[2], call.k.shape[2]]
    if call.sequences is not None and call.q.shape[0] == 1:
        p.dout_stride[0] = 0
    rows = torch.full((2, *lse.shape), math.nan)
    p.delta = rows[0].data_ptr()
    if "attn_mask" in gradients:
        p.dmask, p.mask_extent[:] = gradients["attn_mask"].data_ptr(), call.attn_mask.shape  # type: ignore[union-attr]
    if "alibi_slopes" in gradients:
        p.dslopes, p.slope_rows = gradients["alibi_slopes"].data_ptr(), rows[1].data_ptr()
    if "sinks" in gradients:
        p.dsinks = gradients["sinks"].data_ptr()
    kernels.attention_sm80_backward(ctypes.byref(p))
    return gradients


def _check(kernels: ctypes.CDLL, call: Call, dropout_p: float = 0.0) -> None:
    out_shape = (*call.q.shape[:3], call.v.shape[3])
    upstream = torch.randn(out_shape).to(call.q.dtype), torch.randn(out_shape[:3])
    actual = _run(kernels, call, upstream, dropout_p)
    peer = _reference(_plain, call, upstream, call.q.dtype, dropout_p)
    exact = _reference(forward, call, upstream, torch.float64, dropout_p)
    assert set(actual) == set(exact)
    for name, ours in actual.items():
        assert_accurate(ours, peer[name], exact[name], f"d{name}", terms=call.k.shape[2] * call.q.shape[2])


# (heads, key heads), rows, keys, (D, Dv), causal: every width of tile; several tiles of rows and of keys; rows that are not
# aligned; heads that share keys.
SHAPES = [
    ((1, 1), 5, 3, (64, 64), False),
    ((1, 1), 150, 300, (64, 64), True),
    ((6, 2), 30, 70, (96, 80), True),
    ((2, 1), 65, 150, (40, 128), False),
    ((1, 1), 130, 140, (128, 128), True),
    ((1, 1), 20, 90, (33, 65), True),
    ((2, 1), 40, 100, (192, 130), True),
    ((1, 1), 33, 70, (256, 200), False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels: ctypes.CDLL, shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    heads, rows, keys, dims, causal = shape
    q, k, v = tensors(2 if rows < 35 else 1, heads, rows, keys, dims, dtype)
    window = {"window_right": 0, "diagonal": keys - rows} if causal else {}
    _check(kernels, Call(q, k, v, softmax_scale=dims[0] ** -0.5, **window))


OPTIONS = {
    "window": {"window_left": 20, "window_right": 3, "diagonal": 25},
    "nothing seen": {"window_left": 3, "window_right": 0, "diagonal": -9},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.3, 0.1], [0.05, 0.7]]), "diagonal": 25},
    "one alibi": {"alibi_slopes": torch.tensor([[0.3, 0.1]]), "window_right": 0, "diagonal": 25},
    "sinks": {"sinks": torch.tensor([0.7, -2.0]), "window_right": 0, "diagonal": 25},
    "sinks and alibi": {
        "sinks": torch.tensor([0.7, -2.0]),
        "alibi_slopes": torch.tensor([[0.3, 0.1], [0.05, 0.7]]),
        "diagonal": 25,
    },
    "negative scale": {"softmax_scale": -0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(kernels: ctypes.CDLL, option: str) -> None:
    q, k, v = tensors(2, (2, 1), 70, 95, (64, 64), torch.bfloat16)
    _check(kernels, Call(q, k, v, **OPTIONS[option]))


@pytest.mark.parametrize(
    "window", [{"window_right": 0, "diagonal": 62}, {"window_left": 62}, {"window_right": 62, "diagonal": 64}], ids=str
)
def test_edges_of_tiles(kernels: ctypes.CDLL, window: dict[str, int]) -> None:
    """Bounds one short of a tile, or on it; the first key that a row does not see would have nearly all of its weight."""
    q, k, v = tensors(1, (1, 1), 70, 140, (64, 64), torch.bfloat16)
    call = Call(q, k, v, **window)
    past = call.diagonal + (call.window_right + 1 if call.window_right >= 0 else -call.window_left - 1)
    for row in range(max(0, -past), min(70, 140 - past)):
        k[0, 0, row + past] = 2 * q[0, 0, row]
    _check(kernels, call)


@pytest.mark.parametrize("width", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_all_options_at_once(kernels: ctypes.CDLL, width: int) -> None:
    q, k, v = tensors(1, (2, 1), 37, 75, (width, width), torch.float16)
    call = Call(
        q, k, v, torch.randn(1, 2, 37, 75), torch.tensor([[0.3, 0.1]]), torch.tensor([0.7, -2.0]), softcap=4.0,
        window_left=60, window_right=10, diagonal=38,
    )  # fmt: skip
    _check(kernels, call, dropout_p=0.2)


@pytest.mark.parametrize(
    "shape", [(2, 2, 140, 95), (1, 2, 140, 95), (2, 1, 1, 95), (1, 1, 140, 1), (1, 1, 1, 1)], ids=str
)
def test_gradient_of_a_mask(kernels: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    """Summed over whatever the mask is broadcast along."""
    q, k, v = tensors(2, (2, 1), 140, 95, (64, 48), torch.bfloat16)
    mask = torch.randn(shape)
    if shape[3] > 1:
        mask = mask.masked_fill(torch.rand(shape) > 0.9, -math.inf)
    _check(kernels, Call(q, k, v, mask if shape[1] > 1 else mask.to(torch.bfloat16), window_right=85, diagonal=-45))


def test_boolean_mask(kernels: ctypes.CDLL) -> None:
    q, k, v = tensors(2, (2, 1), 70, 95, (64, 64), torch.float16)
    mask = torch.rand(2, 1, 70, 95) > 0.5
    mask[:, :, 3] = False
    _check(kernels, Call(q, k, v, mask))


def test_dropout_is_the_reference_s(kernels: ctypes.CDLL) -> None:
    q, k, v = tensors(2, (4, 2), 70, 95, (64, 64), torch.float16)
    _check(kernels, Call(q, k, v, window_right=0, diagonal=25), dropout_p=0.3)


def test_strides(kernels: ctypes.CDLL) -> None:
    """(batch, rows, heads, channels), a slice with rows of odd length, and keys that all batches share."""
    q, k, v = tensors(2, (4, 2), 40, 80, (64, 64), torch.float16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 2, 80, 67), math.nan, dtype=torch.float16)
    wide[..., 1:65] = v
    _check(kernels, Call(q, k[:1].expand(2, 2, 80, 64), wide[..., 1:65]))


def test_sequences(kernels: ctypes.CDLL) -> None:
    """Packed, one of them empty, one without keys, and rows behind the last; and batched with lengths of their own."""
    q, k, v = tensors(1, (2, 1), 210, 200, (64, 64), torch.bfloat16)
    table = torch.tensor([[0, 90, 0, 100, 10], [90, 0, 100, 5, 0], [90, 15, 105, 0, 0], [105, 100, 105, 80, -20]])
    _check(kernels, Call(q, k, v, sequences=table, window_right=0))
    slopes, sinks = torch.rand(4, 2), torch.randn(2)
    _check(kernels, Call(q, k, v, None, slopes, sinks, sequences=table))
    q, k, v = tensors(2, (2, 1), 20, 100, (64, 64), torch.bfloat16)
    table = torch.tensor([[0, 20, 0, 70, 50], [0, 20, 0, 0, 0]])
    _check(kernels, Call(q, k, v, sequences=table, window_right=0))
    _check(kernels, Call(q, k, v, torch.randn(2, 1, 20, 100), sequences=table, window_right=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("width", [64, 256])
def test_what_is_not_seen_reaches_no_gradient(kernels: ctypes.CDLL, width: int, bad: float) -> None:
    q, k, v = tensors(1, (1, 1), 40, 60, (width, width), torch.bfloat16)
    upstream = torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[:3])
    mask = torch.ones(1, 1, 40, 60, dtype=torch.bool)
    mask[..., 45:50] = False
    for call in (Call(q, k, v, window_right=0), Call(q, k, v, mask)):
        clean = _run(kernels, call, upstream, 0.0)
        dirty_k, dirty_v = k.clone(), v.clone()
        dirty_k[0, 0, 45, 7] = dirty_v[0, 0, 46, 3] = bad
        dirty = _run(kernels, call._replace(k=dirty_k, v=dirty_v), upstream, 0.0)
        for name in "qkv":
            assert torch.equal(clean[name], dirty[name]), name


def test_tiles_of_keys_cover_every_key_once(kernels: ctypes.CDLL) -> None:
    generator = random.Random(0)
    for _ in range(60):
        lines, count, heads_kv = generator.choice([64, 128]), generator.randint(1, 9), generator.randint(1, 3)
        p = AttentionBackwardParams()
        p.batch, p.heads_kv, p.heads = count, heads_kv, 2 * heads_kv
        lengths = [generator.choice([0, 1, 63, 64, 65, 128, 300]) for _ in range(count)]
        starts = [sum(lengths[:s]) for s in range(count)]
        packed = generator.random() < 0.5
        keys = sum(lengths) + generator.randint(0, 50) if packed else 300
        table = torch.tensor([[0, 4, starts[s] if packed else 0, lengths[s], 0] for s in range(count)])
        p.keys, p.sequences, p.key_stride[0] = keys, table.data_ptr(), 0 if packed else 1000
        entries = 1 if packed and count > 1 else count
        seen = torch.zeros(entries, heads_kv, keys, dtype=torch.int32)
        kernels.key_tiles_cover(ctypes.byref(p), lines, ctypes.c_void_p(seen.data_ptr()))
        for entry in range(entries):
            covered = sum(lengths) if packed else lengths[entry]
            assert (seen[entry, :, :covered] == 1).all() and (seen[entry, :, covered:] == 0).all()


def test_rows_that_see_keys(kernels: ctypes.CDLL) -> None:
    generator = random.Random(1)
    found = (ctypes.c_int32 * 4)()
    for _ in range(300):
        p = AttentionParams()
        p.rows, p.keys = generator.randint(1, 40), generator.randint(1, 40)
        p.window_left, p.window_right = generator.randint(-1, 12), generator.randint(-1, 12)
        p.diagonal = generator.randint(-15, 15)
        first = generator.randrange(p.keys)
        last = generator.randint(first, min(p.keys - 1, first + 8))
        kernels.rows_of_keys(ctypes.byref(p), first, last, found)
        allowed = visible(p.rows, p.keys, p.window_left, p.window_right, p.diagonal, torch.device("cpu"))
        allowed = torch.ones(p.rows, p.keys, dtype=torch.bool) if allowed is None else allowed
        some, every = allowed[:, first : last + 1].any(1), allowed[:, first : last + 1].all(1)
        for rows, (begin, end) in ((some, found[:2]), (every, found[2:])):
            inside = torch.zeros(p.rows, dtype=torch.bool)
            inside[begin : max(begin, end)] = True
            assert torch.equal(inside, rows)
