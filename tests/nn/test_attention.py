"""MultiheadAttention against torch.nn's, over its options."""

import copy
import math
import pickle

import pytest
import torch
from module_parity import assert_parity, sample, twins
from torch import nn
from torch.nn import functional as F

import fastattn

# torch warns that masks of two kinds are deprecated; here they are one of the options tested.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

B, L, S, E, H = 3, 7, 9, 24, 4
WEIGHTS = [{"need_weights": False}, {}, {"average_attn_weights": False}]
LAYOUTS = ["batch_first", "seq_first", "unbatched"]


def pair(**kwargs):
    return twins(fastattn.nn.MultiheadAttention, nn.MultiheadAttention, E, H, **kwargs)


def shaped(layout, n, features=E, dtype=torch.float32):
    shape = {"batch_first": (B, n, features), "seq_first": (n, B, features), "unbatched": (n, features)}[layout]
    return sample(*shape, dtype=dtype)


def masks(kind, layout, rows, columns):
    """(key_padding_mask, attn_mask) of a kind; every row keeps a visible key, since torch gives NaN without one."""
    batch = 1 if layout == "unbatched" else B
    padding = torch.zeros(batch, columns, dtype=torch.bool)
    padding[0, columns - 3 :] = True
    padding = padding[0] if layout == "unbatched" else padding
    hidden2 = torch.rand(rows, columns) < 0.4
    hidden3 = torch.rand(batch * H, rows, columns) < 0.4
    hidden2[:, 0] = hidden3[:, :, 0] = False
    blocked = torch.zeros(rows, columns).masked_fill(hidden2, -math.inf)
    kinds = {
        "none": (None, None),
        "bool 2-D": (None, hidden2),
        "bool 3-D": (None, hidden3),
        "float 2-D": (None, sample(rows, columns) + blocked),
        "float 3-D": (None, sample(batch * H, rows, columns)),
        "padding": (padding, None),
        "float padding": (sample(*padding.shape), None),
        "both bool": (padding, hidden2),
        "both bool 3-D": (padding, hidden3),
        "both float": (sample(*padding.shape), sample(rows, columns)),
        "padding bool, mask float": (padding, sample(batch * H, rows, columns)),
        "padding float, mask bool": (sample(*padding.shape), hidden2),
    }
    return kinds[kind] if kind else list(kinds)


MASKS = masks(None, "batch_first", L, S)


def attend(module, q, k, v, padding, mask, **kwargs):
    return module(q, k, v, key_padding_mask=padding, attn_mask=mask, **kwargs)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, layout, weights):
    modules = pair(batch_first=layout == "batch_first")
    q, k, v = shaped(layout, L), shaped(layout, S), shaped(layout, S)
    assert_parity(*modules, lambda m, *t: attend(m, *t, **weights), (q, k, v, *masks(kind, layout, L, S)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", ["none", "both bool", "both float", "padding bool, mask float"])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        {"kdim": 10, "vdim": 11},
        {"kdim": 10, "vdim": 11, "bias": False, "add_bias_kv": True},
        {"vdim": 5, "add_zero_attn": True},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_options(options, kind, weights):
    ours, theirs = (m.eval() for m in pair(batch_first=True, **options))
    q = shaped("batch_first", L)
    k = shaped("batch_first", S, options.get("kdim", E))
    v = shaped("batch_first", S, options.get("vdim", E))
    tensors = (q, k, v, *masks(kind, "batch_first", L, S))
    assert_parity(ours, theirs, lambda m, *t: attend(m, *t, **weights), tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10}],
)
def test_appended_keys_with_every_mask(options, layout):
    ours, theirs = pair(batch_first=layout == "batch_first", **options)
    q, k, v = shaped(layout, L), shaped(layout, S, options.get("kdim", E)), shaped(layout, S)
    for kind in MASKS:
        padding, mask = masks(kind, layout, L, S)
        for weights in WEIGHTS:
            found, expected = (attend(m, q, k, v, padding, mask, **weights) for m in (ours, theirs))
            torch.testing.assert_close(
                found, expected, atol=1e-5, rtol=1e-5, msg=lambda m, at=(kind, weights): f"{at}: {m}"
            )


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_and_shared_key_value(layout, bias, weights):
    """One tensor as query, key and value, or as key and value, takes the packed projections."""
    modules = pair(batch_first=layout == "batch_first", bias=bias)
    x, y = shaped(layout, L), shaped(layout, S)
    assert_parity(*modules, lambda m, x: m(x, x, x, **weights), (x,))
    assert_parity(*modules, lambda m, x, y: m(x, y, y, **weights), (x, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "both bool", "float 3-D"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_dtypes(dtype, kind, weights):
    modules = pair(batch_first=True, dtype=dtype)
    padding, mask = masks(kind, "batch_first", L, L)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    x = shaped("batch_first", L, dtype=dtype)
    assert_parity(*modules, lambda m, x, p, a: m(x, x, x, p, attn_mask=a, **weights), (x, padding, mask))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_causal_hint(kind, padded, weights):
    modules = pair(batch_first=True)
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    causal = hidden if kind == torch.bool else torch.zeros(L, L).masked_fill(hidden, -math.inf)
    padding = masks("padding", "batch_first", L, L)[0] if padded else None
    x = shaped("batch_first", L)

    def call(module, x, mask):
        return module(x, x, x, key_padding_mask=padding, attn_mask=mask.detach(), is_causal=True, **weights)

    assert_parity(*modules, call, (x, causal))


def test_causal_hint_replaces_the_mask_exactly_where_torch_does():
    """A hint that lies shows which of the two was used."""
    ours, theirs = pair(batch_first=True)
    x = shaped("batch_first", L)
    zeros = torch.zeros(L, L, dtype=torch.bool)
    padding = torch.zeros(B, L, dtype=torch.bool)
    for kwargs in ({}, {"key_padding_mask": padding}):
        for need_weights in (False, True):
            a, b = (
                m(x, x, x, attn_mask=zeros, is_causal=True, need_weights=need_weights, **kwargs)[0]
                for m in (ours, theirs)
            )
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_causal_hint_keeps_appended_keys_visible(options):
    ours, _ = pair(batch_first=True, **options)
    x = shaped("batch_first", L)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    hinted = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(hinted, ours(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_causal_hint_without_mask_is_an_error():
    x = shaped("batch_first", L)
    for module in pair(batch_first=True):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_rows_without_a_visible_key_are_zero(kind, need_weights):
    ours, _ = pair(batch_first=True)
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1] = True
    mask = hidden if kind == torch.bool else torch.zeros(B, S).masked_fill(hidden, -math.inf)
    q, k = shaped("batch_first", L).requires_grad_(), shaped("batch_first", S).requires_grad_()
    out, weights = ours(q, k, k, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(L, S))
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(L))
    out.square().sum().backward()
    assert torch.equal(q.grad[1], torch.zeros(L, E)) and torch.equal(k.grad[1], torch.zeros(S, E))
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [False, True])
def test_nan_in_padding_stays_there(need_weights):
    ours, _ = pair(batch_first=True)
    k = shaped("batch_first", S)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[:, -2:] = True
    q, poisoned = shaped("batch_first", L), k.masked_fill(padding.unsqueeze(-1), math.nan)
    clean = ours(q, k, k, key_padding_mask=padding, need_weights=need_weights)
    dirty = ours(q, poisoned, poisoned, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(clean[0], dirty[0])
    if need_weights:
        assert torch.equal(clean[1], dirty[1])


def test_weights_are_returned_after_dropout_and_are_those_of_the_output():
    ours, _ = pair(batch_first=True, dropout=0.5)
    x = shaped("batch_first", L)
    undropped = ours.eval()(x, x, x, average_attn_weights=False)[1]
    out, weights = ours.train()(x, x, x, average_attn_weights=False)
    kept = weights != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(weights[kept], 2 * undropped[kept])
    v = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj((weights @ v).transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("average", [False, True])
def test_asking_for_weights_keeps_the_bits_of_the_fused_output(average):
    ours, _ = pair(batch_first=True)
    x, mask = shaped("batch_first", L), sample(L, L)
    expected = ours(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert torch.equal(ours(x, x, x, attn_mask=mask, average_attn_weights=average)[0], expected)


def test_dropout_acts_on_the_weights_in_training_only():
    """Each output is a mean over dropped weights: its expectation is the output without dropout."""
    ours, theirs = pair(batch_first=True, dropout=0.3)
    x = sample(1, 5, E).expand(4000, 5, E)
    expected = theirs.eval()(x[:1], x[:1], x[:1])[0]
    torch.testing.assert_close(ours.eval()(x[:1], x[:1], x[:1])[0], expected)
    for module in (ours, theirs):
        out = module.train()(x, x, x, need_weights=False)[0]
        error = (out.mean(0) - expected[0]).abs() / (out.std(0) / math.sqrt(4000))
        assert error.max() < 5.5  # 120 values, standard normal each
    spread = [m(x, x, x, need_weights=False)[0].std(0) for m in (ours, theirs)]
    assert (spread[0] / spread[1] - 1).abs().max() < 0.1  # a standard deviation from 4000 draws is good to 1-2 %


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_everything(need_weights):
    ours, theirs = pair(batch_first=True, dropout=1.0)
    x = shaped("batch_first", L)
    for a, b in zip(*(m(x, x, x, need_weights=need_weights) for m in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_results(layout):
    """Contiguous results, so that code which calls .view() on them works."""
    ours, _ = pair(batch_first=layout == "batch_first")
    q, k = shaped(layout, L), shaped(layout, S)
    assert ours(q, k, k)[0].shape == q.shape
    assert ours(q, k, k)[0].is_contiguous()


def test_empty_batch_and_no_keys():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(0, L, E)
    for a, b in zip(ours(x, x, x), theirs(x, x, x), strict=True):
        assert a.shape == b.shape
    out = ours(torch.randn(2, L, E), *[torch.randn(2, 0, E)] * 2, need_weights=False)[0]
    torch.testing.assert_close(out, ours.out_proj.bias.expand(2, L, E))


def test_under_autocast():
    ours, theirs = pair(batch_first=True, add_bias_kv=True)
    x = shaped("batch_first", L)
    padding, mask = masks("both float", "batch_first", L, L)
    exact = copy.deepcopy(theirs).double()
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x, key_padding_mask=padding, attn_mask=mask)
    reference = exact(*[x.double()] * 3, key_padding_mask=padding.double(), attn_mask=mask.double())
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits; the output is a chain of four products of that precision.
    assert (out - reference[0]).abs().max() < 4 * 2**-8 * reference[0].abs().max()
    assert (weights - reference[1]).abs().max() < 4 * 2**-8


def test_state_dict_pickle_and_copy():
    ours, theirs = pair(batch_first=True, kdim=5, add_bias_kv=True)
    assert isinstance(ours, nn.MultiheadAttention)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    q, k, v = torch.randn(2, 4, E), torch.randn(2, 3, 5), torch.randn(2, 3, E)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fastattn.nn.MultiheadAttention
        assert torch.equal(other(q, k, v)[0], ours(q, k, v)[0])


def test_memory_of_masks_is_not_expanded(monkeypatch):
    """Padding alone reaches the operator as (B, 1, 1, S), and a shared mask with padding as (B, 1, L, S)."""
    import fastattn.nn.attention as module

    seen = []
    operator = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: seen.append(k["attn_mask"]) or operator(*a, **k))
    ours, _ = pair(batch_first=True)
    q, k = shaped("batch_first", L), shaped("batch_first", S)
    for kind in ("padding", "float padding", "bool 2-D", "both bool", "padding bool, mask float"):
        ours(q, k, k, *masks(kind, "batch_first", L, S)[:1], False, masks(kind, "batch_first", L, S)[1])
    assert [tuple(m.shape) for m in seen] == [(B, 1, 1, S), (B, 1, 1, S), (1, 1, L, S), (B, 1, L, S), (B, H, L, S)]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "query must be 2-D", {"query": torch.randn(1, 2, 3, E)}),
        (ValueError, "query must have 24 features", {"query": torch.randn(B, L, E + 1)}),
        (ValueError, "key must be 3-D", {"key": torch.randn(S, E)}),
        (ValueError, "key must have query's batch size 3", {"key": torch.randn(B + 1, S, E)}),
        (ValueError, "same number of rows", {"value": torch.randn(B, S + 1, E)}),
        (ValueError, "key_padding_mask must be 2-D", {"key_padding_mask": torch.zeros(S, dtype=torch.bool)}),
        (ValueError, r"key_padding_mask must be \(3, 9\)", {"key_padding_mask": torch.zeros(B, L, dtype=torch.bool)}),
        (TypeError, "key_padding_mask must be boolean", {"key_padding_mask": torch.zeros(B, S, dtype=torch.int64)}),
        (ValueError, r"attn_mask must be \(7, 9\)", {"attn_mask": torch.zeros(S, L)}),
        (ValueError, r"attn_mask must be \(12, 7, 9\)", {"attn_mask": torch.zeros(B, L, S)}),
        (ValueError, "attn_mask must be 2-D or 3-D", {"attn_mask": torch.zeros(B, H, L, S)}),
    ],
)
def test_wrong_arguments_are_named(error, message, change):
    ours, _ = pair(batch_first=True)
    arguments = {"query": torch.randn(B, L, E), "key": torch.randn(B, S, E), "value": torch.randn(B, S, E)} | change
    with pytest.raises(error, match=message):
        ours(**arguments)
