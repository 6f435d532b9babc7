"""``bench``: counts, schema, the gate in front of every figure, the plot. How long something took is asserted nowhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import sys
import time

import pytest
import torch

from fastattn import __main__ as cli
from fastattn import ops
from fastattn.cli import bench, cases, measure, overhead, peers, sweep
from fastattn.cli.cases import Case
from fastattn.cli.plain import plain_outputs
from fastattn.ops._library import has_cpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("case", "forward", "both", "unit"),
    [
        (Case("attention", (1, 2, 3, 4)), 4 * 2 * 9 * 4, 3.5 * 4 * 2 * 9 * 4, "GFLOP/s"),
        # Rows 2, keys 5: bottom-right they see 4 and 5 keys, top-left 1 and 2.
        (Case("attention", (1, 1, 2, 5, 8), {"causal": True}), 4 * 9 * 8, 3.5 * 4 * 9 * 8, "GFLOP/s"),
        (Case("scaled_dot_product_attention", (1, 1, 2, 5, 8), {"is_causal": True}), 4 * 3 * 8, 336, "GFLOP/s"),
        (Case("attention", (1, 2, 3, 5, 4), {"mask": "padding"}), 4 * 2 * 6 * 4, 3.5 * 4 * 2 * 6 * 4, "GFLOP/s"),
        (Case("layer_norm", (10, 6), {"weight": True}), 2 * 60 * 4, 5 * 60 * 4, "GB/s"),
        (Case("rms_norm", (10, 6), {"residual": True}), 3 * 60 * 4, 7 * 60 * 4, "GB/s"),
        (Case("ffn", (2, 3, 5), {"activation": "gelu"}), 4 * 30, 12 * 30, "GFLOP/s"),
        (Case("glu_ffn", (2, 3, 5), {"activation": "swiglu"}), 6 * 30, 18 * 30, "GFLOP/s"),
        (Case("rope", (1, 2, 3, 4)), 2 * 24 * 4, 4 * 24 * 4, "GB/s"),
        (Case("linear", (2, 3, 5)), 2 * 30, 6 * 30, "GFLOP/s"),
        (Case("cross_entropy", (3, 7)), 21 * 4, 3 * 21 * 4, "GB/s"),
        (Case("linear_cross_entropy", (2, 3, 5)), 2 * 30, 6 * 30, "GFLOP/s"),
    ],
)
def test_work_counts(case, forward, both, unit):
    assert bench.work(case, torch.float32, "forward") == (forward, unit)
    assert bench.work(case, torch.float32, "forward+backward") == (both, unit)
    if unit == "GFLOP/s" and "attention" in case.op:
        assert bench.work(case, torch.float32, "backward") == (both - forward, unit)


def test_percentiles_interpolate():
    assert measure.percentile([5.0, 1.0, 2.0, 4.0, 3.0], 0.2) == pytest.approx(1.8)
    assert measure.percentile([7.0], 0.8) == 7.0


def test_interleaving_gives_everyone_samples_and_the_hopeless_one():
    order: list[str] = []

    def contender(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    found = measure.interleave(
        {"a": contender("a", 0.002), "b": contender("b", 0.02), "c": contender("c", 0.2)}, 0.1, CPU
    )
    assert found["c"].samples == 1 and order.count("c") == 1
    assert found["b"].samples >= measure.MIN_SAMPLES and found["a"].samples >= measure.MIN_SAMPLES
    timed = [name for name in order if name != "c"]
    # In turns: b's samples are not one block, and a runs before, between and after them.
    first, last = timed.index("b", 4), len(timed) - 1 - timed[::-1].index("b")
    assert "a" in timed[first:last]
    for timing in found.values():
        assert timing.p20 <= timing.median <= timing.p80


def _rows(text: str) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_json_and_jsonl_rows(command, tmp_path):
    log = tmp_path / "results" / "rows.jsonl"
    arguments = ["bench", "rope", "--quick", "--dtype", "float32", "--peer", "eager", "--save", str(log), "--json"]
    for _ in range(2):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    saved = _rows(log.read_text())
    assert len(saved) == 2 * len(rows) and saved[len(rows) :] == rows  # appended, not overwritten
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row) == {field.name for field in dataclasses.fields(bench.Row)}
        assert (row["op"], row["dtype"], row["peer"], row["verdict"]) == ("rope", "float32", "eager", "ok")
        assert row["shape"] == [1, 12, 1024, 64] and row["unit"] == "GB/s"
        assert row["ratio"] == pytest.approx(row["peer_median"] / row["median"])
        moved, _ = bench.work(Case("rope", tuple(row["shape"])), torch.float32, row["direction"])
        assert row["rate"] == pytest.approx(moved / row["median"] / 1e9)
        assert row["roofline_percent"] == pytest.approx(100 * row["rate"] / row["roofline"])
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert 0 < row["peer_p20"] <= row["peer_median"] <= row["peer_p80"]
        assert row["samples"] >= 1 and row["threads"] == torch.get_num_threads() and row["torch"] == torch.__version__
        assert row["load"] >= 0 and row["device"] and row["date"].endswith("+00:00") and row["implementation"]


def _tiny(monkeypatch) -> None:
    cases_of = lambda op: [Case(op, (9, 16), {"weight": True, "bias": True})]
    monkeypatch.setattr(bench, "quick_cases", cases_of)


def test_a_failed_check_has_no_speed(monkeypatch, capsys):
    _tiny(monkeypatch)
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert cli.main(["bench", "layer_norm", "--quick", "--dtype", "float32", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["verdict"] == "FAILED" and "out: error" in row["note"]
    assert row["ratio"] is row["median"] is row["rate"] is None
    with pytest.raises(ValueError, match="no row has figures"):
        bench.plot(bench.run(["layer_norm"], dtypes=["float32"], quick=True), "unused.png")


def test_bar(monkeypatch, capsys):
    _tiny(monkeypatch)
    arguments = ["bench", "layer_norm", "--quick", "--dtype", "float32", "--peer", "eager", "--fail-below"]
    assert cli.main([*arguments, "1e9"]) == 1
    assert "below 1000000000.0: layer_norm" in capsys.readouterr().out
    assert cli.main([*arguments, "1e-9"]) == 0


def test_attention_peers_say_the_same_and_name_the_backend():
    case = Case("attention", (1, 2, 5, 9, 8), {"causal": True})
    t = cases.make_tensors(case, torch.float32, CPU)
    found = peers.peers(case, t, list(peers.PEERS))
    assert [name.partition(":")[0] for name in found] == ["sdpa", "eager"]
    sdpa = next(name for name in found if name.startswith("sdpa"))
    assert sdpa.partition(":")[2] in ("flash", "math", "efficient")
    exact = plain_outputs(case, {name: tensor.double() for name, tensor in t.items()})["out"]
    for call in found.values():
        assert (call()["out"].double() - exact).abs().max().item() < 1e-5


def test_compile_is_a_peer_of_the_others_and_right():
    case = Case("rms_norm", (9, 16), {"weight": True})
    t = cases.make_tensors(case, torch.float32, CPU)
    found = peers.peers(case, t, ["compile"])
    if not found:
        pytest.skip("torch.compile does not work here (no C++ compiler)")
    exact = plain_outputs(case, {name: tensor.double() for name, tensor in t.items()})["out"]
    assert (found["compile"]()["out"].double() - exact).abs().max().item() < 1e-5


def _made_up_rows() -> list[bench.Row]:
    peers_of = {"attention": ("sdpa:flash", "eager"), "layer_norm": ("eager", "compile")}
    return [
        bench.Row(op, "", (4, 4), dtype, direction, "cpu", "avx2", peer, "ok", ratio=ratio, device="a CPU", threads=2)
        for op, names in peers_of.items()
        for dtype in ("float32", "bfloat16")
        for direction in bench.DIRECTIONS
        for peer, ratio in zip(names, (0.8, 3.0), strict=True)
    ]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = bench.plot(_made_up_rows(), tmp_path / "new" / "speed.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1200 < width < 2400 and 250 < height < 1200
    assert len(data) > 15_000


def test_scaling(tmp_path):
    """Two lengths, each in its own process: checked, timed, and the memory of a call is its output's order, not N²'s."""
    rows = bench.run_scaling((512, 4096), budget=0.01)
    assert [row.shape for row in rows] == [(1, 1, 512, 64), (1, 1, 4096, 64)]
    for row in rows:
        assert row.verdict == "ok" and row.threads == 2 and row.memory is not None
        assert row.ratio == pytest.approx(row.peer_median / row.median)
    assert 4096 * 64 * 2 <= rows[1].memory < 4096 * 4096 * 2 / 4
    pytest.importorskip("matplotlib")
    data = bench.plot_scaling(rows, tmp_path / "new" / "scaling.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 15_000


def test_sweep_covers_the_sizes():
    found = list(sweep.calls())
    shapes = [case.attention_shape for case in found]
    assert {dim for *_, dim in shapes} == set(sweep.HEAD_DIMS) and {32, 256} <= set(sweep.HEAD_DIMS)
    assert {rows for _, _, rows, keys, _ in shapes if rows == keys} == set(sweep.LENGTHS)
    assert {1, 512} <= {batch * heads for batch, heads, *_ in shapes}
    assert {(rows, keys) for _, _, rows, keys, _ in shapes if rows != keys} == set(
        itertools.product(sweep.QUERIES, sweep.KEYS)
    )
    assert {bool(case.options) for case in found} == {True, False}
    for case in found:
        assert (
            sweep.flop(case)
            == bench.work(dataclasses.replace(case, options={}), torch.float32, "forward+backward")[0] / 3.5
        )
        assert sweep.flop(case) <= sweep.MAX_FLOP
    assert {sweep.directions(case, "float16") for case in found} == {("forward",), ("forward", "backward")}


def test_sweep_lists_what_is_slower(monkeypatch, capsys):
    """A row below 1 is measured a second time, with more time; if it stays there, it is listed and the exit code is 1."""
    monkeypatch.setattr(sweep, "calls", lambda: [Case("attention", (1, 2, 9, 8)), Case("attention", (1, 2, 5, 8))])
    monkeypatch.setattr(sweep, "SHOWN", 0)
    monkeypatch.setattr(measure.MatrixPeak, "SIZES", (16,))
    budgets = []

    def timed(calls, budget, device):
        budgets.append(budget)
        slower = 2.0 if len(budgets) > 2 else 1.0  # all of the first call's
        return {name: measure.Timing(*[1.5 if name == bench.OURS else slower] * 3, 5) for name in calls}

    monkeypatch.setattr(bench, "interleave", timed)
    assert cli.main(["bench", "attention", "--sweep", "--dtype", "float32"]) == 0
    assert budgets == [sweep.SECONDS] * 2 + [sweep.AGAIN_SECONDS] * 2 + [sweep.SECONDS] * 2
    assert "float32 forward: 2 rows, worst ratio 1.33, 0 below 1" in capsys.readouterr().out
    slow = {True: measure.Timing(2.0, 2.0, 2.0, 5), False: measure.Timing(1.0, 1.0, 1.0, 5)}
    monkeypatch.setattr(bench, "interleave", lambda calls, *_: {name: slow[name == bench.OURS] for name in calls})
    assert cli.main(["bench", "attention", "--sweep", "--dtype", "float32", "--only", "1x2x9"]) == 1
    text = capsys.readouterr().out
    assert text.count("1x2x9x8") == 2 and "float32 backward: 1 rows, worst ratio 0.50, 1 below 1" in text


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fastattn\[bench\]"):
        bench.plot(_made_up_rows(), tmp_path / "speed.png")


@pytest.mark.skipif(not has_cpu, reason="needs the C++ core")
def test_overhead_compares_the_function_with_its_own_operator(capsys, monkeypatch):
    cli.main(["bench", "overhead", "--seconds", "0.01", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["op"], row["mode"]) for row in rows] == list(
        itertools.product(("attention", "layer_norm", "ffn"), ("no grad", "grad", "step"))
    )
    assert all(row["verdict"] == "ok" and row["on_top"] == row["function"] - row["kernel"] for row in rows)
    other = dataclasses.replace(next(overhead.calls()), function=lambda q, k, v: q + k + v)
    assert overhead.missed(overhead.measured(other, "no grad", 0.01))
    overhead.render([overhead.Overhead("attention", "grad", "FAILED")])
    assert "missed: attention, grad" in capsys.readouterr().out
