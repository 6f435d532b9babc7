"""``python -m fastattn tune``: the search with a timer that is told what to say, the file, and what happens without a GPU."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastattn.__main__ import main
from fastattn.cli import cases, tune
from fastattn.cli.cases import Case
from fastattn.kernels import choice, configs
from fastattn.kernels.choice import Arch

SM_90 = Arch("cuda", 90)
POINT = (128, torch.bfloat16, False)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTATTN_TUNED", raising=False)
    monkeypatch.setattr(choice, "triton_version", lambda: "3.6.0")
    choice.forget_measured()
    yield
    choice.forget_measured()


def _call() -> configs.Attention:
    return configs.attention_forward(*POINT, SM_90)


def _timer(faster: dict[configs.Attention, float], breaking: tuple[configs.Attention, ...] = ()) -> tune.Timer:
    """Seconds of ``_call`` by the configuration in force: 1, or what ``faster`` says."""

    def seconds(function: Callable[[], object]) -> float:
        config = function()
        if config in breaking:
            raise RuntimeError("out of resource: shared memory")
        return faster.get(config, 1.0)  # type: ignore[arg-type]

    return seconds


def _search(timer: tune.Timer, right: Callable[[], bool] = lambda: True) -> tuple[object, float, float, str]:
    return tune.search(configs.attention_forward, POINT, SM_90, _call, right, timer)


def test_the_fastest_right_candidate_is_taken() -> None:
    shipped, first, second, third, *_ = configs.attention_forward.possible(POINT, SM_90)
    config, seconds, shipped_seconds, note = _search(_timer({first: 0.7, second: 0.6, third: 0.5}, breaking=(third,)))
    assert (config, seconds, shipped_seconds) == (second, 0.6, 1.0) and note.endswith("candidates, 1 broke")
    config, *_, note = _search(_timer({first: 0.7, second: 0.6}), lambda: _call() != second)
    assert config == first and "one was wrong" in note
    assert _call() == shipped  # nothing stays on trial


def test_the_shipped_tiles_stay_where_the_gain_is_noise() -> None:
    shipped, first, *_ = configs.attention_forward.possible(POINT, SM_90)
    assert _search(_timer({first: 0.99}))[0] == shipped
    assert _search(_timer({first: 0.9}), lambda: False)[0] == shipped
    with pytest.raises(RuntimeError, match="out of resource"):
        _search(_timer({}, breaking=(shipped,)))


def _found(config: configs.Attention, changed: bool) -> tune.Found:
    described = configs.attention_forward.described(POINT)
    json_config = choice.config_as_json(config)
    return tune.Found("attention_forward", described, json_config, 0.5, 1.0, changed, "attention 1x1", "")


def test_what_is_written_is_used_and_can_be_withdrawn() -> None:
    shipped, first, *_ = configs.attention_forward.possible(POINT, SM_90)
    path = choice.tuned_path(SM_90)
    assert tune.write(path, SM_90, [_found(first, True)], "NVIDIA H100") == 1
    entry = json.loads(path.read_text())["entries"][0]
    assert entry["device"] == "NVIDIA H100" and entry["seconds"] == 0.5
    choice.forget_measured()
    assert _call() == first
    assert tune.write(path, SM_90, [_found(shipped, False)], "NVIDIA H100") == 0
    choice.forget_measured()
    assert _call() == shipped
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of tuned configurations"):
        tune.write(path, SM_90, [_found(first, True)], "NVIDIA H100")


def test_a_case_is_searched_where_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that asks one choice in forward and another in backward: each is searched in its own direction, once."""
    asked = {"forward": "norm_forward", "backward": "norm_backward"}
    monkeypatch.setattr(tune.check, "running", lambda case, tensors, implementation: ("triton", "", ""))

    def contenders(
        case: Case, oracle: object, implementation: str, wanted: object, direction: str
    ) -> dict[str, object]:
        return {tune.bench.OURS: lambda: choice.CHOICES[asked[direction]](1024, SM_90)}

    monkeypatch.setattr(tune.bench, "contenders", contenders)
    monkeypatch.setattr(tune.bench, "gate", lambda oracle, implementation: ("ok", ""))
    done: set[tuple[str, choice.Key]] = set()
    case = Case("rms_norm", (4, 16), {"weight": True})
    best = configs.norm_forward.possible((1024,), SM_90)[2]
    found = tune.tune_case(case, "float32", torch.device("cpu"), done, _timer({best: 0.5}))  # type: ignore[dict-item]
    assert [(row.choice, row.at) for row in found] == [(name, {"columns": 1024}) for name in asked.values()]
    assert found[0].changed and found[0].config == choice.config_as_json(best) and found[0].call.endswith("forward")
    assert tune.tune_case(case, "float32", torch.device("cpu"), done, _timer({})) == []
    tune.render(found)


def test_default_cases_are_calls_of_their_operations() -> None:
    for op in cases.OPS:
        for case in tune.default_cases(op):
            assert case.op == op and cases.work(case, torch.bfloat16, "forward")[0] > 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "there is none here; the shipped ones stay" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no operation sorting"):
        tune.main(argparse.Namespace(op=["sorting"]))
