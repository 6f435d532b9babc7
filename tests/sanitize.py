"""The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer: ``python tests/sanitize.py [pytest arguments]``.

Builds the C++ core with the sanitizers into build/sanitize (the normal build stays as it is), shows that they are at work by a
product that writes past its result, then runs tests/ops on every instruction set. Fails on a finding and prints its report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package"
SANITIZERS = "address,undefined"

# Without the implementation in PyTorch, the derivatives that come from it, and the same kernels again on other numbers of threads.
KERNEL_TESTS = [
    "tests/ops",
    "--ignore=tests/ops/test_transforms.py",
    "--ignore=tests/ops/test_attention_bits.py",
    "-k=not reference",
]

# c (2, 3) of a product that is told to write (3, 3).
OVERFLOW = """
import torch
from fastattn import _native
assert "-fsanitize=address,undefined" in _native.build_facts()["flags"]
a, b, c = torch.ones(3, 3), torch.ones(3, 3), torch.ones(2, 3)
_native.gemm("scalar", "float32", a.data_ptr(), 3, b.data_ptr(), 3, False, c.data_ptr(), 3, (3, 3, 3))
"""


def build() -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", f"--build-base={BUILD}", f"--build-lib={PACKAGE}"]
    environment = os.environ | {"FASTATTN_SANITIZE": SANITIZERS, "FASTATTN_BUILD_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def environment() -> dict[str, str]:
    """Python itself is not instrumented: the runtime is preloaded, with libstdc++, whose exceptions it intercepts."""
    cxx = (os.environ.get("CXX") or "g++").split()
    libraries = [
        subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    reports = f"log_path={BUILD / 'report'}"
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"{reports}:detect_leaks=0",  # CPython frees little when it ends
        "UBSAN_OPTIONS": f"{reports}:print_stacktrace=1",
        "PYTHONPATH": str(PACKAGE),
        "PYTHONSAFEPATH": "1",  # not the package of the working directory
        "OMP_NUM_THREADS": "1",
    }


def take_reports() -> str:
    paths = sorted(BUILD.glob("report.*"))
    text = "\n".join(path.read_text() for path in paths)
    for path in paths:
        path.unlink()
    return text


def main() -> int:
    build()
    take_reports()
    probe = subprocess.run([sys.executable, "-c", OVERFLOW], env=environment(), capture_output=True, text=True)
    report = take_reports()
    if probe.returncode == 0 or "heap-buffer-overflow" not in report:
        print(f"sanitize: a planted overflow went unseen\n{probe.stderr}\n{report}", file=sys.stderr)
        return 1
    # UndefinedBehaviorSanitizer writes to the standard error and ends the process: pytest must not keep that.
    arguments = [*(sys.argv[1:] or KERNEL_TESTS), "-q", "--capture=sys", "-n", "auto", "--dist", "worksteal"]
    # pytest's own path would put the package of the working directory before the one that was built: conftest.py looks.
    arguments += ["-o", "pythonpath=tests"]
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=environment() | {"FASTATTN_TESTED_BUILD": str(PACKAGE)},
    )
    report = take_reports()
    print(report, file=sys.stderr)
    return 1 if report else tests.returncode


if __name__ == "__main__":
    sys.exit(main())
