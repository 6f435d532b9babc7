"""The README's figures are those of the committed rows that it names."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_come_from_committed_rows() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    names = re.findall(r"benchmarks/results/[\w.-]+\.jsonl", readme)
    assert names
    for name in set(names):
        assert module.table(module.rows_of(ROOT / name)) in readme, f"README.md does not show the table of {name}"
