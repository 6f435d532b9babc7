"""fastattn.cross_entropy, linear_cross_entropy: every implementation and instruction set, loss and gradients, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.ops._library import has_cpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "sum": {"reduction": "sum", "ignore_index": 1},
    "none": {"reduction": "none", "label_smoothing": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.01},
    "everything": {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.1, "reduction": "none", "ignore_index": 2},
}


def _plain(logits, target, weight=None, *, softcap=0.0, z_loss=0.0, reduction="mean", **options):  # type: ignore[no-untyped-def]
    """As eager code writes it, every step in the logits' dtype."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    if not z_loss:
        return loss
    counts = target != options.get("ignore_index", -100)
    squares = torch.where(counts, torch.logsumexp(logits, 1).square(), 0) * z_loss
    if reduction == "none":
        return loss + squares
    weights = counts.to(logits.dtype) if weight is None else torch.where(counts, weight[target * counts], 0)
    return loss + (squares.sum() if reduction == "sum" else squares.sum() / weights.sum())


def _plain_linear(x, weight, bias, target, **options):  # type: ignore[no-untyped-def]
    return _plain(F.linear(x, weight, bias), target, **options)


def _targets(tokens: int, classes: int, ignore_index: int) -> Tensor:
    target = torch.randint(0, classes, (tokens,))
    target[2::5] = ignore_index
    return target


def _run(function, tensors, dtype, upstream):  # type: ignore[no-untyped-def]
    """The loss, and the gradients of whatever is there."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    loss = function(*leaves)
    moving = [leaf for leaf in leaves if leaf is not None]
    return loss, *torch.autograd.grad(loss, moving, upstream[: loss.numel()].reshape(loss.shape).to(loss.dtype))


def _compare(implementation, tokens, classes, dtype, options, scale=2.0, class_weight=None):  # type: ignore[no-untyped-def]
    logits = (torch.randn(tokens, classes) * scale).to(dtype)
    target = _targets(tokens, classes, int(options.get("ignore_index", -100)))
    upstream = torch.rand(tokens) + 0.5

    def run(function, dtype, **extra):  # type: ignore[no-untyped-def]
        weight = None if class_weight is None else class_weight.to(dtype)
        return _run(lambda z: function(z, target, weight, **options, **extra), (logits,), dtype, upstream)

    actual = run(fastattn.cross_entropy, dtype, implementation=implementation)
    exact = run(reference.cross_entropy, torch.float64)
    for name, a, p, e in zip(("loss", "dlogits"), actual, run(_plain, dtype), exact, strict=True):
        assert_accurate(a, p, e, name, terms=classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_entropy(implementation: str, options: dict[str, object], dtype: torch.dtype) -> None:
    _compare(implementation, 13, 83, dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (1, 2), (3, 16), (2, 2048), (5, 4133)], ids=str)
def test_shapes(implementation: str, tokens: int, classes: int, dtype: torch.dtype) -> None:
    _compare(implementation, tokens, classes, dtype, {"label_smoothing": 0.1})


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_weights(implementation: str, dtype: torch.dtype, name: str) -> None:
    _compare(implementation, 13, 83, dtype, OPTIONS[name], class_weight=torch.rand(83).to(dtype))


@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(implementation: str, dtype: torch.dtype, scale: float) -> None:
    """A logsumexp of 10⁵ has no digits left for probabilities: what is kept for backward must."""
    _compare(implementation, 9, 300, dtype, {}, scale)


def test_infinite_logits(implementation: str) -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, 2.0], [0.5, -inf, 1.0], [-inf] * 3, [inf, 0.0, 1.0]])
    target = torch.tensor([0, 2, 1, 1, 0])
    for options in ({}, {"label_smoothing": 0.1}):
        leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours = fastattn.cross_entropy(leaf, target, reduction="none", implementation=implementation, **options)
        theirs = F.cross_entropy(plain, target, reduction="none", **options)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        ours[:3].sum().backward()
        theirs[:3].sum().backward()
        torch.testing.assert_close(leaf.grad[:3], plain.grad[:3], equal_nan=True)  # type: ignore[index]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_and_no_tokens(implementation: str, reduction: str) -> None:
    """The loss is what torch's is, NaN for a mean of nothing; the gradients are zero."""
    for target in (torch.full((4,), -100), torch.zeros(0, dtype=torch.int64)):
        x, w, b = (torch.randn(s, requires_grad=True) for s in ((len(target), 6), (9, 6), (9,)))
        logits = F.linear(x, w, b)
        expected = F.cross_entropy(logits, target, reduction=reduction)
        for loss in (
            fastattn.cross_entropy(logits, target, reduction=reduction, implementation=implementation),
            fastattn.linear_cross_entropy(x, w, target, b, reduction=reduction, implementation=implementation),
        ):
            torch.testing.assert_close(loss, expected, equal_nan=True)
            for gradient in torch.autograd.grad(loss.sum(), (x, w, b), retain_graph=True):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_strided_logits_and_int32_targets(implementation: str) -> None:
    wide = torch.randn(7, 40)
    target = torch.randint(0, 20, (7,), dtype=torch.int32)
    for logits in (wide[:, 3:23], wide[:, ::2], torch.randn(20, 7).t()):
        leaf = logits.detach().requires_grad_()
        loss = fastattn.cross_entropy(leaf, target, implementation=implementation)
        expected = F.cross_entropy(logits, target.long())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaf)[0],
            (torch.softmax(logits, 1) - F.one_hot(target.long(), 20)) / 7,
        )


# (tokens, K, V): one token; odd; over one strip of classes; over a block of rows.
LINEAR_SHAPES = [(1, 8, 5), (7, 33, 67), (33, 17, 1600), (131, 70, 531)]


def _compare_linear(implementation, shape, dtype, options, bias=True):  # type: ignore[no-untyped-def]
    tokens, width, classes = shape
    target = _targets(tokens, classes, int(options.get("ignore_index", -100)))
    upstream = torch.rand(tokens) + 0.5
    tensors = [
        torch.randn(tokens, width).to(dtype),
        (torch.randn(classes, width) * 2 / math.sqrt(width)).to(dtype),
        torch.randn(classes).to(dtype) if bias else None,
    ]

    def ours(x, w, *b):  # type: ignore[no-untyped-def]
        return fastattn.linear_cross_entropy(x, w, target, *b, **options, implementation=implementation)

    actual = _run(ours, tensors, dtype, upstream)
    exact = _run(
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, b, **options), tensors, torch.float64, upstream
    )
    peer = _run(lambda x, w, b: _plain_linear(x, w, b, target, **options), tensors, dtype, upstream)
    for name, a, p, e in zip(("loss", "dx", "dweight", "dbias"), actual, peer, exact, strict=False):
        assert_accurate(a, p, e, name, terms=max(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_linear_cross_entropy(implementation: str, options: dict[str, object], dtype: torch.dtype) -> None:
    _compare_linear(implementation, (19, 40, 90), dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_shapes(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _compare_linear(implementation, shape, dtype, {"reduction": "sum"}, bias=False)
    _compare_linear(implementation, shape, dtype, {"reduction": "none"})


@pytest.mark.skipif(not has_cpu, reason="the C++ core is not built")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_beyond_the_scratch(dtype: torch.dtype, bias: bool) -> None:
    """Chunks of tokens (dW added up over them), and in 16 bits with a bias strips that are computed again."""
    _compare_linear("cpu", (700, 24, 13001), dtype, {"reduction": "sum", "softcap": 4.0}, bias)


@pytest.mark.skipif(not has_cpu, reason="the C++ core is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_computed_again_has_the_same_bits(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(size).to(dtype) for size in ((700, 24), (13001, 24), (13001,)))
    target = torch.randint(0, 13001, (700,))

    def dx(rows: slice) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in (x[rows], w, b)]
        loss = fastattn.linear_cross_entropy(
            *leaves[:2], target[rows], leaves[2], reduction="sum", implementation="cpu"
        )
        return torch.autograd.grad(loss, leaves)[0]

    whole = dx(slice(None))
    for rows in (slice(3, 40), slice(300, 550)):
        assert torch.equal(dx(rows), whole[rows])


def test_linear_partial_gradients(implementation: str) -> None:
    """Frozen weights, or frozen input: what is not asked for is None, the rest unchanged; twice through one graph."""
    x, w, b, target = torch.randn(9, 16), torch.randn(24, 16), torch.randn(24), torch.randint(0, 24, (9,))
    for reduction in ("mean", "none"):

        def loss(x: Tensor, w: Tensor, b: Tensor, reduction: str = reduction) -> Tensor:
            return fastattn.linear_cross_entropy(x, w, target, b, reduction=reduction, implementation=implementation)

        full = [t.clone().requires_grad_() for t in (x, w, b)]
        expected = torch.autograd.grad(loss(*full).sum(), full)
        for index in range(3):
            leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate((x, w, b))]
            total = loss(*leaves).sum()
            total.backward(retain_graph=True)
            assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]
            torch.testing.assert_close(leaves[index].grad, expected[index])
            total.backward(torch.tensor(3.0))
            torch.testing.assert_close(leaves[index].grad, 4 * expected[index])


def test_linear_leading_dimensions() -> None:
    x, w, target = torch.randn(2, 3, 8), torch.randn(12, 8), torch.randint(0, 12, (2, 3))
    expected = F.cross_entropy(F.linear(x, w).flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(fastattn.linear_cross_entropy(x, w, target), expected.mean())
    torch.testing.assert_close(fastattn.linear_cross_entropy(x, w, target, reduction="none"), expected.view(2, 3))
    torch.testing.assert_close(fastattn.linear_cross_entropy(x[0, 0], w, target[0, 0], reduction="none"), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads_or_batch(compiled: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(300, 40).to(dtype), (torch.randn(1700, 40) / 6).to(dtype)
    target = torch.randint(0, 1700, (300,))

    def run(rows: slice) -> list[Tensor]:
        results = []
        for reduction in ("none", "sum"):
            leaves = [t.clone().requires_grad_() for t in (x[rows], w)]
            loss = fastattn.linear_cross_entropy(*leaves, target[rows], reduction=reduction, implementation=compiled)
            results += [loss, *torch.autograd.grad(loss.sum(), leaves)]
            logits = F.linear(leaves[0].detach().float(), w.float()).to(dtype).requires_grad_()
            loss = fastattn.cross_entropy(logits, target[rows], reduction=reduction, implementation=compiled)
            results += [loss, *torch.autograd.grad(loss.sum(), logits)]
        return results

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(slice(None))
        for count in (2, 3):
            torch.set_num_threads(count)
            again = run(slice(None))
            # The logits of cross_entropy come from torch, whose bits may depend on its threads.
            for index in (0, 1, 2, 5, 6, 7):
                assert torch.equal(again[index], expected[index]), f"{count} threads, result {index}"
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(100, 140), slice(5, 290)):
        alone = run(rows)
        for index in (0, 1, 6):  # loss and dx without reduction, dx of the sum
            assert torch.equal(alone[index], expected[index][rows]), f"{rows}, result {index}"


def test_against_the_known_loss_of_uniform_logits(implementation: str) -> None:
    x, w = torch.zeros(5, 8, requires_grad=True), torch.randn(1000, 8)
    target = torch.arange(5)
    loss = fastattn.linear_cross_entropy(x, w, target, z_loss=0.5, implementation=implementation)
    torch.testing.assert_close(loss.item(), math.log(1000) + 0.5 * math.log(1000) ** 2)
    (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(dx, ((1 + math.log(1000)) * w.mean(0) - w[:5]) / 5)


BAD = [
    ({"logits": torch.ones(2, 3, 4)}, ValueError, "logits: expected 2 dimensions"),
    ({"logits": torch.ones(3, 5).int()}, TypeError, "logits: got dtype"),
    ({"target": torch.rand(3, 5)}, TypeError, "target: got torch.float32; class indices"),
    ({"target": torch.tensor([1, 2])}, ValueError, "target: expected shape (3,)"),
    ({"target": torch.tensor([True, False, True])}, TypeError, "target: got dtype torch.bool"),
    ({"weight": torch.ones(4)}, ValueError, "weight: expected shape (5,)"),
    ({"weight": torch.ones(5, requires_grad=True)}, NotImplementedError, "weight: requires a gradient"),
    ({"reduction": "average"}, ValueError, "reduction: got 'average', allowed are none, mean, sum"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    ({"z_loss": math.nan}, ValueError, "z_loss: got nan"),
    ({"z_loss": None}, TypeError, "z_loss: expected a number"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int"),
    ({"implementation": "cuda"}, NotImplementedError, "not written for cross_entropy"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"logits": torch.ones(3, 5), "target": torch.tensor([0, 1, 2])} | change
    with pytest.raises(error) as caught:
        fastattn.cross_entropy(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


BAD_LINEAR = [
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension"),
    ({"weight": torch.ones(5, 7)}, ValueError, "weight: expected shape (5, 6)"),
    ({"weight": torch.ones(5, 6).double()}, TypeError, "weight: dtype"),
    ({"bias": torch.ones(6)}, ValueError, "bias: expected shape (5,)"),
    ({"target": torch.tensor([[0, 1, 2]])}, ValueError, "target: expected shape (3,)"),
    ({"implementation": "cuda"}, NotImplementedError, "not written for linear_cross_entropy"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LINEAR, ids=[message for *_, message in BAD_LINEAR])
def test_bad_input_of_linear(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(3, 6),
        "weight": torch.ones(5, 6),
        "target": torch.tensor([0, 1, 2]),
    } | change
    with pytest.raises(error) as caught:
        fastattn.linear_cross_entropy(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("index", [5, -1])
def test_target_out_of_bounds(compiled: str, index: int) -> None:
    with pytest.raises(RuntimeError, match=rf"target\[1\] is {index}, out of bounds for 5 classes"):
        fastattn.cross_entropy(torch.ones(3, 5), torch.tensor([0, index, 2]), implementation=compiled)
    with pytest.raises(RuntimeError, match=rf"target\[1\] is {index}, out of bounds for 5 classes"):
        fastattn.linear_cross_entropy(
            torch.ones(3, 6), torch.ones(5, 6), torch.tensor([0, index, 2]), implementation=compiled
        )
