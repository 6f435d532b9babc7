"""Softmax attention over sequences of unequal length: packed one after the other, or in a key-value cache."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops import _sequences, _validate
from fastattn.ops.attention import _attend, _check_qkv, _options

__all__ = ["attention_varlen", "attention_with_kv_cache"]


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of S sequences packed without padding: sequence s's rows see sequence s's keys only.

    Every sequence is a call of :func:`attention` of its own, bottom-right aligned by its own lengths, and gives the bits that
    it gives alone. Layout and ``cu_seqlens`` are those of ``flash_attn_varlen_func`` (Dao et al., flash-attention).

    Args:
        q: (total_q, H, D). k: (total_k, Hk, D). v: (total_k, Hk, Dv). Dtypes, heads and strides as in :func:`attention`.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,), from 0, non-decreasing, at most total_q and total_k: sequence s has the rows
            (keys) from entry s to entry s + 1. A sequence may have none. On the GPU they are neither read nor checked by the host.
        max_seqlen_q, max_seqlen_k: the longest sequence may be no longer; not needed.
        causal, window_size, softcap, sinks, softmax_scale, dropout_p, rng_state, implementation: as in :func:`attention`. Dropout
            of sequence s is that of batch entry s.
        alibi_slopes: (H,) or (S, H).

    Returns:
        out (total_q, H, Dv); with ``return_lse`` also lse (H, total_q). Rows after the last sequence: zeros and lse = -inf.

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    q, k, v = _validate.autocast(getattr(getattr(q, "device", None), "type", "cpu"), q, k, v)  # type: ignore[assignment]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _validate.tensor(name, x, 3)
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    _check_qkv(q4, k4, v4)
    sequences = _sequences.packed(cu_seqlens_q, cu_seqlens_k, q, k)
    _check_longest("max_seqlen_q", max_seqlen_q, sequences[:, 1])
    _check_longest("max_seqlen_k", max_seqlen_k, sequences[:, 3])
    options = _options(q, softmax_scale, causal, window_size, 0, softcap, dropout_p)
    own = _sequences.Sequences(sequences)
    out, lse = _attend(q4, k4, v4, None, alibi_slopes, sinks, rng_state, options, implementation, own)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest Nq tokens of B sequences to their key-value caches, read in place.

    Query i of sequence b stands at position cache_lengths[b] - Nq + i: with ``causal`` it sees the keys up to there, itself
    included. What lies in the cache beyond a sequence's length is never read.

    Args:
        q: (B, H, Nq, D).
        k_cache, v_cache: (B, Hk, capacity, D) and (B, Hk, capacity, Dv), strides free but for the last. With ``block_table``, pages
            (P, Hk, page_size, D) and (P, Hk, page_size, Dv); for pages stored (P, page_size, Hk, D) pass ``pages.transpose(1, 2)``.
        cache_lengths: (B,) integers: tokens in the cache of each sequence, those of this call included. On the GPU neither they nor
            ``block_table`` are read or checked by the host.
        k, v: (B, Hk, Nq, D) and (B, Hk, Nq, Dv), the keys and values of this call's tokens: written into the cache first, in place,
            from position cache_lengths[b] - Nq on. None: they are there already.
        block_table: int32 (B, pages of each): key j of sequence b is row j % page_size of page block_table[b, j // page_size]
            (Kwon et al., "PagedAttention", 2023). Without gradients. Entries beyond a sequence's length are not looked at.
        causal, window_size, softcap, alibi_slopes, sinks, softmax_scale, return_lse, implementation: as in :func:`attention`.

    Returns:
        As :func:`attention`: out (B, H, Nq, Dv), with ``return_lse`` also lse (B, H, Nq).

    Raises:
        ValueError, TypeError: naming the argument; NotImplementedError: the named implementation does not take the call.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _validate.tensor(name, x, 4)
    batch, _, rows, _ = q.shape
    capacity = k_cache.shape[2]
    if block_table is not None:
        block_table = _sequences.pages(block_table, q)
        capacity *= block_table.shape[1]
    elif k_cache.shape[0] != batch:
        raise ValueError(f"k_cache: {k_cache.shape[0]} batch entries, but q has {batch}")
    # Pages have no batch: what q is compared with is a view that has one.
    _check_qkv(q[:1], k_cache[:1], v_cache[:1], ("q", "k_cache", "v_cache"))
    _validate.shape("v_cache", v_cache, (*k_cache.shape[:3], v_cache.shape[3]))
    sequences = _sequences.cached(cache_lengths, q, capacity)
    if block_table is not None:
        _sequences.check_pages(block_table, sequences, k_cache.shape[0], k_cache.shape[2])
    own = _sequences.Sequences(sequences, block_table)
    if k is not None or v is not None:
        own = own._replace(fresh=_check_fresh(q, k_cache, v_cache, k, v, sequences))
    options = _options(q, softmax_scale, causal, window_size, 0, softcap, 0.0)
    out, lse = _attend(q, k_cache, v_cache, None, alibi_slopes, sinks, None, options, implementation, own)
    return (out, lse) if return_lse else out


def _check_fresh(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, sequences: Tensor
) -> tuple[Tensor, Tensor]:
    batch, _, rows, _ = q.shape
    lengths = sequences[:, 3]
    if _sequences.readable(lengths) and lengths.numel() and int(lengths.min()) < rows:
        raise ValueError(f"cache_lengths: got {lengths.tolist()}, but k and v hold {rows} tokens of each")
    found = []
    for name, given, cache in (("k", k, k_cache), ("v", v, v_cache)):
        new = _validate.tensor(name, given)
        _validate.like(name, new, "q", q)
        _validate.shape(name, new, (batch, cache.shape[1], rows, cache.shape[3]))
        found.append(new)
    return found[0], found[1]


def _check_longest(name: str, limit: int | None, lengths: Tensor) -> None:
    if limit is None or not _sequences.readable(lengths) or not lengths.numel():
        return
    if int(lengths.max()) > limit:
        raise ValueError(f"{name}: got {limit}, but a sequence has {int(lengths.max())}")
