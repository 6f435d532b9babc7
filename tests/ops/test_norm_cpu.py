"""The C++ normalization operators, called directly: every ISA, dtype and fused form against float64."""

from collections.abc import Iterator

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

import fastattn.ops._library as library
from fastattn.reference.norm import norm_rows
from fastattn.reference.philox import matrix_dropout

if not library.has_cpu:
    pytest.skip(f"no C++ core: {library.load_errors.get('_C')}", allow_module_level=True)

from fastattn import _native

forward, backward = torch.ops.fastattn.norm_forward, torch.ops.fastattn.norm_backward
RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# One column; a tail in every vector width; several chunks of rows; a row too long to share the cache with others.
SHAPES = [(1, 1), (3, 17), (37, 100), (70, 513), (5, 8207)]


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def _leaf(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype, copy=True).requires_grad_()


def _gradients(
    outputs: tuple[Tensor, Tensor], leaves: list[Tensor | None], upstream: list[Tensor]
) -> list[Tensor | None]:
    """(y, h), then the gradient of each leaf that is there."""
    cotangents = [t.to(y.dtype) for t, y in zip(upstream, outputs, strict=True)]
    grads = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], cotangents))
    return [*outputs, *(None if t is None else next(grads) for t in leaves)]


def _plain(
    leaves: list[Tensor | None], upstream: list[Tensor], eps: float, rms: bool, dropout_p: float
) -> list[Tensor | None]:
    """What eager PyTorch makes of it in the dtype of the inputs."""
    x, residual, weight, bias = leaves
    h = x * matrix_dropout(x.shape, dropout_p, RNG_STATE, x.device).to(x.dtype) if dropout_p > 0 else x * 1.0
    h = h if residual is None else h + residual
    columns = (x.shape[1],)
    if rms:
        y = torch.nn.functional.rms_norm(h, columns, weight, eps)
        y = y if bias is None else y + bias
    else:
        y = torch.nn.functional.layer_norm(h, columns, weight, bias, eps)
    return _gradients((y, h), leaves, upstream)


def _judge(inputs: list[Tensor | None], upstream: list[Tensor], eps: float, rms: bool, dropout_p: float) -> None:
    """Compare the operators with the reference in float64; plain PyTorch in the same dtype sets the tolerance."""
    x, residual, weight, bias = inputs
    dy, dh = upstream
    changed = residual is not None or dropout_p > 0
    y, h, mean, rstd = forward(x, residual, weight, bias, eps, rms, dropout_p, RNG_STATE)
    saved = h if changed else x
    total, dx, dweight, dbias = backward(
        dy, dh, saved, weight, mean, rstd, rms, dropout_p, RNG_STATE, weight is not None, bias is not None
    )
    actual = [y, h if changed else None, dx if dropout_p > 0 else total, total if residual is not None else None]
    actual += [dweight if weight is not None else None, dbias if bias is not None else None]

    plain = _plain([_leaf(t, x.dtype) for t in inputs], upstream, eps, rms, dropout_p)
    leaves = [_leaf(t, torch.float64) for t in inputs]
    outputs = norm_rows(*leaves, eps=eps, rms=rms, dropout_p=dropout_p, rng_state=RNG_STATE)
    exact = _gradients(outputs, leaves, upstream)
    names = ["y", "h", "dx", "dresidual", "dweight", "dbias"]
    for name, ours, peer, true in zip(names, actual, plain, exact, strict=True):
        if ours is not None:
            assert_accurate(ours, peer, true, name, terms=max(x.shape))


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_against_float64(isa: str, shape: tuple[int, int], dtype: torch.dtype, rms: bool) -> None:
    columns = shape[1]
    x, dy, dh = (torch.randn(shape).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(columns).to(dtype) for _ in range(2))
    # A single column has variance 0; eps decides.
    _judge([x * 2 + 1, None, weight, bias], [dy, dh], 1e-3, rms, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_residual_and_dropout(isa: str, dtype: torch.dtype, rms: bool, dropout_p: float) -> None:
    shape = (19, 1333)
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    weight = torch.randn(shape[1]).to(dtype)
    _judge([x, residual, weight, None], [dy, dh], 1e-5, rms, dropout_p)
    if dropout_p > 0:
        _judge([x, None, None, None], [dy, dh], 1e-5, rms, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_parameters(isa: str, dtype: torch.dtype) -> None:
    shape = (21, 259)
    x, dy, dh = (torch.randn(shape).to(dtype) for _ in range(3))
    weight, bias = torch.randn(259), torch.randn(259)
    y, _, mean, rstd = forward(x, None, weight, bias, 1e-5, False, 0.0, None)
    _, _, dweight, dbias = backward(dy, dh, x, weight, mean, rstd, False, 0.0, None, True, True)
    assert dweight.dtype == dbias.dtype == torch.float32
    exact_x, exact_dy = x.double(), dy.double()
    xhat = torch.nn.functional.layer_norm(exact_x, (259,), eps=1e-5)
    same = [xhat * weight + bias, (exact_dy * xhat).sum(0), exact_dy.sum(0)]
    for name, ours, exact in zip(["y", "dweight", "dbias"], [y, dweight, dbias], same, strict=True):
        assert_accurate(ours, exact.to(ours.dtype), exact, name, terms=259)


def test_large_mean_cancels_nothing(isa: str) -> None:
    x = 1000 + torch.randn(4, 4096)
    exact = torch.nn.functional.layer_norm(x.double(), (4096,))
    y, _, mean, rstd = forward(x, None, None, None, 1e-5, False, 0.0, None)
    assert_accurate(y, torch.nn.functional.layer_norm(x, (4096,)), exact, "y", terms=4096)
    assert_accurate(rstd, rstd, (x.double().var(1, correction=0) + 1e-5).rsqrt(), "rstd", terms=4096)
    assert_accurate(mean, mean, x.double().mean(1), "mean", terms=4096)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_first_element_far_from_the_mean(isa: str, dtype: torch.dtype) -> None:
    """16-bit moments are taken about it: rows where that is a bad choice are taken again about their mean."""
    x = torch.randn(9, 771)
    x[:, 0] = torch.tensor([0.0, 3.0, 30.0, -300.0, 3000.0, 60000.0, 0.0, 0.0, -0.0])
    x[6] = x[6] * 1e-3 + 50
    x[7] = 1.5
    x = x.to(dtype)
    y, _, mean, rstd = forward(x, None, None, None, 1e-5, False, 0.0, None)
    wide = x.double()
    assert_accurate(
        y, torch.nn.functional.layer_norm(x, (771,)), torch.nn.functional.layer_norm(wide, (771,)), "y", terms=771
    )
    exact = (wide.var(1, correction=0) + 1e-5).rsqrt()
    assert ((rstd.double() - exact) / exact).abs().max() < 1e-5
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_beside_any_others(isa: str, dtype: torch.dtype) -> None:
    """Rows are taken several at once where enough are left."""
    x, dy = torch.randn(11, 259).to(dtype), torch.randn(11, 259).to(dtype)
    weight, bias = torch.randn(259).to(dtype), torch.randn(259).to(dtype)
    for rms in (False, True):

        def both(rows: slice, rms: bool = rms) -> list[Tensor]:
            y, _, mean, rstd = forward(x[rows], None, weight, bias, 1e-5, rms, 0.0, None)
            total, *_ = backward(dy[rows], None, x[rows], weight, mean, rstd, rms, 0.0, None, True, True)
            return [y, rstd, total]

        together = both(slice(None))
        for i in range(11):
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(both(slice(i, i + 1)), together, strict=True))


@pytest.mark.parametrize(("shape", "dtype"), [((6145, 768), torch.float32), ((1100, 8001), torch.bfloat16)], ids=str)
def test_results_past_the_caches(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Results larger than half of the last cache are stored past it, where their rows begin at a vector: the same bits."""
    x = torch.randn(shape).to(dtype)
    dy, weight = x.flip(0), torch.randn(shape[1]).to(dtype)
    y, _, mean, rstd = forward(x, None, weight, weight, 1e-5, False, 0.0, None)
    total, *_ = backward(dy, None, x, weight, mean, rstd, False, 0.0, None, False, False)
    for rows in (slice(0, 300), slice(shape[0] - 301, None)):
        part, _, mean_part, rstd_part = forward(x[rows], None, weight, weight, 1e-5, False, 0.0, None)
        assert torch.equal(y[rows], part)
        part, *_ = backward(dy[rows], None, x[rows], weight, mean_part, rstd_part, False, 0.0, None, False, False)
        assert torch.equal(total[rows], part)


def test_weight_gradients_are_nearer_than_torchs() -> None:
    """torch adds up bfloat16 weight gradients in bfloat16."""
    x, dy, weight, bias = (torch.randn(s).bfloat16() for s in ((2048, 96), (2048, 96), (96,), (96,)))
    _, _, mean, rstd = forward(x, None, weight, bias, 1e-5, False, 0.0, None)
    ours = backward(dy, None, x, weight, mean, rstd, False, 0.0, None, True, True)[2:]

    def gradients(wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(wide).requires_grad_() for t in (weight, bias)]
        return torch.autograd.grad(torch.nn.functional.layer_norm(x.to(wide), (96,), *leaves), leaves, dy.to(wide))

    for a, peer, exact in zip(ours, gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (a.double() - exact).norm() <= (peer.double() - exact).norm()
        assert (a.double() - exact).norm() / exact.norm() < 2.0**-8


def test_rows_are_read_in_place_at_any_stride(isa: str) -> None:
    wide = torch.randn(9, 300)
    x, residual = wide[:, 3:104], wide[:, 150:251]
    weight = torch.randn(101)
    strided = forward(x, residual, weight, None, 1e-5, True, 0.25, RNG_STATE)
    packed = forward(x.contiguous(), residual.contiguous(), weight, None, 1e-5, True, 0.25, RNG_STATE)
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    _, h, mean, rstd = packed
    rest = (weight, mean, rstd, True, 0.25, RNG_STATE, True, False)
    strided = backward(x, residual, h, *rest)
    packed = backward(x.contiguous(), residual.contiguous(), h, *rest)
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


def test_bits_depend_neither_on_threads_nor_on_the_batch(isa: str) -> None:
    x, dy = torch.randn(1000, 257), torch.randn(1000, 257)
    weight, bias = torch.randn(257), torch.randn(257)

    def both(rows: slice) -> list[Tensor]:
        y, _, mean, rstd = forward(x[rows], None, weight, bias, 1e-5, False, 0.0, None)
        return [y, *backward(dy[rows], None, x[rows], weight, mean, rstd, False, 0.0, None, True, True)]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both(slice(None)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = both(slice(500, 501))
    assert torch.equal(alone[0], results[0][0][500:501])
    assert torch.equal(alone[1], results[0][1][500:501])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)], ids=["no rows", "no columns"])
def test_empty(isa: str, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1])
    y, h, mean, rstd = forward(x, None, weight, weight, 1e-5, False, 0.0, None)
    total, _, dweight, dbias = backward(x, None, x, weight, mean, rstd, False, 0.0, None, True, True)
    assert y.shape == total.shape == shape
    assert h.shape == (0,)
    assert torch.equal(dweight, torch.zeros(shape[1]))
    assert torch.equal(dbias, torch.zeros(shape[1]))


def test_wrong_operands_are_refused() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    for operands in (
        (x[0], None, weight, None),
        (x.t(), None, weight[:4], None),
        (x, x[:2], weight, None),
        (x, None, weight[:7], None),
        (x, None, weight.double(), None),
        (x, None, weight, weight.half()),
    ):
        with pytest.raises(RuntimeError, match="fastattn: norm: "):
            forward(*operands, 1e-5, False, 0.0, None)
    with pytest.raises(RuntimeError, match="rng_state"):
        forward(x, None, weight, None, 1e-5, False, 0.5, None)
    with pytest.raises(RuntimeError, match="rstd"):
        backward(x, None, x, weight, x[:, 0], x[:, 0], False, 0.0, None, True, False)


def test_the_reference_defines_the_same_dropout() -> None:
    x = torch.randn(5, 2999, dtype=torch.float64)
    exact, h = norm_rows(x, None, None, None, eps=1e-5, rms=False, dropout_p=0.5, rng_state=RNG_STATE)
    y, ours, _, _ = forward(x, None, None, None, 1e-5, False, 0.5, RNG_STATE)
    assert torch.equal(ours == 0, h == 0)
    assert_accurate(y, exact, exact, "y", terms=2999)
