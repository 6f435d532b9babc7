"""``python -m benchmarks.gpu`` as far as it goes without a GPU: what it plans, how it times, judges and reports, and a dry run."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, peers, plan, report, sanitizer, session, timing, verdicts
from fastattn.cli import cases, check
from fastattn.cli.cases import Case
from fastattn.cli.rows import Row

_ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class CountingWatch:
    """Calls take as many milliseconds as they say; what happened is kept."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def prepare(self, cold: bool) -> None:
        self.log.append("flush" if cold else "fill")

    def time(self, function: Callable[[], object]) -> Callable[[], float]:
        milliseconds = function()
        self.log.append(f"call {milliseconds}")
        return lambda: milliseconds / 1e3 if isinstance(milliseconds, int) else 1e-3

    def finish(self) -> None:
        self.log.append("finish")


def test_every_operation_and_feature_is_checked() -> None:
    assert sorted(op for group in plan.GROUPS.values() for op in group) == sorted(cases.OPS)
    planned = plan.checks(tuple(plan.GROUPS), quick=False)
    for op in cases.OPS:
        own = [wanted.case for wanted in planned if wanted.case.op == op]
        assert all(case in own for case in cases.full_cases(op))
    assert {wanted.dtype for wanted in planned} == {"bfloat16", "float16", "float32"}
    assert any(wanted.tf32 and wanted.case.op == "attention" for wanted in planned)
    assert len(plan.checks(("norm",), quick=True)) < len(plan.checks(("norm",), quick=False)) / 3
    parts = [plan.checks(("rope",), quick=False)[i::3] for i in range(3)]
    assert sum(map(len, parts)) == len(plan.checks(("rope",), quick=False))


def test_bars_are_measured_first_and_every_measurement_has_work_and_peers() -> None:
    planned = plan.measurements(tuple(plan.GROUPS), quick=False)
    assert len({wanted.name for wanted in planned}) == len(planned)
    with_bar = [wanted.rate_bar or wanted.share_bar or wanted.ratio_bar for wanted in planned]
    assert [bar is None for bar in with_bar] == sorted(bar is None for bar in with_bar)
    for wanted in planned:
        assert cases.work(wanted.case, torch.bfloat16, wanted.direction)[0] > 0
        names = peers.for_case(wanted.case, "triton")
        assert next(iter(names)) == "rung below (reference)"
        assert not wanted.against or wanted.against in names
    rates = {(w.case.shape, w.case.label, w.direction): w.rate_bar for w in planned if w.case.op == "attention"}
    assert rates[(1, 16, 16384, 128), "", "forward"] == 610e3
    assert rates[(1, 16, 16384, 128), "causal", "backward"] == 500e3
    quick = plan.measurements(tuple(plan.GROUPS), quick=True)
    assert {w.case.op for w in quick} == {w.case.op for w in planned} and len(quick) < len(planned)


def test_contenders_run_in_turns_and_one_that_breaks_is_left_out() -> None:
    def broken() -> int:
        raise RuntimeError("no kernel for this call")

    watch = CountingWatch()
    contenders = {"a": lambda: 2, "b": lambda: 8, "c": broken}
    timings, errors = timing.interleave(contenders, 0.06, watch, cold=True)
    assert errors == {"c": "RuntimeError: no kernel for this call"}
    assert timings["a"].median == 2e-3 and timings["b"].median == 8e-3
    assert timings["a"].samples == timings["b"].samples == 6  # 60 ms / 10 ms a round
    assert watch.log[4 * 2 :][:5] == ["flush", "call 2", "flush", "call 8", "finish"]


def _session(implementation: str = "reference", **limits: float) -> session.Session:
    return session.Session(CPU, implementation, CountingWatch(), limits)


def _some_peers(case: Case, implementation: str) -> dict[str, peers.Peer]:
    def absent(case: Case, t: peers.Tensors) -> peers.Call:
        import a_library_that_is_not_there  # noqa: F401

    def refusing(case: Case, t: peers.Tensors) -> peers.Call:
        return functools.partial(torch.linalg.inv, t["x"] if "x" in t else t["q"][0, 0])

    ours = functools.partial(peers.ours, implementation="reference")
    return {"rung below (reference)": ours, "eager": peers._eager, "absent": absent, "refusing": refusing}


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_rows_of_a_measurement(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    monkeypatch.setattr(peers, "for_case", _some_peers)
    wanted = plan.Measurement("norm", Case("rms_norm", (8, 16), {"weight": True}), direction, rate_bar=2.0)
    rows = list(_session(**{"GB/s": 4.0}).rows(wanted, 0.01, "float32"))
    good = {row.peer: row for row in rows if row.verdict == check.OK}
    bad = {row.peer: row.note for row in rows if row.verdict != check.OK}
    assert set(good) == {"rung below (reference)", "eager"} and set(bad) == {"absent", "refusing"}
    assert bad["absent"].startswith("ModuleNotFoundError")
    row = good["eager"]
    assert row.ratio == 1.0 and row.unit == "GB/s" and row.median == 1e-3
    assert row.rate == pytest.approx({"forward": 2, "backward": 3, "forward+backward": 5}[direction] * 8 * 16 * 4 / 1e6)
    assert row.roofline_percent == pytest.approx(100 * row.rate / 4.0)
    assert row.rate_bar is None  # this is no H100
    json.dumps(dataclasses.asdict(row))


def test_what_fails_its_check_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "for_case", _some_peers)
    monkeypatch.setattr(session, "gate", lambda oracle, implementation: (check.FAILED, "out: error 1 > 0"))
    wanted = plan.Measurement("rope", Case("rope", (1, 2, 8, 16), {}))
    (row,) = _session().rows(wanted, 0.01)
    assert row.verdict == check.FAILED and row.median is None and row.note == "out: error 1 > 0"
    (row,) = _session("cuda").rows(wanted, 0.01)
    assert row.verdict == check.UNAVAILABLE and "not written for rope" in row.note


@pytest.mark.parametrize("options", [{"causal": True, "nheads_kv": 2}, {"mask": "additive", "mask_grad": False}, {}])
def test_long_attention_is_judged_by_heads(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(session, "_WHOLE_PAIRS", 100)
    judged = session.Tensors(Case("attention", (2, 4, 33, 16), options), torch.float32, CPU, gradients=True)
    assert judged.whole is None
    assert judged.judged("reference") == (check.OK, "")
    honest = cases.prepare

    def wrong(*arguments: Any) -> Callable[[], cases.Outputs]:
        call = honest(*arguments)
        return lambda: {"out": call()["out"] * 1.001}

    monkeypatch.setattr(cases, "prepare", wrong)
    verdict, reason = judged.judged("reference")
    assert verdict == check.FAILED and "out of head" in reason


def _row(**changes: Any) -> Row:
    facts: dict[str, Any] = {"op": "rms_norm", "case": "weight", "shape": (8, 16), "dtype": "bfloat16"}
    facts |= {"direction": "forward", "implementation": "triton", "isa": "", "peer": "eager", "verdict": "ok"}
    facts |= {"ratio": 1.5, "median": 1e-3, "rate": 2800.0, "unit": "GB/s", "roofline_percent": 93.0}
    return Row(**facts | {"device": "NVIDIA H100", "arch": "sm_90", "rate_bar": 2900.0} | changes)


def test_the_table_has_ratios_bars_and_reasons() -> None:
    rows = [
        _row(),
        _row(peer="matmul", ratio=0.99, bar=0.98),
        _row(peer="quack", verdict="unavailable", note="no module"),
    ]
    text = report.markdown(rows, {"GB/s": 3000.0})
    assert "# NVIDIA H100 (sm_90)" in text and "Measured limits: 3 TB/s" in text
    line = next(line for line in text.splitlines() if line.startswith("| rms_norm"))
    assert "| 1 | 2.8 TB/s | 93 % | MISSED: >= 2.9 TB/s, met: matmul >= 0.98 | eager 1.50, matmul 0.99 |" in line
    assert "- rms_norm 8x16 bfloat16 forward quack: unavailable, no module" in text


def test_without_a_gpu_it_says_what_would_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command.main([]) == 2
    assert "TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu" in capsys.readouterr().err
    assert command.main(["--device", "cpu"]) == 2
    with pytest.raises(SystemExit):
        command.main(["--only", "sorting"])


def test_the_cpp_kernels_have_bars_of_their_own() -> None:
    planned = plan.measurements(tuple(plan.GROUPS), quick=False, implementation="cuda")
    assert len({wanted.name for wanted in planned}) == len(planned)
    bars = {(w.case.shape, w.case.label, w.direction): w for w in planned if w.group == "attention"}
    assert bars[(1, 16, 16384, 128), "", "forward"].rate_bar == 700e3
    assert bars[(1, 16, 16384, 128), "causal", "backward"].rate_bar == 575e3
    assert bars[(1, 8, 16384, 256), "", "forward"].rate_bar == 750e3
    short = bars[(32, 16, 512, 128), "", "forward"]
    assert (short.against, short.ratio_bar) == ("sdpa:cudnn", 1.0)
    assert short.against in peers.for_case(short.case, "cuda")
    assert next(iter(peers.for_case(short.case, "cuda"))) == "rung below (triton)"
    assert {w.rate_bar for w in planned if w.group == "norm" and w.memory} == {3000.0, 2400.0}
    assert {w.share_bar for w in planned if w.share_bar} == {85.0}


def test_the_cpp_kernels_need_a_gpu_and_their_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--implementation", "cuda", "--device", "cpu"]) == 2
    assert "these kernels run on a GPU alone" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cases, "parse_device", torch.device)
    monkeypatch.setattr(command._library, "has_cuda", False)
    monkeypatch.setitem(command._library.load_errors, "_cuda", "_cuda.so is not built")
    assert command.main(["--implementation", "cuda"]) == 2
    assert "_cuda.so is not built; FASTATTN_BUILD_CUDA=only" in capsys.readouterr().err


_SANITIZER = """#!/bin/sh
[ "$1 $2 $3 $4 $5 $6" = "--tool {tool} --error-exitcode 86 --kernel-name kernel_substring=fastattn" ] || {{ {other}; }}
{own}
"""


def _sanitized(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, seconds: float = 20.0) -> dict[str, Any]:
    """The rows of a compute-sanitizer that does ``own`` for memcheck and finds nothing with racecheck, by tool."""
    program = folder / "compute-sanitizer"
    program.write_text(
        _SANITIZER.format(tool="memcheck", own=own, other="echo '========= ERROR SUMMARY: 0 errors'; exit 0")
    )
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda: str(program))
    rows = {row["case"]: row for row in sanitizer.run(["--only", "norm"], seconds)}
    assert rows.pop("racecheck")["verdict"] == check.OK
    return rows["memcheck"]


def test_what_the_sanitizer_finds_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = (
        "echo '========= Invalid __global__ write of size 16 bytes'; echo '========= ERROR SUMMARY: 3 errors'; exit 86"
    )
    row = _sanitized(monkeypatch, tmp_path, error)
    assert row["verdict"] == check.FAILED
    assert row["note"] == "Invalid __global__ write of size 16 bytes (ERROR SUMMARY: 3 errors)"
    assert "memcheck" in correctness.failures([row])[0]
    assert _sanitized(monkeypatch, tmp_path, "exit 0")["verdict"] == check.OK
    assert _sanitized(monkeypatch, tmp_path, "echo Killed; exit 3")["note"] == "exit code 3: Killed"
    assert _sanitized(monkeypatch, tmp_path, "sleep 9", 0.5)["verdict"] == check.UNAVAILABLE
    hazard = sanitizer._judged("racecheck", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 0)
    assert hazard["verdict"] == check.FAILED
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert {row["verdict"] for row in sanitizer.run([], 1.0)} == {check.UNAVAILABLE}
    words = sanitizer.command("tool", "memcheck", ["--only", "norm", "--quick"])
    assert words[-5:] == ["--only", "norm", "--quick", "--part", "1/1"]


@pytest.mark.parametrize("verdict", [check.OK, check.FAILED])
def test_a_wrong_result_is_the_exit_code(
    verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = correctness.row("attention", "causal", "triton", "bfloat16", verdict, "error 1 > 0")
    monkeypatch.setattr(correctness, "run", lambda arguments, processes, seconds: ([found], False))
    assert command.main(["--device", "cpu"]) == (0 if verdict == check.OK else 1)
    text = capsys.readouterr().out
    assert ("FAILED: attention [causal]" in text) == (verdict == check.FAILED) and "not every check was reached" in text


def test_no_verdict_rests_on_deterministic_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    asked = []
    monkeypatch.setattr(correctness, "run", lambda arguments, *_: asked.append(arguments) or ([], True))
    monkeypatch.setattr(peers, "for_case", _some_peers)
    wanted = plan.Measurement("norm", Case("rms_norm", (8, 16), {"weight": True}))
    rows, before = [], torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        for flags in ([], ["--deterministic"]):
            assert command.main(["--device", "cpu", *flags]) == 0
            assert ("--deterministic" in asked[-1]) == bool(flags) == torch.are_deterministic_algorithms_enabled()
            rows.append(next(_session().rows(wanted, 0.01, "float32")))
    finally:
        torch.use_deterministic_algorithms(before)
    assert [row.limits for row in rows] == ["", "deterministic algorithms"]
    lines = [json.dumps(dataclasses.asdict(row) | {"arch": "sm_90"}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert [row["limits"] for row in verdicts.rows_of(tmp_path)] == [""]


def test_a_process_that_dies_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    rows, complete = correctness.run([], 1, 5.0)
    assert complete and correctness.failures(rows) == ["process []   : exit code 1: "]


def test_a_dry_run_needs_neither_installation_nor_core(tmp_path: Path) -> None:
    """In the interpreter, from a copy without shared objects: the checks of one group, green."""
    pytest.importorskip("triton")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for folder in ("fastattn", "benchmarks"):
        shutil.copytree(_ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copytree(_ROOT / "tests" / "triton", tmp_path / "tests" / "triton", ignore=ignored)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = ["-m", "benchmarks.gpu", "--device", "cpu", "--only", "norm", "--quick", "--processes", "1"]
    done = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results of triton within the bound, 0 not" in done.stdout and "not built" not in done.stderr
