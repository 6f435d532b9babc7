"""``explain``: the ladder of one call, and requests that cannot be met."""

from __future__ import annotations

import json

import pytest

from fastattn import __main__ as cli
from fastattn.cli import table


def test_ladder_as_json(command):
    done = command("explain", "attention", "--shape", "1,4,32,48,16", "--nheads-kv", "2", "--causal", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [rung["name"] for rung in found["rungs"]] == ["cuda", "triton", "cpu", "reference"]
    assert [rung["name"] for rung in found["rungs"] if rung["chosen"]] == [found["implementation"]]
    for rung in found["rungs"]:
        assert rung["reason"] is None if rung["chosen"] else True
        assert rung["reason"] or rung["name"] in ("cpu", "reference")
    assert found["options"] == {"causal": True, "nheads_kv": 2}
    assert found["shape"] == [1, 4, 32, 48, 16]


def test_named_implementation(capsys):
    assert cli.main(["explain", "layer_norm", "--implementation", "reference", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["implementation"] == "reference"


def test_as_text_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert cli.main(["explain", "rope"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rope 2x3x19x24 float32 on cpu")
    assert [line.split()[0] for line in lines[3:]] == ["cuda", "triton", "cpu", "reference"]
    assert sum("chosen" in line for line in lines) == 1


def test_plain_tables_are_aligned(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    table.print_table(("op", "ratio"), [("attention", "1.25"), ("rope", "10.5")], title="speed", left=1)
    assert capsys.readouterr().out == "speed\nop         ratio\n---------  -----\nattention   1.25\nrope        10.5\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "rope", "--shape", "1,2,3"], "--shape for rope must be B,H,N,D; got '1,2,3'"),
        (["explain", "rope", "--shape", "1,x,3,4"], "--shape for rope"),
        (["explain", "layer_norm", "--causal"], "layer_norm has no causal"),
        (["explain", "ffn", "--activation", "tanh"], "activation"),
        (["explain", "attention", "--nheads-kv", "4", "--shape", "1,6,8,8"], "4"),
        (["explain", "attention", "--dropout", "1.5"], "dropout_p"),
        (["check", "--device", "cuda:99"], "CUDA devices"),
        (["check", "--device", "tpu"], "--device"),
        (["check", "--isa", "sse9"], "--isa"),
        (["bench", "softmax"], "no operation softmax"),
    ],
)
def test_bad_requests_name_what_was_wrong(capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
