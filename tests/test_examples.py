"""The examples run, small, as a user would start them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("convert_modules", {"width": 128, "layers": 1, "tokens": 16}, "14 swapped, 0 left"),
        ("patch_functional", {"width": 64, "tokens": 32}, "attention: "),
        ("flash_registry", {"width": 64, "tokens": 70}, "FASTATTN"),
        ("huggingface", {"length": 40}, "20 more tokens: ["),
    ],
)
def test_example(name: str, arguments: dict[str, int], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    if name == "huggingface":
        pytest.importorskip("transformers")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(**arguments)
    assert expected in capsys.readouterr().out
