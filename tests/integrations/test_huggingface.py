"""attn_implementation="fastattn" in transformers, against eager attention: architectures, masks, caches, refusals."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_accurate

pytest.importorskip("transformers")

import hf_architectures as hf
from transformers import masking_utils

from fastattn.integrations import huggingface
from fastattn.reference.attention import attention as reference_attention

LAYER = SimpleNamespace(is_causal=True, training=False)


@pytest.mark.parametrize("name", hf.ARCHITECTURES)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_and_gradients(name, padding):
    if padding is not None and hf.checks(name)["padded"] is None:
        return
    hf.check_parity(name, padding)


@pytest.mark.parametrize("name", [n for n in hf.ARCHITECTURES if hf.checks(n)["generate"] is not None])
@pytest.mark.parametrize("padding", [None, "left"])
def test_generates_the_same_tokens(name, padding):
    hf.check_generate(name, padding)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("mistral", "gpt2") else n
        for n in ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "t5")
    ],
)
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches(name, padding, cache):
    hf.check_generate(name, padding, cache_implementation=cache)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_after_a_cache(name):
    """Several queries at once behind what a cache holds: not the top left alignment of a prefill."""
    given, _ = hf.inputs(name, "left")
    logits = {}
    for which in ("plain", "fastattn"):
        model, cache, parts = hf.variant(name, which), None, []
        with torch.no_grad():
            for begin, end in itertools.pairwise((0, 5, 9, 11)):
                mask = given["attention_mask"][:, :end]
                out = model(
                    given["input_ids"][:, begin:end], attention_mask=mask, past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                parts.append(out.logits)
        logits[which] = torch.cat(parts, dim=1)[given["attention_mask"].bool()]
    with hf.representable_masks(), torch.no_grad():
        exact = hf.variant(name, "exact")(**given).logits[given["attention_mask"].bool()]
    assert_accurate(logits["fastattn"], logits["plain"], exact, "logits", terms=hf.TERMS)


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "both directions": masking_utils.bidirectional_mask_function,
    "causal window": masking_utils.sliding_window_causal_mask_function(4),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "window": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int)),
}
PADDINGS = {"none": None, "right": [9, 4, 1], "left": [9, -4, -1], "holes": [9, 0, 4]}


def _padding(name: str) -> torch.Tensor | None:
    """bool (3, 9): that many keys from the left, or -that many from the right; holes: every second key of some."""
    if PADDINGS[name] is None:
        return None
    position = torch.arange(9)
    if name == "holes":
        return torch.stack([position >= 0, position % 2 == 0, position % 3 != 1])
    return torch.stack([position < n if n > 0 else position >= 9 + n for n in PADDINGS[name]])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("rows", "offset", "keys", "key_offset"), [(9, 0, 9, 0), (4, 5, 9, 0), (1, 8, 9, 0), (3, 2, 9, 0), (2, 7, 6, 3)]
)
def test_what_a_mask_stands_for(pattern, padding, rows, offset, keys, key_offset):
    """Every form that the mask function gives is the table that transformers' predicate describes."""
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 4, rows, 8), torch.randn(3, 2, keys, 8), torch.randn(3, 2, keys, 8)
    attention_mask = _padding(padding)
    given = {"mask_function": PATTERNS[pattern], "attention_mask": attention_mask, "device": "cpu"}
    # How transformers itself says that there is more than causality.
    given["local_size"] = {"chunks": 3, "causal window": 4, "window of one": 1, "window": 2}.get(pattern)
    if pattern in ("both directions", "window"):
        given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    table = masking_utils.sdpa_mask(
        3, rows, keys, offset, key_offset,
        **{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip
    mask = huggingface.attention_mask(3, rows, keys, offset, key_offset, **given)
    layer = SimpleNamespace(is_causal="causal" in pattern or pattern in ("chunks", "window of one"))
    actual, weights = huggingface.attention_forward(layer, q, k, v, mask)
    assert weights is None and actual.is_contiguous()
    exact = reference_attention(q.double(), k.double(), v.double(), attn_mask=table)
    plain = reference_attention(q, k, v, attn_mask=table)
    exact, plain = (x[0] if isinstance(x, tuple) else x for x in (exact, plain))
    assert_accurate(actual, plain.transpose(1, 2), exact.transpose(1, 2), "out", terms=keys)


@pytest.fixture
def calls(monkeypatch):
    """The arguments with which fastattn.attention is called."""
    seen = []
    original = huggingface.attention

    def record(*tensors, **options):
        seen.append(options)
        return original(*tensors, **options)

    monkeypatch.setattr(huggingface, "attention", record)
    return seen


def test_no_table_reaches_the_kernel(calls):
    """Causal calls come without a mask, padding on the right as lengths, on the left as one line of keys."""
    for name, padding, expected in (
        ("llama", None, {"attn_mask": None, "key_lengths": None, "causal": True}),
        ("llama", "right", {"attn_mask": None, "causal": True}),
        ("bert", "right", {"attn_mask": None, "causal": False}),
        ("bert", None, {"attn_mask": None, "key_lengths": None, "causal": False}),
        ("llama", "left", {"key_lengths": None, "causal": True}),
        ("mistral", None, {"attn_mask": None, "causal": True, "window_size": (5, -1)}),
    ):
        calls.clear()
        given, _ = hf.inputs(name, padding)
        hf.variant(name, "fastattn")(**given)
        assert len(calls) == 2
        for call in calls:
            assert {k: call[k] for k in expected} == expected
            if padding == "right":
                assert call["key_lengths"].tolist() == [hf.LENGTH, hf.LENGTH - 4]
            if padding == "left":
                assert call["attn_mask"].dtype == torch.bool and call["attn_mask"].shape == (2, 1, 1, hf.LENGTH)


def test_position_bias_stays_beside_causality_and_lengths(calls):
    given, _ = hf.inputs("t5", "right")
    hf.variant("t5", "fastattn")(**given)
    assert all(c["attn_mask"] is None or c["attn_mask"].shape[0] == 1 for c in calls if c["key_lengths"] is not None)
    assert sum(c["causal"] for c in calls) == 2


def test_options_reach_the_kernel(calls):
    for name in ("gemma2", "gpt_oss"):
        given, _ = hf.inputs(name)
        hf.variant(name, "fastattn")(**given)
    assert [c["softcap"] for c in calls] == [1.0, 1.0, 0.0, 0.0]
    assert [c["sinks"] is not None for c in calls] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_the_user(dtype):
    """Four-dimensional masks come as they are, and are all that masks."""
    given, _ = hf.inputs("llama")
    visible = torch.rand(2, 1, hf.LENGTH, hf.LENGTH) < 0.6
    visible |= torch.eye(hf.LENGTH, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    given["attention_mask"] = visible if dtype is torch.bool else additive
    actual = hf.variant("llama", "fastattn")(**given).logits
    plain = hf.variant("llama", "plain")(**{**given, "attention_mask": additive}).logits
    exact = hf.variant("llama", "exact")(**{**given, "attention_mask": additive.double()}).logits
    assert_accurate(actual, plain, exact, "logits", terms=hf.TERMS)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal):
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    cumulative = torch.tensor([0, 4, 9])
    packed = {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "max_length_q": 5, "max_length_k": 5}
    actual, _ = huggingface.attention_forward(LAYER, q, k, v, None, is_causal=causal, sliding_window=3, **packed)
    position = torch.arange(9)
    distance = position[:, None] - position
    near = (distance >= 0) & (distance < 3) if causal else distance.abs() <= 3
    visible = near & ((position < 4)[:, None] == (position < 4))
    expected, _ = huggingface.attention_forward(LAYER, q, k, v, visible[None, None])
    exact, _ = huggingface.attention_forward(LAYER, q.double(), k.double(), v.double(), visible[None, None])
    assert_accurate(actual, expected, exact, "out", terms=9)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        huggingface.attention_forward(LAYER, q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v, None, **packed)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"output_attentions": True}, "never in memory"),
        ({"head_mask": torch.ones(4)}, "single heads"),
        ({"cache": object()}, "paged"),
        ({"indices": torch.zeros(1)}, "sparse"),
    ],
)
def test_refuses_with_the_reason(given, reason):
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(NotImplementedError, match=reason):
        huggingface.attention_forward(LAYER, q, q, q, None, **given)


def test_refuses_masks_of_no_known_form():
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="attention_mask"):
        huggingface.attention_forward(LAYER, q, q, q, torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask"):
        huggingface.attention_forward(LAYER, q, q, q, torch.ones(1, 1, 5, 5, dtype=torch.int16))


def test_output_attentions_of_a_model_are_refused():
    given, _ = hf.inputs("llama")
    model = hf.variant("llama", "fastattn")
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**given, output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "t5", "gemma2", "gpt_oss"])
def test_sixteen_bits(name, dtype):
    given, counting = hf.inputs(name, "left")
    with torch.no_grad():
        actual, plain = (hf.variant(name, v).to(dtype)(**given).logits[counting] for v in ("fastattn", "plain"))
        model = hf.variant(name, "plain").to(dtype).double()
        with hf.representable_masks():
            exact = model(**given).logits[counting]
    assert_accurate(actual, plain, exact, "logits")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_compiles(name, padding):
    given, counting = hf.inputs(name, padding)
    model = hf.variant(name, "fastattn")
    with torch.no_grad():
        expected = model(**given).logits[counting]
        actual = torch.compile(model, backend="eager", fullgraph=True)(**given).logits[counting]
        exact = copy.deepcopy(model).double()(**given).logits[counting]
    assert_accurate(actual, expected, exact, "logits", terms=hf.TERMS)
