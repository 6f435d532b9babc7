"""The operators' ``sequences`` (``SCHEMAS`` in ``_library.py``) from what callers have: lengths, cumulative lengths, a cache.

The table lies where q does. Values that lie on the CPU are checked here; while a graph is being captured they cannot be, and the
C++ operator's own checks (RuntimeError) keep a wrong one from reading outside its tensors. Values that lie on a GPU are not looked
at: the host would wait for all that was queued before. There they are the caller's word, and wrong ones are undefined behaviour.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops import _validate

_INTEGERS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """What a call says about its sequences: the operators' ``sequences`` and ``block_table``, and keys and values that are to
    take their place at the end of each first."""

    table: Tensor | None = None
    block_table: Tensor | None = None
    fresh: tuple[Tensor, Tensor] | None = None


#: A batch entry each, all of one length.
DENSE = Sequences()


def padded(key_lengths: Tensor, q: Tensor, keys: int) -> Tensor:
    """All rows of every batch entry of q (B, H, Nq, D), its first ``key_lengths[b]`` keys, the alignment of all ``keys``."""
    return _table(_lengths("key_lengths", key_lengths, q, keys), q, 0, keys - q.shape[2])


def cached(cache_lengths: Tensor, q: Tensor, capacity: int) -> Tensor:
    """All rows of every batch entry of q (B, H, Nq, D) at the end of the ``cache_lengths[b]`` keys in use."""
    return _table(_lengths("cache_lengths", cache_lengths, q, capacity), q, 1, -q.shape[2])


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Sequence s: rows of q and keys of k (total, heads, D) from the cumulative lengths' entry s to entry s + 1, the last row at
    the last key."""
    first_row = _cumulative("cu_seqlens_q", cu_seqlens_q, q)
    first_key = _cumulative("cu_seqlens_k", cu_seqlens_k, k)
    if first_row.shape != first_key.shape:
        raise ValueError(f"cu_seqlens_k: {first_key.shape[0]} entries, but cu_seqlens_q has {first_row.shape[0]}")
    if first_row.device != first_key.device:
        first_row, first_key = first_row.to(q.device), first_key.to(q.device)
    rows, keys = first_row.diff(), first_key.diff()
    return torch.stack((first_row[:-1], rows, first_key[:-1], keys, keys - rows), dim=1).to(q.device)


def pages(block_table: Tensor, q: Tensor) -> Tensor:
    """The table as the operator takes it, where q (B, H, Nq, D) lies."""
    _validate.tensor("block_table", block_table, 2)
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: got dtype {block_table.dtype}, allowed is int32")
    if block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table: {block_table.shape[0]} rows for {q.shape[0]} sequences")
    return block_table.to(q.device).contiguous()


def check_pages(block_table: Tensor, sequences: Tensor, page_count: int, page_size: int) -> None:
    """Every entry that a sequence's length reaches names a page."""
    if not (readable(block_table) and readable(sequences)):
        return
    for s, (table, keys) in enumerate(zip(block_table.tolist(), sequences[:, 3].tolist(), strict=True)):
        used = table[: -(-keys // page_size)]
        if used and not 0 <= min(used) <= max(used) < page_count:
            raise ValueError(f"block_table: row {s} is {used}, allowed are 0 to {page_count - 1}")


def append(k_cache: Tensor, v_cache: Tensor, own: Sequences) -> None:
    """Write ``own.fresh`` at the end of each sequence."""
    assert own.table is not None and own.fresh is not None
    rows, device = own.fresh[0].shape[2], k_cache.device
    position = own.table[:, 3:4] - rows + torch.arange(rows, device=device)
    if own.block_table is None:
        entry = torch.arange(position.shape[0], device=device).unsqueeze(1)
    else:
        page_size = k_cache.shape[2]
        entry, position = own.block_table.long().gather(1, position // page_size), position % page_size
    for cache, new in zip((k_cache, v_cache), own.fresh, strict=True):
        cache[entry, :, position] = new.transpose(1, 2)


def readable(x: Tensor) -> bool:
    """Whether looking at x's values costs nothing: on the CPU, and not while a graph is being captured."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _table(lengths: Tensor, q: Tensor, slope: int, offset: int) -> Tensor:
    """(0, rows, 0, n, slope * n + offset) for each length n."""
    rows = q.shape[2]
    if readable(lengths):  # a third of the time of the tensor arithmetic, which a decoding step feels
        values = [x for n in lengths.tolist() for x in (0, rows, 0, n, slope * n + offset)]
        return torch.tensor(values, dtype=torch.int64).view(-1, 5).to(q.device)
    if lengths.device.type == "cpu":
        table = lengths.unsqueeze(1) * torch.tensor([0, 0, 0, 1, slope]) + torch.tensor([0, rows, 0, 0, offset])
        return table.to(q.device)
    # No constant that would have to come from the host: its copy would wait for the device.
    zero = torch.zeros_like(lengths)
    return torch.stack((zero, zero + rows, zero, lengths, lengths * slope + offset), dim=1)


def _lengths(name: str, x: Tensor, q: Tensor, high: int) -> Tensor:
    if _validate.tensor(name, x).dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {x.dtype}, allowed are int32, int64")
    _validate.shape(name, x, (q.shape[0],))
    x = _near(x, q)
    if readable(x) and any(not 0 <= value <= high for value in x.tolist()):
        raise ValueError(f"{name}: got {x.tolist()}, allowed are 0 to {high}")
    return x.to(torch.int64)


def _cumulative(name: str, x: Tensor, of: Tensor) -> Tensor:
    if _validate.tensor(name, x, 1).dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {x.dtype}, allowed is int32")
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected one entry more than sequences, got shape {tuple(x.shape)}")
    x = _near(x, of)
    if readable(x):
        values, total = x.tolist(), of.shape[0]
        if values[0] != 0 or any(a > b for a, b in pairwise(values)) or values[-1] > total:
            raise ValueError(f"{name}: expected 0 = first <= second <= ... <= {total}, got {values}")
    return x.to(torch.int64)


def _near(x: Tensor, of: Tensor) -> Tensor:
    """x where it is, or on the CPU where the tensors that it is about are there."""
    return x.cpu() if of.device.type == "cpu" else x
