"""The CUDA extension builds where nvcc is, without spilling a register, and loads where no GPU and no CUDA build of torch is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")

# In a process of its own: an operator's kernel is registered once. The object under test stands in for the package's.
LOAD_AND_CALL = """
import ctypes, sys, torch
import fastattn.ops._library as library
if not library.has_cuda:
    ctypes.CDLL(sys.argv[1])
x = torch.randn(4, 8)
arguments = {
    "norm_forward": (x, None, None, None, 1e-5, False, 0.0, None),
    "norm_backward": (x, None, x, None, x[:, 0], x[:, 0], True, 0.0, None, False, False),
}
for name, values in arguments.items():
    operator = getattr(torch.ops.fastattn, name).default
    try:
        operator._op_dk(torch._C.DispatchKey.CUDA, *values)
    except RuntimeError as error:
        print(name, str(error).splitlines()[0])
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One architecture through setup.py into a temporary folder: (the object, what the compilers printed)."""
    folder = tmp_path_factory.mktemp("build")
    environment = os.environ | {
        "FASTATTN_BUILD_CUDA": "only",
        "FASTATTN_CUDA_ARCHS": "80",
        "NVCC": f"{NVCC} -Xptxas -v",
    }
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "fastattn" / "_cuda.so", done.stdout + done.stderr


def test_no_kernel_spills(build: tuple[Path, str]) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", build[1])
    # Forward and backward in four dtypes and four groups, five reductions.
    assert len(spills) == 2 * 4 * 4 + 5
    assert set(spills) == {("0", "0")}


def test_needs_neither_python_nor_cuda(build: tuple[Path, str]) -> None:
    symbols = subprocess.run(["nm", "-D", str(build[0])], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in symbols
    assert not re.search(r"\b_?Py[A-Z_]", symbols)
    needed = subprocess.run(["readelf", "-d", str(build[0])], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(libcuda|libcudart|libtorch_cuda|libpython)", needed)


def test_loads_anywhere_and_refuses_cpu_tensors(build: tuple[Path, str]) -> None:
    command = [sys.executable, "-c", LOAD_AND_CALL, str(build[0])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["norm_forward", "norm_backward"], done.stdout
    assert "x is not on a CUDA device" in lines[0]
    assert "h is not on a CUDA device" in lines[1]
