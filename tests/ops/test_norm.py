"""fastattn.layer_norm and rms_norm: every implementation and instruction set, output and every gradient, against float64."""

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.reference.philox import matrix_dropout

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RNG = torch.tensor([987654321, 7])
# (rows, columns): one row, odd, over one tile, longer than any register block.
SHAPES = [(1, 3), (3, 5), (37, 129), (5, 768), (2, 4099), (67, 64)]


def _ours(rms: bool, implementation: str):  # type: ignore[no-untyped-def]
    def run(x, weight, bias, residual, dropout_p):  # type: ignore[no-untyped-def]
        options = {
            "residual": residual,
            "dropout_p": dropout_p,
            "rng_state": RNG,
            "return_residual": True,
            "implementation": implementation,
        }
        if rms:
            return fastattn.rms_norm(x, x.shape[-1:], weight, 1e-5, **options)
        return fastattn.layer_norm(x, x.shape[-1:], weight, bias, 1e-5, **options)

    return run


def _plain(rms: bool):  # type: ignore[no-untyped-def]
    def run(x, weight, bias, residual, dropout_p):  # type: ignore[no-untyped-def]
        h = x if dropout_p == 0 else x * matrix_dropout(x.shape, dropout_p, RNG, x.device).to(x.dtype)
        h = h if residual is None else h + residual
        return (plain.rms_norm if rms else plain.layer_norm)(h, weight, bias, 1e-5), h

    return run


def _exact(rms: bool):  # type: ignore[no-untyped-def]
    def run(x, weight, bias, residual, dropout_p):  # type: ignore[no-untyped-def]
        options = {"residual": residual, "dropout_p": dropout_p, "rng_state": RNG, "return_residual": True}
        if rms:
            return reference.rms_norm(x, x.shape[-1:], weight, 1e-5, **options)
        return reference.layer_norm(x, x.shape[-1:], weight, bias, 1e-5, **options)

    return run


def _run(function, tensors, dropout_p, cotangents, dtype):  # type: ignore[no-untyped-def]
    leaves = [
        None if t is None else t.to(torch.float64 if dtype == torch.float64 else t.dtype).requires_grad_()
        for t in tensors
    ]
    y, h = function(*leaves, dropout_p)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad((y, h), wanted, [c.to(y.dtype) for c in cotangents])
    return [y, h, *grads]


def _compare(implementation, rms, shape, dtype, *, affine=True, residual=False, dropout_p=0.0, weight_dtype=None):  # type: ignore[no-untyped-def]
    rows, columns = shape
    x = (torch.randn(rows, columns) * 2 + 3).to(dtype)
    weight = (1 + 0.3 * torch.randn(columns)).to(weight_dtype or dtype) if affine else None
    bias = torch.randn(columns).to(weight_dtype or dtype) if affine and not rms else None
    added = torch.randn(rows, columns).to(dtype) if residual else None
    cotangents = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
    tensors = (x, weight, bias, added)
    actual = _run(_ours(rms, implementation), tensors, dropout_p, cotangents, dtype)
    peer = _run(_plain(rms), tensors, dropout_p, cotangents, dtype)
    exact = _run(_exact(rms), tensors, dropout_p, cotangents, torch.float64)
    for name, a, p, e in zip(("y", "h", "dx", "d1", "d2", "d3"), actual, peer, exact, strict=False):
        assert_accurate(a, p, e, name, terms=max(rows, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_shapes(implementation: str, rms: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _compare(implementation, rms, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"residual": True},
        {"dropout_p": 0.4},
        {"residual": True, "dropout_p": 0.4},
        {"weight_dtype": torch.float32},
    ],
    ids=["no-affine", "residual", "dropout", "residual-dropout", "float32-weight"],
)
def test_options(implementation: str, rms: bool, options: dict, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    if dtype == torch.float64 and "weight_dtype" in options:
        options = {}
    _compare(implementation, rms, (37, 129), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_zero_centered_weight(implementation: str, rms: bool, dtype: torch.dtype) -> None:
    """(1 + weight), small weights: rounding the sum to 16 bits would cost what a norm may not."""
    x, weight, bias = (torch.randn(37, 129).to(dtype), (0.01 * torch.randn(129)).to(dtype), torch.randn(129).to(dtype))
    dy = torch.randn(37, 129).to(dtype)

    def run(function, wide, **options):  # type: ignore[no-untyped-def]
        leaves = [t.to(wide).requires_grad_() for t in ((x, weight) if rms else (x, weight, bias))]
        y = function(leaves[0], (129,), *leaves[1:], eps=1e-5, **options)
        return [y, *torch.autograd.grad(y, leaves, dy.to(wide))]

    def eager(x, shape, weight, bias=None, *, eps):  # type: ignore[no-untyped-def]
        return plain.rms_norm(x, 1 + weight, None, eps) if rms else plain.layer_norm(x, 1 + weight, bias, eps)

    ours, exact = (getattr(module, "rms_norm" if rms else "layer_norm") for module in (fastattn, reference))
    results = [
        run(ours, dtype, zero_centered_weight=True, implementation=implementation),
        run(eager, dtype),
        run(exact, torch.float64, zero_centered_weight=True),
    ]
    for name, a, p, e in zip(("y", "dx", "dweight", "dbias"), *results, strict=False):
        assert_accurate(a, p, e, name, terms=129)
    with torch.no_grad():
        inference = ours(x, (129,), *((weight,) if rms else (weight, bias)), eps=1e-5, zero_centered_weight=True)
    if implementation == "cpu":
        assert torch.equal(inference, results[0][0])


def test_one_column(implementation: str) -> None:
    """Layer norm of one number is the bias, and its gradient zero up to rounding of dy / sqrt(eps)."""
    x, weight, bias = torch.randn(5, 1, requires_grad=True), torch.full((1,), 2.0), torch.full((1,), 0.25)
    y = fastattn.layer_norm(x, (1,), weight, bias, implementation=implementation)
    assert torch.equal(y, torch.full((5, 1), 0.25))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.abs().max() < 2 / 1e-5**0.5 * 1e-6
    y = fastattn.rms_norm(x, (1,), weight, 0.0, implementation=implementation)
    torch.testing.assert_close(y, 2 * x.sign())


def test_large_mean_small_variance(implementation: str) -> None:
    """E[x²] - E[x]² would lose every digit here."""
    x = 4096 + torch.randn(9, 1000)
    y = fastattn.layer_norm(x, (1000,), implementation=implementation)
    exact = F.layer_norm(x.double(), (1000,))
    assert (y.double() - exact).abs().max() < 2 * (F.layer_norm(x, (1000,)).double() - exact).abs().max() + 1e-3


def test_bfloat16_weight_gradients_are_accumulated_in_float32(implementation: str) -> None:
    """Many rows: a 16-bit accumulator would be off by several per cent."""
    x, weight, bias = torch.randn(4096, 64).bfloat16(), torch.ones(64).bfloat16(), torch.zeros(64).bfloat16()
    dy = torch.randn(4096, 64).bfloat16()
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    grads = torch.autograd.grad(fastattn.layer_norm(x, (64,), *leaves, implementation=implementation), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(F.layer_norm(x.double(), (64,), *wide), wide, dy.double())
    for g, e in zip(grads, exact, strict=True):
        assert ((g.double() - e).norm() / e.norm()).item() < 2.0**-8


def test_strided_rows_and_leading_dimensions(implementation: str) -> None:
    packed = torch.randn(4, 5, 64, requires_grad=True)
    x = packed[..., 8:41]
    y = fastattn.layer_norm(x, (33,), implementation=implementation)
    torch.testing.assert_close(y, F.layer_norm(x, (33,)))
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), packed)[0] for z in (y, F.layer_norm(x, (33,)))))
    two = torch.randn(3, 4, 6)
    torch.testing.assert_close(
        fastattn.layer_norm(two, (4, 6), implementation=implementation), F.layer_norm(two, (4, 6))
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_empty(implementation: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    y = fastattn.rms_norm(x, (8,), weight, implementation=implementation)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape and dweight.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads_or_batch(compiled: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1000, 96).to(dtype), torch.randn(96).to(dtype)
    threads = torch.get_num_threads()

    def run(x: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = fastattn.layer_norm(leaves[0], (96,), *leaves[1:], implementation=compiled)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    try:
        expected = run(x)
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(x), expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b[500:501]) for a, b in zip(run(x[500:501])[:2], expected[:2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_inference_gives_the_bits_of_training(rms: bool, dtype: torch.dtype) -> None:
    """Without gradients a call on CPU tensors goes a shorter way."""
    function = fastattn.rms_norm if rms else fastattn.layer_norm
    wide = torch.randn(6, 5, 300).to(dtype)
    weights = [torch.randn(33).to(dtype) for _ in range(1 if rms else 2)]
    for x in (wide[..., :33], wide[0, :, 7:40], wide[..., :33].contiguous(), wide[0, 0, :33], wide[:0, 0, :33]):
        trained = function(x.detach().requires_grad_(), (33,), *weights)
        with torch.no_grad():
            for shape in ((33,), [33], torch.Size([33])):
                assert torch.equal(function(x, shape, *weights), trained)
            assert torch.equal(function(x, 33, *weights), trained)
            strided = [torch.stack([w, w], 1)[:, 0] for w in weights]
            assert torch.equal(function(x, (33,), *strided), trained)


def test_defaults_are_torchs() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(4, 6).to(dtype) * 1e-3
        torch.testing.assert_close(fastattn.rms_norm(x, (6,)), F.rms_norm(x, (6,)))
        torch.testing.assert_close(fastattn.layer_norm(x, [6]), F.layer_norm(x, [6]))


BAD = [
    ({"normalized_shape": (7,)}, ValueError, "normalized_shape: (7,)"),
    ({"normalized_shape": ()}, ValueError, "normalized_shape: ()"),
    ({"weight": torch.ones(7)}, ValueError, "weight: expected shape (8,)"),
    ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight: got dtype torch.float16"),
    ({"weight": 3.0}, TypeError, "weight: expected a Tensor"),
    ({"bias": torch.ones(8, device="meta")}, ValueError, "bias: on meta"),
    ({"eps": "small"}, TypeError, "eps: expected a number, got 'small'"),
    ({"eps": -1.0}, ValueError, "eps: got -1.0"),
    ({"eps": math.nan}, ValueError, "eps: got nan"),
    ({"residual": torch.ones(8)}, ValueError, "residual: expected shape (2, 8)"),
    ({"residual": torch.ones(2, 8).double()}, TypeError, "residual: dtype"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5"),
    ({"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "x: got dtype"),
    ({"x": torch.ones(2, 8, dtype=torch.bool)}, TypeError, "x: got dtype"),
    ({"x": torch.ones(2, 8).to_sparse()}, TypeError, "x: expected a dense"),
    ({"x": None}, TypeError, "x: expected a Tensor"),
    ({"normalized_shape": None}, TypeError, "NoneType"),
    ({"weight": torch.ones(8).half(), "x": torch.ones(2, 8).bfloat16()}, TypeError, "weight: got dtype torch.float16"),
    ({"zero_centered_weight": True}, ValueError, "zero_centered_weight: there is no weight"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.randn(2, 8), "normalized_shape": (8,)} | change
    with pytest.raises(error) as caught:
        fastattn.layer_norm(arguments.pop("x"), arguments.pop("normalized_shape"), **arguments)
    assert message in str(caught.value)
