"""The bars of ``bench attention norm ffn …``: the numbers themselves, what counts as missed, what is run to judge them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import pytest
import torch
from torch import nn

from fastattn import __main__ as cli
from fastattn import ops
from fastattn.cli import bars, bench, cases, check, limited, measure, modules, peers
from fastattn.cli.bars import Line
from fastattn.cli.cases import Case
from fastattn.cli.plain import plain_by_head, plain_outputs
from fastattn.models import Transformer, TransformerConfig

CPU = torch.device("cpu")
BERT = "1x12x1024x64"
#: Line: ratio bars of bfloat16, float32, float16; of each direction.
ATTENTION = {
    BERT: ((3.2, 4.5), (2.3, 2.3), (4.5, 5)),
    f"{BERT} causal": ((4, 5), (3, 3), (5, 6)),
    f"{BERT} mask=padding": ((4, 5), (3, 3), (5, 6)),
    f"{BERT} mask=additive, mask_grad=False": ((3, 4), (2, 2), (4, 4)),
    f"{BERT} mask=additive": ((3, 4), (2, 2), (4, 4)),
    f"{BERT} dropout_p=0.1": ((40, 8), (15, 3), (40, 8)),
    "1x8x2048x128": ((2.8, 4), (2.3, 2.3), (4.5, 5)),
    "16x12x128x64": ((3, 25), (2.5, 3), (5, 20)),
    "16x12x128x64 causal": ((5, 40), (4, 5), (8, 40)),
    "8x12x384x64": ((3,), (2.5,), (4,)),
    "8x12x384x64 causal": ((5,), (4,), (7,)),
    "1x32x4096x128 causal": ((2.8,), (2.2,), (4.5,)),
    "1x32x1x8192x128 nheads_kv=8": ((2.9,), (2.5,), (6,)),
    "8x32x1x8192x128 nheads_kv=8": ((3,), (2.5,), (6,)),
    "1x32x1x8192x128": ((1.2,), (1.1,), (1.6,)),
    f"{BERT} FASTATTN_ISA=avx512": ((1.2, 2.5), (1.2, 1.25), (1.2, 15)),
    f"{BERT} FASTATTN_ISA=avx2": ((1.0, 6), (1.05, 1.1), (1.0, 12)),
}
TABLE = {
    "attention": ATTENTION,
    "norm": {
        "layer_norm 8192x768": ((2.5, 3.5), (1.15, 1.5), (2, 2)),
        "rms_norm 8192x768": ((1.8, 2.5), (1.3, 2.0), (2, 2)),
        "layer_norm 8192x768 residual, dropout_p=0.1": ((3,), (2,), (2,)),
        "layer_norm 1x4096": ((3,), (2,), (2,)),
        "rms_norm 1x4096": ((3,), (2,), (2,)),
        "layer_norm 8192x768 FASTATTN_ISA=avx512": ((1, 1), (1, 1), (2, 2)),
        "rms_norm 8192x768 FASTATTN_ISA=avx512": ((1, 1), (1, 1), (2, 2)),
        "layer_norm 8192x768 FASTATTN_ISA=avx2": ((1, 1), (1, 1), (2, 2)),
        "rms_norm 8192x768 FASTATTN_ISA=avx2": ((1, 1), (1, 1), (2, 2)),
    },
    "ffn": {
        "linear 2048x2048x2048": ((None,), (1.8,), (2,)),
        "ffn 2048x768x3072 gelu": ((1.9, 2.4), (2.2, 2.2), (2, 2)),
        "glu_ffn 2048x1024x2816 swiglu": ((2.0, 2.4), (2.2, 2.2), (2, 2)),
        "ffn 1x768x3072 gelu": ((1.8,), (1.15,), (2,)),
        "glu_ffn 1x1024x2816 swiglu": ((1.8,), (1.15,), (2,)),
        "ffn 2048x768x3072 gelu FASTATTN_ISA=avx512": ((1, 6), (1, 1), (2, 6)),
        "ffn 2048x768x3072 gelu FASTATTN_ISA=avx2": ((1, 6), (1, 1), (2, 6)),
    },
    "loss": {"linear_cross_entropy 2048x768x50257": ((2.5,), (2.2,), (2,))},
    "layer": {
        "encoder_layer 16x128x768x12x3072": ((2,), (1.8,), (2,)),
        "encoder_layer 16x128x768x12x3072 dropout_p=0.1": ((5,), (2.5,), (2,)),
        "encoder_layer 8x384x768x12x3072": ((2,), (1.8,), (2,)),
        "encoder_layer 8x384x768x12x3072 dropout_p=0.1": ((8,), (3.5,), (2,)),
        "encoder_layer 16x128x768x12x3072 FASTATTN_ISA=avx512": ((1,), (1,), (2,)),
        "encoder_layer 16x128x768x12x3072 FASTATTN_ISA=avx2": ((1,), (1,), (2,)),
    },
    "model": {
        "causal_lm 1x1024": ((2.5,), (2,), (2,)),
        "causal_lm 1x512 decode": ((2,), (1.3,), (2,)),
    },
}
ALL = [(group, text) for group, lines in TABLE.items() for text in lines]


def test_the_bars_are_not_lowered():
    found = {
        group: {line.text: (line.bfloat16, line.float32, line.float16) for line in lines}
        for group, lines in bars.LINES.items()
    }
    assert found == TABLE
    lines = [line for group in bars.LINES.values() for line in group]
    shares = {(line.text, dtype): values for line in lines for dtype, values in line.roofline.items()}
    decode = {text for text in ATTENTION if "x1x8192x" in text}
    assert shares == {
        (BERT, "bfloat16"): (32, 25),
        (BERT, "float32"): (125, 125),
        ("1x8x2048x128", "bfloat16"): (45, 33),
        ("1x8x2048x128", "float32"): (125, 125),
        ("layer_norm 8192x768", "bfloat16"): (80, None),
        ("linear 2048x2048x2048", "bfloat16"): (75,),
    } | {(text, dtype): (85,) for text in decode for dtype in bars.DTYPES}  # fmt: skip


def test_memory_of_the_loss_and_what_is_for_amx_alone():
    lines = [line for group in bars.LINES.values() for line in group]
    assert {line.text: line.memory for line in lines if line.memory} == {"linear_cross_entropy 2048x768x50257": 0.1}
    (linear,) = [line for line in lines if line.amx_only]
    assert linear.bar("float32", "forward", "amx")["bar"] == 1.8
    assert linear.bar("float32", "forward", "avx512")["bar"] is None
    assert linear.bar("float16", "forward", "avx512")["bar"] == 2


def test_float16_calls_are_the_same_with_fewer_tokens():
    for line in (line for group in bars.LINES.values() for line in group):
        assert all(line.call(dtype) == line.case for dtype in ("bfloat16", "float32"))
        short = line.call("float16")
        assert dataclasses.replace(short, shape=line.case.shape) == line.case
        assert short.shape[0] <= line.case.shape[0] and short.shape[1:] == line.case.shape[1:]
        if "backward" in line.directions[-1] and line.case.op in (
            "ffn",
            "glu_ffn",
            "linear_cross_entropy",
            "encoder_layer",
        ):
            assert short.shape[0] < line.case.shape[0]
    (loss,) = bars.LOSS
    assert loss.bar("float16", "forward+backward", "amx") == {"bar": 2, "roofline_bar": None, "memory_bar": None}


def test_directions_of_the_lines():
    found = {line.text: line.directions for group in bars.LINES.values() for line in group}
    assert found[BERT] == found["layer_norm 8192x768"] == ("forward", "backward")
    assert found["ffn 2048x768x3072 gelu"] == found["glu_ffn 2048x1024x2816 swiglu"] == ("forward", "forward+backward")
    assert found["layer_norm 8192x768 residual, dropout_p=0.1"] == ("forward+backward",)
    assert found["encoder_layer 8x384x768x12x3072 dropout_p=0.1"] == ("forward+backward",)
    assert found["encoder_layer 8x384x768x12x3072"] == found["causal_lm 1x512 decode"] == ("forward",)


def test_each_line_is_measured_once_per_dtype_in_its_own_process():
    chosen = [
        (line.text, dtype)
        for isa in ("", *limited.ENVIRONMENT)
        for line, dtype in bars.chosen(list(bars.LINES), isa, "", bars.DTYPES)
    ]
    assert sorted(chosen) == sorted((text, dtype) for _, text in ALL for dtype in bars.DTYPES)
    assert [line.text for line, _ in bars.chosen(["attention"], "", "2048x128", ["float16"])] == ["1x8x2048x128"]


def test_masks_of_the_lines():
    small = {
        line.text: dataclasses.replace(line.case, shape=(2, 3, 7, 8)) for line in bars.ATTENTION if "mask" in line.text
    }
    made = {text: cases.make_tensors(case, torch.float32, CPU) for text, case in small.items()}
    padding = made[f"{BERT} mask=padding"]["attn_mask"]
    assert padding.shape == (2, 1, 1, 7) and padding.dtype == torch.bool
    assert padding[0, 0, 0].tolist() == [True] * 3 + [False] * 4
    assert made[f"{BERT} mask=additive"]["attn_mask"].requires_grad
    constant = made[f"{BERT} mask=additive, mask_grad=False"]["attn_mask"]
    assert not constant.requires_grad and constant.shape == (2, 1, 7, 7)


def test_decode_reads_keys_and_values_once_per_group():
    line = next(line for line in bars.ATTENTION if line.text == "8x32x1x8192x128 nheads_kv=8")
    t = cases.make_tensors(dataclasses.replace(line.case, shape=(8, 32, 1, 16, 4)), torch.bfloat16, CPU)
    assert t["q"].shape == (8, 32, 1, 4) and t["k"].shape == t["v"].shape == (8, 8, 16, 4)
    assert bench.work(line.case, torch.bfloat16, "forward") == (2 * 8 * 8 * 8192 * 128 * 2, "GB/s")


@pytest.mark.parametrize("options", [{}, {"nheads_kv": 2, "causal": True, "sinks": True}, {"mask": "padding"}])
def test_plain_by_head_is_plain(options):
    case = Case("attention", (2, 4, 5, 9, 8), options)
    t = cases.make_tensors(case, torch.float64, CPU)
    torch.testing.assert_close(plain_by_head(case, t)["out"], plain_outputs(case, t)["out"], rtol=0, atol=1e-14)


def test_backward_alone_is_the_backward_pass():
    case = Case("attention", (1, 2, 5, 9, 8), {"mask": "additive"})
    oracle = check.Oracle(case, torch.float32, CPU)
    calls = bench.contenders(case, oracle, "auto", ["sdpa"], "backward")
    for call in calls.values():
        for gradients in (call(), call()):  # the graph is kept
            for name, gradient in zip(("q", "k", "v", "attn_mask"), gradients, strict=True):
                exact = oracle.exact[f"grad {name}"]
                assert (gradient.double() - exact).abs().max().item() < 1e-5


def test_errors_beside_sdpas():
    """SDPA's own where it makes the same call; with dropout float32, rounded once: at most 2⁻⁹ of each value."""
    plain = check.Oracle(Case("attention", (1, 2, 33, 16)), torch.bfloat16, CPU)
    found = bench.compared(plain, "auto")
    assert list(found) == ["out", "grad q", "grad k", "grad v"]
    (sdpa,) = peers.peers(plain.case, plain.tensors, ["sdpa"]).values()
    out = sdpa()["out"].detach().double()
    exact = plain.exact["out"].detach()
    assert found["out"]["peer_relative"] == pytest.approx(((out - exact).norm() / exact.norm()).item())
    assert found["out"]["peer_largest"] == pytest.approx((out - exact).abs().max().item())
    dropped = check.Oracle(Case("attention", (1, 2, 33, 16), {"dropout_p": 0.5}), torch.bfloat16, CPU)
    for error in bench.compared(dropped, "auto").values():
        assert 0 < error["peer_relative"] < 2**-9 < 2 * error["relative"]


@pytest.fixture
def short(monkeypatch):
    """Bars that a machine of any speed passes."""
    monkeypatch.setattr(bars, "ERROR_NOISE", 10.0)  # of a handful of float32 values
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)  # the tests after these share the process
    monkeypatch.setattr(measure.ReadPeak, "BYTES", 1 << 16)
    monkeypatch.setattr(measure.MatrixPeak, "SIZES", (16,))


def _line(shape=(1, 2, 9, 8), bar=(1e-9, 1e-9), **rest) -> Line:
    return Line(Case("attention", shape), bar, bar, bar, **rest)


def _row(**changes) -> bench.Row:
    start = bench.Row("attention", "", (1, 2, 9, 8), "bfloat16", "forward", "cpu", "avx2", "sdpa:flash", "ok")
    figures = {"ratio": 3.0, "bar": 3.0, "rate": 1.0, "unit": "GFLOP/s", "roofline_percent": 31.9}
    return dataclasses.replace(start, **{**figures, **changes})


def _errors(relative: float) -> dict[str, dict[str, float]]:
    return {"out": {"relative": relative, "peer_relative": 1.0, "largest": 1.0, "peer_largest": 1.0}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"ratio": 2.99}, "ratio 2.99 < 3"),
        ({"roofline_bar": 32.0}, None),  # of AMX, and this row did not run there
        ({"roofline_bar": 32.0, "isa": "amx"}, "32% of the roof < 32%"),
        ({"roofline_bar": 31.9, "isa": "amx"}, None),
        ({"roofline_bar": 85.0, "unit": "GB/s"}, "32% of the roof < 85%"),
        ({"memory_bar": 0.1, "memory": 10, "peer_memory": 100}, None),
        (
            {"memory_bar": 0.1, "memory": 11, "peer_memory": 100},
            "0.110 of the memory that the peer needs beside its results > 0.1",
        ),
        ({"errors": _errors(1.04)}, None),
        ({"errors": _errors(1.06)}, "error of out 1.06 x torch's"),
        ({"errors": _errors(float("nan"))}, "error of out nan x torch's"),
        ({"verdict": "FAILED", "note": "out: error"}, "FAILED: out: error"),
        ({"verdict": "unavailable", "note": "no extension"}, "unavailable: no extension"),
    ],
)
def test_what_is_missed(changes, reason):
    assert bars.missed(_row(**changes)) == ([reason] if reason else [])


def test_exit_code_and_table(short, monkeypatch, capsys):
    monkeypatch.setitem(bars.LINES, "attention", (_line(), _line((1, 2, 1, 9, 8), (1e-9,))))
    arguments = ["bench", "attention", "--device", "cpu", "--dtype", "bfloat16", "float32", "--seconds", "0.001"]
    assert cli.main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert [(row["dtype"], row["direction"]) for row in answer["rows"]] == [
        ("bfloat16", "forward"), ("bfloat16", "backward"), ("float32", "forward"), ("float32", "backward"),
        ("bfloat16", "forward"), ("float32", "forward"),
    ]  # fmt: skip
    for row in answer["rows"]:
        assert row["bar"] == 1e-9 and row["threads"] == 2 and row["peer"].startswith("sdpa")
        names = {"forward": {"out"}, "backward": {"grad q", "grad k", "grad v"}}[row["direction"]]
        assert set(row["errors"]) == names
        for error in row["errors"].values():
            assert 0 < error["relative"] <= 10 * error["peer_relative"]
            assert error["relative"] < {"bfloat16": 1e-2, "float32": 1e-6}[row["dtype"]]
    assert answer["rows"][-1]["unit"] == "GB/s"

    monkeypatch.setitem(bars.LINES, "attention", (_line(bar=(1e-9, 1e9)),))
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert text.count("< 1e+09") >= 2 and "missed: 1x2x9x8 bfloat16 backward: ratio" in text
    assert "missed: 1x2x9x8 bfloat16 forward: ratio" not in text


def test_a_wrong_result_is_missed_and_has_no_figure(short, monkeypatch, capsys):
    monkeypatch.setitem(bars.LINES, "attention", (_line(),))
    right = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert cli.main(["bench", "attention", "--dtype", "float32", "--seconds", "0.001"]) == 1
    text = capsys.readouterr().out
    assert "missed: 1x2x9x8 float32 backward: FAILED: out: error" in text and "≥" not in text


#: Of each group a call that takes no time, and the results that it is judged by.
SMALL = {
    "norm": (
        Case("layer_norm", (9, 16), {"weight": True, "bias": True, "residual": True, "dropout_p": 0.1}),
        {"out", "grad x", "grad residual", "grad weight", "grad bias"},
    ),
    "ffn": (
        Case("glu_ffn", (1, 8, 24), {"activation": "swiglu"}),
        {"out", "grad x", "grad w_gate", "grad w_up", "grad w_down"},
    ),
    "loss": (Case("linear_cross_entropy", (9, 16, 33)), {"out", "grad x", "grad weight"}),
    "layer": (
        Case("encoder_layer", (2, 5, 16, 2, 24), {"dropout_p": 0.1}),
        {"out", "grad x", *(f"grad {name}" for name, _ in nn.TransformerEncoderLayer(16, 2, 24).named_parameters())},
    ),
}  # fmt: skip


@pytest.mark.parametrize("group", SMALL)
def test_groups_of_bars(short, monkeypatch, capsys, group):
    case, results = SMALL[group]
    monkeypatch.setattr(bars.Line, "peers", ("eager",))  # compiling takes long, and it is a peer of test_bench.py
    monkeypatch.setitem(bars.LINES, group, (Line(case, (1e-9, 1e-9), (1e-9, 1e-9), (1e9, 1e9), passes=bars.TOGETHER),))
    arguments = ["bench", group, "--device", "cpu", "--dtype", "bfloat16", "float32", "--seconds", "0.001"]
    assert cli.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    wanted = itertools.product(("bfloat16", "float32"), ("forward", "forward+backward"))
    assert [(row["dtype"], row["direction"]) for row in rows] == list(wanted)
    for row in rows:
        assert row["peer"] == "eager" and row["bar"] == 1e-9 and row["threads"] == 2
        assert row["ratio"] == pytest.approx(row["peer_median"] / row["median"])
        assert row["roofline_percent"] == pytest.approx(100 * row["rate"] / row["roofline"])
        assert set(row["errors"]) == ({"out"} if row["direction"] == "forward" else results)
        for error in row["errors"].values():
            assert error["relative"] < {"bfloat16": 2e-2, "float32": 2e-6}[row["dtype"]]
    assert cli.main(["bench", group, "--dtype", "float16", "--seconds", "0.001"]) == 1
    text = capsys.readouterr().out
    assert f"missed: {bars.name(case.op, case.shape, case.label, '')} float16 forward: ratio" in text


TINY_MODEL = TransformerConfig.tiny(rope_interleaved=True)


@pytest.fixture
def tiny_model(monkeypatch):
    torch.manual_seed(0)
    state = {name: value.detach() for name, value in Transformer(TINY_MODEL).state_dict().items()}
    monkeypatch.setattr(modules, "language_model", lambda: (TINY_MODEL, state, "random weights"))


@pytest.mark.parametrize("options", [{}, {"decode": True}], ids=["prefill", "decode"])
def test_the_language_model_and_its_peer_say_the_same(tiny_model, options):
    pytest.importorskip("transformers")
    case = Case("causal_lm", (1, 11), options)
    t = cases.make_tensors(case, torch.float32, CPU)
    exact = plain_outputs(case, {name: x.double() if x.is_floating_point() else x for name, x in t.items()})["out"]
    assert exact.shape == (1, 1, 256)
    with torch.no_grad():
        for call in (cases.prepare(case, t, "auto"), modules.torchs(case, t)):
            for result in (call(), call()):  # the context is that of the first call
                assert (result["out"].double() - exact).abs().max().item() < 1e-5 * exact.abs().max().item()


def test_bars_of_the_language_model(short, tiny_model, monkeypatch, capsys):
    monkeypatch.setitem(
        bars.LINES, "model", (Line(Case("causal_lm", (1, 9), {"decode": True}), (1e-9,), (1e-9,), (1e-9,)),)
    )
    monkeypatch.setattr(bars.Line, "peers", ("transformers",))
    arguments = ["bench", "model", "--dtype", "float32", "--seconds", "0.001", "--json"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(arguments) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["verdict"] == "unavailable" and "pip install 'fastattn[hf]'" in row["note"]
    monkeypatch.undo()


@pytest.mark.parametrize("decode", [False, True])
def test_what_is_checked_of_the_language_model(tiny_model, monkeypatch, decode):
    """Logits at several places, each those of the whole text up to there."""
    monkeypatch.setattr(modules, "PLACES", 4)
    case = modules.checked(Case("causal_lm", (1, 9), {"decode": True} if decode else {}))
    oracle = check.Oracle(case, torch.float32, CPU)
    model = modules.PlainTransformer(TINY_MODEL, {k: v.double() for k, v in modules.language_model()[1].items()})
    tokens = oracle.tensors["tokens"] if decode else oracle.tensors["tokens"][:, 1:]
    model.reset(1, tokens.shape[1])
    whole = model.forward(tokens)
    torch.testing.assert_close(
        oracle.exact["out"], whole[:, -4:] if decode else whole[:, [1, 3, 5, 7]], rtol=0, atol=1e-9
    )
    for name, error, _, allowed in oracle.judge("auto"):
        assert error <= allowed, name


def test_memory_beyond_the_results(short, monkeypatch, capsys):
    """1025 columns of 4096 rows: the peer has logits and their gradient in memory, 16 MiB each; the gradients of x are results."""
    case = Case("linear_cross_entropy", (4096, 8, 1025))
    line = Line(case, (1e-9,), (1e-9,), (1e-9,), passes=bars.TOGETHER[1:], memory=100.0)
    monkeypatch.setattr(bars.Line, "peers", ("eager",))
    monkeypatch.setitem(bars.LINES, "loss", (line,))
    assert cli.main(["bench", "loss", "--dtype", "float32", "--seconds", "0.001", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    logits, results = 4096 * 1025 * 4, (4096 + 1025) * 8 * 4
    assert row["memory_bar"] == 100 and row["results_memory"] == results
    assert 2 * logits < row["peer_memory"] < 4 * logits
    assert row["memory"] <= 16 * 2**20 + logits // 4  # its least scratch is 16 MiB


def test_memory_in_words():
    row = _row(memory_bar=0.1, memory=11 * 2**20, peer_memory=100 * 2**20, results_memory=20 * 2**20)
    assert bars.memory_text(row) == ("11 of 100 MiB beside the results (0.110 > 0.1), 31 of 120 MiB with them (0.258)")


def test_reading_the_weights_is_what_one_token_takes(tiny_model):
    state = modules.language_model()[1]
    matrices = sum(value.numel() for value in state.values() if value.dim() == 2)
    cached = TINY_MODEL.nlayers * 2 * TINY_MODEL.nheads_kv * 9 * TINY_MODEL.head_dim
    decode = Case("causal_lm", (1, 9), {"decode": True})
    assert cases.work(decode, torch.bfloat16, "forward") == (2 * (matrices + cached), "GB/s")
    in_layers = matrices - state["embedding.weight"].numel()
    attention = TINY_MODEL.nlayers * 4 * TINY_MODEL.nheads * TINY_MODEL.head_dim * 45
    expected = 2 * (9 * in_layers + state["embedding.weight"].numel()) + attention
    assert cases.work(Case("causal_lm", (1, 9)), torch.bfloat16, "forward") == (expected, "GFLOP/s")
    assert cases.work(Case("ffn", (1, 3, 5)), torch.bfloat16, "forward") == (2 * 30, "GB/s")
    assert cases.roof(Case("ffn", (1, 3, 5)), "forward") == cases.roof(decode, "forward") == "read"


def test_work_of_a_layer():
    case = Case("encoder_layer", (2, 5, 16, 2, 24))
    products = 2 * 10 * (4 * 16 * 16 + 2 * 16 * 24)
    attention = 4 * 2 * 25 * 16
    assert cases.work(case, torch.float32, "forward") == (products + attention, "GFLOP/s")
    assert cases.work(case, torch.float32, "forward+backward") == (3 * products + 3.5 * attention, "GFLOP/s")


def test_only_and_isa_are_for_the_bars():
    for arguments in (
        ["rope", "--only", "x"],
        ["norm", "--quick"],
        ["norm", "ffn", "--sweep"],
        ["attention", "--quick", "--isa", "avx2"],
        ["attention", "--only", "nosuch"],
    ):
        assert cli.main(["bench", *arguments]) == 2


def test_limited_process(monkeypatch):
    isa = next((isa for isa in check.isas_to_run("all") if isa in limited.ENVIRONMENT), None)
    if isa is None:
        pytest.skip("this machine has none of the instruction sets that the bars are limited to")
    script = (
        "import json, torch, fastattn._native as n\n"
        "print(json.dumps({'rows': [[n.current_isa(), torch.backends.cpu.get_cpu_capability()]]}))"
    )
    monkeypatch.setattr(limited, "COMMAND", ("-c", script))
    assert limited.bench(isa, []) == [[isa, isa.upper()]]
    monkeypatch.setattr(limited, "COMMAND", ("-c", "raise SystemExit('broken')"))
    with pytest.raises(RuntimeError, match=f"FASTATTN_ISA={isa} .* failed: broken"):
        limited.bench(isa, [])
