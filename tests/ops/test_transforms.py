"""What PyTorch can do to an operation: compile, export, opcheck, vmap, func.grad, forward mode, double backward, checkpoint."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops._library import SCHEMAS, has_cpu

pytestmark = pytest.mark.skipif(not has_cpu, reason="needs the C++ core: the reference is plain PyTorch")

RNG = torch.tensor([5, 6])


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
    out, lse = fastattn.attention(
        q,
        k,
        v,
        attn_mask=mask,
        causal=True,
        softcap=3.0,
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=0.2,
        rng_state=RNG,
        return_lse=True,
        implementation="cpu",
    )
    return out * lse.unsqueeze(-1)


def _attention_varlen(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
    out, lse = fastattn.attention_varlen(
        q,
        k,
        v,
        torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        torch.tensor([0, 4, 5, 6], dtype=torch.int32),
        causal=True,
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=0.2,
        rng_state=RNG,
        return_lse=True,
        implementation="cpu",
    )
    return out * lse.transpose(0, 1).unsqueeze(-1)


def _attention_weights(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    return fastattn.attention_weights(
        q,
        k,
        lse,
        attn_mask=mask,
        causal=True,
        softcap=3.0,
        alibi_slopes=slopes,
        dropout_p=0.2,
        rng_state=RNG,
        implementation="cpu",
    )


def _averaged_weights(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return fastattn.attention_weights(q, k, lse, average_heads=True, implementation="cpu")


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, h = fastattn.layer_norm(
        x,
        (6,),
        weight,
        bias,
        residual=residual,
        dropout_p=0.2,
        rng_state=RNG,
        return_residual=True,
        implementation="cpu",
    )
    return y * h


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return fastattn.rms_norm(x, (6,), weight, 1e-3, implementation="cpu")


def _residual_norm(x: Tensor, residual: Tensor) -> Tensor:
    y, h = fastattn.rms_norm(x, (6,), None, 1e-3, residual=residual, return_residual=True, implementation="cpu")
    return y + h


def _ffn(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor, b_out: Tensor, residual: Tensor) -> Tensor:
    options = {"dropout_p": 0.2, "rng_state": RNG, "implementation": "cpu"}
    return fastattn.ffn(x, w_in, w_out, b_in, b_out, residual=residual, **options)  # type: ignore[arg-type]


def _glu_ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fastattn.glu_ffn(x, w_gate, w_up, w_down, recompute=True, implementation="cpu")


def _linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return fastattn.linear(x, weight, bias, residual=residual, implementation="cpu")


def _rope(x: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, 10, dtype=x.dtype).view(5, 2)
    return fastattn.rope(x, angles.cos(), angles.sin(), implementation="cpu")


def _cross_entropy(logits: Tensor) -> Tensor:
    weight, target = torch.linspace(0.5, 1, 6, dtype=logits.dtype), torch.tensor([1, 5, -100])
    return fastattn.cross_entropy(
        logits, target, weight, label_smoothing=0.1, softcap=3.0, z_loss=0.1, implementation="cpu"
    )


def _linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    target = torch.tensor([1, 4, -100])
    return fastattn.linear_cross_entropy(
        x, weight, target, bias, label_smoothing=0.1, softcap=3.0, z_loss=0.1, implementation="cpu"
    )


def _token_losses(x: Tensor, weight: Tensor) -> Tensor:
    return fastattn.linear_cross_entropy(x, weight, torch.tensor([1, 4, 0]), reduction="none", implementation="cpu")


OPS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (_attention, ((1, 2, 5, 4), (1, 1, 6, 4), (1, 1, 6, 3), (2, 1, 6), (2,), (2,))),
    "attention_varlen": (_attention_varlen, ((5, 2, 4), (6, 1, 4), (6, 1, 3), (3, 2), (2,))),
    "attention_weights": (_attention_weights, ((1, 2, 5, 4), (1, 1, 6, 4), (1, 2, 5), (2, 1, 6), (2,))),
    "averaged_weights": (_averaged_weights, ((1, 2, 5, 4), (1, 1, 6, 4), (1, 2, 5))),
    "layer_norm": (_layer_norm, ((3, 6), (3, 6), (6,), (6,))),
    "rms_norm": (_rms_norm, ((3, 6), (6,))),
    "residual_norm": (_residual_norm, ((3, 6), (3, 6))),
    "ffn": (_ffn, ((3, 4), (7, 4), (5, 7), (7,), (5,), (3, 5))),
    "glu_ffn": (_glu_ffn, ((3, 4), (7, 4), (7, 4), (5, 7))),
    "linear": (_linear, ((3, 4), (5, 4), (5,), (3, 5))),
    "rope": (_rope, ((1, 2, 5, 6),)),
    "cross_entropy": (_cross_entropy, ((3, 6),)),
    "linear_cross_entropy": (_linear_cross_entropy, ((3, 4), (5, 4), (5,))),
    "token_losses": (_token_losses, ((3, 4), (5, 4))),
}


@pytest.fixture(params=OPS.values(), ids=OPS.keys())
def op(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, shapes = request.param
    return function, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_gradcheck(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    assert torch.autograd.gradcheck(*op, check_forward_ad=True, check_undefined_grad=False)


def test_gradgradcheck(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    assert torch.autograd.gradgradcheck(*op)


def test_func_grad_and_jvp(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    function, inputs = op
    wanted = tuple(range(len(inputs)))
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    plain = [x.detach() for x in inputs]
    actual = torch.func.grad(lambda *args: function(*args).square().sum(), argnums=wanted)(*plain)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    tangents = [torch.randn_like(x) for x in plain]
    out, pushed = torch.func.jvp(function, tuple(plain), tuple(tangents))
    cotangent = torch.randn_like(out)
    pulled = torch.autograd.grad(function(*inputs), inputs, cotangent)
    torch.testing.assert_close(
        (pushed * cotangent).sum(), sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    )


def test_forward_over_reverse(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    """jvp of grad, and dual numbers through a plain backward pass, against reverse over reverse."""
    function, inputs = op
    tangents = [torch.randn_like(x) for x in inputs]
    wanted = tuple(range(len(inputs)))
    loss = lambda *args: function(*args).square().sum()
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    expected = torch.autograd.grad(first, inputs, tangents)
    plain = tuple(x.detach() for x in inputs)
    _, found = torch.func.jvp(torch.func.grad(loss, argnums=wanted), plain, tuple(tangents))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        gradients = torch.autograd.grad(loss(*dual), dual)
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(g).tangent, e)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    function, inputs = op
    stacked = [torch.randn(3, *x.shape, dtype=x.dtype) for x in inputs]
    expected = torch.stack([function(*(x[i] for x in stacked)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), expected)
    gradient = torch.func.grad(lambda *args: function(*args).sum())
    expected = torch.stack([gradient(*(x[i] for x in stacked)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(gradient)(*stacked), expected)


def test_compile_in_one_graph(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    function, inputs = op
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    expected, actual = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_compile_draws_dropout_without_breaking_the_graph() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 8, 4)
    compiled = torch.compile(lambda q: fastattn.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    first, second = compiled(q), compiled(q)
    assert not torch.equal(first, second)


def test_compile_with_inductor_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, w: torch.relu(fastattn.rms_norm(x * 2, (16,), w)) + 1, fullgraph=True, dynamic=True
    )
    weight = torch.randn(16)
    for rows in (3, 7):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(function(x, weight), torch.relu(fastattn.rms_norm(x * 2, (16,), weight)) + 1)


def test_export(op: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    function, inputs = op

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    args = tuple(x.detach() for x in inputs)
    program = torch.export.export(Module(), args)
    assert any("fastattn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), function(*args))


def test_checkpoint_replays_the_same_dropout() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def function(q: Tensor) -> Tensor:
        return fastattn.attention(q, q, q, dropout_p=0.5)

    torch.manual_seed(1)
    expected = torch.autograd.grad(function(q).square().sum(), q)
    torch.manual_seed(1)
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(function, q, use_reentrant=False).square().sum(), q)
    torch.testing.assert_close(actual, expected)


def test_autocast() -> None:
    q, w = torch.randn(1, 2, 5, 8), torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.attention(q, q, q).dtype == torch.bfloat16
        assert fastattn.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        assert fastattn.ffn(q, w, w).dtype == torch.bfloat16
        assert fastattn.linear(q, w, residual=q).dtype == torch.bfloat16
        loss = fastattn.linear_cross_entropy(q[0, 0].requires_grad_(), w, torch.arange(5))
        assert loss.dtype == torch.float32 and loss.grad_fn is not None


def _samples() -> dict[str, tuple[object, ...]]:
    """Arguments of every operator, in the schema's order."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 7)
    mask, slopes, sinks = torch.randn(1, 4, 1, 6), torch.rand(1, 4), torch.randn(4)
    options = (0.3, -1, 0, 1, 2.0, 0.1)
    out, lse, saved = torch.ops.fastattn.attention_forward(q, k, v, mask, slopes, sinks, *options, RNG)
    x, w, b = torch.randn(5, 6), torch.randn(6), torch.randn(6)
    y, h, mean, rstd = torch.ops.fastattn.norm_forward(x, x.clone(), w, b, 1e-5, False, 0.1, RNG)
    w_in, w_gate, w_out, b_in, b_out = (torch.randn(s) for s in ((9, 6), (9, 6), (4, 9), (9,), (4,)))
    o, pre, gate = torch.ops.fastattn.ffn_forward(x, w_in, b_in, w_gate, b_in, w_out, b_out, None, 1, 0.1, RNG, True)
    target, ce = torch.tensor([1, 3, -100, 0, 2]), (-100, 0.1, 3.0, 0.1, 1)
    _, ce_stats = torch.ops.fastattn.cross_entropy_forward(x, target, w.abs(), *ce)
    _, stats, *_ = torch.ops.fastattn.linear_cross_entropy_forward(x, w_in, b_in, target, *ce, False, False, False)
    both = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    return {
        "attention_forward": (q, k, v, mask, slopes, sinks, *options, RNG),
        "attention_inference": (q, k, v, mask, slopes, sinks, *options, RNG),
        "attention_backward": (*both, mask, slopes, sinks, *options, RNG, True, True, True, None, saved),
        "attention_weights": (q, k, lse, mask, slopes, *options, RNG, True),
        "norm_forward": (x, x.clone(), w, b, 1e-5, False, 0.1, RNG),
        "norm_inference": (x, w, b, 6, 1e-5, False),
        "norm_backward": (torch.randn_like(y), torch.randn_like(h), h, w, mean, rstd, False, 0.1, RNG, True, True),
        "ffn_forward": (x, w_in, b_in, w_gate, b_in.clone(), w_out, b_out, torch.randn(5, 4), 1, 0.1, RNG, True),
        "ffn_inference": (x.view(5, 1, 6), w_in, b_in, w_gate, b_in.clone(), w_out, b_out, torch.randn(5, 1, 4), 1),
        "ffn_backward": (torch.randn_like(o), x, w_in, w_gate, w_out, pre, gate, 1, 0.1, RNG, True, True, True),
        "linear_forward": (x.view(1, 5, 6), w_in, b_in, torch.randn(1, 5, 9)),
        "linear_backward": (torch.randn(5, 9), x, w_in, True, True, True),
        "cross_entropy_forward": (x, target, w.abs(), *ce),
        "cross_entropy_backward": (torch.tensor(1.5), x, target, w.abs(), ce_stats, *ce),
        "linear_cross_entropy_forward": (x, w_in, b_in, target, *ce, True, True, True),
        "linear_cross_entropy_backward": (torch.tensor(1.5), x, w_in, b_in, target, stats, *ce, True, True, True),
        "rope": (torch.randn(2, 3, 5, 8), torch.randn(1, 5, 3), torch.randn(1, 5, 3), False, True),
        "rope_": (torch.randn(2, 3, 5, 8), torch.randn(1, 5, 3), torch.randn(1, 5, 3), False, True),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str) -> None:
    # Without NaN poisoning: opcheck compares two runs, and deterministic mode is itself an argument of the compiled one.
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(getattr(torch.ops.fastattn, name).default, _samples()[name])
