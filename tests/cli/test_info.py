"""``info`` says what is there, and above all it still speaks when something is broken."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

import fastattn


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The directory of a copy of the package's Python files, to break."""
    shutil.copytree(
        Path(fastattn.__file__).parent,
        tmp_path / "copy" / "fastattn",
        symlinks=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path / "copy"


def test_healthy(command):
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["python"]["version"] == platform.python_version()
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] >= 1
    assert facts["cpu"]["cores"] >= 1 and facts["cpu"]["model"]
    assert set(facts["libraries"]) == {"_C", "_cuda"}
    if facts["libraries"]["_C"] == "loaded":
        assert facts["native"]["isa"] in facts["native"]["isas"]
        assert facts["native"]["why"] and facts["native"]["build"]["compiler"]
        assert facts["auto"]["cpu"]["layer_norm"] in ("cpu", "reference")
        assert facts["problems"] == []
    else:
        assert any("the C++ core is missing" in problem for problem in facts["problems"])


def test_forced_isa_is_reported(command):
    pytest.importorskip("fastattn._native")
    facts = json.loads(command("info", "--json", FASTATTN_ISA="scalar").stdout)
    assert facts["native"]["isa"] == "scalar"
    assert facts["environment"]["FASTATTN_ISA"] == "scalar"
    assert "FASTATTN_ISA" in facts["native"]["why"]


def test_without_torch(command, without):
    done = command("info", "--json", path=(without("torch"),))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "No module named 'torch'" in facts["torch"]["error"]
    assert "No module named 'torch'" in facts["import"]["error"]
    assert any("torch" in problem for problem in facts["problems"])
    assert facts["python"]["version"] == platform.python_version()


def test_other_commands_point_to_info_when_the_package_is_broken(command, without):
    done = command("check", path=(without("torch"),))
    assert done.returncode == 1
    assert "python -m fastattn info" in done.stderr and "No module named 'torch'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_rich_and_matplotlib_as_text(command, without):
    done = command("info", path=(without("rich", "matplotlib"),))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["section", "fact", "value"]
    assert any(line.split()[:1] == ["torch"] and torch.__version__ in line for line in lines)


@pytest.mark.parametrize("content", [b"", b"this is no shared object"], ids=["empty", "text"])
def test_corrupt_library(command, copied, content):
    (copied / "fastattn" / "_C.so").write_bytes(content)
    done = command("info", "--json", path=(copied,))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["fastattn"]["path"] == str(copied / "fastattn")
    assert "_C.so does not load" in facts["libraries"]["_C"]
    assert any("_C.so does not load" in problem and "plain PyTorch" in problem for problem in facts["problems"])
    assert facts["auto"]["cpu"]["attention"] == "reference"


def test_not_built(command, copied):
    facts = json.loads(command("info", "--json", path=(copied,)).stdout)
    # Not so fastattn._native: where the package is installed for editing, its import hook still finds the original's.
    assert facts["libraries"]["_C"] == "_C.so is not built"


def test_broken_python_file(command, copied):
    (copied / "fastattn" / "ops" / "attention.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = command("info", "--json", path=(copied,))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["import"]["error"] == "RuntimeError: broken on purpose"
    assert facts["torch"]["version"] == torch.__version__


def test_a_section_that_kills_the_process_costs_only_itself(command, copied):
    # As a cut-off shared object does (SIGBUS): the signal is reported, the other sections are still read.
    (copied / "fastattn" / "_native.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGBUS)\n")
    facts = json.loads(command("info", "--json", path=(copied,)).stdout)
    assert "SIGBUS" in facts["native"]["error"]
    assert facts["torch"]["version"] == torch.__version__
    assert facts["libraries"]["_C"] == "_C.so is not built"
