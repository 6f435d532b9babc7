"""Sequences of unequal length: key lengths, packed sequences, caches. Against float64, and bitwise against the call alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import plain
import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.ops._library import has_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RNG = torch.tensor([987654321098, 3])

# (rows, keys) of each sequence: several blocks of 64 queries and 128 keys, none of either, a decoding step, more rows than keys.
LENGTHS = ((67, 131), (0, 5), (9, 0), (1, 300), (8, 40), (130, 70), (0, 0))

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 3), "softcap": 2.5},
    "alibi-sinks": {"alibi_slopes": True, "sinks": True, "causal": True},
    "dropout": {"dropout_p": 0.3, "rng_state": RNG},
}


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _packed(dtype: torch.dtype, heads: int = 4, heads_kv: int = 2, dim: int = 24, dim_v: int = 19) -> list[Tensor]:
    rows, keys = (sum(pair[i] for pair in LENGTHS) for i in (0, 1))
    shapes = ((rows, heads, dim), (keys, heads_kv, dim), (keys, heads_kv, dim_v))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _packed_call(q: Tensor, k: Tensor, v: Tensor, lengths: Any = LENGTHS, **options: Any) -> tuple[Tensor, Tensor]:
    cu = [_cumulative([pair[i] for pair in lengths]) for i in (0, 1)]
    return fastattn.attention_varlen(q, k, v, *cu, return_lse=True, **options)  # type: ignore[return-value]


def _exactly(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return reference.attention(q, k, v, return_lse=True, **options)


def _plainly(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Ordinary PyTorch, where every row sees something: else it gives NaN."""
    seen = torch.isfinite(_exactly(q, k, v, **options)[1]).all() and k.shape[2] > 0
    return plain.attention(q, k, v, **options) if seen else _exactly(q, k, v, **options)


def _one_by_one(dense: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Every packed sequence through ``dense``, as the batch entry that it is of: dropout and slopes depend on that."""
    outs, lses = [], []
    begin_q = begin_k = 0
    for s, (rows, keys) in enumerate(LENGTHS):
        q_s = q[begin_q : begin_q + rows].transpose(0, 1)
        k_s, v_s = (x[begin_k : begin_k + keys].transpose(0, 1) for x in (k, v))
        batch = [x.expand(len(LENGTHS), *x.shape) for x in (q_s, k_s, v_s)]
        out, lse = dense(*batch, **options)
        outs.append(out[s].transpose(0, 1))
        lses.append(lse[s])
        begin_q, begin_k = begin_q + rows, begin_k + keys
    return torch.cat(outs), torch.cat(lses, 1)


def _with_gradients(
    function: Any, tensors: list[Tensor], options: dict[str, Any], upstream: list[Tensor]
) -> dict[str, Tensor]:
    """out, lse and the gradients of everything that has one, at the tensors' dtypes; lse's only where it is finite."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    extra = {
        name: x.clone().requires_grad_()
        for name, x in options.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    out, lse = function(*leaves, **(options | extra))
    seen = torch.isfinite(lse.detach())
    total = (out * upstream[0].to(out.dtype)).sum() + (lse[seen] * upstream[1].to(lse.dtype)[seen]).sum()
    named = dict(zip("qkv", leaves, strict=True)) | extra
    gradients = torch.autograd.grad(total, list(named.values()))
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{n}": g for n, g in zip(named, gradients, strict=True)}


def _compare(
    ours: Any, form: Any, tensors: list[Tensor], options: dict[str, Any], out: tuple[int, ...], lse: tuple[int, ...]
) -> None:
    """``ours`` against ``form(dense, ...)`` by float64, allowed what plain PyTorch errs in the dtype itself."""
    upstream = [torch.randn(out).to(tensors[0].dtype), torch.randn(lse)]
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    actual = _with_gradients(ours, tensors, options, upstream)
    peer = _with_gradients(partial(form, _plainly), tensors, options, upstream)
    exact = _with_gradients(partial(form, _exactly), [x.double() for x in tensors], double, upstream)
    for name, value in actual.items():
        assert_accurate(value, peer[name], exact[name], name, terms=300 * 24)


def _options(feature: str, sequences: int, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(FEATURES[feature])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.rand(sequences, heads).to(wide)
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads).to(wide)
    return options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_packed_sequences(implementation: str, feature: str, dtype: torch.dtype) -> None:
    tensors = _packed(dtype)
    options = _options(feature, len(LENGTHS), 4, dtype)
    total = tensors[0].shape[0]

    def ours(*inputs: Tensor, **kwargs: Any) -> Any:
        return _packed_call(*inputs, implementation=implementation, **kwargs)

    _compare(ours, _one_by_one, tensors, options, (total, 4, 19), (4, total))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_key_lengths_are_a_boolean_mask(implementation: str, rows: int, dtype: torch.dtype) -> None:
    """With every other feature at once, the additive mask and its gradient included."""
    lengths = torch.tensor([150, 0, 131, 1], dtype=torch.int32)
    tensors = [torch.randn(shape).to(dtype) for shape in ((4, 4, rows, 24), (4, 2, 150, 24), (4, 2, 150, 19))]
    options = {
        "attn_mask": torch.randn(1, 4, rows, 150).to(dtype),
        "window_size": (90, 10),
        "softcap": 3.0,
        **_options("alibi-sinks", 4, 4, dtype),
        "causal": False,
    }
    hidden = torch.arange(150) >= lengths[:, None, None, None]

    def ours(*inputs: Tensor, **kwargs: Any) -> Any:
        return fastattn.attention(
            *inputs, key_lengths=lengths, return_lse=True, implementation=implementation, **kwargs
        )

    def by_entry(dense: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        mask, slopes = kwargs.pop("attn_mask"), kwargs.pop("alibi_slopes")
        entries = []
        for b in range(4):
            own = {"attn_mask": mask.masked_fill(hidden[b], -math.inf), "alibi_slopes": slopes[b : b + 1]}
            entries.append(dense(q[b : b + 1], k[b : b + 1], v[b : b + 1], **own, **kwargs))
        return tuple(torch.cat(x) for x in zip(*entries, strict=True))

    _compare(ours, by_entry, tensors, options, (4, 4, rows, 19), (4, 4, rows))


@pytest.mark.parametrize("rows", [3, 40])
def test_padding_is_never_read_and_has_no_gradient(implementation: str, rows: int) -> None:
    lengths = torch.tensor([40, 200])
    inputs = [torch.randn(2, heads, n, 16) for heads, n in ((4, rows), (2, 200), (2, 200))]
    clean = fastattn.attention(*inputs, key_lengths=lengths, causal=True, implementation=implementation)
    for x in inputs[1:]:
        x[0, :, 40:] = math.nan
    leaves = [x.requires_grad_() for x in inputs]
    out = fastattn.attention(*leaves, key_lengths=lengths, causal=True, implementation=implementation)
    assert torch.equal(out, clean)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert all(g[0, :, 40:].abs().max() == 0 for g in gradients[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gives_the_bits_that_it_gives_alone(compiled: str, dtype: torch.dtype) -> None:
    """Packed with others of any length, on any number of threads: output, lse and gradients; and so does the dense call."""
    tensors = _packed(dtype)
    upstream = [torch.randn(tensors[0].shape[0], 4, 19).to(dtype), torch.randn(4, tensors[0].shape[0])]
    options = {"causal": True, "implementation": compiled}
    threads = torch.get_num_threads()
    try:
        whole = _with_gradients(_packed_call, tensors, options, upstream)
        torch.set_num_threads(5)
        again = _with_gradients(_packed_call, tensors, options, upstream)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(again[name], value) for name, value in whole.items())

    begin_q = begin_k = 0
    for rows, keys in LENGTHS:
        at_q, at_k = slice(begin_q, begin_q + rows), slice(begin_k, begin_k + keys)
        own = [tensors[0][at_q], tensors[1][at_k], tensors[2][at_k]]
        up = [upstream[0][at_q], upstream[1][:, at_q]]

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Any:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
            return out[0].transpose(0, 1), lse[0]

        def packed(*inputs: Tensor, lengths: Any = ((rows, keys),)) -> Any:
            return _packed_call(*inputs, lengths=lengths, **options)

        for function in (dense, packed):
            alone = _with_gradients(function, own, {}, up)
            expected = {
                "out": whole["out"][at_q], "lse": whole["lse"][:, at_q],
                "dq": whole["dq"][at_q], "dk": whole["dk"][at_k], "dv": whole["dv"][at_k],
            }  # fmt: skip
            assert all(torch.equal(alone[name], value) for name, value in expected.items()), (rows, keys)
        begin_q, begin_k = begin_q + rows, begin_k + keys


def test_rows_after_the_last_sequence(implementation: str) -> None:
    """Buffers longer than what is packed into them: zeros, lse = -inf, zero gradients, and NaN there stays there."""
    q, k, v = (torch.randn(50, 2, 8) for _ in range(3))
    q[30:], k[20:], v[20:] = math.nan, math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention_varlen(
        *leaves, _cumulative([10, 20]), _cumulative([15, 5]), return_lse=True, implementation=implementation
    )
    assert out[30:].abs().max() == 0 and (lse[:, 30:] == -math.inf).all() and torch.isfinite(out).all()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert gradients[0][30:].abs().max() == 0 and all(g[20:].abs().max() == 0 for g in gradients[1:])


def test_no_sequence_at_all(implementation: str) -> None:
    inputs = [torch.randn(0, 2, 8, requires_grad=True) for _ in range(3)]
    slopes = torch.rand(2, requires_grad=True)
    out = fastattn.attention_varlen(
        *inputs, _cumulative([]), _cumulative([]), alibi_slopes=slopes, implementation=implementation
    )
    assert out.shape == (0, 2, 8)
    assert torch.autograd.grad(out.sum(), slopes)[0].abs().max() == 0


def _caches(
    dtype: torch.dtype, lengths: Tensor, page_size: int, pages: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The same keys and values in contiguous caches and in shuffled pages, NaN in all that is not in use, and the page table."""
    batch, capacity, count = len(lengths), page_size * pages, 3 + len(lengths) * pages
    table = torch.randperm(count)[: batch * pages].view(batch, pages).int()
    whole = [torch.full((batch, 2, capacity, dim), math.nan).to(dtype) for dim in (24, 19)]
    paged = [torch.full((count, 2, page_size, dim), math.nan).to(dtype) for dim in (24, 19)]
    for b, length in enumerate(lengths.tolist()):
        for cache, page in zip(whole, paged, strict=True):
            cache[b, :, :length] = torch.randn(2, length, cache.shape[3]).to(dtype)
            for j in range(length):
                page[table[b, j // page_size], :, j % page_size] = cache[b, :, j]
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // page_size) :] = -7  # not looked at
    return whole, paged, table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "page_size"), [(1, 16), (1, 7), (7, 48), (33, 16)], ids=str)
def test_key_value_cache(implementation: str, rows: int, page_size: int, dtype: torch.dtype) -> None:
    """Against the dense reference on each sequence alone; pages give the bits of the contiguous cache."""
    lengths = torch.tensor([300, 33, 0, 129])
    whole, paged, table = _caches(dtype, lengths, page_size, -(-300 // page_size))
    q = torch.randn(4, 6, rows, 24).to(dtype)
    options = {"window_size": (200, -1), "sinks": torch.randn(6), "softcap": 4.0}
    if dtype == torch.float64:
        options["sinks"] = options["sinks"].double()
    ours = {"return_lse": True, "implementation": implementation, **options}
    actual = fastattn.attention_with_kv_cache(q, *whole, lengths, **ours)
    for b, length in enumerate(lengths.tolist()):
        own = [q[b : b + 1], *(x[b : b + 1, :, :length] for x in whole)]
        peer = reference.attention(*own, causal=True, return_lse=True, **options)
        double = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items()}
        exact = reference.attention(*(x.double() for x in own), causal=True, return_lse=True, **double)
        for name, a, p, e in zip(("out", "lse"), actual, peer, exact, strict=True):
            assert_accurate(a[b : b + 1], p, e, name, terms=300 * 24)
    for a, b in zip(
        fastattn.attention_with_kv_cache(q, *paged, lengths, block_table=table, **ours), actual, strict=True
    ):
        assert torch.equal(a, b)
    heads_inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in paged]
    for a, b in zip(
        fastattn.attention_with_kv_cache(q, *heads_inside, lengths, block_table=table, **ours), actual, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 20])
def test_keys_behind_the_window_are_never_read(implementation: str, rows: int) -> None:
    """Several parts of 256 keys lie wholly outside it."""
    lengths = torch.tensor([900, 613])
    whole, paged, table = _caches(torch.float32, lengths, 64, 15)
    q = torch.randn(2, 4, rows, 24)
    options = {"window_size": (99, -1), "return_lse": True, "implementation": implementation}
    expected = [x.clone() for x in fastattn.attention_with_kv_cache(q, *whole, lengths, **options)]
    for b, length in enumerate(lengths.tolist()):
        for cache, pages in zip(whole, paged, strict=True):
            cache[b, :, : length - rows - 99] = math.nan
            pages[table[b, : (length - rows - 99) // 64].long()] = math.nan
    for caches, more in ((whole, {}), (paged, {"block_table": table})):
        for a, e in zip(
            fastattn.attention_with_kv_cache(q, *caches, lengths, **more, **options), expected, strict=True
        ):
            assert torch.equal(a, e)


@pytest.mark.parametrize("paged", [False, True])
def test_new_keys_are_appended_in_place(implementation: str, paged: bool) -> None:
    lengths = torch.tensor([40, 5, 17])
    whole, pages, table = _caches(torch.float32, lengths, 8, 5)
    caches = pages if paged else whole
    q = torch.randn(3, 4, 5, 24)
    options = {"block_table": table if paged else None, "implementation": implementation}
    expected = fastattn.attention_with_kv_cache(q, *caches, lengths, **options)
    before = [x.clone() for x in caches]
    new = [torch.stack([x[b, :, n - 5 : n] for b, n in enumerate(lengths.tolist())]) for x in whole]
    for b, n in enumerate(lengths.tolist()):
        for x in caches:
            for j in range(n - 5, n):
                if paged:
                    x[table[b, j // 8], :, j % 8] = math.nan
                else:
                    x[b, :, j] = math.nan
    out = fastattn.attention_with_kv_cache(q, *caches, lengths, k=new[0], v=new[1], **options)
    assert torch.equal(out, expected)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(caches, before, strict=True))


def test_gradients_of_a_contiguous_cache_and_none_of_pages(compiled: str) -> None:
    lengths = torch.tensor([60, 33])
    whole, paged, table = _caches(torch.float32, lengths, 20, 3)
    q = torch.randn(2, 4, 11, 24, requires_grad=True)
    leaves = [x.requires_grad_() for x in whole]
    out = fastattn.attention_with_kv_cache(q, *leaves, lengths, implementation=compiled)
    gradients = torch.autograd.grad(out.square().sum(), (q, *leaves))
    expected = fastattn.attention_with_kv_cache(q, *leaves, lengths, implementation="reference")
    for a, e in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, *leaves)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=False)
    out = fastattn.attention_with_kv_cache(q, *paged, lengths, block_table=table, implementation=compiled)
    with pytest.raises(NotImplementedError, match="block_table: a paged cache has no gradients"):
        out.sum().backward()


def test_explain_says_why_not() -> None:
    q = torch.randn(4, 2, 8)
    cu = _cumulative([1, 3])
    text = str(fastattn.explain(fastattn.attention_varlen, q, q, q, cu, cu))
    assert "attention: " in text
    explanation = fastattn.explain(fastattn.attention, q[None], q[None], q[None], key_lengths=torch.tensor([1]))
    assert dict(explanation.rungs)["triton"] is not None


def _varlen(**change: Any) -> Any:
    cu = _cumulative([1, 3])
    arguments = {
        "q": torch.randn(4, 2, 8),
        "k": torch.randn(4, 2, 8),
        "v": torch.randn(4, 2, 8),
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
    }
    return fastattn.attention_varlen(**(arguments | change))


def _cache(**change: Any) -> Any:
    cache = torch.randn(2, 2, 6, 8)
    arguments = {
        "q": torch.randn(2, 2, 1, 8),
        "k_cache": cache,
        "v_cache": cache,
        "cache_lengths": torch.tensor([6, 1]),
    }
    return fastattn.attention_with_kv_cache(**(arguments | change))


def _lengths(key_lengths: Any) -> Any:
    q = torch.randn(2, 2, 3, 8)
    return fastattn.attention(q, q, q, key_lengths=key_lengths)


INT32 = torch.int32
BAD = [
    (_lengths, {"key_lengths": torch.tensor([1, 4])}, ValueError, "key_lengths: got [1, 4], allowed are 0 to 3"),
    (_lengths, {"key_lengths": torch.tensor([1, -1])}, ValueError, "key_lengths: got [1, -1]"),
    (_lengths, {"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths: got dtype torch.float32"),
    (_lengths, {"key_lengths": torch.tensor([1])}, ValueError, "key_lengths: expected shape (2,)"),
    (_lengths, {"key_lengths": [1, 2]}, TypeError, "key_lengths: expected a Tensor"),
    (_varlen, {"q": torch.randn(1, 4, 2, 8)}, ValueError, "q: expected 3 dimensions"),
    (_varlen, {"cu_seqlens_q": torch.tensor([0, 1, 4])}, TypeError, "cu_seqlens_q: got dtype torch.int64"),
    (_varlen, {"cu_seqlens_k": torch.tensor([0, 3, 2], dtype=INT32)}, ValueError, "cu_seqlens_k: expected 0 = first <="),
    (_varlen, {"cu_seqlens_k": torch.tensor([1, 2, 4], dtype=INT32)}, ValueError, "cu_seqlens_k: expected 0 = first <="),
    (_varlen, {"cu_seqlens_q": torch.tensor([0, 2, 5], dtype=INT32)}, ValueError, "cu_seqlens_q: expected 0 = first <="),
    (_varlen, {"cu_seqlens_k": torch.tensor([0, 4], dtype=INT32)}, ValueError, "cu_seqlens_k: 2 entries"),
    (_varlen, {"cu_seqlens_q": torch.tensor([], dtype=INT32)}, ValueError, "cu_seqlens_q: expected one entry more"),
    (_varlen, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q: got 2, but a sequence has 3"),
    (_varlen, {"k": torch.randn(4, 3, 8)}, ValueError, "k: 3 heads do not divide"),
    (_varlen, {"alibi_slopes": torch.rand(3, 2)}, ValueError, "alibi_slopes: expected shape (2,) or (2, 2)"),
    (_cache, {"cache_lengths": torch.tensor([7, 1])}, ValueError, "cache_lengths: got [7, 1], allowed are 0 to 6"),
    (_cache, {"k_cache": torch.randn(3, 2, 6, 8)}, ValueError, "k_cache: 3 batch entries"),
    (_cache, {"v_cache": torch.randn(2, 2, 5, 8)}, ValueError, "v_cache: expected shape"),
    (_cache, {"block_table": torch.tensor([[0], [2]], dtype=INT32)}, ValueError, "block_table: row 1 is [2], allowed are 0 to 1"),
    (_cache, {"block_table": torch.tensor([[0], [1]])}, TypeError, "block_table: got dtype torch.int64"),
    (_cache, {"block_table": torch.tensor([[0]], dtype=INT32)}, ValueError, "block_table: 1 rows for 2 sequences"),
    (_cache, {"k": torch.randn(2, 2, 1, 8)}, TypeError, "v: expected a Tensor"),
    (_cache, {"k": torch.randn(2, 2, 2, 8), "v": torch.randn(2, 2, 2, 8)}, ValueError, "k: expected shape (2, 2, 1, 8)"),
    (_cache, {"cache_lengths": torch.tensor([0, 1]), "k": torch.randn(2, 2, 1, 8), "v": torch.randn(2, 2, 1, 8)}, ValueError,
     "cache_lengths: got [0, 1], but k and v hold 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(call: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call(**change)
    assert message in str(caught.value)


BAD_SEQUENCES = [
    ([[0, 4, 0, 4, 0], [0, 4, 0, 5, 0]], "keys outside k"),
    ([[0, 4, 0, 4, 0], [1, 4, 0, 4, 0]], "rows outside q"),
    ([[0, 4, 0, 4, 0], [-1, 4, 0, 4, 0]], "rows outside q"),
    ([[0, 4, 0, 4, 0], [0, 2**62, 2**62, 4, 0]], "rows outside q"),
    ([[0, 4, 0, 4, 0]], "k is batched by sequence or packed"),
]


@pytest.mark.skipif(not has_cpu, reason="needs the C++ core")
@pytest.mark.parametrize(("rows", "message"), BAD_SEQUENCES, ids=[message for _, message in BAD_SEQUENCES])
def test_the_operator_reads_nothing_outside_its_tensors(rows: list[list[int]], message: str) -> None:
    """A captured graph cannot look at values: the operator itself must."""
    q, k = torch.randn(1 if len(rows) == 1 else 2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    options = (0.3, -1, -1, 0, 0.0, 0.0, None)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastattn.attention_forward(q, k, k, None, None, None, *options, torch.tensor(rows))


@pytest.mark.skipif(not has_cpu, reason="needs the C++ core")
def test_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
    cu = _cumulative([5, 0, 7])

    def function(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, lengths: Tensor) -> Tensor:
        out = fastattn.attention_varlen(q, k, v, cu, cu, causal=True, implementation="cpu")
        q, k, v = (x.view(2, 6, 2, 8).transpose(1, 2) for x in (q, k, v))
        return out.sum(1).sum() + fastattn.attention(q, k, v, key_lengths=lengths, implementation="cpu").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in (torch.tensor([6, 2]), torch.tensor([0, 5])):
        expected, actual = (f(q, k, v, cu, lengths) for f in (function, compiled))
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(x, (q, k, v)) for x in (actual, expected)]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.skipif(not has_cpu, reason="needs the C++ core")
def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 7)
    sequences = torch.tensor([[0, 3, 0, 5, 2], [3, 6, 5, 7, 1]])
    options = (0.3, -1, 0, 0, 2.0, 0.0, None)
    forward, backward = torch.ops.fastattn.attention_forward.default, torch.ops.fastattn.attention_backward.default
    out, lse, saved = forward(q, k, v, None, None, None, *options, sequences)
    torch.library.opcheck(forward, (q, k, v, None, None, None, *options, sequences))
    paged = torch.randn(4, 2, 8, 8)
    table = torch.tensor([[3, 1], [0, 2]], dtype=INT32)
    torch.library.opcheck(
        forward, (q, paged, paged, None, None, None, *options, torch.tensor([[0, 3, 0, 5, 2], [3, 6, 0, 16, 9]]), table)
    )
    grads = (torch.randn_like(out), torch.randn_like(lse))
    arguments = (*grads, q, k, v, out, lse, None, None, None, *options, False, False, False, sequences, saved)
    torch.library.opcheck(backward, arguments)
