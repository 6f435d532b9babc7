"""``python -m benchmarks.gpu.verdicts``: writes ``fastattn/ops/proven.json`` from the rows under ``benchmarks/results/``.

An implementation of an operation enters ``auto`` on an architecture when the newest row of every measurement of the operation there
is green, there is at least one against the rung below, and none of these shows it slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastattn.cli import check
from fastattn.ops import _proven

RESULTS = Path(__file__).resolve().parent.parent / "results"
BELOW = "rung below"
Row = dict[str, Any]


def rows_of(folder: Path = RESULTS) -> list[Row]:
    """The rows of a GPU in all files of ``folder``, each with its ``file``; not those of sessions with ``limits``."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [{**json.loads(line), "file": path.name} for line in path.read_text().splitlines()]
    return [row for row in found if row.get("arch") and not row.get("limits")]


def proven(rows: Iterable[Row]) -> list[Row]:
    """The entries of ``proven.json``: operation, implementation, architecture, and what they rest on."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        measurement = (*_key(row), row["case"], tuple(row["shape"]), row["dtype"], row["direction"], row["peer"])
        if measurement not in newest or row["date"] >= newest[measurement]["date"]:
            newest[measurement] = row
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in newest.values():
        groups.setdefault(_key(row), []).append(row)
    entries = []
    for (op, implementation, arch), own in sorted(groups.items()):
        below = [row for row in own if row["peer"].startswith(BELOW) and row["verdict"] == check.OK]
        worst = min((row["ratio"] for row in below), default=0.0)
        if worst >= 1.0 and not any(row["verdict"] == check.FAILED for row in own):
            entry = {"op": op, "implementation": implementation, "arch": arch, "measurements": len(below)}
            entries.append(entry | {"worst_ratio": worst, "files": sorted({row["file"] for row in below})})
    return entries


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["implementation"], row["arch"]


def text(entries: list[Row]) -> str:
    """``proven.json``: an entry a line."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f'{{"schema": {_proven.SCHEMA}, "proven": [' + (f"\n{lines}\n" if lines else "") + "]}\n"


def main() -> int:
    entries = proven(rows_of())
    _proven.PATH.write_text(text(entries))
    for entry in entries:
        print(
            "{op} {implementation} {arch}: {measurements} measurements, worst ratio {worst_ratio:.2f}".format(**entry)
        )
    print(f"{len(entries)} entries in {_proven.PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
