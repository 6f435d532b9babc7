"""What a measurement is: the row, the table of many, the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastattn.cli import bars, cases, check, machine
from fastattn.cli.table import print_table

SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


@dataclass(frozen=True)
class Row:
    """One measurement. Times are seconds per call, ``rate`` is ours in ``unit``, ``roofline`` is the limit in the same unit.

    ``load`` is the machine's load average before the session began: above its cores, others were competing.
    A row with a bar (fastattn/cli/bars.py) has in ``bar`` what ``ratio`` must reach, in ``roofline_bar`` what
    ``roofline_percent`` must (None: no bar), and in ``errors`` for each of its results the relative Frobenius error against
    float64 and the largest error, ours and the peer's; with ``memory_bar`` it has in ``memory`` the bytes that one step holds
    at its highest beside its results, and in ``results_memory`` those of the results. ``limits`` are the variables that limit
    ours and torch. Rows of a GPU have its architecture ("sm_90") and Triton's version, in ``rate_bar`` what ``rate`` must reach.
    ``verdict`` is "ok"; or "FAILED" (the check of this very shape did) or "unavailable", and then there are no figures
    and ``note`` says why.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    implementation: str
    isa: str
    peer: str
    verdict: str
    ratio: float | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int | None = None
    peer_median: float | None = None
    peer_p20: float | None = None
    peer_p80: float | None = None
    peer_samples: int | None = None
    rate: float | None = None
    unit: str = ""
    roofline: float | None = None
    roofline_percent: float | None = None
    bar: float | None = None
    roofline_bar: float | None = None
    memory_bar: float | None = None
    errors: dict[str, dict[str, float]] | None = None
    limits: str = ""
    memory: int | None = None
    peer_memory: int | None = None
    results_memory: int | None = None
    device: str = ""
    threads: int = 0
    load: float = 0.0
    torch: str = ""
    commit: str | None = None
    date: str = ""
    note: str = ""
    arch: str = ""
    triton: str = ""
    rate_bar: float | None = None


def _milliseconds(median: float, p20: float, p80: float) -> str:
    def text(seconds: float) -> str:
        return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"

    return f"{text(median)} [{text(p20)}, {text(p80)}]"


def render(rows: Sequence[Row]) -> None:
    """Print the table: the ratio first, then times, rate and its share of the measured limit; the reasons of FAILED last."""
    columns = ["op", "shape", "dtype", "pass", "by", "against", "ratio", "ms [p20, p80]", "theirs", "rate", "roof"]
    with_bars = any(row.bar is not None for row in rows)
    with_memory = any(row.memory is not None for row in rows)
    columns += ["error / theirs"] if with_bars else ["memory", "theirs"] if with_memory else []
    lines, styles = [], []
    for row in rows:
        call = (cases.title(row.op, row.case), "x".join(map(str, row.shape)), row.dtype, SHORT.get(row.direction, ""))
        start = (*call, f"{row.implementation} {row.isa}".strip(), row.peer)
        if row.verdict != check.OK:
            lines.append((*start, row.verdict, *[""] * (len(columns) - len(start) - 1)))
            styles.append("red")
            continue
        assert row.ratio is not None and row.rate is not None
        ours = _milliseconds(row.median or 0, row.p20 or 0, row.p80 or 0)
        theirs = _milliseconds(row.peer_median or 0, row.peer_p20 or 0, row.peer_p80 or 0)
        rate = f"{row.rate:.0f} {row.unit}" if row.rate >= 10 else f"{row.rate:.2f} {row.unit}"
        lines.append((*start, bars.cell(row), ours, theirs, rate, bars.share(row)))
        if with_bars:
            result, error = bars.error_ratio(row)
            lines[-1] += (f"{error:.2f} {result}",)
        elif with_memory:
            lines[-1] += tuple(f"{(size or 0) / 2**20:.1f} MiB" for size in (row.memory, row.peer_memory))
        bar = row.bar or 1
        styles.append("green" if row.ratio >= bar else "yellow" if row.ratio >= 0.95 * bar else "red")
    print_table(
        columns, lines, left=6, styles=styles, title="ratio = their time / fastattn's: above 1, fastattn is faster"
    )
    for row in rows:
        if row.note:
            shape = "x".join(map(str, row.shape))
            print(f"{row.verdict}: {cases.title(row.op, row.case)} {shape} {row.dtype}: {row.note}")
    if rows:
        machine_text = f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}"
        print(f"{machine_text}, commit {rows[0].commit or 'unknown'}")
        if rows[0].load > machine.cores() + 0.5:
            print(f"note: load {rows[0].load} on {machine.cores()} cores: others were running, these times mean little")


def save(rows: Sequence[Row], path: Path) -> None:
    """Append the rows to a JSONL file, which is a log: nothing in it is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def below(rows: Sequence[Row], bar: float) -> list[Row]:
    """Rows that miss the bar: slower than ``bar`` × the peer, or without figures because their check failed."""
    return [row for row in rows if row.verdict == check.FAILED or (row.ratio is not None and row.ratio < bar)]
