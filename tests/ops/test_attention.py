"""fastattn.attention: every implementation and instruction set, every option, output and every gradient, against float64."""

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# (B, H, Hk, Nq, Nk, D, Dv): odd sizes that are no multiple of any tile, a single query, more queries than keys.
SHAPES = {
    "odd": (2, 3, 3, 37, 37, 24, 24),
    "gqa": (1, 6, 2, 33, 65, 40, 17),
    "decode": (2, 4, 1, 1, 70, 64, 64),
    "long-query": (1, 2, 2, 70, 19, 7, 33),
}
RNG = torch.tensor([1234567890123, 42])

# Each option set alone, and together. Values are made per shape by _options.
FEATURES = {
    "plain": (),
    "causal": ("causal",),
    "window": ("window",),
    "bool-mask": ("bool",),
    "additive-mask": ("additive",),
    "softcap": ("softcap",),
    "alibi": ("alibi",),
    "sinks": ("sinks",),
    "dropout": ("dropout",),
    "scale": ("scale",),
    "everything": ("window", "row-mask", "softcap", "alibi", "sinks", "dropout"),
}


def _options(features: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, object]:
    batch, heads, _, rows, columns, *_ = shape
    options: dict[str, object] = {}
    if "causal" in features:
        options["causal"] = True
    if "window" in features:
        options["window_size"] = (max(columns, rows) // 2, 3)
    if "bool" in features:
        mask = torch.rand(batch, 1, rows, columns) > 0.3
        mask[..., columns // 2] = True  # every row sees something
        options["attn_mask"] = mask
    if "additive" in features:
        options["attn_mask"] = torch.randn(1, heads, rows, columns)
    if "row-mask" in features:
        options["attn_mask"] = torch.randn(batch, 1, 1, columns)
    if "softcap" in features:
        options["softcap"] = 2.5
    if "alibi" in features:
        options["alibi_slopes"] = torch.rand(heads)
    if "sinks" in features:
        options["sinks"] = torch.randn(heads)
    if "dropout" in features:
        options |= {"dropout_p": 0.3, "rng_state": RNG}
    if "scale" in features:
        options["softmax_scale"] = 0.37
    return options


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, key_heads, rows, columns, head_dim, head_dim_v = shape
    sizes = (
        (batch, heads, rows, head_dim),
        (batch, key_heads, columns, head_dim),
        (batch, key_heads, columns, head_dim_v),
    )
    return [torch.randn(size).to(dtype) for size in sizes]


def _run(function, inputs, options, cotangents, dtype):  # type: ignore[no-untyped-def]
    """[out, lse, gradients of q, k, v and of the mask, slopes, sinks] at ``dtype``, gradients along ``cotangents``."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = dict(options)
    for name in ("attn_mask", "alibi_slopes", "sinks"):
        extra = options.get(name)
        if isinstance(extra, Tensor) and extra.is_floating_point():
            leaf = extra.to(dtype if name == "attn_mask" else wide).requires_grad_()
            options[name] = leaf
            leaves.append(leaf)
    out, lse = function(*leaves[:3], **options)
    grads = torch.autograd.grad((out, lse), leaves, (cotangents[0].to(out.dtype), cotangents[1].to(lse.dtype)))
    return [out, lse, *grads]


def _compare(implementation, shape, features, dtype):  # type: ignore[no-untyped-def]
    inputs, options = _inputs(shape, dtype), _options(features, shape)
    if isinstance(options.get("attn_mask"), Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    batch, heads, _, rows, columns, _, head_dim_v = shape
    cotangents = (torch.randn(batch, heads, rows, head_dim_v).to(dtype), torch.randn(batch, heads, rows).to(dtype))

    def ours(q, k, v, **kwargs):  # type: ignore[no-untyped-def]
        return fastattn.attention(q, k, v, return_lse=True, implementation=implementation, **kwargs)

    def exactly(q, k, v, **kwargs):  # type: ignore[no-untyped-def]
        return reference.attention(q, k, v, return_lse=True, **kwargs)

    actual = _run(ours, inputs, options, cotangents, dtype)
    peer = _run(plain.attention, inputs, options, cotangents, dtype)
    exact = _run(exactly, inputs, options, cotangents, torch.float64)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv", "d1", "d2", "d3"), actual, peer, exact, strict=False):
        assert_accurate(a, p, e, name, terms=columns * max(shape[5], head_dim_v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_options(implementation: str, features: tuple[str, ...], dtype: torch.dtype) -> None:
    _compare(implementation, SHAPES["odd"], features, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("gqa", "decode")], ids=["gqa", "decode"])
@pytest.mark.parametrize("features", [FEATURES[name] for name in ("plain", "causal", "everything")], ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...], features: tuple[str, ...], dtype: torch.dtype) -> None:
    _compare(implementation, shape, features, dtype)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 33, 80, 129, 200])
def test_any_head_dim(implementation: str, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _compare(implementation, (1, 2, 1, 19, 35, head_dim, head_dim), (), dtype)


def test_several_blocks(implementation: str) -> None:
    """Long enough for every blocked loop to turn more than once."""
    for dtype in (torch.float32, torch.bfloat16):
        _compare(implementation, (1, 2, 1, 301, 523, 64, 64), ("causal", "additive"), dtype)


@pytest.mark.parametrize(
    "mask_shape", [(37,), (1, 37), (37, 1), (3, 1, 37), (2, 1, 37, 37), (2, 3, 37, 37), (1, 1, 1, 1)], ids=str
)
def test_mask_gradient_is_reduced_over_what_was_broadcast(implementation: str, mask_shape: tuple[int, ...]) -> None:
    inputs = _inputs(SHAPES["odd"], torch.float32)
    mask = torch.randn(mask_shape)
    cotangents = (torch.randn(2, 3, 37, 24), torch.randn(2, 3, 37))
    actual = _run(
        lambda *a, **o: fastattn.attention(*a, return_lse=True, implementation=implementation, **o),
        inputs,
        {"attn_mask": mask},
        cotangents,
        torch.float32,
    )
    peer = _run(plain.attention, inputs, {"attn_mask": mask}, cotangents, torch.float32)
    exact = _run(
        lambda *a, **o: reference.attention(*a, return_lse=True, **o),
        inputs,
        {"attn_mask": mask},
        cotangents,
        torch.float64,
    )
    assert actual[5].shape == torch.Size(mask_shape)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv", "dmask"), actual, peer, exact, strict=True):
        assert_accurate(a, p, e, name, terms=37 * 37 * 24)


def test_rows_without_keys_give_zeros(implementation: str) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(SHAPES["odd"], torch.float32))
    mask = torch.ones(2, 1, 37, 37, dtype=torch.bool)
    mask[0, 0, 5] = False
    mask[1, 0, :] = False
    out, lse = fastattn.attention(q, k, v, attn_mask=mask, return_lse=True, implementation=implementation)
    assert out[0, :, 5].abs().max() == 0 and out[1].abs().max() == 0
    assert (lse[0, :, 5] == -math.inf).all() and (lse[1] == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[0][0, :, 5].abs().max() == 0 and all(g[1].abs().max() == 0 for g in grads)


def test_a_float32_mask_of_float64_scores(implementation: str) -> None:
    """What torch takes too: it is widened, and its gradient is its own."""
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    narrow = torch.randn(9, 9).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    results = [fastattn.attention(q, k, v, attn_mask=m, implementation=implementation) for m in (narrow, wide)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(out.sum(), m)[0] for out, m in zip(results, (narrow, wide), strict=True)]
    assert gradients[0].dtype == torch.float32 and torch.equal(gradients[0], gradients[1].float())


def test_minus_infinity_in_an_additive_mask_is_a_boolean_mask(implementation: str) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(SHAPES["odd"], torch.float32))
    mask = torch.rand(2, 1, 37, 37) > 0.5
    mask[0, 0, 3] = False
    additive = torch.zeros(2, 1, 37, 37).masked_fill(~mask, -math.inf)
    results = []
    for m in (mask, additive):
        out = fastattn.attention(q, k, v, attn_mask=m, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_nobody_sees_are_never_touched(implementation: str, dtype: torch.dtype) -> None:
    q, k, v = _inputs((1, 2, 2, 20, 90, 16, 16), dtype)
    mask = (torch.arange(90) < 53).view(1, 1, 1, 90)
    clean = fastattn.attention(q, k, v, attn_mask=mask, implementation=implementation)
    k[:, :, 53:], v[:, :, 53:] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, attn_mask=mask, implementation=implementation)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[1][:, :, 53:].abs().max() == 0 and grads[2][:, :, 53:].abs().max() == 0


def test_dropout_masks_agree_with_the_reference_bit_for_bit(implementation: str) -> None:
    """With v = identity the output shows which weights were dropped."""
    q, k = torch.randn(2, 3, 21, 8), torch.randn(2, 3, 50, 8)
    v = torch.eye(50).expand(2, 3, 50, 50)
    options = {"dropout_p": 0.4, "rng_state": torch.tensor([2**62 + 17, 2**31 + 5])}
    out = fastattn.attention(q, k, v, implementation=implementation, **options)
    expected = reference.attention(q, k, v, **options)
    assert torch.equal(out == 0, expected == 0)
    assert 0.37 < (out == 0).float().mean() < 0.43
    torch.testing.assert_close(out, expected)


def test_dropout_draws_from_torchs_generator() -> None:
    q = torch.randn(1, 2, 40, 8)
    torch.manual_seed(3)
    first, second = (fastattn.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, fastattn.attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_strides_are_read_in_place(implementation: str) -> None:
    """(batch, seq, heads, dim) inputs, as a projection gives them; the output keeps that order."""
    packed = torch.randn(2, 45, 3 * 4 * 16, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in packed.view(2, 45, 3, 4, 16).unbind(2))
    out = fastattn.attention(q, k, v, causal=True, implementation=implementation)
    dense = [t.detach().contiguous() for t in (q, k, v)]
    expected = fastattn.attention(*dense, causal=True, implementation=implementation)
    assert torch.equal(out, expected)
    if implementation != "reference":
        assert out.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(out.sum(), packed)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (1, 0, 3, 3)], ids=str)
def test_empty(implementation: str, sizes: tuple[int, int, int, int]) -> None:
    batch, heads, rows, columns = sizes
    q = torch.randn(batch, heads, rows, 8, requires_grad=True)
    k, v = (torch.randn(batch, heads, columns, 8, requires_grad=True) for _ in range(2))
    out, lse = fastattn.attention(q, k, v, return_lse=True, implementation=implementation)
    assert out.shape == (batch, heads, rows, 8) and lse.shape == (batch, heads, rows)
    assert out.abs().sum() == 0
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.abs().sum() == 0


SDPA_CASES = [
    ((2, 3, 9, 8), (2, 3, 9, 8), {}),
    ((2, 3, 9, 8), (2, 3, 14, 8), {"is_causal": True}),
    ((2, 3, 14, 8), (2, 3, 9, 8), {"is_causal": True}),
    ((9, 8), (11, 8), {}),
    ((3, 9, 8), (3, 11, 8), {"scale": 0.5}),
    ((2, 2, 3, 9, 8), (2, 2, 3, 9, 8), {"is_causal": True}),
    ((2, 6, 9, 8), (2, 2, 11, 8), {"enable_gqa": True}),
    ((2, 3, 9, 8), (1, 3, 11, 8), {}),
    ((2, 3, 9, 8), (2, 3, 11, 8), {"scale": -0.25}),
]


@pytest.mark.parametrize(("query", "key", "options"), SDPA_CASES, ids=str)
def test_sdpa_is_torchs(query: tuple[int, ...], key: tuple[int, ...], options: dict[str, object]) -> None:
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(key)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    assert_accurate(fastattn.scaled_dot_product_attention(q, k, v, **options), expected, exact, terms=100)


@pytest.mark.parametrize("mask_shape", [(9, 11), (3, 9, 11), (2, 1, 1, 11), (1, 11), (2, 3, 9, 11)], ids=str)
def test_sdpa_masks_are_torchs(mask_shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    for mask in (torch.randn(mask_shape), torch.rand(mask_shape) > 0.2):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, mask), expected)


def test_causal_alignment() -> None:
    """attention() is aligned to the bottom right, scaled_dot_product_attention() to the top left."""
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4), torch.eye(5).view(1, 1, 5, 5)
    sees = fastattn.attention(q, k, v, causal=True)[0, 0] > 0
    assert sees.tolist() == [[True] * 4 + [False], [True] * 5]
    sees = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0] > 0
    assert sees.tolist() == [[True] + [False] * 4, [True, True] + [False] * 3]


BAD = [
    ({"q": torch.randn(2, 3, 4)}, ValueError, "q: expected 4 dimensions"),
    ({"q": "text"}, TypeError, "q: expected a Tensor"),
    ({"q": torch.ones(1, 2, 3, 8, dtype=torch.int64)}, TypeError, "q: got dtype"),
    ({"k": torch.randn(1, 2, 5, 8, dtype=torch.float64)}, TypeError, "k: dtype"),
    ({"k": torch.randn(1, 3, 5, 8)}, ValueError, "k: 3 heads do not divide"),
    ({"k": torch.randn(1, 2, 5, 9)}, ValueError, "k: expected shape"),
    ({"v": torch.randn(1, 2, 6, 8)}, ValueError, "v: expected shape"),
    ({"v": torch.randn(1, 2, 5, 8, device="meta")}, ValueError, "v: on meta"),
    ({"softmax_scale": -1.0}, ValueError, "softmax_scale: got -1.0"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale: got nan"),
    ({"softcap": -2.0}, ValueError, "softcap: got -2.0"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p: got nan"),
    ({"window_size": (-3, 2)}, ValueError, "window_size"),
    ({"window_size": (1.5, 2)}, ValueError, "window_size: expected two integers (left, right), got (1.5"),
    ({"softmax_scale": "a"}, TypeError, "softmax_scale: expected a number, got 'a'"),
    ({"softcap": None}, TypeError, "softcap: expected a number"),
    (
        {"q": torch.randn(1, 2, 3, 8).to_sparse()},
        TypeError,
        "q: expected a dense (strided) tensor, got a torch.sparse_coo",
    ),
    ({"window_size": 5}, ValueError, "window_size: expected two integers"),
    ({"attn_mask": torch.randn(4, 5)}, ValueError, "attn_mask: shape (4, 5) does not broadcast"),
    ({"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "attn_mask: got dtype"),
    ({"attn_mask": torch.ones(1, 1, 1, 3, 5)}, ValueError, "attn_mask: shape"),
    ({"alibi_slopes": torch.randn(3)}, ValueError, "alibi_slopes: expected shape"),
    ({"sinks": torch.randn(2, 2)}, ValueError, "sinks: expected shape"),
    ({"rng_state": torch.zeros(3), "dropout_p": 0.1}, ValueError, "rng_state: expected an int64"),
    ({"implementation": "magic"}, ValueError, "implementation: got 'magic'"),
    ({"implementation": "cuda"}, NotImplementedError, "implementation='cuda' does not take this call"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.randn(1, 2, 3, 8),
        "k": torch.randn(1, 2, 5, 8),
        "v": torch.randn(1, 2, 5, 8),
    }
    arguments |= change
    with pytest.raises(error) as caught:
        fastattn.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert message in str(caught.value)
