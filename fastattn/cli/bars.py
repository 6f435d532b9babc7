"""The bars of attention on a CPU: how many times torch's speed, which share of the machine, at most torch's error.

The ratios hold on 2 threads everywhere. A share of the matrix unit is a bar where that unit is AMX; elsewhere it is
shown and not judged. Errors are the relative Frobenius norm against float64, ours at most torch's own; what one rounding
more or less makes of two equally accurate results is ERROR_NOISE. The largest error of a single element is judged by the
rule of ``check``, before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastattn.cli import check, limited
from fastattn.cli.cases import Case
from fastattn.cli.table import print_table

if TYPE_CHECKING:
    from fastattn.cli.bench import Row

DTYPES = ("bfloat16", "float32", "float16")
DIRECTIONS = ("forward", "backward")
THREADS = 2
#: Seconds per row, all contenders together: long enough for several calls of each but torch's slowest.
SECONDS = 3.0
ERROR_NOISE = 1.05
#: A bar for each of DIRECTIONS, or for the forward pass alone.
Bars = tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """One line of the table: ratio bars per dtype; roofline bars in percent; the instruction set both are limited to, or ""."""

    case: Case
    bfloat16: Bars
    float32: Bars
    float16: Bars
    roofline: Mapping[str, Bars] = field(default_factory=dict)
    isa: str = ""

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS[: len(self.bfloat16)]

    def bar(self, dtype: str, direction: str) -> dict[str, Any]:
        """The fields ``bar`` and ``roofline_bar`` of a row."""
        index = DIRECTIONS.index(direction)
        ratios: Bars = getattr(self, dtype)
        shares = self.roofline.get(dtype)
        return {"bar": ratios[index], "roofline_bar": shares[index] if shares else None}

    @property
    def text(self) -> str:
        return name(self.case.shape, self.case.label, limited.text(self.isa))


def _call(*shape: int, **options: object) -> Case:
    return Case("attention", shape, options)


_BERT = (1, 12, 1024, 64)
#: Of the memory's read bandwidth: one read of K and V is what a decoding step must do.
_DECODE = dict.fromkeys(DTYPES, (85.0,))
LINES = (
    Line(_call(*_BERT), (3.2, 4.5), (2.3, 2.3), (4.5, 5), {"bfloat16": (32, 25), "float32": (125, 125)}),
    Line(_call(*_BERT, causal=True), (4, 5), (3, 3), (5, 6)),
    Line(_call(*_BERT, mask="padding"), (4, 5), (3, 3), (5, 6)),
    Line(_call(*_BERT, mask="additive", mask_grad=False), (3, 4), (2, 2), (4, 4)),
    Line(_call(*_BERT, mask="additive"), (3, 4), (2, 2), (4, 4)),
    Line(_call(*_BERT, dropout_p=0.1), (40, 8), (15, 3), (40, 8)),
    Line(_call(1, 8, 2048, 128), (2.8, 4), (2.3, 2.3), (4.5, 5), {"bfloat16": (45, 33), "float32": (125, 125)}),
    Line(_call(16, 12, 128, 64), (3, 25), (2.5, 3), (5, 20)),
    Line(_call(16, 12, 128, 64, causal=True), (5, 40), (4, 5), (8, 40)),
    Line(_call(8, 12, 384, 64), (3,), (2.5,), (4,)),
    Line(_call(8, 12, 384, 64, causal=True), (5,), (4,), (7,)),
    Line(_call(1, 32, 4096, 128, causal=True), (2.8,), (2.2,), (4.5,)),
    Line(_call(1, 32, 1, 8192, 128, nheads_kv=8), (2.9,), (2.5,), (6,), _DECODE),
    Line(_call(8, 32, 1, 8192, 128, nheads_kv=8), (3,), (2.5,), (6,), _DECODE),
    Line(_call(1, 32, 1, 8192, 128), (1.2,), (1.1,), (1.6,), _DECODE),
    Line(_call(*_BERT), (1.2, 2.5), (1.2, 1.25), (1.2, 15), isa="avx512"),
    Line(_call(*_BERT), (1.0, 6), (1.05, 1.1), (1.0, 12), isa="avx2"),
)


def name(shape: Sequence[int], label: str, limits: str) -> str:
    """What a line is called, and found by with ``--only``: ``1x12x1024x64 causal``, ``1x12x1024x64 FASTATTN_ISA=avx2``."""
    return " ".join(filter(None, ["x".join(map(str, shape)), label, limits.partition(" ")[0]]))


def chosen(isa: str, only: str, dtypes: Sequence[str]) -> Iterator[tuple[Line, str]]:
    """(line, dtype) of one process, limited to ``isa`` or not (""), whose name has ``only`` in it."""
    for line in LINES:
        if line.isa == isa and only in line.text:
            yield from ((line, dtype) for dtype in DTYPES if dtype in dtypes)


def judged(row: Row) -> bool:
    """Whether the row's roofline bar holds here: those of the matrix unit need AMX, those of the memory nothing."""
    return row.roofline_bar is not None and (row.unit == "GB/s" or row.isa == "amx")


def error_ratio(row: Row) -> tuple[str, float]:
    """(result, our error over torch's) of the row's worst result; a result that torch gets exactly right counts as 1 if we do."""
    worst = ("", 0.0)
    for result, error in (row.errors or {}).items():
        mine, theirs = error["relative"], error["peer_relative"]
        ratio = mine / theirs if theirs else 1.0 if mine == 0 else math.inf
        if not ratio <= worst[1]:  # a NaN is the worst
            worst = (result, ratio)
    return worst


def missed(row: Row) -> list[str]:
    """What the row fails, in words; nothing for a row without a bar."""
    if row.verdict != check.OK:
        return [f"{row.verdict}: {row.note}"]
    if row.bar is None or row.ratio is None:
        return []
    found = []
    if row.ratio < row.bar:
        found.append(f"ratio {row.ratio:.2f} < {row.bar:g}")
    if judged(row) and (row.roofline_percent or 0) < (row.roofline_bar or 0):
        found.append(f"{row.roofline_percent:.0f}% of the roof < {row.roofline_bar:g}%")
    result, ratio = error_ratio(row)
    if not ratio <= ERROR_NOISE:
        found.append(f"error of {result} {ratio:.2f} x torch's")
    return found


def share(row: Row) -> str:
    """The roofline's cell: ``52% ≥ 45%``, ``13% (needs AMX: 45%)`` where the bar is not for this machine, ``52%`` without one."""
    percent = "" if row.roofline_percent is None else f"{row.roofline_percent:.0f}%"
    if row.roofline_bar is None:
        return percent
    if not judged(row):
        return f"{percent} (needs AMX: {row.roofline_bar:g}%)"
    return f"{percent} {'≥' if (row.roofline_percent or 0) >= row.roofline_bar else '<'} {row.roofline_bar:g}%"


def cell(row: Row) -> str:
    """The ratio beside its bar: ``3.41 ≥ 3.2``, ``2.91 < 4.5``; the verdict where there is no figure."""
    if row.verdict != check.OK or row.ratio is None:
        return row.verdict
    if row.bar is None:
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} {'≥' if row.ratio >= row.bar else '<'} {row.bar:g}"


def render(rows: Sequence[Row]) -> None:
    """Print the table: a line per call, our ratio to torch against its bar per dtype and direction; then what was missed."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault(name(row.shape, row.case, row.limits), {})[row.dtype, row.direction] = cell(row)
    columns = [(dtype, direction) for dtype in DTYPES for direction in DIRECTIONS]
    columns = [column for column in columns if any(column in line for line in cells.values())]
    lines = [(text, *(line.get(column, "") for column in columns)) for text, line in cells.items()]
    styles = ["red" if any("<" in cell or cell == check.FAILED for cell in line) else "green" for line in lines]
    heads = [f"{dtype} {direction}" for dtype, direction in columns]
    title = "their time / fastattn's, and its bar"
    print_table(("case (B, H, N, D)", *heads), lines, styles=styles, title=title)
    for limits in dict.fromkeys(row.limits for row in rows if row.limits):
        print(f"{limits.partition(' ')[0]}: a process with {limits}")
    for row in rows:
        for reason in missed(row):
            text = name(row.shape, row.case, row.limits)
            print(f"missed: {text} {row.dtype} {row.direction}: {reason}")
    unjudged = sum(row.roofline_bar is not None and not judged(row) for row in rows)
    if unjudged:
        print(f"needs AMX: {unjudged} bars on the share of the matrix unit's peak, not judged on this machine")
