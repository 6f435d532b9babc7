"""The README's table of figures, made from committed rows: ``python benchmarks/readme_table.py benchmarks/results/FILE.jsonl``.

``tests/test_readme.py`` fails when the README and the rows that it names disagree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DIRECTIONS = ("forward", "forward+backward")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """One line per call and dtype, against the fastest of torch's ways: ratio (theirs / ours) and both medians in ms."""
    calls: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["verdict"] != "ok":
            continue
        call = (row["op"], row["case"], "×".join(map(str, row["shape"])), row["dtype"])
        best = calls.setdefault(call, {})
        if row["direction"] not in best or row["ratio"] < best[row["direction"]]["ratio"]:
            best[row["direction"]] = row
    lines = ["| operation | shape | dtype | forward | forward + backward |", "| --- | --- | --- | --- | --- |"]
    for (op, case, shape, dtype), best in calls.items():
        words = [word for word in case.split(", ") if word not in ("", "weight", "bias")]
        cells = [_cell(best[direction]) if direction in best else "" for direction in DIRECTIONS]
        lines.append(f"| {' '.join([op, *words])} | {shape} | {dtype} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    ours, theirs = (f"{t:.0f}" if t >= 1000 else f"{t:.3g}" for t in (row["median"] * 1e3, row["peer_median"] * 1e3))
    return f"**{row['ratio']:.2f}** ({ours} ms, {row['peer'].split(':')[0]} {theirs})"


if __name__ == "__main__":
    print(table(rows_of(Path(sys.argv[1]))))
