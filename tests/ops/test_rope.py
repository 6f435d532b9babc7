"""fastattn.rope: every implementation and instruction set, output and gradient, against float64."""

import pytest
import torch
from tolerance import assert_accurate

import fastattn
from fastattn import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 17), (6, 1), (7, 3), (5, 0)], ids=str)
def test_rotation(implementation: str, head_dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    x, dy = (torch.randn(2, 3, 11, head_dim).to(dtype) for _ in range(2))
    for angles in (torch.randn(11, half), torch.randn(2, 11, half)):
        cos, sin = angles.cos(), angles.sin()

        def run(function, dtype, cos=cos, sin=sin, **extra):  # type: ignore[no-untyped-def]
            leaf = x.to(dtype).requires_grad_()
            y = function(leaf, cos.to(dtype), sin.to(dtype), interleaved=interleaved, **extra)
            return y, *torch.autograd.grad(y, leaf, dy.to(dtype))

        # The angles keep float32 in ours, as the definition says; plain PyTorch multiplies in the dtype.
        leaf = x.clone().requires_grad_()
        y = fastattn.rope(leaf, cos, sin, interleaved=interleaved, implementation=implementation)
        actual = (y, *torch.autograd.grad(y, leaf, dy))
        exact = run(reference.rope, torch.float64)
        peer = run(reference.rope, dtype)
        for name, a, p, e in zip(("y", "dx"), actual, peer, exact, strict=True):
            assert_accurate(a, p, e, name, terms=2)


def test_strided_input(implementation: str) -> None:
    x = torch.randn(2, 9, 3, 16).transpose(1, 2)
    angles = torch.randn(9, 8)
    y = fastattn.rope(x, angles.cos(), angles.sin(), implementation=implementation)
    torch.testing.assert_close(y, reference.rope(x, angles.cos(), angles.sin()))


def test_relative_position() -> None:
    """What rope is for: the product of rotated vectors depends on the distance of their positions only."""
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    frequency = 10000 ** (-torch.arange(16, dtype=torch.float64) / 16)

    def at(x: torch.Tensor, position: float) -> torch.Tensor:
        angles = position * frequency.unsqueeze(0)
        return fastattn.rope(x, angles.cos(), angles.sin())

    near, far = ((at(q, p) * at(k, p + 5)).sum() for p in (3.0, 1003.0))
    torch.testing.assert_close(near, far)


BAD = [
    ({"x": torch.ones(2, 3, 4)}, ValueError, "x: expected 4 dimensions"),
    ({"cos": torch.ones(5, 5)}, ValueError, "cos: expected (5, R/2)"),
    ({"cos": torch.ones(4, 4)}, ValueError, "cos: expected (5, R/2)"),
    ({"sin": torch.ones(5, 3)}, ValueError, "sin: shape (5, 3) differs"),
    ({"sin": torch.ones(5, 4).int()}, TypeError, "sin: got dtype"),
    ({"cos": torch.ones(5, 4, requires_grad=True)}, NotImplementedError, "cos: requires a gradient"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(1, 2, 5, 8),
        "cos": torch.ones(5, 4),
        "sin": torch.ones(5, 4),
    } | change
    with pytest.raises(error) as caught:
        fastattn.rope(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
