"""torch.nn.attention.activate_flash_attention_impl("FASTATTN")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.attention as attention
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops import _library

pytestmark = [
    pytest.mark.skipif(not _library.has_cpu, reason="the C++ core is not built"),
    pytest.mark.skipif(not hasattr(attention, "restore_flash_attention_impl"), reason="torch 2.10 has no way back"),
]


@contextmanager
def activated() -> Iterator[None]:
    attention.activate_flash_attention_impl("FASTATTN")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def _results(*tensors: Tensor, **options: object) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = F.scaled_dot_product_attention(*leaves, **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_sdpa(mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, rows, 3, 40).to(dtype).transpose(1, 2) for rows in (37, 53, 53))
    options: dict[str, object] = {
        "none": {"scale": 0.2},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(2, 1, 37, 53) > 0.3},
        "additive": {"attn_mask": torch.randn(37, 53).to(dtype)},
    }[mask]
    plain = _results(q, k, v, **options)
    with activated():
        assert attention.current_flash_attention_impl() == "FASTATTN"
        found = _results(q, k, v, **options)
    assert torch.equal(found[0], fastattn.scaled_dot_product_attention(q, k, v, **options))  # type: ignore[arg-type]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 3 * torch.finfo(dtype).eps)
    for a, b in zip(found, plain, strict=True):
        assert ((a - b).norm() / b.norm()).item() < tolerance
    after = _results(q, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True)), "restoring did not"


def test_registered_and_not_active() -> None:
    assert "FASTATTN" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None


def test_in_a_module() -> None:
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 70, 32)
    plain = layer(x, x, x, need_weights=False)[0]
    with activated():
        found = layer(x, x, x, need_weights=False)[0]
        compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)
        heads = x.view(2, 70, 4, 8).transpose(1, 2)
        assert torch.equal(compiled(heads), fastattn.scaled_dot_product_attention(heads, heads, heads))
    torch.testing.assert_close(found, plain)
    assert not torch.equal(found, plain), "nothing of fastattn ran"
