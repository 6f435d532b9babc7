"""A pretrained encoder-decoder, written by others with torch.nn, converted: the numbering of antibodies by ANARCII.

Greenshields-Watson et al., "ANARCII: a generalised language model for antigen receptor numbering", 2025; the PyPI package
``anarcii`` carries its weights. Only its model file is loaded, by path, since the package imports libraries for other tasks.
"""

import copy
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tolerance import assert_accurate
from torch import nn

from fastattn.nn import conversion_report, convert, revert

_spec = importlib.util.find_spec("anarcii")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(_spec is None, reason="needs the package anarcii (pip install --no-deps anarcii)"),
]

VOCABULARY = ["<PAD>", "<SOS>", "<EOS>", "<SKIP>", *"ACDEFGHIKLMNPQRSTVWXY"]
# The variable domains of trastuzumab.
HEAVY = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"


@pytest.fixture(scope="module")
def pretrained():
    root = Path(_spec.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("anarcii_model", root / "inference" / "model.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    file = root / "models" / "antibody" / "antibody_4_2_128_512"
    p = json.loads(file.with_suffix(".json").read_text())
    shape = (p["HID_DIM"], p["LAYERS"], p["HEADS"], 4 * p["HID_DIM"], p["DROPOUT"], torch.device("cpu"))
    encoder, decoder = source.Encoder(p["INPUT_DIM"], *shape), source.Decoder(p["OUTPUT_DIM"], *shape)
    model = source.S2S(encoder, decoder, p["SRC_PAD_IDX"], p["TRG_PAD_IDX"], torch.device("cpu"))
    model.load_state_dict(torch.load(file.with_suffix(".pt"), map_location="cpu", weights_only=True))
    return model.eval()


def tokens(*sequences):
    rows = [torch.tensor([1, *(VOCABULARY.index(c) for c in s), 2]) for s in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def decode(model, source, steps):
    """Greedy decoding with the model's key-value cache: (tokens, logits), as its own runner does."""
    hidden = model.make_src_mask(source)
    encoded = model.encoder(source, hidden)
    generated, cache, logits = source[:, :1], None, []
    for _ in range(steps):
        padding, causal = model.make_trg_mask(generated)
        out, cache = model.decoder(generated[:, -1:], encoded, padding, causal, hidden, cache)
        logits.append(out[:, -1])
        generated = torch.cat([generated, out[:, -1:].argmax(-1)], dim=1)
    return generated, torch.stack(logits, dim=1)


@pytest.mark.parametrize("need_weights", [True, False])
def test_numbers_antibodies_as_before(pretrained, need_weights):
    model = convert(copy.deepcopy(pretrained))
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attentions) == 6 and len(conversion_report(model).swapped) == 6 + 10
    if not need_weights:
        for attention in attentions:
            attention.forward = functools.partial(attention.forward, need_weights=False)
    source = tokens(HEAVY, LIGHT)
    expected, expected_logits = decode(pretrained, source, len(HEAVY) + 1)
    actual, logits = decode(model, source, len(HEAVY) + 1)
    assert torch.equal(actual, expected)
    exact_tokens, exact_logits = decode(copy.deepcopy(pretrained).double(), source, len(HEAVY) + 1)
    assert torch.equal(exact_tokens, expected)
    assert_accurate(logits, expected_logits, exact_logits, "logits", terms=512)
    # The first token is the chain, H and K; then IMGT positions: token 3 + n is position n.
    assert expected[:, 1].tolist() == [133, 135]
    assert expected[0, 2:12].tolist() == [3 + n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11)]


def test_reverted_is_the_original(pretrained):
    model = copy.deepcopy(pretrained)
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in revert(convert(model)).modules()] == classes
