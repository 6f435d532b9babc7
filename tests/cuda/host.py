"""Compiles the kernels of ``csrc/cuda`` over the host model of a thread block (``host_cuda.h``)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compiled(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """``tests/cuda/<source>`` as a shared object in ``folder``, loaded."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / f"{Path(source).stem}.so"
    # Unique symbols would be one variable in all the libraries of a process.
    apart = ["-fno-gnu-unique"] if compiler.endswith("g++") else []
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", *apart, *flags]
    command.append(f"-I{ROOT / 'csrc'}")
    subprocess.run([*command, str(ROOT / "tests" / "cuda" / source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
