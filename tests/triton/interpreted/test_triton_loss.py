"""tests/ops/test_loss.py again, by Triton in the interpreter; chunks of logits, and the operators that only Triton has."""

import math

import pytest
import torch
from test_loss import *  # noqa: F403
from test_loss import _compare, _compare_linear

import fastattn
from fastattn.kernels import linear_loss

_OPERATORS = torch.ops.fastattn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_chunks(
    implementation: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the weight and the bias are sums over chunks, the last of them short."""
    monkeypatch.setattr(linear_loss, "_LEAST_SCRATCH", 1)
    assert linear_loss.chunk_rows(300, 67, 4) == 128
    _compare_linear(implementation, (300, 20, 67), dtype, {"reduction": reduction, "label_smoothing": 0.1})


def test_chunks_are_bounded(implementation: str) -> None:
    for tokens, classes, itemsize in ((8192, 128256, 2), (16384, 50257, 4), (4096, 32000, 2), (65536, 262144, 2)):
        rows = linear_loss.chunk_rows(tokens, classes, itemsize)
        assert rows % 128 == 0 and rows * classes * itemsize <= min(512 << 20, tokens * classes * itemsize / 4)
    assert linear_loss.chunk_rows(100, 1000, 4) == 100
    assert linear_loss.chunk_rows(0, 1000, 4) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_weights_with_everything_over_several_steps(implementation: str, dtype: torch.dtype) -> None:
    options = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}
    _compare(implementation, 4, 4200, dtype, options, class_weight=torch.rand(4200).to(dtype))


@pytest.mark.parametrize("index", [5, -1])
def test_a_target_out_of_bounds_is_nan(implementation: str, index: int) -> None:
    """Its loss and gradient; those of its neighbours are untouched."""
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, index, 2])
    loss = fastattn.cross_entropy(logits, target, reduction="none", implementation=implementation)
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(dlogits).any(1).tolist() == [False, True, False]
    assert torch.isnan(fastattn.cross_entropy(logits, target, implementation=implementation))


def test_a_small_gradient_keeps_its_digits(implementation: str) -> None:
    """A mean over tokens divides by more than float16 has below 1: the power of two is taken out of the 16-bit products."""
    x, w = torch.randn(64, 8).half().requires_grad_(), torch.randn(16, 8).half()
    target = torch.randint(0, 16, (64,))
    factor = 2.0**-8
    for reduction in ("mean", "none"):
        loss = fastattn.linear_cross_entropy(x, w, target, reduction=reduction, implementation=implementation)
        (whole,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        (small,) = torch.autograd.grad(loss.sum() * factor, x)
        assert (small.float() / factor - whole.float()).abs().max() <= 2**-9 * whole.abs().max() + 2**-25 / factor


def test_operators(implementation: str) -> None:
    """Schemas, fakes and aliasing as torch checks them."""
    target, cos = torch.randint(0, 9, (6,)), torch.rand(1, 4, 3)
    logits, x, w, heads = torch.randn(6, 9), torch.randn(6, 5), torch.randn(9, 5), torch.randn(2, 3, 4, 8)
    options = (-100, 0.1, 0.0, 0.1, 1)
    _, statistics = _OPERATORS.triton_cross_entropy_forward(logits, target, None, *options)
    one = torch.tensor(1.0)
    calls = [
        ("rope", (heads, cos, cos, False, False)),
        ("rope_", (heads.clone(), cos, cos, True, True)),
        ("cross_entropy_forward", (logits, target, torch.rand(9), *options)),
        ("cross_entropy_backward", (one, logits, target, None, statistics, *options)),
        ("linear_cross_entropy_forward", (x, w, None, target, *options, True, True, False)),
        ("linear_cross_entropy_backward", (one, x, w, torch.rand(9), target, statistics, *options, True, False, True)),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(_OPERATORS, f"triton_{name}").default, arguments)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_compiled_whole(implementation: str, linear: bool) -> None:
    """One graph with rope before the loss, forward and backward, and the same numbers."""
    angles, target = torch.rand(6, 4), torch.randint(0, 8, (6,))

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        turned = fastattn.rope(x, angles.cos(), angles.sin(), implementation=implementation).reshape(6, 8)
        if linear:
            return fastattn.linear_cross_entropy(turned, w, target, implementation=implementation)
        return fastattn.cross_entropy(turned @ w.t(), target, implementation=implementation)

    leaves = [torch.randn(1, 1, 6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert math.isfinite(results[0][0].item())
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
