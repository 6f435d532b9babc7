"""The operators' ``sequences`` (``SCHEMAS`` in ``_library.py``) from what callers have: lengths, cumulative lengths, a cache.

Values are checked here where they can be read; while a graph is being captured they cannot, and the C++ operator's own checks
(RuntimeError) keep a wrong one from reading outside its tensors.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn.ops import _validate

_INTEGERS = (torch.int32, torch.int64)


def padded(key_lengths: Tensor, batch: int, rows: int, keys: int) -> Tensor:
    """All rows of every batch entry, its first ``key_lengths[b]`` keys, the alignment of all ``keys``."""
    return _table(_lengths("key_lengths", key_lengths, batch, keys), rows, 0, keys - rows)


def cached(cache_lengths: Tensor, batch: int, rows: int, capacity: int) -> Tensor:
    """All rows of every batch entry at the end of the ``cache_lengths[b]`` keys in use."""
    return _table(_lengths("cache_lengths", cache_lengths, batch, capacity), rows, 1, -rows)


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int) -> Tensor:
    """Sequence s: rows and keys from the cumulative lengths' entry s to entry s + 1, the last row at the last key."""
    q = _cumulative("cu_seqlens_q", cu_seqlens_q, total_q)
    k = _cumulative("cu_seqlens_k", cu_seqlens_k, total_k)
    if q.shape != k.shape:
        raise ValueError(f"cu_seqlens_k: {k.shape[0]} entries, but cu_seqlens_q has {q.shape[0]}")
    rows, keys = q.diff(), k.diff()
    return torch.stack((q[:-1], rows, k[:-1], keys, keys - rows), dim=1)


def pages(block_table: Tensor, batch: int) -> Tensor:
    """The table as the operator takes it."""
    _validate.tensor("block_table", block_table, 2)
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: got dtype {block_table.dtype}, allowed is int32")
    if block_table.shape[0] != batch:
        raise ValueError(f"block_table: {block_table.shape[0]} rows for {batch} sequences")
    return block_table.cpu().contiguous()


def check_pages(block_table: Tensor, sequences: Tensor, page_count: int, page_size: int) -> None:
    """Every entry that a sequence's length reaches names a page."""
    if not _readable():
        return
    for s, (table, keys) in enumerate(zip(block_table.tolist(), sequences[:, 3].tolist(), strict=True)):
        used = table[: -(-keys // page_size)]
        if used and not 0 <= min(used) <= max(used) < page_count:
            raise ValueError(f"block_table: row {s} is {used}, allowed are 0 to {page_count - 1}")


def _readable() -> bool:
    return not torch.compiler.is_compiling()


def _table(lengths: Tensor, rows: int, slope: int, offset: int) -> Tensor:
    """(0, rows, 0, n, slope * n + offset) for each length n."""
    if _readable():  # a third of the time of the tensor arithmetic, which a decoding step feels
        values = [x for n in lengths.tolist() for x in (0, rows, 0, n, slope * n + offset)]
        return torch.tensor(values, dtype=torch.int64).view(-1, 5)
    return lengths.unsqueeze(1) * torch.tensor([0, 0, 0, 1, slope]) + torch.tensor([0, rows, 0, 0, offset])


def _lengths(name: str, x: Tensor, batch: int, high: int) -> Tensor:
    if _validate.tensor(name, x).dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {x.dtype}, allowed are int32, int64")
    _validate.shape(name, x, (batch,))
    x = x.cpu()
    if _readable() and any(not 0 <= value <= high for value in x.tolist()):
        raise ValueError(f"{name}: got {x.tolist()}, allowed are 0 to {high}")
    return x.to(torch.int64)


def _cumulative(name: str, x: Tensor, total: int) -> Tensor:
    if _validate.tensor(name, x, 1).dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {x.dtype}, allowed is int32")
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected one entry more than sequences, got shape {tuple(x.shape)}")
    x = x.cpu()
    if _readable():
        values = x.tolist()
        if values[0] != 0 or any(a > b for a, b in pairwise(values)) or values[-1] > total:
            raise ValueError(f"{name}: expected 0 = first <= second <= ... <= {total}, got {values}")
    return x.to(torch.int64)
