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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [0, 1, 7, 16, 19, 33, 40])
def test_every_isa(compiled: str, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Both memory orders, in place and not, one thread and three, rows alone: one set of bits, near float64."""
    angles = torch.randn(2, 9, half, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 9, 83).to(dtype)
    y = fastattn.rope(x, cos, sin, interleaved=interleaved, implementation=compiled)
    exact = reference.rope(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    peer = reference.rope(x, cos.to(dtype), sin.to(dtype), interleaved=interleaved)
    assert_accurate(y, peer, exact, "y", terms=2)

    by_position = x.transpose(1, 2).contiguous().transpose(1, 2)
    other = fastattn.rope(by_position, cos, sin, interleaved=interleaved, implementation=compiled)
    assert torch.equal(other, y)
    assert other.stride() == by_position.stride()
    assert y.is_contiguous()
    alone = fastattn.rope(x[1:, 2:, 5:6], cos[1:, 5:6], sin[1:, 5:6], interleaved=interleaved, implementation=compiled)
    assert torch.equal(alone, y[1:, 2:, 5:6])
    for turned in (x.clone(), by_position):
        assert fastattn.rope(turned, cos, sin, interleaved=interleaved, inplace=True, implementation=compiled) is turned
        assert torch.equal(turned, y)


def test_threads_share_rows_without_a_trace(compiled: str) -> None:
    x, angles = torch.randn(3, 5, 301, 66), torch.randn(301, 33)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fastattn.rope(x, angles.cos(), angles.sin(), implementation=compiled))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_in_place(implementation: str, interleaved: bool) -> None:
    angles = torch.randn(9, 6)
    cos, sin = angles.cos(), angles.sin()
    packed = torch.randn(2, 9, 3, 4, 16)
    before = packed.clone()
    q, k = packed[:, :, 0].transpose(1, 2), packed[:, :, 2].transpose(1, 2)
    options = {"interleaved": interleaved, "implementation": implementation}
    expected = [fastattn.rope(x, cos, sin, **options) for x in (q, k)]
    version = packed._version
    for x, y in zip((q, k), expected, strict=True):
        assert fastattn.rope(x, cos, sin, inplace=True, **options) is x
        assert torch.equal(x, y)
    assert packed._version > version
    assert torch.equal(packed[:, :, 1], before[:, :, 1])
    scattered = torch.randn(2, 4, 16, 9).mT
    y = fastattn.rope(scattered, cos, sin, **options)
    assert torch.equal(fastattn.rope(scattered, cos, sin, inplace=True, **options), y)


def test_in_place_refuses_what_it_would_spoil() -> None:
    x, cos = torch.randn(1, 2, 5, 8), torch.ones(5, 4)
    with pytest.raises(ValueError, match="inplace: x requires a gradient"):
        fastattn.rope(x.requires_grad_(), cos, cos, inplace=True)
    with torch.no_grad():
        fastattn.rope(x, cos, cos, inplace=True)
    with pytest.raises(ValueError, match="inplace: elements of x share memory"):
        fastattn.rope(x.detach().expand(3, 2, 5, 8), cos, cos, inplace=True)


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
