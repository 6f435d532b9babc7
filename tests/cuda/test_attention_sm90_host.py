"""The Hopper attention kernel, run on the CPU: producer and consumers, rings, turns, tiles, masks, against float64.

Its own source runs with one fiber per CUDA thread; mbarriers, named barriers, TMA's swizzled boxes with zeros beyond the extents,
and wgmma by its fragment layouts are those of ``host_ptx_sm90.h``. Copies land at once and products are computed late, or the other
way round. Not seen here: missing fences between kinds of access, registers of a product that change before it ends, real
concurrency, and whether the descriptors mean to the hardware what the PTX manual says.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_call import AttentionParams, Call, fill, projections, reference
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled("attention_sm90_host.cpp", tmp_path_factory.mktemp("cuda"))
    library.attention_sm90_forward.restype = ctypes.c_bool
    library.attention_tiles.restype = ctypes.c_int64
    return library


@dataclass
class Run:
    """``blocks``: persistent ones; ``late_copies``: when TMA acts (``host_ptx_sm90.h``)."""

    blocks: int = 2
    late_copies: bool = False
    dropout_p: float = 0.0


def _run(kernels: ctypes.CDLL, call: Call, how: Run) -> tuple[Tensor, Tensor] | None:
    q = call.q
    # In the memory order (batch, rows, heads, channels), as a projection's result has it.
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], call.v.shape[3]), math.nan, dtype=q.dtype).transpose(1, 2)
    lse = torch.full(q.shape[:3], math.nan)
    if call.sequences is not None and q.shape[0] == 1:  # rows that are no sequence's, as the operator leaves them
        out.zero_()
        lse.fill_(-math.inf)
    p = fill(call, out, lse, how.dropout_p)
    return (out, lse) if kernels.attention_sm90_forward(ctypes.byref(p), how.blocks, how.late_copies) else None


def _check(kernels: ctypes.CDLL, call: Call, how: Run = Run()) -> None:  # noqa: B008
    actual = _run(kernels, call, how)
    assert actual is not None, "not taken"
    plain, exact = (reference(call, dtype, how.dropout_p) for dtype in (call.q.dtype, torch.float64))
    for name, ours, peer, true in zip(("out", "lse"), actual, plain, exact, strict=True):
        assert_accurate(ours, peer, true, name, terms=call.k.shape[2])


# Every tile; heads narrower than it, values and keys of other widths, tails of rows, keys and channels.
@pytest.mark.parametrize(
    ("rows", "keys", "dims", "dtype"),
    [
        (70, 300, (64, 64), torch.bfloat16),
        (200, 130, (40, 64), torch.float16),
        (65, 260, (96, 80), torch.float16),
        (130, 290, (128, 128), torch.bfloat16),
        (40, 200, (192, 128), torch.bfloat16),
        (33, 170, (256, 256), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("late", [False, True], ids=["late-products", "late-copies"])
def test_every_tile(
    kernels: ctypes.CDLL, rows: int, keys: int, dims: tuple[int, int], dtype: torch.dtype, late: bool
) -> None:
    q, k, v = projections((1, 1), rows, keys, dims, dtype)
    _check(kernels, Call(q, k, v, softmax_scale=dims[0] ** -0.5), Run(late_copies=late))


@pytest.mark.parametrize("late", [False, True], ids=["late-products", "late-copies"])
def test_windows_over_several_tiles_of_a_block(kernels: ctypes.CDLL, late: bool) -> None:
    q, k, v = projections((2, 1), 300, 420, (64, 64))
    sinks = torch.randn(2)
    for window in ({"window_right": 0, "diagonal": 120}, {"window_left": 100, "window_right": 3, "diagonal": 60}):
        _check(kernels, Call(q, k, v, softmax_scale=0.125, sinks=sinks, **window), Run(blocks=1, late_copies=late))


def test_everything_that_touches_a_score(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((4, 2), 20, 150, (24, 24), batch=2)
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    common = {"softmax_scale": 0.3, "diagonal": 130}
    _check(kernels, Call(q, k, v, alibi_slopes=slopes, softcap=2.0, sinks=sinks, window_right=0, **common))
    boolean = torch.rand(2, 1, 20, 150) < 0.4
    boolean[:, :, 1] = False
    _check(kernels, Call(q, k, v, boolean, slopes[:1], window_left=90, **common))
    for kind in (torch.bfloat16, torch.float32):
        additive = torch.randn(1, 4, 1, 150).to(kind).masked_fill(torch.rand(150) < 0.3, -math.inf)
        _check(kernels, Call(q, k, v, additive, softcap=3.0, **common))
    _check(kernels, Call(q, k, v, softmax_scale=-0.3))
    _check(kernels, Call(q, k, v, window_right=0, **common), Run(dropout_p=0.3))


@pytest.mark.parametrize("dims", [(128, 128), (192, 192), (256, 256)], ids=str)
def test_general_scores_in_every_tile(kernels: ctypes.CDLL, dims: tuple[int, int]) -> None:
    q, k, v = projections((1, 1), 70, 140, dims)
    _check(kernels, Call(q, k, v, softcap=5.0, softmax_scale=0.1), Run(late_copies=True))


def test_few_rows_take_the_heads_of_a_key_head_together(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((8, 2), 21, 140, (64, 64), batch=2)
    _check(kernels, Call(q, k, v, softmax_scale=0.125, window_right=0, diagonal=119))
    slopes = torch.rand(1, 8)
    _check(kernels, Call(q, k, v, softmax_scale=0.125, alibi_slopes=slopes), Run(dropout_p=0.2))


def test_sequences(kernels: ctypes.CDLL) -> None:
    # Packed: one without rows, one without keys; what lies between them is no one's.
    extents = [(0, 70, 0, 150, 80), (70, 0, 150, 20, 0), (70, 130, 170, 0, 0), (200, 90, 175, 140, 50)]
    sequences = torch.tensor(extents)
    q, k, v = projections((2, 1), 300, 330, (64, 64))
    k[:, :, 170:175], v[:, :, 170:175] = math.nan, math.nan
    for options in ({"window_right": 0}, {"softcap": 3.0}):
        for late in (False, True):
            _check(kernels, Call(q, k, v, softmax_scale=0.125, sequences=sequences, **options), Run(late_copies=late))
    # A cache whose sequences have unequal lengths: what is beyond them may be anything.
    q, k, v = projections((2, 1), 17, 200, (128, 128), batch=2)
    lengths = [131, 64]
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    table = torch.tensor([[0, 17, 0, n, n - 17] for n in lengths])
    _check(kernels, Call(q, k, v, softmax_scale=0.1, window_right=0, sequences=table))


def test_keys_that_no_row_sees_may_hold_anything(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((1, 1), 40, 200, (64, 64))
    for unseen in (slice(0, 30), slice(190, 200)):
        k[:, :, unseen], v[:, :, unseen] = math.nan, math.nan
    _check(kernels, Call(q, k, v, softmax_scale=0.125, window_left=50, window_right=70, diagonal=80))


def test_rows_that_see_nothing(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((2, 2), 200, 40, (64, 64))
    actual = _run(kernels, Call(q, k, v, window_right=0, diagonal=-195), Run())
    assert actual is not None
    out, lse = actual
    assert out[:, :, :195].eq(0).all() and lse[:, :, :195].eq(-math.inf).all() and lse[:, :, 195:].isfinite().all()
    _check(kernels, Call(q, k, v, window_right=0, diagonal=-195, sinks=torch.randn(2)))


def test_what_tma_cannot_read_is_not_taken(kernels: ctypes.CDLL) -> None:
    q, k, v = projections((1, 1), 10, 10, (64, 64))
    assert _run(kernels, Call(*projections((1, 1), 10, 10, (36, 36))), Run()) is None
    assert _run(kernels, Call(q, k[..., :1, :].expand_as(k), v), Run()) is None
    wide = torch.randn(1, 1, 10, 72).to(q.dtype)
    assert _run(kernels, Call(q, wide[..., 4:68], v), Run()) is None
    assert _run(kernels, Call(q, wide[..., 8:], v), Run()) is not None


@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_tiles_cover_each_line_once(kernels: ctypes.CDLL, packed: bool, pack: int) -> None:
    generator = torch.Generator().manual_seed(pack)
    for _ in range(40):
        rows = torch.randint(0, 400, (5,), generator=generator).tolist()
        p = AttentionParams()
        p.batch, p.heads, p.heads_kv, p.head_dim, p.head_dim_v, p.keys = 5, 8, 2, 64, 64, 5_000_000
        begins = [sum(rows[:i]) for i in range(5)] if packed else [0] * 5
        table = torch.tensor([[b, n, 0, 7, 0] for b, n in zip(begins, rows, strict=True)])
        p.sequences, p.rows = table.data_ptr(), sum(rows) if packed else max(rows)
        p.q_stride[0] = 0 if packed else 1
        count = kernels.attention_tiles(ctypes.byref(p), 128, pack, None)
        tiles = (ctypes.c_int64 * (4 * count))()
        kernels.attention_tiles(ctypes.byref(p), 128, pack, tiles)
        found = [tuple(tiles[4 * i : 4 * i + 3]) for i in range(count) if tiles[4 * i + 3]]
        wanted = {(b, g, line) for b in range(5) for g in range(8 // pack) for line in range(0, rows[b] * pack, 128)}
        assert len(found) == len(wanted) and set(found) == wanted
        # Within a section, longest first.
        blocks = [line for b, g, line in found if (b, g) == found[0][:2]]
        assert blocks == sorted(blocks, reverse=True)
