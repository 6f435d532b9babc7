"""torch.set_float32_matmul_precision(): what "high" allows float32 products, where the machine has tiles for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastattn

_native = pytest.importorskip("fastattn._native", reason="the C++ core is not built")
ISAS = _native.available_isas()


def test_one_backend_set_alone() -> None:
    """What ``torch.get_float32_matmul_precision()`` raises for."""
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    x = torch.randn(4, 8)
    torch.testing.assert_close(fastattn.linear(x, x), x @ x.T, rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    isa = _native.current_isa()
    torch.set_float32_matmul_precision("highest")
    yield
    _native.set_isa(isa)
    torch.set_float32_matmul_precision("highest")


def _cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, 75, (40,), generator=generator)
    heads = [draw(1, 2, 70, 40), draw(1, 2, 90, 40), draw(1, 2, 90, 24)]
    weights = [draw(40, 70), draw(96, 70) / 8, draw(96) / 8]
    return {
        "attention": (lambda q, k, v: fastattn.attention(q, k, v, causal=True), heads),
        "linear": (fastattn.linear, weights),
        "ffn": (lambda x, w, b, o: fastattn.ffn(x, w, o, b), [*weights, draw(50, 96) / 8]),
        "glu_ffn": (fastattn.glu_ffn, [draw(40, 70), draw(96, 70) / 8, draw(96, 70) / 8, draw(50, 96) / 8]),
        "linear_cross_entropy": (
            lambda x, w: fastattn.linear_cross_entropy(x, w, target),
            [draw(40, 70), draw(75, 70) / 8],
        ),
    }


def _results(call: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", _cases())
def test_reduced_precision(op: str, isa: str, precision: str) -> None:
    """On tiles errors between float32's and 2^-14, output and gradients; elsewhere the same bits."""
    call, tensors = _cases()[op]
    exact = _results(call, [t.double() for t in tensors])
    _native.set_isa(isa)
    full = _results(call, tensors)
    torch.set_float32_matmul_precision(precision)
    reduced = _results(call, tensors)
    if not isa.startswith("amx"):
        assert all(torch.equal(a, b) for a, b in zip(full, reduced, strict=True))
        return
    for name, before, after in zip(("out", *"abcdef"), _errors(full, exact), _errors(reduced, exact), strict=False):
        if name == "c" and op in ("linear", "ffn"):
            continue  # a bias: its gradient is a sum
        assert before < 1e-6, f"{name}: error {before:.1e} at highest precision"
        assert before < after < 2.0**-14, f"{name}: error {after:.1e}, {before:.1e} at highest precision"


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.startswith("amx")])
def test_what_is_not_finite_stays_so(isa: str) -> None:
    _native.set_isa(isa)
    torch.set_float32_matmul_precision("high")
    x, w = torch.randn(5, 40), torch.randn(33, 40)
    x[1, 3], x[2, 7], w[4, 9] = float("inf"), float("nan"), torch.finfo(torch.float32).max / 8
    found, exact = fastattn.linear(x, w), x.double() @ w.double().T
    assert torch.equal(found[1], exact[1].float()) and found[2].isnan().all()
    torch.testing.assert_close(found[[0, 3, 4]].double(), exact[[0, 3, 4]], rtol=2.0**-10, atol=1e-4)


def test_other_dtypes_do_not_change() -> None:
    """float64, float16 and bfloat16 have no other product."""
    for isa in ISAS:
        _native.set_isa(isa)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            for op, (call, tensors) in _cases().items():
                cast = [t.to(dtype) for t in tensors]
                torch.set_float32_matmul_precision("highest")
                full = _results(call, cast)
                torch.set_float32_matmul_precision("high")
                assert all(torch.equal(a, b) for a, b in zip(full, _results(call, cast), strict=True)), (op, isa, dtype)


def test_compiled_calls_follow() -> None:
    """torch.compile takes the setting of the time it traces."""
    isa = next((isa for isa in ISAS if isa.startswith("amx")), None)
    if isa is not None:
        _native.set_isa(isa)
    x, w = torch.randn(8, 64), torch.randn(32, 64)
    torch.set_float32_matmul_precision("high")
    compiled = torch.compile(lambda x, w: fastattn.linear(x, w), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), fastattn.linear(x, w))
