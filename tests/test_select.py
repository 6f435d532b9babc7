"""The ladder: who is chosen, by name or automatically, and what explain says of it."""

import os
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn.ops import _library, _select

Q = torch.randn(1, 2, 5, 8)


def test_auto_takes_the_first_that_can() -> None:
    explanation = fastattn.explain(fastattn.attention, Q, Q, Q)
    assert [name for name, _ in explanation.rungs] == ["cuda", "triton", "cpu", "reference"]
    assert explanation.implementation == ("cpu" if _library.cpu_is_fast else "reference")
    reasons = dict(explanation.rungs)
    assert reasons["cuda"] == "not written for attention" and "Triton compiles for GPUs" in reasons["triton"]
    assert reasons["reference"] is None
    text = str(explanation)
    assert text.splitlines()[0].startswith("attention: ") and "chosen" in text and "no: not written" in text


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
