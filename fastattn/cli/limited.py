"""fastattn and torch on an older instruction set: a process of its own, since libraries read these variables when they load.

What each does (torch 2.13): ``ATEN_CPU_CAPABILITY`` chooses torch's own vectorized kernels; ``ONEDNN_MAX_CPU_ISA`` limits what
oneDNN generates, hence the 16-bit products (oneDNN's "CPU Dispatcher Control"); ``MKL_ENABLE_INSTRUCTIONS`` limits MKL's
float32 products on Intel processors. MKL ignores it on others, where it takes its AVX2 path anyway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ENVIRONMENT = {
    isa: {
        "FASTATTN_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": isa.upper(),
    }
    for isa, onednn in {"avx512": "AVX512_CORE", "avx2": "AVX2"}.items()
}
COMMAND = ("-m", "fastattn", "bench")


def in_force(isa: str) -> bool:
    """Whether this process was started with all of ``isa``'s variables."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT[isa].items())


def text(isa: str) -> str:
    """What is set for ``isa``, as one would write it before a command; "" for no limit."""
    return " ".join(f"{name}={value}" for name, value in ENVIRONMENT.get(isa, {}).items())


def bench(isa: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of ``python -m fastattn bench`` with ``arguments``, run limited to ``isa``. RuntimeError if it breaks."""
    command = [sys.executable, *COMMAND, *arguments, "--isa", isa, "--json"]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT[isa]}, capture_output=True, text=True)
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    except ValueError:
        raise RuntimeError(f"{text(isa)} {' '.join(command)} failed: {done.stderr.strip()[-500:]}") from None
    return rows
