"""LayerNorm and RMSNorm against torch.nn's."""

import copy
import pickle

import pytest
import torch
from module_parity import assert_parity, sample, twins
from tolerance import assert_accurate
from torch import nn

import fastattn

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:Mismatch dtype between input"
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(fastattn.nn.LayerNorm, nn.LayerNorm), (fastattn.nn.RMSNorm, nn.RMSNorm)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    ("shape", "x_shape"), [(7, (5, 7)), (33, (2, 3, 33)), ((3, 5), (4, 3, 5)), ([6], (6,)), (257, (9, 257))]
)
def test_matches_torch(ours, theirs, shape, x_shape, dtype):
    pair = twins(ours, theirs, shape, dtype=dtype)
    assert_parity(*pair, lambda m, x: m(x), (sample(*x_shape, dtype=dtype),), terms=300)


@pytest.mark.parametrize(
    "kwargs", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}, {"eps": 1e-12}], ids=str
)
def test_layer_norm_options(kwargs):
    pair = twins(fastattn.nn.LayerNorm, nn.LayerNorm, 19, **kwargs)
    assert repr(pair[0]) == repr(pair[1])
    assert_parity(*pair, lambda m, x: m(x), (3 + 2 * sample(4, 19),), terms=300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-6, 0.5])
def test_rms_norm_eps(eps, dtype):
    """eps=None is the machine epsilon of the accumulation dtype: it shows on rows of that order."""
    pair = twins(fastattn.nn.RMSNorm, nn.RMSNorm, 24, eps=eps, dtype=dtype)
    assert_parity(*pair, lambda m, x: m(x), (1e-2 * sample(5, 24, dtype=dtype),), terms=300)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("rows", [(0,), (2, 0), (1, 1)])
def test_no_rows(ours, theirs, rows):
    x = torch.randn(*rows, 8)
    y = ours(8)(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, theirs(8)(x))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_residual_is_the_sum_then_the_norm(ours, theirs):
    pair = twins(ours, theirs, 13)

    def both(module, x, residual):
        if isinstance(module, ours):
            return module(x, residual=residual, return_residual=True)
        h = x + residual
        return module(h), h

    assert_parity(*pair, both, (sample(6, 13), sample(6, 13)), terms=300)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_dropout_in_front_of_the_norm(ours, theirs):
    norm, plain = twins(ours, theirs, 512)
    x, residual = torch.rand(64, 512) + 1, torch.randn(64, 512)
    y, h = norm(x, residual=residual, dropout_p=0.25, return_residual=True)
    kept = (h - residual).abs() > 0.5
    torch.testing.assert_close(h, torch.where(kept, x / 0.75, 0) + residual)
    torch.testing.assert_close(y, plain(h))
    # 32768 draws: the standard deviation of the kept fraction is sqrt(0.25 · 0.75 / 32768) = 0.0024.
    assert abs(kept.float().mean().item() - 0.75) < 5 * 0.0024


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_under_autocast_keeps_torchs_dtype(ours, theirs):
    norm, plain = twins(ours, theirs, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(3, 16), torch.randn(3, 16).bfloat16()):
            assert norm(x).dtype == plain(x).dtype == x.dtype


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_dict_pickle_and_copy(ours, theirs):
    norm, plain = twins(ours, theirs, 8)
    assert isinstance(norm, theirs)
    plain.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(4, 8)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is ours
        assert torch.equal(other(x), norm(x))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rms_norm_weights_of_any_dtype(weights, given):
    """As torch's: the result is of the input's dtype, the weight's gradient of the weight's."""
    norm, plain = (make(16).to(weights) for make in (fastattn.nn.RMSNorm, nn.RMSNorm))
    exact = nn.RMSNorm(16, eps=torch.finfo(torch.float64 if given is torch.float64 else torch.float32).eps).double()
    with torch.no_grad():
        for module in (norm, plain, exact):
            module.weight.copy_(torch.linspace(0.5, 1.5, 16))
    x, dy = torch.randn(5, 16).to(given), torch.randn(5, 16).to(given)
    ours, theirs, true = (
        (m, x.detach().to(d, copy=True).requires_grad_())
        for m, d in ((norm, given), (plain, given), (exact, torch.float64))
    )
    results = [(m(x), x, m.weight) for m, x in (ours, theirs, true)]
    for y, *_ in results:
        y.backward(dy.to(y.dtype))
    for name in range(3):
        a, b, c = (r[name] if name == 0 else r[name].grad for r in results)
        assert a.dtype == b.dtype
        if a.dtype is torch.float64 and given is not torch.float64:  # computed in float32
            a, b = a.float(), b.float()
        assert_accurate(a, b, c, ("y", "dx", "dweight")[name], terms=16)


def test_nested_tensors_are_torchs():
    norm, plain = twins(fastattn.nn.LayerNorm, nn.LayerNorm, 8)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    for a, b in zip(norm(x).unbind(), plain(x).unbind(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="nested"):
        norm(x, residual=x)


def test_named_implementation_is_used():
    norm = fastattn.nn.LayerNorm(8)
    norm.implementation = "reference"
    assert fastattn.explain(norm, torch.randn(2, 8)).implementation == "reference"
    norm.implementation = "cuda"
    with pytest.raises(NotImplementedError, match="cuda"):
        norm(torch.randn(2, 8))


def test_wrong_shapes_name_the_argument():
    with pytest.raises(ValueError, match="normalized_shape"):
        fastattn.nn.LayerNorm(8)(torch.randn(2, 7))
    with pytest.raises(ValueError, match="residual"):
        fastattn.nn.RMSNorm(8)(torch.randn(2, 8), residual=torch.randn(3, 8))
