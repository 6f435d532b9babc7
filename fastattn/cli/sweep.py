"""Attention over many sizes on a CPU, to find where torch is faster: head_dim 32 to 256, N 1 to 8192, B·H 1 to 512.

Not the whole product of the sizes: every N meets every B·H, every number of queries every number of keys, and head_dim
and causality change from one to the next. What would take too long is left out: MAX_FLOP and MAX_PAIRS bound a call and
its check, MAX_FLOAT16_BACKWARD the pass in which torch runs at a few GFLOP/s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastattn.cli import bars
from fastattn.cli.cases import Case

if TYPE_CHECKING:
    from fastattn.cli.rows import Row

HEAD_DIMS = (64, 128, 32, 96, 256, 80, 192, 40, 160)
LENGTHS = (1, 2, 5, 16, 33, 64, 127, 128, 257, 384, 512, 1000, 1024, 2048, 4096, 8192)
#: (batch, heads): B·H from 1 to 512.
BATCHES = ((1, 1), (1, 3), (1, 12), (4, 8), (8, 16), (32, 16))
#: Few queries: decoding, speculative decoding.
QUERIES = (1, 2, 4, 7, 8)
KEYS = (63, 1024, 8192)
#: Floating-point operations of one forward pass: 0.1 s at 200 GFLOP/s.
MAX_FLOP = 2e10
#: Of scores, which the check holds several times over in float64: 0.5 GB each.
MAX_PAIRS = 8192**2
MAX_FLOAT16_BACKWARD = 5e9
#: Seconds per row, all contenders together; a row below 1 is measured again with more, and that one counts.
SECONDS, AGAIN_SECONDS = 0.1, 2.0
#: How many of the worst rows are shown.
SHOWN = 25


def flop(case: Case) -> int:
    """Of the forward pass, masked or not."""
    batch, heads, rows, keys, dim = case.attention_shape
    return 4 * batch * heads * rows * keys * dim


def calls() -> Iterator[Case]:
    """Every call of the sweep."""
    sizes = [(*batch, length, length) for length, batch in itertools.product(LENGTHS, BATCHES)]
    few = [(*batch, rows, keys) for rows, keys, batch in itertools.product(QUERIES, KEYS, BATCHES[::2])]
    for index, size in enumerate(sizes + few):
        options = {"causal": True} if index % 2 and size[2] > 1 else {}
        dim = HEAD_DIMS[index % len(HEAD_DIMS)]
        shape = (*size[:2], *(size[2:] if size[2] != size[3] else size[2:3]), dim)
        case = Case("attention", shape, options)
        pairs = flop(case) // (4 * dim)
        if pairs <= MAX_PAIRS and flop(case) <= MAX_FLOP:
            yield case


def directions(case: Case, dtype: str) -> tuple[str, ...]:
    """Forward and, where torch needs no minute for it and the gradients are not all zero (one key), backward.

    The rule of ``check`` allows no error at all in a gradient that is exactly zero.
    """
    slow = dtype == "float16" and 2.5 * flop(case) > MAX_FLOAT16_BACKWARD
    return bars.APART[:1] if slow or case.attention_shape[3] == 1 else bars.APART


def worst(rows: Sequence[Row]) -> list[Row]:
    """The SHOWN rows with the lowest ratio, and all below 1; those without a figure first."""
    ordered = sorted(rows, key=lambda row: row.ratio or 0.0)
    slower = sum((row.ratio or 0.0) < 1 for row in ordered)
    return ordered[: max(SHOWN, slower)]


def summary(rows: Sequence[Row]) -> str:
    """How many rows there are, the worst ratio and how many are below 1, per dtype and direction."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault((row.dtype, row.direction), []).append(row.ratio)
    return "\n".join(
        f"{dtype} {direction}: {len(ratios)} rows, worst ratio {min(ratios):.2f}, {sum(r < 1 for r in ratios)} below 1"
        for (dtype, direction), ratios in groups.items()
    )
