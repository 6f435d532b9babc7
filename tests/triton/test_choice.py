"""Choices of configurations: classes of arguments, enumeration, and files of measured ones (``kernels/choice.py``)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.kernels import choice, configs
from fastattn.kernels.choice import CHOICES, Arch

SM_90 = Arch("cuda", 90)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTATTN_TUNED", raising=False)
    monkeypatch.setattr(choice, "triton_version", lambda: "3.6.0")
    choice.forget_measured()
    yield
    choice.forget_measured()


def _content(**changes: Any) -> dict[str, Any]:
    point = {"head_dim": 128, "dtype": "bfloat16", "extras": False}
    config = {"kind": "Attention", "block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "registers": None}
    entry = {"choice": "attention_forward", "at": point, "config": config}
    return {"schema": 1, "arch": "sm_90", "triton": "3.6.0", "entries": [entry]} | changes


def test_values_belong_to_the_next_larger_class() -> None:
    assert [choice.classify(value, (16, 32, 256)) for value in (1, 16, 17, 256, 9999)] == [16, 16, 32, 256, 256]
    assert choice.classify(torch.float16, choice.DTYPES) == torch.bfloat16
    assert choice.classify(torch.float32, choice.DTYPES) == torch.float32
    with pytest.raises(ValueError, match="belongs to none"):
        choice.classify(torch.float64, choice.DTYPES)
    assert configs.norm_forward(3000, SM_90) == configs.norm_forward(4096, SM_90)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_point_has_one_configuration_and_its_candidates_fit(arch: str) -> None:
    where = Arch.of(arch)
    assert where.name == arch
    for chosen in CHOICES.values():
        points = dict(chosen.points(where))
        assert points or chosen is configs.attention_forward_sm90, chosen.name
        for point, config in points.items():
            assert chosen(*point, where) == config
            possible = chosen.possible(point, where)
            assert possible[0] == config and len(set(possible)) == len(possible)
            json.dumps([chosen.described(point), choice.config_as_json(config)])


def test_what_is_asked_is_collected_and_a_trial_holds_for_its_point_alone() -> None:
    point = (128, torch.bfloat16, False)
    shipped = configs.attention_forward(*point, SM_90)
    other = configs.Attention(64, 64, 4, 2)
    with choice.asking() as asked:
        configs.attention_forward(100, torch.float16, False, SM_90)
    assert asked == [(configs.attention_forward, point, SM_90)]
    with choice.trying(configs.attention_forward, point, SM_90, other):
        assert configs.attention_forward(*point, SM_90) == other
        assert configs.attention_forward(*point, Arch("cuda", 80)) != other
        assert configs.attention_forward(64, torch.bfloat16, False, SM_90) != other
    assert configs.attention_forward(*point, SM_90) == shipped


def test_a_measured_configuration_is_taken_on_its_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = choice.tuned_path(SM_90)
    assert path == tmp_path / "fastattn" / "tuned-sm_90-triton-3.6.0.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_content()))
    measured = configs.Attention(64, 64, 4, 2)
    assert configs.attention_forward(100, torch.float16, False, SM_90) == measured
    assert configs.attention_forward(128, torch.bfloat16, True, SM_90) != measured
    assert configs.attention_forward(128, torch.bfloat16, False, Arch("cuda", 80)) != measured
    assert configs.attention_forward(128, torch.bfloat16, False, Arch("interpreter")) != measured
    monkeypatch.setenv("FASTATTN_TUNED", "off")
    choice.forget_measured()
    assert configs.attention_forward(100, torch.float16, False, SM_90) != measured
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "mine.json"))
    choice.forget_measured()
    with pytest.raises(ValueError, match=r"mine\.json: not a readable JSON file.*FASTATTN_TUNED=off"):
        configs.attention_forward(100, torch.float16, False, SM_90)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 0}, "not a file of tuned configurations of schema 1"),
        ({"arch": "sm_80"}, "measured for arch sm_80, this is sm_90"),
        ({"triton": "3.5.1"}, "measured for triton 3.5.1, this is 3.6.0"),
        ({"entries": [{"choice": "attention_sideways"}]}, "no choice 'attention_sideways'"),
        ({"entries": [{**_content()["entries"][0], "at": {"head_dim": 100}}]}, "attention_forward has no point"),
        ({"entries": [{**_content()["entries"][0], "config": {"kind": "Attention", "block_m": 8}}]}, "no candidate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_does_not_fit_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(_content(**changes)))
    with pytest.raises(ValueError, match=reason):
        choice.read_tuned(path, SM_90)
    assert len(choice.read_tuned(_written(tmp_path), SM_90)) == 1


def _written(folder: Path) -> Path:
    path = folder / "good.json"
    path.write_text(json.dumps(_content()))
    return path


def test_a_choice_says_what_it_distinguishes() -> None:
    with pytest.raises(TypeError, match="its parameters must be rows, arch"):
        choice.choice(rows=(1, 2))(lambda columns, arch: None)
