"""fastattn's modules under the tools that people apply to torch.nn's: pruning, quantization, func, checkpointing, export."""

import copy

import pytest
import torch
from module_parity import assert_parity, sample, twins
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastattn

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization", "ignore:.*quantize_per_", "ignore:.*performance drop"
)

E = 16


def pair(**kwargs):
    kwargs = {"batch_first": True, "dim_feedforward": 21, "dropout": 0.0} | kwargs
    return twins(fastattn.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer, E, 4, **kwargs)


@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "linear1.weight", "norm1.weight"])
def test_pruning(name):
    """Pruning makes the weight a plain attribute that a hook recomputes before each call."""
    child, parameter = name.split(".")
    modules = pair()
    for module in modules:
        torch.manual_seed(0)
        prune.random_unstructured(getattr(module, child), parameter, 0.5)
        module(sample(1, 2, E))
    ours, theirs = modules
    x = sample(2, 5, E)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_dynamic_quantization_of_the_linear_layers():
    ours, theirs = (torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear}) for m in pair())
    x = sample(2, 5, E)
    enabled = torch.backends.mha.get_fastpath_enabled()
    # torch's fast path reads linear1.weight, which is a method of the quantized layer.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = theirs(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_each_sample_by_vmap():
    modules = pair()
    parameters = dict(modules[0].named_parameters())
    x = sample(3, 5, E)

    def per_sample(module):
        loss = lambda p, x: functional_call(module, p, (x.unsqueeze(0),)).square().sum()
        return vmap(grad(loss), (None, 0))(parameters, x)

    ours, theirs = (per_sample(m) for m in modules)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-3, rtol=1e-3)


def test_checkpointing_repeats_the_dropout():
    ours, _ = pair(dropout=0.3)
    grads = []
    for call in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        x = torch.ones(2, 5, E, requires_grad=True)
        torch.manual_seed(1)
        (call(x) ** 2).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_exports():
    ours, _ = pair()
    x = sample(2, 5, E)
    torch.testing.assert_close(torch.export.export(ours.eval(), (x,)).module()(x), ours(x))


def test_meta_device_then_materialized():
    with torch.device("meta"):
        ours = fastattn.nn.TransformerEncoderLayer(E, 4, 21, 0.0)
    _, theirs = pair(batch_first=False)
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    assert_parity(ours, copy.deepcopy(theirs), lambda m, x: m(x), (sample(5, 2, E),))
