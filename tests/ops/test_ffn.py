"""fastattn.ffn and glu_ffn: every implementation and instruction set, output and every gradient, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.reference.ffn import ACTIVATIONS, FUNCTIONS, GATED_ACTIVATIONS
from fastattn.reference.philox import matrix_dropout

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RNG = torch.tensor([31337, 99])
# (M, K, F, O): one token, odd, over one tile in every dimension.
SHAPES = [(1, 64, 96, 64), (5, 7, 11, 3), (67, 72, 131, 65), (33, 130, 258, 31)]


def _plain(x, w_in, b_in, w_gate, b_gate, w_out, b_out, residual, *, activation, dropout_p):  # type: ignore[no-untyped-def]
    act = FUNCTIONS[activation]
    pre = F.linear(x, w_in, b_in)
    hidden = act(pre) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * pre
    if dropout_p:
        hidden = hidden * matrix_dropout(hidden.shape, dropout_p, RNG, x.device).to(x.dtype)
    out = F.linear(hidden, w_out, b_out)
    return out if residual is None else out + residual


def _call(module, tensors, activation, dropout_p, **extra):  # type: ignore[no-untyped-def]
    x, w_in, b_in, w_gate, b_gate, w_out, b_out, residual = tensors
    options = {"residual": residual, "dropout_p": dropout_p, "rng_state": RNG, **extra}
    if w_gate is None:
        return module.ffn(x, w_in, w_out, b_in, b_out, activation=activation, **options)
    return module.glu_ffn(x, w_gate, w_in, w_out, b_gate, b_in, b_out, activation=activation, **options)


def _compare(  # type: ignore[no-untyped-def]
    implementation, shape, activation, dtype, *, bias=True, dropout_p=0.0, residual=False
):
    rows, width, hidden, outputs = shape
    gated = activation in GATED_ACTIVATIONS

    def weight(*size: int) -> Tensor:
        return (torch.randn(size) / math.sqrt(size[-1])).to(dtype)

    def offset(size: int) -> Tensor | None:
        return torch.randn(size).to(dtype) if bias else None

    tensors = [
        torch.randn(rows, width).to(dtype),
        weight(hidden, width),
        offset(hidden),
        weight(hidden, width) if gated else None,
        offset(hidden) if gated else None,
        weight(outputs, hidden),
        offset(outputs),
        torch.randn(rows, outputs).to(dtype) if residual else None,
    ]
    cotangent = torch.randn(rows, outputs).to(dtype)

    def run(function, dtype):  # type: ignore[no-untyped-def]
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
        out = function(leaves)
        return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], cotangent.to(dtype))]

    actual = run(lambda leaves: _call(fastattn, leaves, activation, dropout_p, implementation=implementation), dtype)
    exact = run(lambda leaves: _call(reference, leaves, activation, dropout_p), torch.float64)
    name = GATED_ACTIVATIONS.get(activation, activation)
    peer = run(lambda leaves: _plain(*leaves, activation=name, dropout_p=dropout_p), dtype)
    for index, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert_accurate(a, p, e, "out" if index == 0 else f"gradient {index}", terms=max(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_shapes(implementation: str, shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    _compare(implementation, shape, activation, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED_ACTIVATIONS])
def test_activations(implementation: str, activation: str, dtype: torch.dtype) -> None:
    _compare(implementation, (19, 40, 70, 33), activation, dtype, dropout_p=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_without_bias(implementation: str, activation: str, dtype: torch.dtype) -> None:
    _compare(implementation, (19, 40, 70, 33), activation, dtype, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "reglu"])
def test_residual(implementation: str, activation: str, dtype: torch.dtype) -> None:
    _compare(implementation, (19, 40, 70, 33), activation, dtype, dropout_p=0.3, residual=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recompute_saves_no_activation_and_changes_no_bit(compiled: str, activation: str, dtype: torch.dtype) -> None:
    rows, width, hidden = 150, 33, 70
    sizes = ((rows, width), (hidden, width), (hidden,), (hidden, width), (hidden,), (width, hidden), (width,))
    tensors = [torch.randn(size).to(dtype) / size[-1] ** 0.5 for size in sizes]
    if activation in ACTIVATIONS:
        tensors[3:5] = [None, None]  # type: ignore[list-item]

    def run(recompute: bool) -> tuple[list[Tensor], int]:
        saved = 0

        def count(x: Tensor) -> Tensor:
            nonlocal saved
            saved += x.numel() if x.shape == (rows, hidden) else 0
            return x

        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = _call(fastattn, [*leaves, None], activation, 0.3, recompute=recompute, implementation=compiled)
        wanted = [x for x in leaves if x is not None]
        return [out, *torch.autograd.grad(out.float().square().sum(), wanted)], saved

    (kept, activations), (again, none) = run(False), run(True)
    assert activations >= rows * hidden and none == 0
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_activation_tails(implementation: str, activation: str) -> None:
    """Through an identity network: the activation and its derivative far out, near zero and at special values."""
    x = torch.cat([torch.linspace(-30, 30, 601), torch.logspace(-38, -1, 50), -torch.logspace(-38, -1, 50)]).unsqueeze(
        1
    )
    one = torch.ones(1, 1)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    ours = fastattn.ffn(leaf, one, one, activation=activation, implementation=implementation)
    exact = FUNCTIONS[activation](wide)
    eps = torch.finfo(torch.float32).eps
    assert ((ours.double() - exact).abs() <= 4 * eps * wide.abs() + 1e-38).all()
    (da,), (de,) = torch.autograd.grad(ours.sum(), leaf), torch.autograd.grad(exact.sum(), wide)
    # relu's derivative at zero is a convention, and to AMX subnormal numbers are zero.
    away = (x.abs() > torch.finfo(torch.float32).tiny).squeeze(1)
    assert ((da.double() - de).abs() <= 16 * eps * (1 + wide.abs()))[away].all()


def test_partial_gradients(implementation: str) -> None:
    """Frozen weights, or frozen input: what is not asked for is None, the rest unchanged."""
    x, w1, w2 = torch.randn(9, 16), torch.randn(24, 16), torch.randn(16, 24)
    full = [t.clone().requires_grad_() for t in (x, w1, w2)]
    expected = torch.autograd.grad(fastattn.ffn(*full, implementation=implementation).sum(), full)
    for index in range(3):
        leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate((x, w1, w2))]
        fastattn.ffn(*leaves, implementation=implementation).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]
        torch.testing.assert_close(leaves[index].grad, expected[index])


@pytest.mark.parametrize("shape", [(0, 8, 12, 4), (3, 8, 0, 4), (3, 0, 12, 4), (3, 8, 12, 0)], ids=str)
def test_empty(implementation: str, shape: tuple[int, ...]) -> None:
    rows, width, hidden, outputs = shape
    sizes = ((rows, width), (hidden, width), (outputs, hidden), (hidden,), (outputs,))
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = fastattn.ffn(*leaves, implementation=implementation)
    exact = reference.ffn(*wide)
    torch.testing.assert_close(out.double(), exact)
    grads = torch.autograd.grad(out.sum(), leaves)
    for g, e in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads_or_batch(compiled: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(size).to(dtype) / 8 for size in ((300, 96), (200, 96), (64, 200), (200,), (64,))]
    threads = torch.get_num_threads()

    def run(x: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *tensors[1:])]
        out = fastattn.ffn(*leaves, implementation=compiled)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    try:
        expected = run(tensors[0])
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(tensors[0]), expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    for rows in (1, 3, 40):
        alone = run(tensors[0][100 : 100 + rows])
        assert all(torch.equal(a, b[100 : 100 + rows]) for a, b in zip(alone[:2], expected[:2], strict=True)), (
            f"{rows} rows"
        )


def test_leading_dimensions() -> None:
    x, w1, w2 = torch.randn(2, 3, 5, 8), torch.randn(12, 8), torch.randn(4, 12)
    torch.testing.assert_close(fastattn.ffn(x, w1, w2), F.linear(F.gelu(F.linear(x, w1)), w2))
    assert fastattn.ffn(x[0, 0, 0], w1, w2).shape == (4,)


BAD = [
    ({"activation": "tanh"}, ValueError, "activation: got 'tanh', allowed are relu, gelu"),
    ({"w_in": torch.ones(12, 9)}, ValueError, "w_in: expected shape (12, 8)"),
    ({"w_in": torch.ones(12)}, ValueError, "w_in: expected 2 dimensions"),
    ({"w_out": torch.ones(4, 13)}, ValueError, "w_out: expected shape (4, 12)"),
    ({"w_out": torch.ones(4, 12).double()}, TypeError, "w_out: dtype"),
    ({"b_in": torch.ones(4)}, ValueError, "b_in: expected shape (12,)"),
    ({"b_out": torch.ones(12)}, ValueError, "b_out: expected shape (4,)"),
    ({"x": torch.ones(2, 8).int()}, TypeError, "x: got dtype"),
    ({"residual": torch.ones(2, 12)}, ValueError, "residual: expected shape (2, 4)"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p: got 2.0"),
    ({"implementation": "cuda"}, NotImplementedError, "the tensors are on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(2, 8),
        "w_in": torch.ones(12, 8),
        "w_out": torch.ones(4, 12),
    } | change
    with pytest.raises(error) as caught:
        fastattn.ffn(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
