"""``check`` finds what is wrong: errors, wrong gradients, NaN, exceptions; and lets pass what is right."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import __main__ as cli
from fastattn import ops
from fastattn.cli import cases, check
from fastattn.cli.cases import Case
from fastattn.cli.plain import plain_outputs


def test_reference_passes_with_figures(command):
    done = command("check", "--op", "layer_norm", "rope", "--quick", "--implementation", "reference", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is True
    rows = found["rows"]
    assert {row["dtype"] for row in rows} == set(cases.DTYPES)
    assert {row["result"] for row in rows if row["op"] == "layer_norm"} == {"out", "grad x", "grad weight", "grad bias"}
    for row in rows:
        assert row["verdict"] == "ok" and row["implementation"] == "reference"
        assert 0 <= row["error"] <= row["bound"]
    # bfloat16 keeps 8 bits: plain PyTorch's error on values of about 3 is of the order of 3 · 2⁻⁹.
    plain = [r["plain_error"] for r in rows if (r["op"], r["dtype"], r["result"]) == ("layer_norm", "bfloat16", "out")]
    assert 2**-9 < plain[0] < 2**-4


def test_every_implementation_here_passes_the_quick_cases():
    rows = check.run(quick=True, isa="all" if check.isas_to_run(None) != [""] else None)
    assert [row for row in rows if row.verdict == check.FAILED] == []
    assert check.passed(rows)
    assert {row.op for row in rows} == set(cases.OPS)


def test_both_causal_alignments_are_among_the_quick_cases():
    (bottom_right,) = [case for case in cases.quick_cases("attention") if case.options.get("causal")]
    (top_left,) = [case for case in cases.quick_cases("scaled_dot_product_attention") if case.options.get("is_causal")]
    for case in (bottom_right, top_left):
        _, _, rows, keys, _ = case.attention_shape
        assert rows != keys


@pytest.mark.parametrize("rows, keys", [(5, 9), (9, 5), (7, 7)])
def test_the_oracle_agrees_with_torch_on_top_left(rows, keys):
    case = Case("scaled_dot_product_attention", (2, 3, rows, keys, 8), {"is_causal": True})
    t = cases.make_tensors(case, torch.float64, torch.device("cpu"))
    expected = F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)
    assert (plain_outputs(case, t)["out"] - expected).abs().max().item() < 1e-14


def test_the_oracle_of_bottom_right_with_every_score_term():
    case = Case(
        "attention",
        (1, 2, 3, 5, 4),
        {"causal": True, "alibi": True, "sinks": True, "softcap": 2.0, "mask": "additive", "return_lse": True},
    )
    t = cases.make_tensors(case, torch.float64, torch.device("cpu"))
    q, k, v, mask = (t[name][0, 0].tolist() for name in ("q", "k", "v", "attn_mask"))
    slope, sink = t["alibi_slopes"][0].item(), t["sinks"][0].item()
    i = 1  # sees keys 0..3, for the last query (2) sees the last key (4)
    logits = []
    for j in range(4):
        score = 2.0 * math.tanh(sum(a * b for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(4) / 2.0)
        logits.append(score + mask[i][j] - slope * abs(i + 2 - j))
    lse = math.log(sum(map(math.exp, logits)) + math.exp(sink))
    expected = [sum(math.exp(logits[j] - lse) * v[j][d] for j in range(4)) for d in range(4)]
    found = plain_outputs(case, t)
    assert found["lse"][0, 0, i].item() == pytest.approx(lse, abs=1e-13)
    assert found["out"][0, 0, i].tolist() == pytest.approx(expected, abs=1e-13)


def _broken(monkeypatch, change) -> None:
    """layer_norm whose result went through ``change``."""
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, *args, **kwargs: change(x, right(x, *args, **kwargs)))


ARGUMENTS = ["check", "--op", "layer_norm", "--quick", "--dtype", "float32", "--implementation", "reference"]


def test_a_wrong_result_fails(monkeypatch, capsys):
    _broken(monkeypatch, lambda x, y: y * 1.0001)
    assert cli.main(ARGUMENTS) == 1
    text = capsys.readouterr().out
    assert "FAILED: layer_norm [weight, bias] 37x193 float32 reference out: error" in text


def test_a_wrong_gradient_fails_alone(monkeypatch, capsys):
    _broken(monkeypatch, lambda x, y: y + 0.001 * (x - x.detach()))
    assert cli.main([*ARGUMENTS, "--json"]) == 1
    rows = {row["result"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["out"]["verdict"] == rows["grad weight"]["verdict"] == "ok"
    assert rows["grad x"]["verdict"] == "FAILED"
    # The gradient is off by 0.001 times a cotangent of which the largest of 7141 normal numbers is about 3.8.
    assert 0.003 < rows["grad x"]["error"] < 0.006


def test_nan_fails_and_the_json_stays_json(monkeypatch, capsys):
    _broken(monkeypatch, lambda x, y: y * float("nan"))
    assert cli.main([*ARGUMENTS, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["rows"]
    assert all(row["verdict"] == "FAILED" for row in rows) and rows[0]["error"] is None


def test_an_exception_is_a_verdict(monkeypatch, capsys):
    def explode(x, y):
        raise RuntimeError("kernel exploded")

    _broken(monkeypatch, explode)
    assert cli.main(ARGUMENTS) == 1
    assert "RuntimeError: kernel exploded" in capsys.readouterr().out


def test_nothing_measured_is_not_a_pass(capsys):
    assert cli.main([*ARGUMENTS[:-1], "cuda", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert (row["verdict"], row["error"]) == ("unavailable", None)
    assert "not on a CUDA device" in row["note"]


def test_own_shape_replaces_the_cases():
    rows = check.run(ops=["attention"], dtypes=["float64"], implementations=["reference"], shape="1,2,7,11,5")
    assert {row.shape for row in rows} == {(1, 2, 7, 11, 5)}
    assert {row.case for row in rows} == {"", "causal"}
    assert check.passed(rows)


def test_rule_is_that_of_the_tests():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert check.bound(0.25, exact, torch.bfloat16, 100) == 0.5 + 2**-7 * 4
    assert check.bound(0.25, exact, torch.float32, 100) == 0.5 + 10 * 2**-23 * 4
