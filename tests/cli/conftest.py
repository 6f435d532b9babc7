"""``python -m fastattn`` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastattn

PACKAGE_PARENT = Path(fastattn.__file__).resolve().parent.parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets the number of threads of its process: a test that runs it here gives them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """``command("check", "--json", path=(…), FASTATTN_ISA="avx2")``, in an empty directory.

    ``path`` comes before everything else on sys.path; of the caller's own FASTATTN_ variables none is handed on.
    """

    def run(*arguments: str, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
        environment |= variables
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, PACKAGE_PARENT)))
        empty = tmp_path / "elsewhere"
        empty.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "fastattn", *arguments],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., Path]:
    """``without("rich", "torch")``: a directory for ``path`` in which importing those fails, as if they were not installed."""

    def make(*modules: str) -> Path:
        directory = tmp_path / "-".join(["without", *modules])
        directory.mkdir()
        for module in modules:
            (directory / f"{module}.py").write_text(f"raise ModuleNotFoundError({f'No module named {module!r}'!r})\n")
        return directory

    return make
