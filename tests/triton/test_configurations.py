"""Every shipped configuration is launched by a case that is compiled, and docs/kernels.md speaks of these configurations.

Nothing is compiled here: a launch stops where Triton would compile.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import kernel_table

from fastattn.kernels import configs  # noqa: F401  defines the choices
from fastattn.kernels.choice import CHOICES, Arch

_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.fixture(scope="module")
def launches() -> list[kernel_table.Row]:
    return kernel_table.report(",".join(_ARCHITECTURES), "--launches", timeout=300)


@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_every_configuration_is_launched_by_a_case(launches: list[kernel_table.Row], arch: str) -> None:
    where = Arch.of(arch)
    asked = [entry for row in launches if row["arch"] == arch for entry in row.get("asked", ())]
    missing = [
        f"{chosen.name} {chosen.described(point)}"
        for chosen in CHOICES.values()
        for point, _ in chosen.points(where)
        if [chosen.name, chosen.described(point)] not in asked
    ]
    assert not missing, "no case of families.py launches\n" + "\n".join(missing)


def test_the_page_has_the_shipped_configurations(launches: list[kernel_table.Row]) -> None:
    expected: dict[tuple[str, str, str, str], set[str]] = {}
    for row in launches:
        if "asked" not in row and kernel_table.listed(row):
            key = row["family"], kernel_table.label(row), row["name"].removesuffix("_kernel"), row["arch"]
            expected.setdefault(key, set()).add(kernel_table.configuration(row))
    written = kernel_table.configurations(kernel_table.PAGE.read_text())
    stale = sorted(key for key in {*written, *expected} if written.get(key) != expected.get(key))
    assert not stale, f"{len(stale)} entries differ, such as {stale[:5]}: run python tests/triton/kernel_table.py"


def test_a_page_can_be_read_back() -> None:
    row = {"family": "norm", "point": {"columns": 64, "dtype": "float32", "rms": True}, "name": "norm_kernel"}
    row |= {"arch": "sm_90", "tile": {"ROWS": 4, "BLOCK": 64}, "num_warps": 8, "num_stages": None}
    row |= {"registers": 40, "stack": 0, "shared": 1536, "instructions": {"HMMA": 0, "UTMALDG": 2}}
    page = kernel_table.table([row], "3.9.0")
    assert "| 64 float32 rms | norm |  | R4 N64 8w, 40, 1.5, 2 TMA |  |  |" in page
    assert kernel_table.configurations(page) == {("norm", "64 float32 rms", "norm", "sm_90"): {"R4 N64 8w"}}
    later = kernel_table.table([row | {"family": "rope", "arch": "gfx942"}], "3.9.0", page)
    assert set(kernel_table.configurations(later)) == {
        ("norm", "64 float32 rms", "norm", "sm_90"),
        ("rope", "64 float32 rms", "norm", "gfx942"),
    }
    assert kernel_table.table([row], "3.9.0", later) == later
