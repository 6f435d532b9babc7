"""Triton's kernels, numbers and gradients, in Triton's interpreter.

TRITON_INTERPRET is read when Triton is imported and cannot be switched in a process: each module of ``interpreted/`` runs in
a pytest of its own, all started together, one thread each. A test here is one of those modules; its failures and counts are
reported whole.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")

_ROOT = Path(__file__).resolve().parents[2]
_MODULES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    folder = tmp_path_factory.mktemp("interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = {}
    for module in _MODULES:
        report = folder / f"{module.stem}.xml"
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(module)]
        log = (folder / f"{module.stem}.log").open("w+")
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        running[module.stem] = (process, report)
    yield running
    for process, _ in running.values():
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("module", [module.stem for module in _MODULES])
def test_interpreted(module: str, processes: dict[str, tuple[subprocess.Popen[str], Path]]) -> None:
    process, report = processes[module]
    code = process.wait(timeout=600)
    output = report.with_suffix(".log").read_text()
    assert code == 0, output[-8000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    passed = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    print(f"{module}: {passed} tests passed in the interpreter")
    assert passed >= 10, f"{module}: only {passed} tests ran\n{output[-2000:]}"
