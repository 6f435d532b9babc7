"""Which product the modules' projections take: fastattn's where it may, torch's where a tensor or an implementation has none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor, nn

from fastattn.nn import _fusion


class Doubled(Tensor):
    """A weight that is more than its numbers, as sharded and quantized ones are: torch's linear uses twice its values."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function is F.linear else out


@pytest.fixture
def ours(monkeypatch):
    """How often fastattn's operations were called."""
    calls = []
    for name in ("linear", "linear_cross_entropy"):
        operation = getattr(_fusion, name)
        counted = lambda *a, operation=operation, name=name, **k: calls.append(name) or operation(*a, **k)
        monkeypatch.setattr(_fusion, name, counted)
    return calls


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 24).to(dtype), torch.randn(9, 24).to(dtype), torch.randn(9).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_tensors_take_fastattns(ours, dtype):
    x, weight, bias = tensors(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    out = _fusion.project(x, nn.Parameter(weight), nn.Parameter(bias), "auto")
    assert_accurate(out, F.linear(x, weight, bias), exact, terms=24)
    target = torch.tensor([3, -100, 8, 0, 1])
    loss = _fusion.classify(x, weight, target, "auto")
    plain = F.cross_entropy(F.linear(x, weight).to(loss.dtype), target)
    assert_accurate(loss, plain, F.cross_entropy(F.linear(x.double(), weight.double()), target), terms=24)
    assert ours == ["linear", "linear_cross_entropy"]


def test_an_implementation_without_a_fused_loss_leaves_it_to_torch(ours):
    x, weight, _ = tensors(torch.float32)
    target = torch.tensor([3, -100, 8, 0, 1], dtype=torch.int32)
    plain = F.cross_entropy(F.linear(x, weight), target.long())
    assert torch.equal(_fusion.classify(x, weight, target, "cuda"), plain)
    assert ours == []


def test_an_implementation_named_is_never_replaced(ours):
    x, weight, bias = tensors(torch.float32)
    for implementation in ("triton", "cuda"):
        with pytest.raises(NotImplementedError, match=f"^linear: implementation='{implementation}'"):
            _fusion.project(x, weight, bias, implementation)
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: implementation='triton'"):
        _fusion.classify(x, weight, torch.tensor([3, -100, 8, 0, 1]), "triton")
    assert ours == ["linear", "linear", "linear_cross_entropy"]


def test_a_weight_that_knows_its_own_product_is_asked(ours):
    x, weight, bias = tensors(torch.float32)
    doubled = weight.as_subclass(Doubled)
    out = _fusion.project(x, doubled, bias, "auto").as_subclass(Tensor)
    assert torch.equal(out, 2 * F.linear(x, weight, bias))
    assert ours == []
