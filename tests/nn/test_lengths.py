"""Each module under PyTorch's transforms: compile without a graph after the second length, export for every length, autocast,
checkpoints, copies and files, determinism, forward mode, forward over reverse and vmap by functional_call."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import nn as ours

E, H, HIDDEN = 16, 2, 24
LENGTHS = (5, 8, 9, 16)
_LAYER: dict[str, Any] = {
    "d_model": E,
    "nhead": H,
    "dim_feedforward": HIDDEN,
    "batch_first": True,
    "activation": "gelu",
}


class SelfAttention(nn.Module):
    """MultiheadAttention as a function of one tensor."""

    def __init__(self, weights: bool, **kwargs: Any) -> None:
        super().__init__()
        self.weights = weights
        self.attention = ours.MultiheadAttention(E, H, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x, need_weights=self.weights)
        return out if weights is None else torch.cat((out, weights), -1)


class Decoding(nn.Module):
    """A decoder over its own input as memory, masked."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        if isinstance(self.part, nn.Transformer):
            return self.part(x[:, 1:], x, tgt_mask=mask, tgt_is_causal=True)
        return self.part(x, x[:, 1:], tgt_mask=mask, tgt_is_causal=True)


def _gated() -> nn.Module:
    return ours.FeedForward(E, HIDDEN, activation="silu", gated=True, dropout=0.5)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: ours.LayerNorm(E),
    "RMSNorm": lambda: ours.RMSNorm(E),
    "FeedForward": _gated,
    "Sequential": lambda: ours.Sequential(nn.Linear(E, HIDDEN), nn.GELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, E)),
    "MultiheadAttention": lambda: SelfAttention(False, dropout=0.5),
    "MultiheadAttention, weights": lambda: SelfAttention(True, add_bias_kv=True, add_zero_attn=True),
    "TransformerEncoderLayer": lambda: ours.TransformerEncoderLayer(**_LAYER, dropout=0.5, norm_first=True),
    "TransformerDecoderLayer": lambda: Decoding(ours.TransformerDecoderLayer(**_LAYER, dropout=0.5)),
    "TransformerEncoder": lambda: ours.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2, nn.LayerNorm(E)),
    "TransformerDecoder": lambda: Decoding(ours.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 1)),
    "Transformer": lambda: Decoding(
        ours.Transformer(E, H, 1, 1, HIDDEN, dropout=0.1, activation="gelu", batch_first=True)
    ),
    "converted": lambda: fastattn.convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 1)),
}
EVERY = pytest.mark.parametrize("name", MODULES)
#: Graphs that take seconds to trace; of the compiled tests only some modules run each time.
_LONG = ("Transformer", "TransformerEncoder", "TransformerDecoder", "converted")
_TRAINED = ("LayerNorm", "FeedForward", "MultiheadAttention")


def spread(*names: str) -> pytest.MarkDecorator:
    """Every module, the named ones in each run of the tests and the others in the long ones."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in MODULES]
    )


WITHOUT_DROPOUT = ("LayerNorm", "RMSNorm", "MultiheadAttention, weights")


def build(name: str, train: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return MODULES[name]().train(train)


def draw(n: int) -> Tensor:
    return torch.randn(2, n, E, generator=torch.Generator().manual_seed(n))


def step(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    out = module(x)
    # Not a sum of squares: behind a norm that is a constant.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out.detach(), *torch.autograd.grad(out.float(), [x, *parameters], cotangent)]


@spread(*set(MODULES) - set(_LONG))
def test_no_graph_after_the_second_length(name: str) -> None:
    module = build(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for n in LENGTHS:
            torch.testing.assert_close(compiled(draw(n)), module(draw(n)), rtol=1e-4, atol=1e-5)
            assert counter.frame_count <= 2, f"compiled again for {n} rows"


@spread(*_TRAINED)
def test_no_graph_after_the_second_length_in_training(name: str) -> None:
    module = build(name, train=name in WITHOUT_DROPOUT)
    parameters = list(module.parameters())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for n in LENGTHS:
        for mine, expected in zip(step(compiled, parameters, draw(n)), step(module, parameters, draw(n)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
        assert counter.frame_count <= 2, f"compiled again for {n} rows"


@spread(*set(MODULES) - set(_LONG))
def test_export_for_every_length(name: str) -> None:
    module = build(name)
    length = torch.export.Dim("length", min=6, max=64)
    program = torch.export.export(module, (draw(8),), dynamic_shapes=({1: length},))
    for n in (6, 17):
        torch.testing.assert_close(program.module()(draw(n)), module(draw(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@EVERY
def test_autocast(name: str, low: torch.dtype) -> None:
    """Products run in the low dtype; norms stay; the parameters and their gradients are in float32."""
    module = build(name)
    parameters = list(module.parameters())
    exact = step(module, parameters, draw(7))
    with torch.autocast("cpu", low):
        found = step(module, parameters, draw(7))
        dtype = module(draw(7)).dtype
    last_is_a_norm = name not in ("FeedForward", "Sequential", "MultiheadAttention", "MultiheadAttention, weights")
    if name != "TransformerEncoderLayer":  # norm_first: a sum of both dtypes comes last
        assert dtype == (torch.float32 if last_is_a_norm else low)
    for mine, reference in zip(found, exact, strict=True):
        # 8 bits, 11 bits; up to ten products one after the other, there and back.
        assert (mine.float() - reference).abs().max() <= 20 * torch.finfo(low).eps * reference.abs().max()
    assert all(g.dtype == torch.float32 for g in found[1:])


@pytest.mark.parametrize("reentrant", (False, True))
@EVERY
def test_a_checkpoint_replays_the_dropout(name: str, reentrant: bool) -> None:
    module = build(name, train=True)
    results = []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        module.zero_grad()
        x = draw(7).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)  # type: ignore[arg-type]


@EVERY
def test_copies_and_files(name: str) -> None:
    module = build(name)
    file, state = io.BytesIO(), io.BytesIO()
    torch.save(module, file)
    torch.save(module.state_dict(), state)
    loaded = build(name)
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    loaded.load_state_dict(torch.load(io.BytesIO(state.getvalue()), weights_only=True), strict=True)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    others.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for other in others:
        assert [type(m) for m in other.modules()] == [type(m) for m in module.modules()]
        assert torch.equal(other(draw(7)), module(draw(7)))


@EVERY
def test_deterministic(name: str) -> None:
    """The fixture of every test asks for deterministic algorithms: nothing may raise, and two runs have the same bits."""
    assert torch.are_deterministic_algorithms_enabled()
    module = build(name, train=True)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(step(module, list(module.parameters()), draw(19)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@EVERY
def test_forward_mode_is_the_transpose_of_backward(name: str) -> None:
    """And by functional_call, with the parameters' tangents; and forward over reverse."""
    module = build(name).double()
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = draw(5).double()
    tangents = ({n: torch.randn_like(p) for n, p in parameters.items()}, torch.randn_like(x))

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))

    out, pushed = jvp(call, (parameters, x), tangents)
    cotangent = torch.randn_like(out)
    _, pull = torch.func.vjp(call, parameters, x)  # type: ignore[misc]
    onto_parameters, onto_x = pull(cotangent)
    expected = (onto_x * tangents[1]).sum() + sum((g * tangents[0][n]).sum() for n, g in onto_parameters.items())
    torch.testing.assert_close((pushed * cotangent).sum(), expected)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: call(parameters, x).square().sum())(x)

    _, hessian_vector = jvp(gradient, (x,), (tangents[1],))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(hessian_vector, torch.autograd.grad(first, leaf, tangents[1])[0])


@EVERY
def test_vmap_over_samples(name: str) -> None:
    module = build(name)
    samples = torch.stack([draw(5), draw(5) + 1, 2 * draw(5)])
    found = torch.func.vmap(module)(samples)
    torch.testing.assert_close(found, torch.stack([module(x) for x in samples]), rtol=1e-4, atol=1e-5)
