"""Writes Triton's part of docs/kernels.md: what the compiler makes of every shipped configuration.

python tests/triton/kernel_table.py                    compiles everything on two processes, about half an hour
python tests/triton/kernel_table.py --rows FILE...     from rows that compiled_report.py printed before
"""

import argparse
import concurrent.futures
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
PAGE = _ROOT / "docs" / "kernels.md"
#: What follows is tests/cuda/compiled.py's.
_CUDA_TITLE = "# What nvcc makes of the CUDA kernels\n"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
Row = dict[str, Any]

_HEAD = """# What the compiler makes of every configuration

The CUDA kernels are further down. This part was made by `python tests/triton/kernel_table.py` with Triton {triton}, ahead of time,
without a GPU: registers per thread, shared memory of a program and tensor-core instructions are the compiler's; no time is
claimed. A cell reads

    tile, warps (w), stages (s) | registers | shared memory in KiB | tensor-core instructions [TMA loads]

The tiles are those of `kernels/configs.py`; M and N are rows and columns of a program's tile, K the inner dimension of a step, R
rows. A configuration without stages has no loop that is pipelined. A cell whose kernel spills says so;
`tests/triton/test_compile.py` fails there, and where shared memory does not suffice, also for sm_86, sm_89 and sm_120 (99 KiB).
sm_90's products are wgmma (HGMMA) unless a tile has fewer than its 64 rows, sm_100's tcgen05 (UTCHMMA), sm_80's
mma.sync (HMMA), gfx942's MFMA; float32 with torch's default matmul precision uses none but gfx942's; TF32 runs the same tiles and
is not listed.
"""


def listed(row: Row) -> bool:
    """Whether a row is on the page: TF32 runs the tiles of float32, and expanded keys those of keys of their own."""
    point = row["point"]
    return row["arch"] in ARCHITECTURES and point.get("dtype") != "tf32" and point.get("keys") != "expanded"


def configuration(row: Row) -> str:
    """``M128 N64 8w 3s``: what ``configs.py`` decides."""
    short = {"BLOCK_DIM": "D", "BLOCK_M": "M", "BLOCK_N": "N", "BLOCK_K": "K", "ROWS": "R", "BLOCK": "N"}
    words = [f"{short.get(name, name.lower() + ' ')}{size}" for name, size in row["tile"].items()]
    words += [f"{row[name]}{name[4]}" for name in ("num_warps", "num_stages") if row[name] is not None]
    return " ".join(words)


def label(row: Row) -> str:
    """``128 bfloat16 extras``: the case without its family."""
    words = (key if value is True else "" if value is False else str(value) for key, value in row["point"].items())
    return " ".join(word for word in words if word)


def _cell(row: Row) -> str:
    counts = row["instructions"]
    cores = [f"{counts[name]} {name}" for name in ("HMMA", "HGMMA", "UTCHMMA", "MFMA") if counts.get(name)]
    cores += [f"{counts['UTMALDG']} TMA"] if counts.get("UTMALDG") else []
    words = [configuration(row), str(row["registers"]), f"{row['shared'] / 1024:.3g}", " ".join(cores) or "-"]
    return ", ".join(words + ([f"**spills {row['stack']} bytes**"] if row["stack"] else []))


def table(rows: Iterable[Row], triton: str, earlier: str = "") -> str:
    """The page: a section per family, a line per case, kernel and configuration, a column per architecture; of several binaries of
    one configuration the one that takes most. Families that have no row keep their section of the ``earlier`` page."""
    lines: dict[str, dict[tuple[str, str], dict[str, dict[str, Row]]]] = {}
    for row in rows:
        found = (
            lines.setdefault(row["family"], {}).setdefault((label(row), row["name"]), {}).setdefault(row["arch"], {})
        )
        other = found.setdefault(configuration(row), row)
        if (row["stack"], row["registers"]) > (other["stack"], other["registers"]):
            found[configuration(row)] = row
    sections = dict(zip(*[iter(re.split(r"^## (.*)\n", earlier, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for family, found in lines.items():
        text = ["| case | kernel | " + " | ".join(ARCHITECTURES) + " |", "| --- " * 6 + "|"]
        for (case, kernel), by_arch in found.items():
            name = kernel.removesuffix("_kernel")
            columns = [[_cell(row) for row in by_arch.get(arch, {}).values()] for arch in ARCHITECTURES]
            for cells in itertools.zip_longest(*columns, fillvalue=""):
                text.append(f"| {case} | {name} | " + " | ".join(cells) + " |")
        sections[family] = "\n".join(text)
    parts = [_HEAD.format(triton=triton), *(f"## {name}\n\n{sections[name].strip()}\n" for name in sorted(sections))]
    return "\n".join(parts)


def configurations(page: str) -> dict[tuple[str, str, str, str], set[str]]:
    """{(family, case, kernel, architecture): configurations} of a page that ``table`` wrote."""
    found: dict[tuple[str, str, str, str], set[str]] = {}
    family = ""
    for line in page.partition(_CUDA_TITLE)[0].splitlines():
        if line.startswith("## "):
            family = line[3:]
        elif line.startswith("| ") and not line.startswith(("| case", "| ---")):
            case, kernel, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            for arch, cell in zip(ARCHITECTURES, cells, strict=True):
                if cell:
                    found.setdefault((family, case, kernel, arch), set()).add(cell.partition(",")[0])
    return found


def environment(cache: str) -> dict[str, str]:
    """Of a process that compiles: no interpreter, no binaries of an earlier run, no configuration measured here."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"TRITON_CACHE_DIR": cache, "FASTATTN_TUNED": "off", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    if "PYTHONPATH" in os.environ:
        own["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    # Fused multiply-adds are Triton's default up to 3.9, which warns that this will change.
    return kept | own | {"TRITON_DEFAULT_FP_FUSION": "1"}


def report(*arguments: str, timeout: float | None = None) -> list[Row]:
    """The rows of ``compiled_report.py`` with ``arguments``, in a process of its own. RuntimeError if it breaks."""
    command = [sys.executable, str(Path(__file__).with_name("compiled_report.py")), *arguments]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="default: all")
    parser.add_argument("--rows", nargs="+", type=Path, help="rows of compiled_report.py instead of compiling")
    args = parser.parse_args(argv)
    if args.rows:
        rows = [json.loads(line) for path in args.rows for line in path.read_text().splitlines()]
    else:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            rows = [row for found in pool.map(lambda arch: report(arch, *args.family), ARCHITECTURES) for row in found]
    earlier, title, cuda = PAGE.read_text().partition(_CUDA_TITLE) if PAGE.exists() else ("", "", "")
    kept = earlier if args.family or args.rows else ""
    own = table(filter(listed, rows), importlib.metadata.version("triton"), kept)
    PAGE.write_text(f"{own}\n{title}{cuda}" if title else own)
    for row in rows:
        for fault in row["wrong"]:
            print(f"{row['arch']} {row['case']} {row['name']}: {fault}")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
