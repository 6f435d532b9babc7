"""TransformerEncoderLayer against torch.nn's: values, gradients, the places of dropout, hooks, nested tensors, compile."""

import copy
import functools
import math
import pickle

import pytest
import torch
from module_parity import assert_parity, sample, twins
from torch import nn
from torch.nn import functional as F

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

B, L, E, H, HIDDEN = 3, 6, 16, 2, 21
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True])


def pair(**kwargs):
    kwargs = {"batch_first": True, "dim_feedforward": HIDDEN, "dropout": 0.0} | kwargs
    return twins(fastattn.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer, E, H, **kwargs)


def padding_mask():
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 4:] = True
    padding[2, 1:] = True
    return padding


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)


class LowRank(nn.Linear):
    """A Linear with an addition to its output, as adapters are written."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.a, self.b = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, x):
        return super().forward(x) + self.b(self.a(x))


@NORM_FIRST
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal hint", "padding and causal", "per head"])
@pytest.mark.parametrize("layout", ["batch_first", "seq_first", "unbatched"])
def test_masks_and_layouts(layout, masks, train, norm_first):
    modules = [m.train(train) for m in pair(batch_first=layout == "batch_first", norm_first=norm_first)]
    x = {"batch_first": sample(B, L, E), "seq_first": sample(L, B, E), "unbatched": sample(L, E)}[layout]
    padding = padding_mask()[0] if layout == "unbatched" else padding_mask()
    mask = CAUSAL if "causal" in masks else None
    if masks == "per head":
        mask = sample(H if layout == "unbatched" else B * H, L, L)
    if "padding" not in masks:
        padding = None
    elif mask is not None:
        padding = torch.zeros(padding.shape).masked_fill(padding, -math.inf)

    def call(module, x, mask, padding):
        mask, padding = (None if m is None else m.detach() for m in (mask, padding))
        return module(x, mask, padding, is_causal=masks == "causal hint")

    assert_parity(*modules, call, (x, mask, padding))


@NORM_FIRST
@pytest.mark.parametrize(
    "activation",
    [
        "relu",
        "gelu",
        F.silu,
        nn.GELU("tanh"),
        functools.partial(F.gelu, approximate="tanh"),
        torch.tanh,
        nn.ReLU(),
        nn.ELU(),
    ],
    ids=lambda a: getattr(a, "__name__", str(a)),  # no addresses: parallel workers must agree on names
)
@pytest.mark.parametrize("bias", [True, False])
def test_activations(activation, bias, norm_first):
    modules = pair(activation=activation, bias=bias, norm_first=norm_first)
    assert_parity(*modules, lambda m, x: m(x), (sample(B, L, E),))


@NORM_FIRST
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, norm_first):
    modules = pair(dtype=dtype, norm_first=norm_first)
    assert_parity(*modules, lambda m, x: m(x, src_key_padding_mask=padding_mask()), (sample(B, L, E, dtype=dtype),))


@NORM_FIRST
@pytest.mark.parametrize("place", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_each_dropout_is_where_torch_has_it(place, norm_first):
    """Dropping everything at one place is deterministic and shows the place."""
    modules = pair(norm_first=norm_first)
    for module in modules:
        child = getattr(module, place)
        setattr(child, "dropout" if place == "self_attn" else "p", 1.0)
    assert_parity(*modules, lambda m, x: m(x), (sample(B, L, E),))


@NORM_FIRST
@pytest.mark.parametrize("place", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_each_dropout_has_torchs_distribution(place, norm_first):
    """Mean and spread over 3000 draws of the same sequence, with dropout at one place only."""
    ours, theirs = pair(norm_first=norm_first)
    x = sample(1, 3, E).expand(3000, 3, E)
    outs = []
    for module in (ours, theirs):
        setattr(getattr(module, place), "dropout" if place == "self_attn" else "p", 0.4)
        with torch.no_grad():
            outs.append(module(x))
    error = outs[0].std(0) / math.sqrt(3000)
    # 48 differences of means with sqrt(2) · error each; the standard deviations are good to a few percent.
    assert ((outs[0].mean(0) - outs[1].mean(0)).abs() / (math.sqrt(2) * error)).max() < 5
    assert (outs[0].std(0) / outs[1].std(0) - 1).abs().max() < 0.2
    for module in (ours, theirs):
        module.eval()
    torch.testing.assert_close(ours(x[:1]), theirs(x[:1]))


@NORM_FIRST
def test_evaluation_without_gradients_runs_our_operators(norm_first, monkeypatch):
    """torch's fast path would take the weights and go round this module's children."""
    import fastattn.nn.attention as module

    calls = []
    operator = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(1) or operator(*a, **k))
    ours, theirs = (m.eval() for m in pair(norm_first=norm_first))
    x = sample(B, L, E)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert calls == [1]


@NORM_FIRST
@pytest.mark.parametrize(
    "name", ["self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"]
)
def test_hooks_see_what_they_see_in_torch(name, norm_first):
    ours, theirs = pair(norm_first=norm_first)
    x, seen = sample(B, L, E), {}
    for key, module in (("ours", ours), ("theirs", theirs)):
        getattr(module, name).register_forward_hook(
            lambda _, args, output, key=key: seen.setdefault(key, []).append((args[0], output))
        )
        module(x, src_key_padding_mask=padding_mask())
    assert len(seen["ours"]) == 1
    torch.testing.assert_close(seen["ours"], seen["theirs"], atol=2e-5, rtol=1e-4)


@NORM_FIRST
@pytest.mark.parametrize(
    "replace",
    [
        lambda m: setattr(m, "linear1", LowRank(m.linear1)),
        lambda m: setattr(m, "linear2", LowRank(m.linear2)),
        lambda m: setattr(m, "norm1", nn.RMSNorm(E)),
        lambda m: setattr(m, "norm2", nn.Identity()),
        lambda m: setattr(m, "dropout1", nn.Identity()),
        lambda m: setattr(m, "dropout2", nn.AlphaDropout(0.0)),
        lambda m: setattr(m, "activation", nn.Softplus()),
    ],
    ids=["linear1", "linear2", "norm1", "norm2", "dropout1", "dropout2", "activation"],
)
def test_replaced_children_are_called(replace, norm_first):
    ours, theirs = pair(norm_first=norm_first)
    for module in (ours, theirs):
        torch.manual_seed(5)
        replace(module)
    assert_parity(ours, theirs, lambda m, x: m(x), (sample(B, L, E),))


@NORM_FIRST
def test_fastattn_rms_norm_in_place_of_the_norms(norm_first):
    ours, theirs = pair(norm_first=norm_first)
    for module, norm in ((ours, fastattn.nn.RMSNorm), (theirs, nn.RMSNorm)):
        module.norm1, module.norm2 = norm(E, eps=1e-6), norm(E, eps=1e-6)
    assert_parity(ours, theirs, lambda m, x: m(x), (sample(B, L, E),))


def test_subclass_with_its_own_blocks():
    class Scaled(fastattn.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    class TorchScaled(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    for norm_first in (False, True):
        kwargs = {"batch_first": True, "dim_feedforward": HIDDEN, "dropout": 0.0, "norm_first": norm_first}
        assert_parity(*twins(Scaled, TorchScaled, E, H, **kwargs), lambda m, x: m(x), (sample(B, L, E),))


@NORM_FIRST
def test_nested_input_gives_torchs_nested_output(norm_first):
    ours, theirs = (m.eval() for m in pair(norm_first=norm_first))
    x = torch.nested.nested_tensor([sample(n, E) for n in (5, 1, 6)])
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert a.is_nested
    for mine, other in zip(a.unbind(), b.unbind(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours(x)


def test_encoder_with_padding_runs_packed_and_zeroes_padding(monkeypatch):
    """nn.TransformerEncoder turns padding into nested tensors: our layers run on them, and padding comes out as zeros."""
    import fastattn.nn.transformer as module

    calls = []
    operator = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(1) or operator(*a, **k))
    ours, theirs = (nn.TransformerEncoder(m, 3).eval() for m in pair())
    x = sample(B, L, E)
    with torch.no_grad():
        a, b = (m(x, src_key_padding_mask=padding_mask()) for m in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(a[0, 4:], torch.zeros(2, E))
    assert calls == [1, 1, 1]


@NORM_FIRST
def test_under_autocast(norm_first):
    ours, theirs = pair(norm_first=norm_first)
    x = sample(B, L, E)
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype
    error, peer = ((y - exact).abs().max() for y in (a, b))
    assert error <= 2 * peer + 2**-8 * exact.abs().max()


@NORM_FIRST
@pytest.mark.parametrize("train", [True, False])
def test_compiles_as_one_graph(train, norm_first):
    ours, _ = pair(norm_first=norm_first)
    ours.train(train)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = sample(B, L, E)
    for kwargs in ({}, {"src_mask": CAUSAL, "is_causal": True}, {"src_key_padding_mask": padding_mask()}):
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outs = [m(leaf, **kwargs) for m, leaf in zip((ours, compiled), leaves, strict=True)]
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_state_dict_pickle_and_copy():
    ours, theirs = pair()
    assert isinstance(ours, nn.TransformerEncoderLayer)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = sample(B, L, E)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fastattn.nn.TransformerEncoderLayer
        assert torch.equal(other(x), ours(x))
