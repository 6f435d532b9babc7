"""The CUDA extension builds where nvcc is, and loads where no GPU and no CUDA build of torch is."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

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
q, table = torch.randn(1, 2, 3, 8), torch.tensor([[0, 3, 0, 3, 0]])
options = (0.3, -1, 0, 0, 0.0, 0.0, None)
arguments = {
    "attention_forward": (q, q, q, None, None, None, *options),
    "attention_inference": (q, q, q, None, None, None, *options),
    "attention_backward": (q, None, q, q, q, q, q[..., 0], None, None, None, *options, False, False, False),
    "attention_append": (q, q, q, q, q, None, None, 0.3, -1, 0, 0.0, table, None),
    "norm_forward": (x, None, None, None, 1e-5, False, 0.0, None),
    "norm_backward": (x, None, x, None, x[:, 0], x[:, 0], True, 0.0, None, False, False),
    "linear_forward": (x, x, None, None),
    "linear_backward": (x, x, x, True, True, True),
    "ffn_forward": (x, x, None, None, None, x, None, None, 0, 0.0, None, False),
    "ffn_backward": (x, x, x, None, x, x, x, 0, 0.0, None, True, True, True),
}
for name, values in arguments.items():
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", "CUDA"):
        continue
    operator = getattr(torch.ops.fastattn, name).default
    try:
        operator._op_dk(torch._C.DispatchKey.CUDA, *values)
    except RuntimeError as error:
        print(name, str(error).splitlines()[0])
"""


def _build(tree: Path, folder: Path, archs: str) -> Path:
    """The object that setup.py of ``tree`` makes, in ``folder``."""
    environment = os.environ | {"FASTATTN_BUILD_CUDA": "only", "FASTATTN_CUDA_ARCHS": archs}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder),
    ]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "fastattn" / "_cuda.so"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The norms alone, for one architecture: how an object is built and loaded does not depend on what is in it."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("build")
    shutil.copy2(ROOT / "setup.py", tree)
    others = [source.name for source in (ROOT / "csrc" / "cuda").glob("*.cu") if source.stem not in ("norm", "device")]
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns(*others))
    return _build(tree, folder, "80")


def test_says_what_it_is_for_and_why_it_cannot_run(build: Path) -> None:
    library = ctypes.CDLL(str(build))
    library.fastattn_cuda_architectures.restype = library.fastattn_cuda_obstacle.restype = ctypes.c_char_p
    assert library.fastattn_cuda_architectures() == b"80"
    obstacle = library.fastattn_cuda_obstacle().decode()
    assert obstacle == "" if torch.cuda.is_available() else "CUDA" in obstacle


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launches would succeed")
def test_errors_name_kernel_configuration_and_cause(tmp_path: Path) -> None:
    program = tmp_path / "launch_probe"
    sources = [str(ROOT / "tests" / "cuda" / "launch_probe.cu"), str(ROOT / "csrc" / "cuda" / "device.cu")]
    defines = ['-DFASTATTN_CUDA_ARCHS="80"', f"-I{ROOT / 'csrc'}"]
    subprocess.run([NVCC, "-std=c++17", "-arch=sm_80", *defines, *sources, "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    cause = r"[\w ]+ \(cudaError\w+\)"
    wanted = [
        r"doubled: launch of 3 x 1 x 1 blocks of 64 threads, 0 bytes of dynamic shared memory, clusters of 1 failed: "
        + cause,
        r"doubled: launch of 4 x 2 x 1 blocks of 128 threads, 102400 bytes .* clusters of 4 failed: " + cause,
        r"the driver's cuTensorMapEncodeTiled: " + cause,
        r"CUDA device 0: " + cause,
        r"CUDA device 1000 is beyond the first 64",
    ]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch("fastattn: " + pattern, line), line


def test_torch_says_whether_it_is_to_be_deterministic() -> None:
    """By the names that ``csrc/cuda/operator.h`` looks up."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    context, question = library._ZN2at13globalContextEv, library._ZNK2at7Context23deterministicAlgorithmsEv
    context.restype, question.argtypes, question.restype = ctypes.c_void_p, [ctypes.c_void_p], ctypes.c_bool
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for enabled in (True, False):
            torch.use_deterministic_algorithms(enabled)
            assert question(context()) is enabled
    finally:
        torch.use_deterministic_algorithms(before)


def test_architectures_follow_from_the_file_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("norm", "attention_sm80", "attention_sm80_backward", "attention_sm90_forward"):
        (folder / f"{name}.cu").touch()
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    rules = runpy.run_path(str(ROOT / "setup.py"))
    rules["cuda_sources"].__globals__["ROOT"] = tmp_path

    def compiled(archs: str) -> dict[str, str]:
        monkeypatch.setenv("FASTATTN_CUDA_ARCHS", archs)
        found = rules["cuda_sources"](rules["cuda_architectures"]())
        return {source.stem: " ".join(own) for source, own in found.items()}

    everywhere = ("norm", "attention_sm80", "attention_sm80_backward")
    assert compiled("") == dict.fromkeys(everywhere, "80 90a") | {"attention_sm90_forward": "90a"}
    assert compiled("120;80,90") == dict.fromkeys(everywhere, "80 90a 120") | {"attention_sm90_forward": "90a"}
    assert compiled("86") == dict.fromkeys(everywhere, "86")
    assert compiled("90a") == dict.fromkeys((*everywhere, "attention_sm90_forward"), "90a")
    with pytest.raises(SystemExit, match="75, hopper is not an architecture"):
        compiled("75;80;hopper")
    assert "code=compute_80" in rules["gencode"](["80", "90a"])
    assert "code=compute" not in rules["gencode"](["90a"])


def test_needs_neither_python_nor_cuda(build: Path) -> None:
    symbols = subprocess.run(["nm", "-D", str(build)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in symbols
    assert not re.search(r"\b_?Py[A-Z_]", symbols)
    needed = subprocess.run(["readelf", "-d", str(build)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(libcuda|libcudart|libtorch_cuda|libpython)", needed)


#: What each operator says of CPU tensors.
REFUSALS = {
    **{"norm_forward": "x", "norm_backward": "h"},
    **dict.fromkeys(("attention_forward", "attention_inference", "attention_backward", "attention_append"), "q"),
    **dict.fromkeys(("linear_forward", "linear_backward", "ffn_forward", "ffn_backward"), "x"),
}


def _check_refusals(library: Path, *operators: str) -> None:
    command = [sys.executable, "-c", LOAD_AND_CALL, str(library)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert set(said) == set(operators)
    for name, text in said.items():
        assert f"{REFUSALS[name]} is not on a CUDA device" in text


def test_loads_anywhere_and_refuses_cpu_tensors(build: Path) -> None:
    _check_refusals(build, "norm_forward", "norm_backward")


@pytest.mark.slow
def test_everything_builds_into_one_object(tmp_path: Path) -> None:
    """For the architectures that are the default; that no kernel is missing shows when it is loaded."""
    library = _build(ROOT, tmp_path, "")
    test_needs_neither_python_nor_cuda(library)
    _check_refusals(library, *REFUSALS)
