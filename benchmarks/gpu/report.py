"""Rows as a markdown table: one line per measurement, ours first, then the ratio to every peer, and the bars that are missed."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.cli import cases, check
from fastattn.cli.rows import Row

_SCALE = {"GFLOP/s": ("TFLOP/s", 1e3), "GB/s": ("TB/s", 1e3)}


def markdown(rows: Sequence[Row], limits: dict[str, float]) -> str:
    """Title, measured limits, a table; then what had no figures, with its reason."""
    lines = []
    if rows:
        first = rows[0]
        versions = f"torch {first.torch}, Triton {first.triton or 'not installed'}, commit {first.commit or 'unknown'}"
        lines += [f"# {first.device} ({first.arch}), {versions}, {first.date[:10]}", ""]
    if limits:
        text = ", ".join(f"{value / _SCALE[unit][1]:.3g} {_SCALE[unit][0]}" for unit, value in limits.items())
        lines += [
            f"Measured limits: {text} (bfloat16 product, copy). Ratio = their time / ours: above 1, fastattn is faster.",
            "",
        ]
    lines += ["| call | pass | ms | rate | of limit | bar | peers: ratio |", "| --- " * 7 + "|"]
    for key, found in _measurements(rows).items():
        call, direction = key
        ours = found[0]
        ratios = ", ".join(f"{row.peer} {row.ratio:.2f}" for row in found)
        share = "" if ours.roofline_percent is None else f"{ours.roofline_percent:.0f} %"
        lines.append(
            f"| {call} | {direction} | {1e3 * (ours.median or 0):.4g} | {_rate(ours.rate, ours.unit)} | {share} | "
            f"{', '.join(bars(found))} | {ratios} |"
        )
    notes = [row for row in rows if row.verdict != check.OK]
    if notes:
        lines += ["", "Without figures:", ""]
        lines += [f"- {_call(row)} {row.direction} {row.peer}: {row.verdict}, {row.note}" for row in notes]
    return "\n".join(lines) + "\n"


def bars(found: Sequence[Row]) -> list[str]:
    """Each bar of a measurement in words: ``met: 2.9 TB/s`` or ``MISSED: ...``."""
    words = []
    first = found[0]
    if first.rate_bar is not None:
        words.append(_bar((first.rate or 0) >= first.rate_bar, f">= {_rate(first.rate_bar, first.unit)}"))
    if first.roofline_bar is not None:
        words.append(
            _bar((first.roofline_percent or 0) >= first.roofline_bar, f">= {first.roofline_bar:.0f} % of limit")
        )
    for row in found:
        if row.bar is not None:
            words.append(_bar((row.ratio or 0) >= row.bar, f"{row.peer} >= {row.bar:.2f}"))
    return words


def _bar(met: bool, text: str) -> str:
    return f"{'met' if met else 'MISSED'}: {text}"


def _rate(rate: float | None, unit: str) -> str:
    if rate is None:
        return ""
    name, scale = _SCALE[unit]
    return f"{rate / scale:.3g} {name}"


def _call(row: Row) -> str:
    return f"{cases.title(row.op, row.case)} {'x'.join(map(str, row.shape))} {row.dtype}"


def _measurements(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.verdict == check.OK:
            found.setdefault((_call(row), row.direction), []).append(row)
    return found
