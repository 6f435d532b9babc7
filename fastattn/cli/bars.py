"""The bars on a CPU: how many times torch's speed, which share of the machine, at most torch's error and a part of its memory.

The ratios hold on 2 threads everywhere, against the fastest of torch's ways (eager, torch.compile; for attention SDPA, for the
language model transformers). A share of the matrix unit is a bar where that unit is AMX; elsewhere it is shown and not judged.
Errors are the relative Frobenius norm against float64, ours at most torch's own; what one rounding more or less makes of two
equally accurate results is ERROR_NOISE. The largest error of a single element is judged by the rule of ``check``, before
anything is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastattn.cli import check, limited
from fastattn.cli.cases import Case
from fastattn.cli.peers import peer_names
from fastattn.cli.table import print_table

if TYPE_CHECKING:
    from fastattn.cli.rows import Row

DTYPES = ("bfloat16", "float32", "float16")
DIRECTIONS = ("forward", "backward", "forward+backward")
THREADS = 2
#: Seconds per row, all contenders together: long enough for several calls of each but torch's slowest.
SECONDS = 3.0
ERROR_NOISE = 1.05
#: A bar for each direction of a line, None where there is none.
Bars = tuple[float | None, ...]
APART = ("forward", "backward")
TOGETHER = ("forward", "forward+backward")


@dataclass(frozen=True)
class Line:
    """One line of the table, with a bar for each of ``directions`` or for the first alone.

    ``bfloat16``, ``float32`` and ``float16`` are bars of the ratio; ``roofline`` has those of the share in percent;
    ``memory`` is the part of the peer's memory that ours may take, results not counted; ``isa`` the instruction set both are
    limited to, or ""; ``amx_only`` the dtypes whose ratio is a bar on AMX alone; ``float16_tokens`` how many tokens (of a layer:
    sequences) the call has in float16, whose backward products torch runs at 2 to 5 GFLOP/s on a CPU: minutes for all of them.
    """

    case: Case
    bfloat16: Bars
    float32: Bars
    float16: Bars
    roofline: Mapping[str, Bars] = field(default_factory=dict)
    isa: str = ""
    passes: tuple[str, ...] = APART
    memory: float | None = None
    amx_only: tuple[str, ...] = ()
    float16_tokens: int | None = None

    def call(self, dtype: str) -> Case:
        """The call in ``dtype``."""
        if dtype != "float16" or self.float16_tokens is None:
            return self.case
        return dataclasses.replace(self.case, shape=(self.float16_tokens, *self.case.shape[1:]))

    @property
    def directions(self) -> tuple[str, ...]:
        return self.passes[: len(self.bfloat16)]

    @property
    def peers(self) -> tuple[str, ...]:
        """Torch's ways, of which the fastest counts."""
        return ("sdpa",) if self.case.op == "attention" else peer_names(self.case.op)

    def bar(self, dtype: str, direction: str, isa: str) -> dict[str, Any]:
        """The fields ``bar``, ``roofline_bar`` and ``memory_bar`` of a row that ran on ``isa``."""
        index = self.directions.index(direction)
        ratios: Bars = getattr(self, dtype)
        shares = self.roofline.get(dtype)
        return {
            "bar": None if dtype in self.amx_only and isa != "amx" else ratios[index],
            "roofline_bar": shares[index] if shares else None,
            "memory_bar": self.memory if self.call(dtype) == self.case else None,
        }

    @property
    def text(self) -> str:
        return name(self.case.op, self.case.shape, self.case.label, limited.text(self.isa))


def _call(*shape: int, **options: object) -> Case:
    return Case("attention", shape, options)


_BERT = (1, 12, 1024, 64)
#: Of the memory's read bandwidth: one read of K and V is what a decoding step must do.
_DECODE = dict.fromkeys(DTYPES, (85.0,))
ATTENTION = (
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

_LAYER_NORM = Case("layer_norm", (8192, 768), {"weight": True, "bias": True})
_RMS_NORM = Case("rms_norm", (8192, 768), {"weight": True})
NORM = (
    Line(_LAYER_NORM, (2.5, 3.5), (1.15, 1.5), (2, 2), {"bfloat16": (80, None)}),
    Line(_RMS_NORM, (1.8, 2.5), (1.3, 2.0), (2, 2)),
    Line(
        Case("layer_norm", (8192, 768), {"weight": True, "bias": True, "residual": True, "dropout_p": 0.1}),
        (3,), (2,), (2,), passes=TOGETHER[1:],
    ),
    Line(Case("layer_norm", (1, 4096), {"weight": True, "bias": True}), (3,), (2,), (2,)),
    Line(Case("rms_norm", (1, 4096), {"weight": True}), (3,), (2,), (2,)),
    *(
        Line(case, (1, 1), (1, 1), (2, 2), isa=isa)
        for isa in limited.ENVIRONMENT
        for case in (_LAYER_NORM, _RMS_NORM)
    ),
)  # fmt: skip

_FFN = Case("ffn", (2048, 768, 3072), {"activation": "gelu", "bias": True})
FFN = (
    Line(
        Case("linear", (2048, 2048, 2048)),
        (None,),
        (1.8,),
        (2,),
        {"bfloat16": (75,)},
        amx_only=("float32",),
    ),
    Line(_FFN, (1.9, 2.4), (2.2, 2.2), (2, 2), passes=TOGETHER, float16_tokens=256),
    Line(
        Case("glu_ffn", (2048, 1024, 2816), {"activation": "swiglu"}),
        (2.0, 2.4),
        (2.2, 2.2),
        (2, 2),
        passes=TOGETHER,
        float16_tokens=256,
    ),
    Line(Case("ffn", (1, 768, 3072), {"activation": "gelu", "bias": True}), (1.8,), (1.15,), (2,)),
    Line(Case("glu_ffn", (1, 1024, 2816), {"activation": "swiglu"}), (1.8,), (1.15,), (2,)),
    *(Line(_FFN, (1, 6), (1, 1), (2, 6), isa=isa, float16_tokens=256) for isa in limited.ENVIRONMENT),
)

LOSS = (
    Line(
        Case("linear_cross_entropy", (2048, 768, 50257)), (2.5,), (2.2,), (2,), passes=TOGETHER[1:], memory=0.1,
        float16_tokens=128,
    ),
)  # fmt: skip

_SHORT, _LONG = (16, 128, 768, 12, 3072), (8, 384, 768, 12, 3072)
_DROPOUT = {"dropout_p": 0.1}
#: In evaluation forward, in training (with dropout) forward and backward.
LAYER = (
    Line(Case("encoder_layer", _SHORT), (2,), (1.8,), (2,)),
    Line(Case("encoder_layer", _SHORT, _DROPOUT), (5,), (2.5,), (2,), passes=TOGETHER[1:], float16_tokens=2),
    Line(Case("encoder_layer", _LONG), (2,), (1.8,), (2,)),
    Line(Case("encoder_layer", _LONG, _DROPOUT), (8,), (3.5,), (2,), passes=TOGETHER[1:], float16_tokens=1),
    *(Line(Case("encoder_layer", _SHORT), (1,), (1,), (2,), isa=isa) for isa in limited.ENVIRONMENT),
)

MODEL = (
    Line(Case("causal_lm", (1, 1024)), (2.5,), (2,), (2,)),
    Line(Case("causal_lm", (1, 512), {"decode": True}), (2,), (1.3,), (2,)),
)

#: What ``bench`` calls them.
LINES = {"attention": ATTENTION, "norm": NORM, "ffn": FFN, "loss": LOSS, "layer": LAYER, "model": MODEL}


def name(op: str, shape: Sequence[int], label: str, limits: str) -> str:
    """What a line is called, and found by with ``--only``: ``layer_norm 8192x768``, ``ffn 2048x768x3072 gelu FASTATTN_ISA=avx2``.

    Attention, whose lines are the most, goes without its name: ``1x12x1024x64 causal``.
    """
    words = ", ".join(word for word in label.split(", ") if op == "attention" or word not in ("weight", "bias"))
    kind = "" if op == "attention" else op
    return " ".join(filter(None, [kind, "x".join(map(str, shape)), words, limits.partition(" ")[0]]))


def row_name(row: Row) -> str:
    return name(row.op, row.shape, row.case, row.limits)


def group_of(row: Row) -> str:
    """The group of LINES that the row's operation is in."""
    return next(group for group, lines in LINES.items() if any(line.case.op == row.op for line in lines))


def chosen(groups: Sequence[str], isa: str, only: str, dtypes: Sequence[str]) -> Iterator[tuple[Line, str]]:
    """(line, dtype) of one process, limited to ``isa`` or not (""), whose name has ``only`` in it."""
    for line in itertools.chain.from_iterable(LINES[group] for group in groups):
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
    if row.ratio is None or row.bar is row.roofline_bar is row.memory_bar is None:
        return []
    found = []
    if row.bar is not None and row.ratio < row.bar:
        found.append(f"ratio {row.ratio:.2f} < {row.bar:g}")
    if judged(row) and (row.roofline_percent or 0) < (row.roofline_bar or 0):
        found.append(f"{row.roofline_percent:.0f}% of the roof < {row.roofline_bar:g}%")
    if row.memory_bar is not None and (row.memory or 0) > row.memory_bar * (row.peer_memory or 0):
        found.append(f"{memory(row)} of the memory that the peer needs beside its results > {row.memory_bar:g}")
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


def memory(row: Row) -> str:
    """Our part of the memory that the peer needs beside its results: ``0.093``; "" where it was not measured."""
    return "" if row.memory is None or not row.peer_memory else f"{row.memory / row.peer_memory:.3f}"


def memory_text(row: Row) -> str:
    """The row's memory in words: ``48 of 513 MiB beside the results (0.093 ≤ 0.1), 124 of 590 MiB with them (0.211)``."""
    results = row.results_memory or 0
    beside, both = (
        (row.memory or 0, row.peer_memory or 0),
        ((row.memory or 0) + results, (row.peer_memory or 0) + results),
    )
    bar = row.memory_bar or 0
    verdict = "≤" if beside[0] <= bar * beside[1] else ">"
    (ours, theirs), (all_ours, all_theirs) = ([size / 2**20 for size in pair] for pair in (beside, both))
    share = 0.0 if not all_theirs else all_ours / all_theirs
    return (
        f"{ours:.0f} of {theirs:.0f} MiB beside the results ({memory(row)} {verdict} {bar:g}), "
        f"{all_ours:.0f} of {all_theirs:.0f} MiB with them ({share:.3f})"
    )


def render(rows: Sequence[Row]) -> None:
    """Print a table per group, a line per call: our ratio to torch and its bar by dtype and direction; then what was missed."""
    for group in LINES:
        mine = [row for row in rows if group_of(row) == group]
        if mine:
            _render_group(group, mine)
    for limits in dict.fromkeys(row.limits for row in rows if row.limits):
        print(f"{limits.partition(' ')[0]}: a process with {limits}")
    for row in rows:
        if row.memory_bar is not None and row.memory is not None:
            print(f"memory: {row_name(row)} {row.dtype} {row.direction}: {memory_text(row)}")
    for row in rows:
        for reason in missed(row):
            print(f"missed: {row_name(row)} {row.dtype} {row.direction}: {reason}")
    unjudged = sum(row.roofline_bar is not None and not judged(row) for row in rows)
    if unjudged:
        print(f"needs AMX: {unjudged} bars on the share of the matrix unit's peak, not judged on this machine")


def _render_group(group: str, rows: Sequence[Row]) -> None:
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault(row_name(row), {})[row.dtype, row.direction] = cell(row)
    columns = [(dtype, direction) for dtype in DTYPES for direction in DIRECTIONS]
    columns = [column for column in columns if any(column in line for line in cells.values())]
    lines = [(text, *(line.get(column, "") for column in columns)) for text, line in cells.items()]
    styles = ["red" if any("<" in cell or cell == check.FAILED for cell in line) else "green" for line in lines]
    heads = [f"{dtype} {direction}" for dtype, direction in columns]
    title = "their time / fastattn's, and its bar"
    first = "case (B, H, N, D)" if group == "attention" else group
    print_table((first, *heads), lines, styles=styles, title=title)
