"""attention_weights against float64 on every instruction set: values, the output that they stand for, gradients to any order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

import fastattn

RNG = torch.tensor([11, 5])
B, H, HK, NQ, NK, D = 2, 4, 2, 70, 141, 40

#: Options of attention that attention_weights takes as well.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 3), "softmax_scale": 0.3},
    "boolean": {"mask": "boolean"},
    "additive": {"mask": "additive", "softcap": 3.0},
    "slopes": {"slopes": True, "causal": True},
    "dropout": {"dropout_p": 0.3},
    "all of it": {"dropout_p": 0.2, "causal": True, "mask": "additive", "slopes": True, "softcap": 2.0},
}


def _inputs(case: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(len(case))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    options = dict(CASES[case])
    mask, slopes = options.pop("mask", None), options.pop("slopes", None)
    if mask == "boolean":
        options["attn_mask"] = draw(B, 1, NQ, NK) > 0.5
        options["attn_mask"][1, :, 3] = False  # a row that sees nothing
    elif mask == "additive":
        options["attn_mask"] = draw(1, H, 1, NK).to(dtype)
    if slopes:
        options["alibi_slopes"] = draw(H).abs()
    if "dropout_p" in options:
        options["rng_state"] = RNG
    tensors = [draw(B, H, NQ, D), draw(B, HK, NK, D), draw(B, HK, NK, 24)]
    return [t.to(dtype) for t in tensors], options


def _doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights(case: str, dtype: torch.dtype, average: bool, implementation: str) -> None:
    (q, k, v), options = _inputs(case, dtype)
    given = {"average_heads": average}
    out, lse = fastattn.attention(q, k, v, return_lse=True, implementation=implementation, **options)
    found = fastattn.attention_weights(q, k, lse, implementation=implementation, **given, **options)
    assert found.dtype == dtype and found.shape == ((B, NQ, NK) if average else (B, H, NQ, NK))
    exact_options = _doubled(options) | {"implementation": "reference"}
    _, exact_lse = fastattn.attention(q.double(), k.double(), v.double(), return_lse=True, **exact_options)
    exact = fastattn.attention_weights(q.double(), k.double(), exact_lse, **given, **exact_options)
    _, plain_lse = fastattn.attention(q, k, v, return_lse=True, **(options | {"implementation": "reference"}))
    plain = fastattn.attention_weights(q, k, plain_lse, **given, **(options | {"implementation": "reference"}))
    assert_accurate(found, plain, exact, case, terms=D + NK)  # a product of D terms, less a sum over all keys
    hidden = exact == 0
    assert torch.equal(found[hidden], torch.zeros_like(found[hidden]))
    if not average:
        values = v.repeat_interleave(H // HK, dim=1)
        product = (found.double() @ values.double()).to(dtype)
        assert_accurate(product, out, exact @ values.double(), "weights @ v", terms=NK)


def test_each_row_sums_to_one_less_its_sink(implementation: str) -> None:
    (q, k, v), _ = _inputs("plain", torch.float32)
    sinks = torch.randn(H)
    _, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, implementation=implementation)
    weights = fastattn.attention_weights(q, k, lse, implementation=implementation)
    torch.testing.assert_close(weights.sum(-1) + torch.exp(sinks[None, :, None] - lse), torch.ones(B, H, NQ))


def test_nothing_hidden_reaches_a_weight(implementation: str) -> None:
    (q, k, v), _ = _inputs("plain", torch.float32)
    mask = torch.ones(NK, dtype=torch.bool)
    mask[5:9] = False
    _, lse = fastattn.attention(q, k, v, attn_mask=mask, return_lse=True, implementation=implementation)
    clean = fastattn.attention_weights(q, k, lse, attn_mask=mask, implementation=implementation)
    k[:, :, 5:9] = float("nan")
    dirty = fastattn.attention_weights(q, k, lse, attn_mask=mask, implementation=implementation)
    assert torch.equal(clean, dirty)


def test_strides_threads_and_batch(implementation: str) -> None:
    """Inputs are read where they lie; a sequence has the bits that it has alone, on any number of threads."""
    (q, k, v), _ = _inputs("plain", torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    _, lse = fastattn.attention(q, k, v, return_lse=True, implementation=implementation)
    weights = fastattn.attention_weights(q, k, lse, implementation=implementation)
    assert torch.equal(fastattn.attention_weights(*turned, lse, implementation=implementation), weights)
    if implementation != "reference":
        alone = fastattn.attention_weights(q[1:], k[1:], lse[1:], implementation=implementation)
        assert torch.equal(alone, weights[1:])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(fastattn.attention_weights(q, k, lse, implementation=implementation), weights)
    finally:
        torch.set_num_threads(before)


def test_gradients_to_second_order() -> None:
    """With respect to q, k, mask and slopes, through lse as well: those of softmax."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    mask = torch.randn(1, 2, 1, 5, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
        common: dict[str, Any] = {"causal": True, "attn_mask": mask, "alibi_slopes": slopes, "softcap": 2.0}
        out, lse = fastattn.attention(q, k, v, return_lse=True, **common)
        weights = fastattn.attention_weights(q, k, lse, average_heads=True, **common)
        return weights.square().sum() + out.sum()

    inputs = (q, k, v, mask, slopes)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_compiles_and_batches() -> None:
    q, k, v = (torch.randn(3, 2, 7, 8) for _ in range(3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, lse = fastattn.attention(q, k, v, return_lse=True)
        return fastattn.attention_weights(q, k, lse)

    expected = function(q, k, v)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    stacked = torch.func.vmap(function)(*(x.unsqueeze(1) for x in (q, k, v)))
    torch.testing.assert_close(stacked.squeeze(1), expected)


@pytest.mark.parametrize("heads, rows, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(heads: int, rows: int, keys: int) -> None:
    q, k = torch.randn(1, heads, rows, 8), torch.randn(1, heads, keys, 8)
    _, lse = fastattn.attention(q, k, k, return_lse=True)
    assert fastattn.attention_weights(q, k, lse).shape == (1, heads, rows, keys)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, "lse: expected shape", {"lse": torch.zeros(1, 2, 4)}),
        (TypeError, "lse", {"lse": None}),
        (ValueError, "rng_state: None", {"dropout_p": 0.1}),
        (ValueError, "attn_mask", {"attn_mask": torch.zeros(7, 7)}),
        (ValueError, "softmax_scale", {"softmax_scale": math.inf}),
        (NotImplementedError, "triton", {"implementation": "triton"}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"q": torch.randn(1, 2, 3, 8), "k": torch.randn(1, 2, 5, 8), "lse": torch.zeros(1, 2, 3)}
    with pytest.raises(error, match=message):
        fastattn.attention_weights(**(given | change))
