"""compute-sanitizer over the small checks: accesses out of bounds or misaligned (memcheck), races in shared memory (racecheck).

For the C++ kernels, whose addresses and barriers nobody else checks. The tool comes with the CUDA toolkit; where it is not found, a
row says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import correctness
from fastattn.cli import check

TOOLS = ("memcheck", "racecheck")
#: What the tool exits with if it found something; a program that fails by itself exits with its own code.
_FOUND = 86
_SUMMARY = re.compile(r"={9} (?:ERROR SUMMARY: ([1-9]\d*) error|RACECHECK SUMMARY: ([1-9]\d*) hazard).*")


def find() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(str(home / "bin" / "compute-sanitizer"))


def command(program: str, tool: str, arguments: Sequence[str]) -> list[str]:
    """``python -m benchmarks.gpu <arguments>``, the quick checks in one process, under ``tool``: fastattn's kernels alone, and not
    the calls that torch makes to find out what a device can do."""
    own = ["--tool", tool, "--error-exitcode", str(_FOUND), "--kernel-name", "kernel_substring=fastattn"]
    quick = [*arguments, *([] if "--quick" in arguments else ["--quick"]), "--part", "1/1"]
    return [program, *own, "--report-api-errors", "no", sys.executable, "-m", "benchmarks.gpu", *quick]


def run(arguments: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """A row per tool. The tools run side by side, for ``seconds`` at most."""
    program = find()
    if program is None:
        return [_row(tool, check.UNAVAILABLE, "compute-sanitizer was not found") for tool in TOOLS]
    # An allocation of its own for each tensor: in torch's pool, what lies beyond one is another.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = {
        tool: subprocess.Popen(
            ["timeout", "-k", "5", str(seconds), *command(program, tool, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for tool in TOOLS
    }
    return [_judged(tool, process.communicate()[0], process.returncode) for tool, process in started.items()]


def _judged(tool: str, output: str, status: int) -> dict[str, Any]:
    lines = output.splitlines()
    found = next((match for line in lines if (match := _SUMMARY.match(line))), None)
    if found is not None or status == _FOUND:
        words = [line.strip("= ").strip() for line in lines if line.startswith("=========")]
        first = next((text for text in words if re.search(r"Invalid|Error:|[Rr]ace|hazard|Misaligned", text)), "")
        return _row(tool, check.FAILED, f"{first} ({found[0].strip('= ')})" if found else first)
    if status in (124, 137):
        return _row(tool, check.UNAVAILABLE, "did not come to its end in its time: raise --seconds")
    if status != 0:
        return _row(tool, check.FAILED, f"exit code {status}: {lines[-1] if lines else ''}")
    return _row(tool, check.OK, "")


def _row(tool: str, verdict: str, note: str) -> dict[str, Any]:
    return correctness.row("compute-sanitizer", tool, "cuda", "", verdict, note)
