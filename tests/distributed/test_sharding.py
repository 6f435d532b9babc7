"""Operators and modules on sharded tensors: two gloo processes on this machine against one that has everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
_SCRIPT = Path(__file__).with_name("ranks.py")
_NAMES = re.findall(r"^@check\ndef (\w+)", _SCRIPT.read_text(), re.MULTILINE)


def _run(names: list[str]) -> str:
    root = str(_SCRIPT.parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, str(_SCRIPT), *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return result.stdout + ("" if result.returncode == 0 else result.stderr[-3000:])


@pytest.fixture(scope="module")
def output() -> str:
    """All checks in one pair of processes, which take longer to start than to compute."""
    return _run(_NAMES)


@pytest.mark.parametrize("name", _NAMES)
def test_two_ranks(name: str, output: str) -> None:
    if f"ok {name}\n" not in output:
        # A check after one that failed has not run: alone.
        output = _run([name])
    assert f"ok {name}\n" in output, output
