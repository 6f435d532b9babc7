"""The attention kernels on mma.sync, run on the CPU (``host_cuda.h``): fragments, masks, tiles, rings, against float64.

What a GPU adds (coalescing, registers, real concurrency) is not tested here.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_call import Call, fill, reference, tensors
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("attention_sm80_host.cpp", tmp_path_factory.mktemp("cuda"))


def _run(kernels: ctypes.CDLL, call: Call, dropout_p: float) -> tuple[Tensor, Tensor]:
    q, packed = call.q, call.sequences is not None and call.q.shape[0] == 1
    out = torch.full((*q.shape[:3], call.v.shape[3]), math.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:3], math.nan)
    if packed:  # as the operator does
        out.zero_()
        lse.fill_(-math.inf)
    p = fill(call, out, lse, dropout_p)
    kernels.attention_sm80_forward(ctypes.byref(p))
    return out, lse


def _check(kernels: ctypes.CDLL, call: Call, dropout_p: float = 0.0) -> None:
    actual = _run(kernels, call, dropout_p)
    plain, exact = (reference(call, dtype, dropout_p) for dtype in (call.q.dtype, torch.float64))
    for name, ours, peer, true in zip(("out", "lse"), actual, plain, exact, strict=True):
        assert_accurate(ours, peer, true, name, terms=call.k.shape[2])


# (heads, key heads), rows, keys, (D, Dv), causal: every width of tile; two tiles of rows, the ring around; rows that are not
# aligned; few rows of three heads in one tile.
SHAPES = [
    ((1, 1), 5, 3, (64, 64), False),
    ((1, 1), 150, 600, (64, 64), True),
    ((6, 2), 30, 70, (96, 80), True),
    ((2, 1), 65, 200, (40, 128), False),
    ((1, 1), 130, 140, (128, 128), True),
    ((1, 1), 20, 90, (33, 65), True),
    ((1, 1), 40, 100, (192, 128), True),
    ((1, 1), 33, 97, (256, 200), False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels: ctypes.CDLL, shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    heads, rows, keys, dims, causal = shape
    q, k, v = tensors(2 if rows < 40 else 1, heads, rows, keys, dims, dtype)
    window = {"window_right": 0, "diagonal": keys - rows} if causal else {}
    _check(kernels, Call(q, k, v, softmax_scale=dims[0] ** -0.5, **window))


OPTIONS = {
    "window": {"window_left": 20, "window_right": 3, "diagonal": 25},
    "nothing seen": {"window_left": 3, "window_right": 0, "diagonal": -9},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.3, 0.1], [0.05, 0.7]]), "diagonal": 30},
    "sinks": {"sinks": torch.tensor([0.7, -2.0]), "window_right": 0},
    "negative scale": {"softmax_scale": -0.3},
}


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(kernels: ctypes.CDLL, option: str, width: int) -> None:
    q, k, v = tensors(2, (2, 1), 70, 95, (width, width), torch.bfloat16)
    _check(kernels, Call(q, k, v, **OPTIONS[option]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["bool", "additive", "float32 of keys", "transposed"])
def test_masks(kernels: ctypes.CDLL, form: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, (2, 1), 70, 95, (64, 48), dtype)
    mask = {
        "bool": torch.rand(2, 1, 70, 95) > 0.5,
        "additive": torch.randn(1, 2, 70, 95).to(dtype).masked_fill(torch.rand(70, 95) > 0.9, -math.inf),
        "float32 of keys": torch.randn(2, 1, 1, 95),
        "transposed": torch.randn(1, 1, 95, 70).to(dtype).transpose(2, 3),
    }[form]
    _check(kernels, Call(q, k, v, attn_mask=mask, window_right=40))


@pytest.mark.parametrize("width", [64, 256])
def test_dropout_is_the_reference_s(kernels: ctypes.CDLL, width: int) -> None:
    q, k, v = tensors(2, (4, 2), 70, 95, (width, width), torch.float16)
    _check(kernels, Call(q, k, v, window_right=0, diagonal=25), dropout_p=0.3)


@pytest.mark.parametrize("rows", [6, 70])
def test_strides(kernels: ctypes.CDLL, rows: int) -> None:
    """(batch, rows, heads, channels), a slice with rows of odd length, and keys that all batches share."""
    q, k, v = tensors(2, (4, 2), rows, 80, (64, 64), torch.float16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 2, 80, 67), math.nan, dtype=torch.float16)
    wide[..., 1:65] = v
    _check(kernels, Call(q, k[:1].expand(2, 2, 80, 64), wide[..., 1:65]))


def test_sequences(kernels: ctypes.CDLL) -> None:
    """Packed, one of them empty, one without keys, and rows behind the last; and batched with lengths of their own."""
    q, k, v = tensors(1, (4, 2), 210, 200, (64, 64), torch.bfloat16)
    table = torch.tensor([[0, 90, 0, 100, 10], [90, 0, 100, 5, 0], [90, 15, 105, 0, 0], [105, 100, 105, 80, -20]])
    _check(kernels, Call(q, k, v, sequences=table, window_right=0))
    _check(kernels, Call(q, k, v, sequences=table, softcap=5.0))
    q, k, v = tensors(2, (4, 2), 20, 100, (64, 64), torch.bfloat16)
    _check(kernels, Call(q, k, v, sequences=torch.tensor([[0, 20, 0, 70, 50], [0, 20, 0, 0, 0]]), window_right=0))


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "general"])
@pytest.mark.parametrize("page_size", [5, 16, 128])
def test_pages_have_the_bits_of_a_contiguous_cache(kernels: ctypes.CDLL, page_size: int, options: dict) -> None:  # type: ignore[type-arg]
    """Shuffled pages, NaN in what no sequence has: rows of 24 channels are aligned, those of 19 are not."""
    lengths, count = (97, 130), -(-130 // page_size)
    q, k, v = tensors(2, (4, 2), 20, count * page_size, (24, 19), torch.bfloat16)
    table = torch.randperm(2 * count + 1)[: 2 * count].view(2, count).int()
    pages = [torch.full((2 * count + 1, 2, page_size, x.shape[3]), math.nan, dtype=x.dtype) for x in (k, v)]
    for x, paged in zip((k, v), pages, strict=True):
        for sequence, length in enumerate(lengths):
            x[sequence, :, length:] = math.nan
            for i, page in enumerate(table[sequence].tolist()):
                paged[page] = x[sequence, :, i * page_size : (i + 1) * page_size]
    own = torch.tensor([[0, 20, 0, length, length - 20] for length in lengths])
    call = Call(q, *pages, sequences=own, block_table=table, window_right=0, **options)
    _check(kernels, call)
    whole = _run(kernels, Call(q, k, v, sequences=own, window_right=0, **options), 0.0)
    assert all(torch.equal(x, y) for x, y in zip(_run(kernels, call, 0.0), whole, strict=True))


def test_packed_sequences_of_few_rows_are_another_kernels(kernels: ctypes.CDLL) -> None:
    """Without dropout they are attention_decode's; with it, or batched, they are not."""
    q, k, v = tensors(1, (2, 1), 17, 60, (64, 64), torch.bfloat16)
    call = Call(q, k, v, sequences=torch.tensor([[0, 8, 0, 30, 22], [8, 9, 30, 30, 21]]), window_right=0)
    _check(kernels, call, 0.2)
    out, lse = _run(kernels, call, 0.0)
    assert out[:, :, :8].eq(0).all() and lse[:, :, :8].eq(-math.inf).all()
    plain, exact = (reference(call, dtype, 0.0) for dtype in (q.dtype, torch.float64))
    assert_accurate(out[:, :, 8:], plain[0][:, :, 8:], exact[0][:, :, 8:], "out", terms=30)
    _check(kernels, Call(*(x[:, :, :8] for x in (q, k, v)), window_right=0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_seen_cannot_reach_a_row(kernels: ctypes.CDLL, bad: float, masked: bool) -> None:
    q, k, v = tensors(1, (1, 1), 70, 70, (64, 64), torch.bfloat16)
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril() if masked else None
    call = Call(q, k, v, attn_mask=mask) if masked else Call(q, k, v, window_right=0)
    clean, _ = _run(kernels, call, 0.0)
    v[0, 0, 50, 7] = bad
    k[0, 0, 60, 3] = bad
    out, _ = _run(kernels, call, 0.0)
    assert torch.equal(out[:, :, :50], clean[:, :, :50])
    assert out[:, :, 50:, 7].isnan().all() and out[:, :, 60:].isnan().all()


@pytest.mark.parametrize("channels", [64, 96, 128, 192, 256])
def test_no_bank_conflicts(kernels: ctypes.CDLL, channels: int) -> None:
    """ldmatrix reads a chunk of eight rows, the copy eight chunks of a row: each in eight different bank groups."""
    places = (ctypes.c_int32 * (64 * channels // 8))()
    kernels.tile_places(channels, places)
    table = torch.tensor(list(places)).view(64, -1)
    assert table.flatten().sort().values.equal(torch.arange(table.numel()) * 16)
    groups = table // 16 % 8
    for rows in range(0, 64, 8):
        assert (groups[rows : rows + 8].sort(0).values == torch.arange(8)[:, None]).all()
    if channels % 64 == 0:
        assert (groups.view(64, -1, 8).sort(2).values == torch.arange(8)).all()
