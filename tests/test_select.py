"""The ladder: who is chosen, by name or automatically, and what explain says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.kernels import configs
from fastattn.ops import _library, _proven, _select

Q = torch.randn(1, 2, 5, 8)


def test_auto_takes_the_first_that_can() -> None:
    explanation = fastattn.explain(fastattn.attention, Q, Q, Q)
    assert [name for name, _ in explanation.rungs] == ["cuda", "triton", "cpu", "reference"]
    assert explanation.implementation == ("cpu" if _library.cpu_is_fast else "reference")
    reasons = dict(explanation.rungs)
    assert reasons["cuda"] == "the tensors are on cpu, not on a CUDA device"
    assert "Triton compiles for GPUs" in reasons["triton"]
    assert reasons["reference"] is None
    text = str(explanation)
    assert text.splitlines()[0].startswith("attention: ") and "chosen" in text and "no: the tensors" in text
    rope = fastattn.explain(fastattn.rope, Q, torch.ones(5, 4), torch.ones(5, 4))
    assert dict(rope.rungs)["cuda"] == "not written for rope"


def test_explain_computes_nothing_and_leaves_no_trace() -> None:
    def twice(q: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q) + fastattn.rms_norm(q, (8,))

    state = torch.get_rng_state()
    assert fastattn.explain(twice, Q).op == "attention"
    assert torch.equal(state, torch.get_rng_state())
    assert twice(Q).shape == Q.shape


def test_explain_validates_and_refuses_what_calls_no_operation() -> None:
    with pytest.raises(ValueError, match="q: expected 4 dimensions"):
        fastattn.explain(fastattn.attention, Q[0], Q, Q)
    with pytest.raises(ValueError, match="reached no fastattn operation"):
        fastattn.explain(torch.relu, Q)
    assert fastattn.attention(Q, Q, Q).shape == Q.shape


@pytest.mark.parametrize(
    ("function", "args", "op"),
    [
        (fastattn.scaled_dot_product_attention, (Q, Q, Q), "attention"),
        (fastattn.layer_norm, (Q, (8,)), "layer_norm"),
        (fastattn.rms_norm, (Q, (8,)), "rms_norm"),
        (fastattn.ffn, (Q, torch.ones(3, 8), torch.ones(8, 3)), "ffn"),
        (fastattn.glu_ffn, (Q, torch.ones(3, 8), torch.ones(3, 8), torch.ones(8, 3)), "glu_ffn"),
        (fastattn.linear, (Q, torch.ones(3, 8)), "linear"),
        (fastattn.cross_entropy, (torch.ones(3, 8), torch.arange(3)), "cross_entropy"),
        (fastattn.linear_cross_entropy, (torch.ones(3, 8), torch.ones(5, 8), torch.arange(3)), "linear_cross_entropy"),
        (fastattn.rope, (Q, torch.ones(5, 4), torch.ones(5, 4)), "rope"),
    ],
)
def test_every_operation_can_be_explained(function, args, op) -> None:  # type: ignore[no-untyped-def]
    assert fastattn.explain(function, *args).op == op


def test_a_name_computes_or_raises_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "has_cpu", False)
    monkeypatch.setitem(_library.load_errors, "_C", "_C.so is not built")
    with pytest.raises(NotImplementedError, match=r"implementation=.cpu. does not take this call: _C\.so is not built"):
        fastattn.attention(Q, Q, Q, implementation="cpu")
    assert fastattn.explain(fastattn.attention, Q, Q, Q).implementation == "reference"
    with pytest.raises(ValueError, match="implementation: got 'gpu', allowed are auto, cuda, triton, cpu, reference"):
        fastattn.attention(Q, Q, Q, implementation="gpu")


def test_auto_alone_is_replaced() -> None:
    with _select.replacing_auto("reference"):
        assert fastattn.explain(fastattn.attention, Q, Q, Q).implementation == "reference"
        if _library.has_cpu:
            named = fastattn.explain(lambda: fastattn.attention(Q, Q, Q, implementation="cpu"))
            assert named.implementation == "cpu"
    with (
        _select.replacing_auto("fastest"),
        pytest.raises(ValueError, match="implementation: got 'fastest'"),
    ):
        fastattn.attention(Q, Q, Q)


def test_the_environment_replaces_auto_from_import_on() -> None:
    script = (
        "import torch, fastattn; q = torch.randn(1, 2, 3, 4);"
        "print(fastattn.explain(fastattn.attention, q, q, q).implementation)"
    )
    environment = os.environ | {"FASTATTN_IMPLEMENTATION": "reference"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "reference"


def test_a_gpu_implementation_enters_auto_only_with_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(_library, "has_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    rungs = {"cuda": lambda: None}
    assert _select.choose("layer_norm", "auto", device, rungs) == "reference"
    assert _select.choose("layer_norm", "cuda", device, rungs) == "cuda"
    assert "no committed result" in str(_select._reason("layer_norm", "cuda", device, rungs, named=False))
    monkeypatch.setattr(_select, "PROVEN_ON_GPU", frozenset({("layer_norm", "cuda", "sm_90")}))
    assert _select.choose("layer_norm", "auto", device, rungs) == "cuda"


def test_scalar_kernels_are_not_chosen_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cpu_is_fast", False)
    explanation = fastattn.explain(fastattn.rms_norm, Q, (8,))
    assert explanation.implementation == "reference"


def _row(**changes: object) -> dict[str, object]:
    row = {"op": "rope", "implementation": "triton", "arch": "sm_90", "case": "", "shape": [4, 8], "dtype": "bfloat16"}
    row |= {"direction": "forward", "peer": "rung below (reference)", "verdict": "ok", "ratio": 1.2}
    return row | {"date": "2026-11-22T00:00:00+00:00", "file": "a.jsonl"} | changes


@pytest.mark.parametrize(
    ("rows", "enters"),
    [
        ([_row()], True),
        ([_row(), _row(direction="backward", ratio=1.0), _row(peer="eager", ratio=0.5)], True),
        ([_row(), _row(direction="backward", ratio=0.99)], False),
        ([_row(peer="eager", ratio=2.0)], False),
        ([_row(), _row(direction="backward", verdict="FAILED", peer="", ratio=None)], False),
        ([_row(), _row(direction="backward", verdict="unavailable", peer="quack", ratio=None)], True),
        ([_row(ratio=0.9), _row(date="2026-11-23T00:00:00+00:00")], True),
        ([_row(), _row(ratio=0.9, date="2026-11-23T00:00:00+00:00")], False),
    ],
    ids=[
        "faster",
        "as fast",
        "slower once",
        "other peers",
        "wrong once",
        "peer missing",
        "newer better",
        "newer worse",
    ],
)
def test_green_and_not_slower_enters_auto(rows: list[dict[str, object]], enters: bool, tmp_path: Path) -> None:
    from benchmarks.gpu import verdicts

    path = tmp_path / "proven.json"
    path.write_text(verdicts.text(verdicts.proven(rows)))
    assert _proven.load(path) == ({("rope", "triton", "sm_90")} if enters else set())
    other = verdicts.proven([_row(arch="sm_80"), *rows])
    assert ("sm_80" in {entry["arch"] for entry in other}) and len(other) == 1 + enters


def test_what_auto_takes_is_what_the_committed_rows_show() -> None:
    from benchmarks.gpu import verdicts

    expected = verdicts.text(verdicts.proven(verdicts.rows_of()))
    assert _proven.PATH.read_text() == expected, "run python -m benchmarks.gpu.verdicts"
    assert _proven.load() == _select.PROVEN_ON_GPU


def test_a_list_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "proven.json"
    path.write_text('{"schema": 0, "proven": []}')
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        _proven.load(path)
    entry = {"op": "rope", "implementation": "triton", "arch": "sm_90", "measurements": 3, "worst_ratio": 0.97}
    path.write_text(json.dumps({"schema": 1, "proven": [entry]}))
    with pytest.raises(ValueError, match="not slower than the rung below"):
        _proven.load(path)


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ((9, 0), 232448, None),
        ((8, 6), 101376, None),
        ((7, 5), 65536, "sm_75: the Triton kernels are for sm_80 and later"),
        ((8, 0), 101376, "this sm_80 gives a program 101376 bytes of shared memory, the tiles may take 166912"),
    ],
)
def test_a_gpu_is_asked_once_whether_the_tiles_fit(
    capability: tuple[int, int], shared: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(shared_memory_per_block_optin=shared)

    monkeypatch.setattr(_library, "has_triton", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    for cached in (_select._no_triton_on, configs.arch_of_device):
        cached.cache_clear()
    try:
        for _ in range(2):
            assert _select._no_triton(torch.device("cuda", 1)) == reason
        assert len(asked) <= 1
    finally:
        for cached in (_select._no_triton_on, configs.arch_of_device):
            cached.cache_clear()


def test_rows_too_far_apart_are_refused() -> None:
    wide = torch.empty_strided((3, 4), (1 << 23, 1), device="meta")
    assert _select.triton_why_not(torch.ones(3, 4), None, wide) == (
        "rows 8388608 elements apart (offsets within a tile of 256 rows are 32-bit)"
    )
    assert _select.triton_why_not(torch.ones(2, 3), torch.ones(3)) is None
    assert "float64" in str(_select.triton_why_not(torch.ones(3).double()))
