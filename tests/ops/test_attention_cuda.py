"""The ``cuda`` rung of attention without a GPU: what it answers about calls on tensors that only pretend to be on one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn.ops import _library, _select, _sequences

# Capability of the device, and what the rung says of a call that it takes on newer ones.
REASONS = {
    (7, 5): "sm_75: the CUDA kernels are for sm_80 and later",
    (8, 0): None,
    (9, 0): None,
    (12, 0): None,
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tensors of "cuda" without a device: shapes and strides, no values."""
    monkeypatch.setattr(_library, "has_cuda", True)
    monkeypatch.setattr(_library, "has_triton", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        yield monkeypatch


def _tensors(rows: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    q = torch.empty(2, 4, rows, head_dim, device="cuda", dtype=dtype)
    return [q, *(torch.empty(2, 2, 50, head_dim, device="cuda", dtype=dtype) for _ in range(2))]


def _answer(*tensors: torch.Tensor, **options: object) -> str | None:
    explanation = fastattn.explain(fastattn.attention, *tensors, implementation="cuda", **options)
    return dict(explanation.rungs)["cuda"]


@pytest.mark.parametrize("capability", REASONS, ids=str)
def test_architectures(device: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    device.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert _answer(*_tensors()) == REASONS[capability]


def test_what_decoding_takes(device: pytest.MonkeyPatch) -> None:
    mask = torch.empty(1, 1, 2, 50, dtype=torch.bool, device="cuda")
    slopes, sinks = torch.empty(2, 4, device="cuda"), torch.empty(4, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (1, 33, 64, 256):
            tensors = _tensors(2, head_dim, dtype)
            options = {"attn_mask": mask, "alibi_slopes": slopes, "sinks": sinks, "softcap": 5.0, "causal": True}
            assert _answer(*tensors) is _answer(*tensors, **options) is None
    strided = [torch.empty_strided(x.shape, (9000, 1, 70, 11), device="cuda", dtype=x.dtype) for x in _tensors()]
    assert _answer(*strided) is None


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        ({"dtype": torch.float64}, {}, "float64 (CUDA kernels accumulate in float32)"),
        ({"head_dim": 257}, {}, "head_dim 257 is over 256"),
        ({"rows": 9, "dtype": torch.float32}, {}, "float32 of more than 8 query rows, or with dropout"),
        ({"dtype": torch.float32}, {"dropout_p": 0.1}, "float32 of more than 8 query rows, or with dropout"),
    ],
    ids=["float64", "wide", "rows", "dropout"],
)
def test_what_it_does_not_take(
    device: pytest.MonkeyPatch, tensors: dict[str, object], options: dict[str, object], reason: str
) -> None:
    made = _tensors(**tensors)  # type: ignore[arg-type]
    assert str(_answer(*made, **options)).startswith(reason)
    with pytest.raises(NotImplementedError, match="implementation='cuda' does not take this call"):
        fastattn.attention(*made, implementation="cuda", **options)  # type: ignore[arg-type]


def test_full_tiles_take_16_bits(device: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        made = _tensors(40, 33, dtype)
        assert _answer(*made) is _answer(*made, dropout_p=0.1) is None


def test_gradients_are_of_16_bits(device: pytest.MonkeyPatch) -> None:
    q, k, v = _tensors()
    assert _answer(q.requires_grad_(), k, v) is None
    q, k, v = _tensors(dtype=torch.float32)
    assert str(_answer(q.requires_grad_(), k, v)).startswith("gradients of float32")
    with torch.no_grad():
        assert _answer(q, k, v) is None


def test_auto_takes_it_where_it_is_proven(device: pytest.MonkeyPatch) -> None:
    tensors = _tensors()
    explanation = fastattn.explain(fastattn.attention, *tensors)
    assert explanation.implementation == "reference"
    assert "no committed result" in str(dict(explanation.rungs)["cuda"])
    device.setattr(_select, "PROVEN_ON_GPU", frozenset({("attention", "cuda", "sm_90")}))
    assert fastattn.explain(fastattn.attention, *tensors).implementation == "cuda"


def test_results_are_announced_as_they_come(device: pytest.MonkeyPatch) -> None:
    _, k, _ = _tensors()
    q = torch.empty_strided((2, 4, 2, 64), (512, 64, 256, 1), device="cuda", dtype=k.dtype)
    v = torch.empty(2, 2, 50, 40, device="cuda", dtype=k.dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True, implementation="cuda")  # type: ignore[misc]
    assert out.shape == (2, 4, 2, 40) and out.stride(1) < out.stride(2) and out.device.type == "cuda"
    assert lse.shape == (2, 4, 2) and lse.dtype == torch.float32


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_is_appended_to_in_the_launch(device: pytest.MonkeyPatch, paged: bool) -> None:
    module = importlib.import_module("fastattn.ops.attention")
    called, real = [], module._append
    device.setattr(module, "_append", lambda *args: called.append(args) or real(*args))
    q, k_cache, v_cache = _tensors()
    fresh = tuple(torch.empty(2, 2, 2, 64, device="cuda", dtype=q.dtype) for _ in range(2))
    table = torch.empty(2, 3, dtype=torch.int32, device="cuda") if paged else None
    own = _sequences.Sequences(torch.empty(2, 5, dtype=torch.int64, device="cuda"), table, fresh)
    options = module._options(q, None, True, (-1, -1), 0, 0.0, 0.0)
    out, _ = module._attend(q, k_cache, v_cache, None, None, None, None, options, "cuda", own)
    assert out.shape == q.shape and len(called) == 1
