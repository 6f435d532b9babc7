"""FeedForward against its definition, and Sequential against torch.nn's."""

import copy
import functools
import pickle

import pytest
import torch
from module_parity import assert_parity, sample, twins
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn.nn.ffn import ACTIVATIONS


class Defined(nn.Module):
    """The feed-forward network as its docstring defines it, from torch.nn's modules."""

    def __init__(self, width, hidden, activation, bias=True, gated=False, dtype=None):
        super().__init__()
        self.function = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
            "silu": F.silu,
        }[activation]
        self.linear1 = nn.Linear(width, hidden, bias, dtype=dtype)
        self.linear2 = nn.Linear(hidden, width, bias, dtype=dtype)
        self.linear_gate = nn.Linear(width, hidden, bias, dtype=dtype) if gated else None

    def forward(self, x):
        up = self.linear1(x)
        hidden = self.function(up) if self.linear_gate is None else self.function(self.linear_gate(x)) * up
        return self.linear2(hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
def test_matches_its_definition(activation, gated, bias, dtype):
    pair = twins(fastattn.nn.FeedForward, Defined, 13, 37, activation, bias=bias, gated=gated, dtype=dtype)
    assert_parity(*pair, lambda m, x: m(x), (sample(3, 5, 13, dtype=dtype),), terms=200)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_is_on_the_hidden_units(gated):
    """Dropping everything leaves linear2's bias; dropping a part leaves the mean, and nothing is dropped in evaluation."""
    module = fastattn.nn.FeedForward(8, 64, "relu", dropout=1.0, gated=gated)
    x = sample(6, 8)
    torch.testing.assert_close(module(x), module.linear2.bias.expand(6, 8))
    expected = module.eval()(x[:1])
    module.dropout.p = 0.4
    out = module.train()(x[:1].expand(4000, 8))
    assert ((out.mean(0) - expected[0]).abs() / (out.std(0) / 4000**0.5)).max() < 5
    torch.testing.assert_close(module.eval()(x[:1]), expected)


def test_hooks_and_replaced_layers_run():
    module = fastattn.nn.FeedForward(8, 16)
    x = sample(2, 8)
    expected, seen = module(x), []
    handle = module.linear1.register_forward_hook(lambda _, inputs, output: seen.append(output))
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(seen[0], F.linear(x, module.linear1.weight, module.linear1.bias))
    handle.remove()
    module.linear2 = nn.Sequential(module.linear2, nn.Tanh())
    torch.testing.assert_close(module(x), expected.tanh())


def test_under_autocast():
    module = fastattn.nn.FeedForward(32, 64)
    x = sample(4, 32)
    exact = copy.deepcopy(module).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 3 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"activation": "tanh"}, "activation"), ({"d_model": 0}, "d_model"), ({"dropout": 1.5}, "dropout")],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fastattn.nn.FeedForward(**({"d_model": 4, "dim_feedforward": 8} | change))


CHAINS = {
    "relu": lambda: [nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 7)],
    "gelu, dropout": lambda: [nn.Linear(9, 20), nn.GELU(), nn.Dropout(0.5), nn.Linear(20, 9), nn.Dropout(0.5)],
    "tanh-gelu": lambda: [nn.LayerNorm(9), nn.Linear(9, 20, bias=False), nn.GELU("tanh"), nn.Linear(20, 7)],
    "silu twice": lambda: [
        nn.Linear(9, 5),
        nn.SiLU(),
        nn.Linear(5, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    ],
    "not fused": lambda: [nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 7)],
    "inplace": lambda: [nn.Linear(9, 20), nn.ReLU(inplace=True), nn.Linear(20, 7)],
}


@pytest.mark.parametrize("name", list(CHAINS))
def test_sequential(name, monkeypatch):
    import fastattn.nn.ffn as module

    calls = []
    operator = module.ffn
    monkeypatch.setattr(module, "ffn", lambda *a, **k: calls.append(k["activation"]) or operator(*a, **k))
    theirs = nn.Sequential(*CHAINS[name]()).eval()
    ours = fastattn.nn.Sequential(*copy.deepcopy(theirs)).eval()
    assert isinstance(ours, nn.Sequential)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_parity(ours, theirs, lambda m, x: m(x), (sample(2, 3, 9),), terms=200)
    expected = {
        "relu": ["relu"],
        "gelu, dropout": ["gelu"],
        "tanh-gelu": ["gelu_tanh"],
        "silu twice": ["silu", "relu"],
        "not fused": [],
        "inplace": ["relu"],
    }
    assert calls == expected[name]


def test_sequential_with_a_hooked_child_calls_it():
    ours = fastattn.nn.Sequential(*CHAINS["relu"]())
    x, seen = sample(2, 9), []
    expected = ours(x)
    ours[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(seen, [ours[0](x)])


def test_pickle_and_copy():
    module = fastattn.nn.FeedForward(8, 16, gated=True)
    sequential = fastattn.nn.Sequential(*CHAINS["relu"]())
    for original, x in ((module, sample(2, 8)), (sequential, sample(2, 9))):
        for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert torch.equal(other(x), original(x))
