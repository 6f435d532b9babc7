"""Which GPU implementations ``auto`` may take: ``proven.json`` beside this file, which the committed benchmark rows decide.

``python -m benchmarks.gpu.verdicts`` writes it; a test fails when it says anything else than the rows in ``benchmarks/results/``.
"""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).with_name("proven.json")
SCHEMA = 1


def load(path: Path = PATH) -> frozenset[tuple[str, str, str]]:
    """{(operation, implementation, architecture)}. ValueError for anything but what ``verdicts`` writes."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {content.get('schema')}, expected {SCHEMA}")
    entries = content["proven"]
    for entry in entries:
        if not (entry["measurements"] >= 1 and entry["worst_ratio"] >= 1.0):
            raise ValueError(f"{path}: {entry} shows no implementation that is not slower than the rung below")
    return frozenset((entry["op"], entry["implementation"], entry["arch"]) for entry in entries)
