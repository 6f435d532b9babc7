"""The arithmetic of the CUDA decode kernels, run on the CPU (``host_cuda.h``): parts, fragments, pages, masks, against float64.

What a GPU adds (coalescing, registers, real concurrency) is not tested here.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_call import Call, fill, reference, tensors
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled("attention_decode_host.cpp", tmp_path_factory.mktemp("cuda"))
    library.has_gradients.restype = ctypes.c_bool
    return library


def _run(kernels: ctypes.CDLL, call: Call, fresh: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    q, several = call.q, call.sequences is not None and call.sequences.shape[0] > 1
    out = torch.full((*q.shape[:3], call.v.shape[3]), math.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:3], math.nan)
    q_packed = call.sequences is not None and q.shape[0] == 1 and (several or q.shape[2] > 8)
    if q_packed:  # as the operator does
        out.zero_()
        lse.fill_(-math.inf)
    k_packed = several and call.k.shape[0] == 1 and call.block_table is None
    pointers = strides = None
    if fresh is not None:
        pointers = (ctypes.c_void_p * 2)(*(x.data_ptr() for x in fresh))
        strides = (ctypes.c_int64 * 6)(*(s for x in fresh for s in x.stride()[:3]))
    kernels.attention_decode(ctypes.byref(fill(call, out, lse)), q_packed, k_packed, pointers, strides)
    return out, lse


def _check(kernels: ctypes.CDLL, call: Call) -> None:
    actual, plain, exact = _run(kernels, call), reference(call, call.q.dtype), reference(call, torch.float64)
    for name, ours, peer, true in zip(("out", "lse"), actual, plain, exact, strict=True):
        assert_accurate(ours, peer, true, name, terms=call.k.shape[2])


# (heads, key heads), rows, keys, (D, Dv) by what they reach: one part, one line; two parts and a tail; two tiles of lines; rows
# that are not aligned; the widest.
SHAPES = [
    ((1, 1), 1, 5, (64, 64)),
    ((4, 2), 2, 300, (128, 128)),
    ((6, 2), 7, 257, (40, 24)),
    ((2, 2), 3, 64, (33, 1)),
    ((3, 1), 1, 100, (256, 200)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels: ctypes.CDLL, shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    heads, rows, keys, dims = shape
    q, k, v = tensors(2, heads, rows, keys, dims, dtype)
    _check(kernels, Call(q, k, v, softmax_scale=dims[0] ** -0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_that_touches_a_score(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, (4, 2), 3, 290, (24, 24), dtype)
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    common = {"softmax_scale": 0.3, "diagonal": 287}
    _check(kernels, Call(q, k, v, sinks=sinks, window_right=0, **common))  # type: ignore[arg-type]
    _check(kernels, Call(q, k, v, window_left=30, window_right=4, **common))  # type: ignore[arg-type]
    # Tiles that begin, or end, between what the first and what the last row see.
    _check(kernels, Call(q, k, v, window_left=15, **common))  # type: ignore[arg-type]
    _check(kernels, Call(q, k, v, window_right=0, diagonal=270))
    _check(kernels, Call(q, k, v, alibi_slopes=slopes, softcap=2.0, **common))  # type: ignore[arg-type]
    boolean = torch.rand(2, 1, 3, 290) < 0.4
    boolean[:, :, 1] = False
    _check(kernels, Call(q, k, v, boolean, slopes[:1], sinks, window_left=200, **common))  # type: ignore[arg-type]
    _check(kernels, Call(q, k, v, boolean, **common))  # type: ignore[arg-type]
    for kind in {dtype, torch.float32}:
        additive = torch.randn(1, 4, 1, 290).to(kind).masked_fill(torch.rand(290) < 0.3, -math.inf)
        _check(kernels, Call(q, k, v, additive, softcap=3.0, **common))  # type: ignore[arg-type]


def test_rows_that_see_nothing(kernels: ctypes.CDLL) -> None:
    q, k, v = tensors(1, (2, 2), 4, 40, (16, 16), torch.bfloat16)
    out, lse = _run(kernels, Call(q, k, v, window_right=0, diagonal=-2))
    assert out[:, :, :2].eq(0).all() and lse[:, :, :2].eq(-math.inf).all() and lse[:, :, 2:].isfinite().all()
    out, lse = _run(kernels, Call(q, k[:, :, :0], v[:, :, :0]))
    assert out.eq(0).all() and lse.eq(-math.inf).all()


def test_strides(kernels: ctypes.CDLL) -> None:
    wide = torch.randn(2, 70, 3, 3, 56).to(torch.float16)
    q, k, v = (wide[:, :, i, :, 8:40].transpose(1, 2) for i in range(3))
    _check(kernels, Call(q[:, :, :5], k, v))
    q, k, v = (wide[:, :, i, :, 3:40].transpose(1, 2) for i in range(3))  # no 16-byte chunk is aligned
    _check(kernels, Call(q[:, :, :5], k, v))


def _cache(table: list[int], page_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pages in which nothing is but NaN, and room for every sequence."""
    pages = torch.full((max(table) + 1, 2, page_size, 40), math.nan, dtype=dtype)
    return pages, pages.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caches(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    lengths = [0, 3, 33, 300]
    table = torch.tensor([[9, 9, 9, 9, 9, 9, 9], [3, 9, 9, 9, 9, 9, 9], [0, 9, 9, 9, 9, 9, 9], [8, 2, 7, 1, 6, 5, 4]])
    q, k, v = tensors(4, (4, 2), 2, 300, (40, 40), dtype)
    for s, length in enumerate(lengths):  # what lies past a sequence's end must not be read
        k[s, :, length:], v[s, :, length:] = math.nan, math.nan
    sequences = torch.tensor([[0, 2, 0, n, n - 2] for n in lengths])
    call = Call(q, k, v, window_right=0, sequences=sequences)
    _check(kernels, call)
    k_pages, v_pages = _cache(table.flatten().tolist(), 48, dtype)
    for s, length in enumerate(lengths):
        for page in range(-(-length // 48)):
            part = slice(page * 48, min(length, page * 48 + 48))
            k_pages[table[s, page], :, : part.stop - part.start] = k[s, :, part]
            v_pages[table[s, page], :, : part.stop - part.start] = v[s, :, part]
    paged = call._replace(k=k_pages, v=v_pages, block_table=table.int())
    for whole, pages in zip(_run(kernels, call), _run(kernels, paged), strict=True):
        assert torch.equal(whole, pages)


@pytest.mark.parametrize("paged", [False, True])
def test_append(kernels: ctypes.CDLL, paged: bool) -> None:
    q, k, v = tensors(2, (20, 2), 3, 272, (64, 48), torch.bfloat16)
    lengths, table = (258, 17), None
    sequences = torch.tensor([[0, 3, 0, n, n - 3] for n in lengths])
    if paged:
        table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
        k, v = (
            x.unflatten(2, (2, 136)).permute(0, 2, 1, 3, 4).flatten(0, 1)[[1, 0, 2, 3]].contiguous() for x in (k, v)
        )
    call = Call(q, k, v, window_right=0, sequences=sequences, block_table=table)
    wanted = _run(kernels, call)
    own = [(s, n - 3 + i) for s, n in enumerate(lengths) for i in range(3)]
    places = [(int(table[s, j // 136]), j % 136) if table is not None else (s, j) for s, j in own]
    entry, line = (torch.tensor(x) for x in zip(*places, strict=True))
    caches, fresh = [k.clone(), v.clone()], []
    for cache in caches:
        fresh.append(cache[entry, :, line].unflatten(0, (2, 3)).transpose(1, 2))
        cache[entry, :, line] = math.nan
    found = _run(kernels, call._replace(k=caches[0], v=caches[1]), (fresh[0], fresh[1]))
    for ours, known in zip((*found, *caches), (*wanted, k, v), strict=True):
        assert torch.equal(ours, known)


def test_packed_sequences_have_the_bits_they_have_alone(kernels: ctypes.CDLL) -> None:
    rows, keys = [2, 0, 8, 1, 11, 3], [30, 7, 600, 0, 5, 256]
    first_row, first_key = ([sum(x[:i]) for i in range(len(x))] for x in (rows, keys))
    q, k, v = (torch.randn(1, 4, n, 32).to(torch.bfloat16) for n in (sum(rows) + 2, sum(keys), sum(keys)))
    table = [[a, n, b, m, m - n] for a, n, b, m in zip(first_row, rows, first_key, keys, strict=True)]
    call = Call(q, k, v, window_right=0, sequences=torch.tensor(table))
    out, lse = _run(kernels, call)
    for (a, n, b, m, diagonal), _ in zip(table, rows, strict=True):
        if n > 8:  # another kernel's
            assert out[:, :, a : a + n].eq(0).all()
            continue
        alone = call._replace(
            q=q[:, :, a : a + n], k=k[:, :, b : b + m], v=v[:, :, b : b + m], diagonal=diagonal, sequences=None
        )
        for together, one in zip((out, lse), _run(kernels, alone), strict=True):
            assert torch.equal(together[:, :, a : a + n], one)
    assert out[:, :, -2:].eq(0).all() and lse[:, :, -2:].eq(-math.inf).all()


def test_nothing_unseen_reaches_a_row(kernels: ctypes.CDLL) -> None:
    q, k, v = tensors(1, (2, 1), 3, 60, (64, 64), torch.float16)
    call = Call(q, k, v, window_right=0, diagonal=57)
    clean, _ = _run(kernels, call)
    k[:, :, 59], v[:, :, 59, 5] = math.nan, math.inf
    out, lse = _run(kernels, call)
    assert torch.equal(out[:, :, :2], clean[:, :, :2]) and lse[:, :, :2].isfinite().all()
    assert out[:, :, 2].isnan().all()


def test_the_longest_part(kernels: ctypes.CDLL) -> None:
    """Beyond 64 parts of 256 keys parts are longer."""
    q, k, v = tensors(1, (1, 1), 1, 64 * 256 + 70, (8, 8), torch.float16)
    _check(kernels, Call(q, k, v))


@pytest.mark.parametrize("seed", range(20))
def test_parts_visit_every_key_once(kernels: ctypes.CDLL, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = (300, 5000, 70000)[seed % 3]
    lengths = torch.randint(0, longest, (7,), generator=generator).tolist()
    capacity = max(lengths) + seed
    first = [sum(lengths[:i]) for i in range(7)]
    q = torch.empty(1, 1, 1, 1)
    for packed in (False, True):
        k = torch.empty(1 if packed else 7, 1, sum(lengths) if packed else capacity, 1)
        table = torch.tensor([[0, 1, b if packed else 0, n, 0] for b, n in zip(first, lengths, strict=True)])
        seen = torch.zeros(k.shape[0], k.shape[2], dtype=torch.int32)
        p = fill(Call(q, k, k, sequences=table), q, q)
        kernels.decode_cover(ctypes.byref(p), packed, ctypes.c_void_p(seen.data_ptr()))
        inside = torch.arange(k.shape[2]) < (k.shape[2] if packed else torch.tensor(lengths).unsqueeze(1))
        assert torch.equal(seen, inside.int().expand_as(seen))


@pytest.mark.parametrize("chunks", [8, 16, 32, 64])
def test_tiles_have_no_bank_conflicts(kernels: ctypes.CDLL, chunks: int) -> None:
    offsets = torch.empty(16, chunks, dtype=torch.int32)
    kernels.tile_offsets(chunks, ctypes.c_void_p(offsets.data_ptr()))
    assert torch.equal(offsets.flatten().sort().values, torch.arange(16 * chunks, dtype=torch.int32) * 16)
    # Eight lines at one chunk, what ldmatrix reads at a time, and eight neighbours of a line, what a copy writes: all 32 banks.
    groups = [offsets[i : i + 8, c] for i in (0, 8) for c in range(chunks)]
    groups += [offsets[i, c : c + 8] for i in range(16) for c in range(0, chunks, 8)]
    assert all((group // 16 % 8).unique().numel() == 8 for group in groups)


def test_which_kernels_take_a_call(kernels: ctypes.CDLL) -> None:
    fills, tiles, decodes = 4, 2, 1
    dense, alone, packed = (False, False), (True, False), (True, True)
    for rows, p, (sequences, q_packed), wanted in [
        (1, 0.0, dense, decodes),
        (8, 0.0, alone, decodes),
        (9, 0.0, dense, tiles),
        (9, 0.0, alone, fills + tiles),
        (8, 0.1, dense, tiles),
        (8, 0.1, packed, fills + tiles),
        (8, 0.0, packed, fills + decodes),
        (9, 0.0, packed, fills + tiles + decodes),
    ]:
        q = torch.empty(1, 2, rows, 64, dtype=torch.float16)
        call = fill(Call(q, q, q), q, q)
        call.dropout.threshold = int(p * 2**32)
        assert kernels.forward_plan(ctypes.byref(call), sequences, q_packed) == wanted


def test_the_rung_refuses_what_the_kernels_refuse(kernels: ctypes.CDLL) -> None:
    module = importlib.import_module("fastattn.ops.attention")
    refused = set()
    for dtype, rows, p, dims in itertools.product(
        (*DTYPES, torch.float64), (1, 8, 9), (0.0, 0.1), ((64, 64), (257, 8), (8, 257), (256, 256))
    ):
        q, v = (torch.empty(1, 1, rows, dim, dtype=dtype) for dim in dims)
        call = fill(Call(q, q, v), v, v)
        call.dropout.threshold = int(p * 2**32)
        options = module._Options(0.1, -1, -1, 0, 0.0, p)
        reason = module._cuda_why_not(q, v, options, False)
        assert (kernels.forward_plan(ctypes.byref(call), False, False) == 8) == (reason is not None)
        refused.add(reason)
        if reason is None:
            assert kernels.has_gradients(ctypes.byref(call)) == (module._cuda_why_not(q, v, options, True) is None)
    assert len(refused) == 4 and None in refused
