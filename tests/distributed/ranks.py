"""What two ranks compute together, by name; each check runs on both and raises where sharded and whole results differ.

``python ranks.py NAME...`` starts the two processes (gloo, on this machine), prints "ok NAME" for each check that passed.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastattn
import fastattn.distributed

R, S0, S1 = Replicate(), Shard(0), Shard(1)
CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}


def check(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[function.__name__] = function
    return function


def compare(
    mesh: DeviceMesh,
    call: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    placements: Sequence[Placement | None],
    expected: Placement | None,
) -> None:
    """``call`` on tensors split as ``placements``: results and gradients of the whole ones, the first result ``expected``
    (None: placed anyhow)."""
    whole = [None if t is None else t.clone().requires_grad_() for t in tensors]
    split = [
        None if t is None else distribute_tensor(t, mesh, [p]).requires_grad_()
        for t, p in zip(tensors, placements, strict=True)
    ]
    results, sharded = call(*whole), call(*split)
    results, sharded = ((r if isinstance(r, tuple) else (r,)) for r in (results, sharded))
    assert expected is None or sharded[0].placements == (expected,), f"{sharded[0].placements}, expected {expected}"
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(r.shape, generator=generator) for r in results]
    pushed = [distribute_tensor(c, mesh, [R]) for c in cotangents]
    gradients = torch.autograd.grad(results, [t for t in whole if t is not None], cotangents)
    of_split = torch.autograd.grad(sharded, [t for t in split if t is not None], pushed)
    for name, a, b in zip("results", sharded, results, strict=False):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"result {n}: {m}")
    for i, (a, b) in enumerate(zip(of_split, gradients, strict=True)):
        full = a.full_tensor() if isinstance(a, DTensor) else a
        torch.testing.assert_close(full, b, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"gradient {i}: {m}")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@check
def attention_by_batch_and_heads(mesh: DeviceMesh) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 6)
    mask, slopes, sinks = draw(2, 1, 7, 9), draw(2, 4).abs(), draw(4)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> Any:
        options: dict[str, Any] = {"attn_mask": mask, "alibi_slopes": slopes, "sinks": sinks, "softcap": 3.0}
        return fastattn.attention(q, k, v, causal=True, return_lse=True, **options)

    compare(mesh, call, (q, k, v, mask, slopes, sinks), (S0, S0, S0, S0, S0, R), S0)
    compare(mesh, call, (q, k, v, mask[:1].repeat(1, 4, 1, 1), slopes, sinks), (S1, S1, S1, S1, S1, S0), S1)
    shared = (q, k, v, draw(1, 1, 7, 9), slopes[0], sinks)
    compare(mesh, call, shared, (S0, S0, S0, R, R, R), S0)
    compare(mesh, call, shared, (S1, S1, S1, R, S0, S0), S1)


@check
def attention_in_other_dtypes_and_without_gradient(mesh: DeviceMesh) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [draw(2, 2, 5, 8).to(dtype) for _ in range(3)]
        split = [distribute_tensor(t, mesh, [S1]) for t in tensors]
        with torch.no_grad():
            assert torch.equal(fastattn.attention(*split).full_tensor(), fastattn.attention(*tensors))
        out = fastattn.attention(*(t.requires_grad_() for t in split), return_lse=True)[0]
        assert torch.equal(out.full_tensor(), fastattn.attention(*tensors))


@check
def one_key_head_is_not_split(mesh: DeviceMesh) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 1, 9, 8), draw(2, 1, 9, 8)
    whole = fastattn.attention(q, k, v)
    split = [distribute_tensor(t, mesh, [p]) for t, p in ((q, S1), (k, R), (v, R))]
    torch.testing.assert_close(fastattn.attention(*split).full_tensor(), whole)


@check
def dropout_is_refused(mesh: DeviceMesh) -> None:
    for placement in (S0, R):
        q = distribute_tensor(draw(2, 2, 5, 8), mesh, [placement])
        w = distribute_tensor(draw(8, 8), mesh, [R])
        for call in (
            lambda q=q: fastattn.attention(q, q, q, dropout_p=0.5),
            lambda q=q: fastattn.scaled_dot_product_attention(q, q, q, None, 0.5),
            lambda q=q: fastattn.layer_norm(q, (8,), dropout_p=0.5),
            lambda q=q, w=w: fastattn.ffn(q, w, w, dropout_p=0.5),
        ):
            try:
                call()
            except NotImplementedError as error:
                assert "on sharded tensors (DTensor) only 0 is allowed" in str(error), error
            else:
                raise AssertionError("dropout went through")


@check
def norms_by_rows(mesh: DeviceMesh) -> None:
    x, residual, w, b = draw(4, 3, 10), draw(4, 3, 10), draw(10), draw(10)
    compare(mesh, lambda x, w, b: fastattn.layer_norm(x, (10,), w, b), (x, w, b), (S0, R, R), S0)
    compare(mesh, lambda x, w: fastattn.rms_norm(x, (10,), w), (x, w), (S0, R), S0)

    def call(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        return fastattn.rms_norm(x, (10,), w, residual=residual, return_residual=True)

    compare(mesh, call, (x, residual, w), (S0, S0, R), S0)


@check
def linear_by_rows_outputs_and_inputs(mesh: DeviceMesh) -> None:
    x, w, b, residual = draw(6, 8), draw(10, 8), draw(10), draw(6, 10)

    def call(x: Tensor, w: Tensor, b: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return fastattn.linear(x, w, b, residual=residual)

    compare(mesh, call, (x, w, b, residual), (S0, R, R, S0), S0)
    compare(mesh, call, (x, w, b, residual), (R, S0, S0, S1), S1)
    compare(mesh, call, (x, w, None, None), (S1, S1, None, None), Partial())


@check
def ffn_by_rows_and_hidden_features(mesh: DeviceMesh) -> None:
    x, w_in, b_in, w_gate, w_out = draw(6, 8), draw(12, 8), draw(12), draw(12, 8), draw(10, 12)
    plain = lambda x, w_in, b_in, w_out: fastattn.ffn(x, w_in, w_out, b_in)
    compare(mesh, plain, (x, w_in, b_in, w_out), (S0, R, R, R), S0)
    compare(mesh, plain, (x, w_in, b_in, w_out), (R, S0, S0, S1), Partial())
    gated = lambda x, w_in, w_gate, w_out: fastattn.glu_ffn(x, w_in, w_gate, w_out)
    compare(mesh, gated, (x, w_in, w_gate, w_out), (S0, R, R, R), S0)
    compare(mesh, gated, (x, w_in, w_gate, w_out), (R, S0, S0, S1), Partial())


@check
def products_of_rows_in_two_dimensions(mesh: DeviceMesh) -> None:
    x, w_in, w_out, residual = draw(4, 6, 8), draw(12, 8), draw(10, 12), draw(4, 6, 10)
    linear, ffn = torch.ops.fastattn.linear_forward.default, torch.ops.fastattn.ffn_inference.default
    whole = lambda x: distribute_tensor(x, mesh, [R])
    for split in (S0, S1):
        rows = [distribute_tensor(t, mesh, [split]) for t in (x, residual)]
        out = ffn(rows[0], whole(w_in), None, None, None, whole(w_out), None, rows[1], 1)
        assert out.placements == (split,)
        expected = ffn(x, w_in, None, None, None, w_out, None, residual, 1)
        torch.testing.assert_close(out.full_tensor(), expected, rtol=1e-4, atol=1e-5)
        y = linear(rows[0], whole(w_in), None, None)
        assert y.placements == (split,)
        torch.testing.assert_close(y.full_tensor(), linear(x, w_in, None, None), rtol=1e-4, atol=1e-5)
    features = [distribute_tensor(w_in, mesh, [S0]), distribute_tensor(w_out, mesh, [S1])]
    out = ffn(whole(x), features[0], None, None, None, features[1], None, None, 1)
    assert out.placements == (Partial(),)
    expected = ffn(x, w_in, None, None, None, w_out, None, None, 1)
    torch.testing.assert_close(out.full_tensor(), expected, rtol=1e-4, atol=1e-5)


@check
def rope_by_batch_and_heads(mesh: DeviceMesh) -> None:
    angles = draw(5, 3)
    cos, sin = angles.cos(), angles.sin()
    for split in (S0, S1):
        call = lambda x: fastattn.rope(x, *(distribute(t, x, mesh) for t in (cos, sin)))
        compare(mesh, call, (draw(2, 4, 5, 8),), (split,), split)


@check
def losses_by_rows(mesh: DeviceMesh) -> None:
    logits, x, head, bias = draw(6, 11), draw(6, 8), draw(11, 8), draw(11)
    target, classes = torch.tensor([3, 10, -100, 0, 5, 5]), draw(11).abs()
    options: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1}]
    for reduction, expected in (("none", S0), ("sum", Partial()), ("mean", None)):
        for given in options:
            given = given | {"reduction": reduction}

            def loss(z: Tensor, given: Any = given, weight: Tensor | None = None) -> Tensor:
                return fastattn.cross_entropy(z, distribute(target, z, mesh, S0), weight, **given)

            def weighted(z: Tensor, loss: Any = loss) -> Tensor:
                return loss(z, weight=distribute(classes, z, mesh))

            def linear(x: Tensor, w: Tensor, b: Tensor | None = None, given: Any = given) -> Tensor:
                return fastattn.linear_cross_entropy(x, w, distribute(target, x, mesh, S0), b, **given)

            compare(mesh, loss, (logits,), (S0,), expected)
            compare(mesh, weighted, (logits,), (S0,), expected)
            compare(mesh, linear, (x, head), (S0, R), expected)
            compare(mesh, linear, (x, head, bias), (S0, R, R), expected)
            # Split along classes: gathered.
            compare(mesh, loss, (logits,), (S1,), None)
            compare(mesh, linear, (x, head, bias), (R, S0, S0), None)


@check
def a_mean_loss_of_sharded_rows_gathers_no_logits(mesh: DeviceMesh) -> None:
    x, head, target = draw(6, 8), draw(11, 8), torch.tensor([3, 10, -100, 0, 5, 5])
    split = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in ((x, S0), (head, R))]
    rows = distribute_tensor(target, mesh, [S0])
    with CommDebugMode() as communication:
        fastattn.cross_entropy(split[0] @ split[1].T, rows)
        fastattn.linear_cross_entropy(*split, rows)
    assert not any("gather" in str(op) for op in communication.get_comm_counts()), communication.get_comm_counts()


@check
def attention_weights_by_batch_and_heads(mesh: DeviceMesh) -> None:
    q, k, mask, slopes = draw(2, 4, 7, 8), draw(2, 2, 9, 8), draw(2, 1, 7, 9), draw(2, 4).abs()
    _, lse = fastattn.attention(q, k, k, attn_mask=mask, causal=True, alibi_slopes=slopes, return_lse=True)
    for average in (False, True):

        def call(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor, slopes: Tensor, average: bool = average) -> Tensor:
            options: dict[str, Any] = {"attn_mask": mask, "alibi_slopes": slopes, "average_heads": average}
            return fastattn.attention_weights(q, k, lse, causal=True, **options)

        by_heads = Partial("avg") if average else S1
        compare(mesh, call, (q, k, lse, mask, slopes), (S0, S0, S0, S0, S0), S0)
        compare(mesh, call, (q, k, lse, mask.repeat(1, 4, 1, 1), slopes), (S1, S1, S1, S1, S1), by_heads)
        compare(mesh, call, (q, k, lse, mask[:1], slopes[0]), (S1, S1, S1, R, S0), by_heads)
        with torch.no_grad():
            one = [distribute_tensor(t, mesh, [p]) for t, p in ((q, S1), (k[:, :1], R), (lse, S1))]
            whole = fastattn.attention_weights(q, k[:, :1], lse, average_heads=average)
            torch.testing.assert_close(
                fastattn.attention_weights(*one, average_heads=average).full_tensor(), whole, rtol=1e-5, atol=1e-6
            )


@check
def double_backward(mesh: DeviceMesh) -> None:
    """The gradient of a gradient's norm, through the reference: its own constants are on every rank."""
    q, k, v, x, w = draw(2, 4, 7, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 6), draw(4, 8), draw(8)
    up, down, target = draw(12, 8), draw(8, 12), torch.tensor([1, 5, -100, 0])

    def loss(x: Tensor) -> Tensor:
        return fastattn.cross_entropy(x, distribute(target, x, mesh, S0))

    calls: list[tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[Placement]]] = [
        (lambda q, k, v: fastattn.attention(q, k, v, causal=True), (q, k, v), (S0, S0, S0)),
        (lambda q, k, v: fastattn.attention(q, k, v, causal=True), (q, k, v), (S1, S1, S1)),
        (lambda x, w: fastattn.rms_norm(x, (8,), w), (x, w), (S0, R)),
        (fastattn.ffn, (x, up, down), (S0, R, R)),
        (fastattn.linear, (x, up), (S0, R)),
        (loss, (x,), (S0,)),
    ]
    for call, tensors, placements in calls:
        whole = [t.clone().requires_grad_() for t in tensors]
        split = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, placements, strict=True)]
        second = []
        for leaves in (whole, split):
            first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))  # type: ignore[arg-type]
        for mine, expected in zip(second[1], second[0], strict=True):
            torch.testing.assert_close(mine.full_tensor(), expected, rtol=1e-3, atol=1e-4)


def distribute(t: Tensor, like: Tensor, mesh: DeviceMesh, placement: Placement = R) -> Tensor:
    return distribute_tensor(t, mesh, [placement]) if isinstance(like, DTensor) else t


class _OverItself(nn.Module):
    """A decoder whose memory is its input."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


def _model() -> nn.Module:
    """Of every module of fastattn.nn."""
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    chain = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    gated = fastattn.nn.FeedForward(16, 24, activation="silu", gated=True)
    parts = (nn.TransformerEncoder(layer, 2), nn.LayerNorm(16), chain, gated, _OverItself(), nn.RMSNorm(16))
    return fastattn.convert(nn.Sequential(*parts))


def _trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Parameters after two steps of SGD on this rank's x."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def _data_parallel(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(9)
    x = draw(4, 6, 16)
    own = x[2 * dist.get_rank() :][:2]
    for a, b in zip(_trained(wrap(_model()), own), _trained(_model(), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@check
def ddp(mesh: DeviceMesh) -> None:
    _data_parallel(DistributedDataParallel)


@check
def fsdp2(mesh: DeviceMesh) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        for layer in model[0].layers:  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    _data_parallel(wrap)


@check
def tensor_parallel(mesh: DeviceMesh) -> None:
    """Column and row parallel Linears of a feed-forward network and of attention's projections, torch's own styles."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.norm = nn.RMSNorm(16)
            self.ffn = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            heads = [m(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v)]
            x = x + self.o(fastattn.attention(*heads, causal=True).transpose(1, 2).flatten(-2))
            return x + self.ffn(x)

    torch.manual_seed(2)
    whole = fastattn.convert(Block())
    split = copy.deepcopy(whole)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    parallelize_module(split, mesh, plan | {"ffn.0": ColwiseParallel(), "ffn.2": RowwiseParallel()})
    x = draw(2, 6, 16)
    results = [module(x) for module in (whole, split)]
    for out in results:
        out.square().sum().backward()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(split.parameters(), whole.parameters(), strict=True):
        grad = a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad
        torch.testing.assert_close(grad, b.grad, rtol=1e-3, atol=1e-4)


def _work(rank: int, names: list[str], port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[name](mesh)
        except Exception:
            print(f"rank {rank}, {name}:\n{traceback.format_exc()}", flush=True)
            os._exit(1)  # the other rank would wait for this one
        if rank == 0:
            print(f"ok {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (sys.argv[1:] or list(CHECKS), port), nprocs=2)
