"""Every Triton kernel's shipped configuration, compiled ahead of time for GPUs that are not here.

Nothing may spill, shared memory must fit the architecture, and matrix products must run on its tensor cores' best instruction
(``compiled_report.py: faults``). The compiler cannot share a process with the interpreter, nor may it find binaries of an earlier
run: each test is a process of its own with an empty cache. A spread runs always, everything with the slow tests.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import families
import kernel_table

_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
#: Cases of one test: one takes up to 15 s on a slow core.
_CASES = 8

_SPREAD = [
    ("sm_80", "attention", "head_dim=128", "dtype=bfloat16"),
    ("sm_80", "ffn", "dtype=bfloat16"),
    ("sm_90", "attention", "head_dim=128", "dtype=bfloat16"),
    ("sm_90", "attention_forward", "head_dim=128", "windowed=False", "extras=False", "keys=own"),
    ("sm_90", "attention_forward", "head_dim=128", "windowed=False", "keys=gluon"),
    ("sm_90", "norm", "columns=4096", "dtype=bfloat16"),
    ("sm_90", "norm", "columns=32768", "dtype=bfloat16"),
    ("sm_90", "cross_entropy", "classes=32000", "dtype=bfloat16"),
    ("sm_90", "rope", "head_dim=256", "heads=16", "dtype=bfloat16"),
    ("sm_90", "ffn", "dtype=bfloat16"),
    ("sm_100", "attention", "head_dim=128", "dtype=bfloat16", "extras=False"),
    ("sm_120", "attention", "head_dim=64", "dtype=bfloat16", "extras=False"),
    ("gfx942", "attention", "head_dim=64", "dtype=bfloat16", "extras=False"),
]


def _parts() -> list[tuple[str, str, str]]:
    found = []
    for family in families.names():
        count = -(-len(list(families.cases([family]))) // _CASES)
        found += [(arch, family, f"{i + 1}/{count}") for arch in _ARCHITECTURES for i in range(count)]
    return found


def _check(*arguments: str) -> None:
    rows = kernel_table.report(*arguments, timeout=900)
    assert rows
    wrong = [f"{row['case']} {row['name']} {fault}" for row in rows for fault in row["wrong"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arguments", _SPREAD, ids="-".join)
def test_a_spread_of_configurations_fits(arguments: tuple[str, ...]) -> None:
    arch, family, *only = arguments
    _check(arch, family, "--only", *only)


@pytest.mark.slow
@pytest.mark.parametrize("arch, family, part", _parts(), ids=lambda value: value.replace("/", "of"))
def test_every_configuration_fits(arch: str, family: str, part: str) -> None:
    _check(arch, family, "--part", part)
