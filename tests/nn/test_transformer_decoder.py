"""TransformerDecoderLayer, the stacks and Transformer against torch.nn's: values, gradients, children, compile."""

import copy
import math
import pickle

import pytest
import torch
from module_parity import assert_parity, sample, twins
from torch import nn
from torch.nn import functional as F

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")

B, L, S, E, H, HIDDEN = 3, 6, 8, 16, 2, 21
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True])
PLACES = ["self_attn", "multihead_attn", "dropout", "dropout1", "dropout2", "dropout3"]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)


def pair(**kwargs):
    kwargs = {"batch_first": True, "dim_feedforward": HIDDEN, "dropout": 0.0} | kwargs
    return twins(fastattn.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer, E, H, **kwargs)


def padding(length):
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[0, length - 2 :] = True
    mask[2, 1:] = True
    return mask


@NORM_FIRST
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal hint", "both", "per head"])
@pytest.mark.parametrize("layout", ["batch_first", "seq_first", "unbatched"])
def test_masks_and_layouts(layout, masks, norm_first):
    modules = pair(batch_first=layout == "batch_first", norm_first=norm_first)
    shape = {"batch_first": (B, -1, E), "seq_first": (-1, B, E), "unbatched": (-1, E)}[layout]
    x, memory = (sample(*(n if extent == -1 else extent for extent in shape)) for n in (L, S))
    given = {}
    if masks in ("causal", "causal hint", "both"):
        given["tgt_mask"] = CAUSAL
    if masks == "per head":
        heads = H if layout == "unbatched" else B * H
        given |= {"tgt_mask": sample(heads, L, L), "memory_mask": sample(heads, L, S) > 0.5}
    if masks in ("padding", "both"):
        kinds = (padding(L), padding(S))
        if masks == "both":
            kinds = tuple(torch.zeros(m.shape).masked_fill(m, -math.inf) for m in kinds)
        kinds = tuple(m[0] for m in kinds) if layout == "unbatched" else kinds
        given |= dict(zip(("tgt_key_padding_mask", "memory_key_padding_mask"), kinds, strict=True))
    given["tgt_is_causal"] = masks == "causal hint"
    assert_parity(*modules, lambda m, x, memory: m(x, memory, **given), (x, memory))


@NORM_FIRST
@pytest.mark.parametrize(
    "activation", ["gelu", F.silu, torch.tanh, nn.ELU()], ids=lambda a: getattr(a, "__name__", str(a))
)
@pytest.mark.parametrize("bias", [True, False])
def test_activations(activation, bias, norm_first):
    modules = pair(activation=activation, bias=bias, norm_first=norm_first)
    assert_parity(*modules, lambda m, x, memory: m(x, memory), (sample(B, L, E), sample(B, S, E)))


@NORM_FIRST
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, norm_first):
    tensors = (sample(B, L, E, dtype=dtype), sample(B, S, E, dtype=dtype))
    # relu's slope at a pre-activation that rounding moves across zero would be anything.
    modules = pair(dtype=dtype, norm_first=norm_first, activation="gelu")
    assert_parity(*modules, lambda m, x, memory: m(x, memory, CAUSAL), tensors)


@NORM_FIRST
@pytest.mark.parametrize("place", PLACES)
def test_each_dropout_is_where_torch_has_it(place, norm_first):
    """Dropping everything at one place is deterministic and shows the place."""
    modules = pair(norm_first=norm_first)
    for module in modules:
        setattr(getattr(module, place), "dropout" if place.endswith("attn") else "p", 1.0)
    assert_parity(*modules, lambda m, x, memory: m(x, memory), (sample(B, L, E), sample(B, S, E)))


@NORM_FIRST
@pytest.mark.parametrize("name", [*PLACES, "linear1", "linear2", "norm1", "norm2", "norm3"])
def test_hooks_see_what_they_see_in_torch(name, norm_first):
    ours, theirs = pair(norm_first=norm_first)
    x, memory, seen = sample(B, L, E), sample(B, S, E), {}
    for key, module in (("ours", ours), ("theirs", theirs)):
        getattr(module, name).register_forward_hook(
            lambda _, args, output, key=key: seen.setdefault(key, []).append((args[0], output))
        )
        module(x, memory)
    assert len(seen["ours"]) == 1
    torch.testing.assert_close(seen["ours"], seen["theirs"], atol=5e-5, rtol=1e-4)


@NORM_FIRST
@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3", "dropout1", "dropout2", "dropout3"])
def test_replaced_children_are_called(name, norm_first):
    ours, theirs = pair(norm_first=norm_first)
    for module in (ours, theirs):
        setattr(module, name, nn.RMSNorm(E) if name.startswith("norm") else nn.Identity())
    assert_parity(ours, theirs, lambda m, x, memory: m(x, memory), (sample(B, L, E), sample(B, S, E)))


@NORM_FIRST
@pytest.mark.parametrize("block", ["_sa_block", "_mha_block", "_ff_block"])
def test_subclass_with_its_own_blocks(block, norm_first):
    def scaled(base):
        method = getattr(base, block)
        return type("Scaled", (base,), {block: lambda self, *args, **kwargs: 2 * method(self, *args, **kwargs)})

    classes = scaled(fastattn.nn.TransformerDecoderLayer), scaled(nn.TransformerDecoderLayer)
    modules = twins(*classes, E, H, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    assert_parity(*modules, lambda m, x, memory: m(x, memory, CAUSAL), (sample(B, L, E), sample(B, S, E)))


def test_converted_and_reverted():
    ours, theirs = pair()
    x, memory = sample(B, L, E), sample(B, S, E)
    converted = fastattn.convert(copy.deepcopy(theirs))
    assert type(converted) is fastattn.nn.TransformerDecoderLayer
    assert torch.equal(converted(x, memory), ours(x, memory))
    assert [row.status for row in fastattn.conversion_report(converted).rows] == ["swapped"] * 6
    assert type(fastattn.revert(converted)) is nn.TransformerDecoderLayer
    assert torch.equal(converted(x, memory), theirs(x, memory))


@NORM_FIRST
def test_compiles_as_one_graph(norm_first):
    ours, _ = pair(norm_first=norm_first)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, memory = sample(B, L, E), sample(B, S, E)
    for kwargs in ({}, {"tgt_mask": CAUSAL, "tgt_is_causal": True}, {"memory_key_padding_mask": padding(S)}):
        torch.testing.assert_close(compiled(x, memory, **kwargs), ours(x, memory, **kwargs))
    torch.compiler.reset()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_a_stack_with_a_mask_and_no_hint_compiles_as_one_graph(kind, converted):
    """torch's looks at the mask's values for the causal one, on which no graph can depend; in ours the mask is enough."""
    theirs = getattr(nn, f"Transformer{kind}")(pair()[1] if kind == "Decoder" else encoder_layer(), 2)
    if converted:
        ours = fastattn.convert(copy.deepcopy(theirs))
    else:
        ours = getattr(fastattn.nn, f"Transformer{kind}")(theirs.layers[0], 2)
        ours.load_state_dict(theirs.state_dict())
    x, memory = sample(B, L, E), sample(B, S, E)
    call = (lambda m, mask: m(x, mask=mask)) if kind == "Encoder" else (lambda m, mask: m(x, memory, tgt_mask=mask))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for mask, train in ((CAUSAL, True), (CAUSAL, False), (sample(B * H, L, L), True)):
        expected = call(theirs.train(train), mask)
        torch.testing.assert_close(compiled(ours.train(train), mask), expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        torch.compile(call, fullgraph=True, backend="eager")(theirs, CAUSAL)
    torch.compiler.reset()


def encoder_layer():
    return nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0, batch_first=True)


def test_state_dict_pickle_and_copy():
    ours, theirs = pair()
    assert isinstance(ours, nn.TransformerDecoderLayer)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, memory = sample(B, L, E), sample(B, S, E)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fastattn.nn.TransformerDecoderLayer
        assert torch.equal(other(x, memory), ours(x, memory))


def test_transformer():
    kwargs = {"d_model": E, "nhead": H, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": HIDDEN}
    ours, theirs = twins(fastattn.nn.Transformer, nn.Transformer, dropout=0.0, batch_first=True, **kwargs)
    assert isinstance(ours, nn.Transformer) and type(ours.encoder) is fastattn.nn.TransformerEncoder
    kinds = {type(m) for m in ours.modules() if type(m).__module__.startswith("torch.nn")}
    assert kinds <= {nn.ModuleList, nn.Linear, nn.Dropout, nn.modules.linear.NonDynamicallyQuantizableLinear}
    masks = {"tgt_mask": CAUSAL, "src_key_padding_mask": padding(S), "memory_key_padding_mask": padding(S)}
    call = lambda m, src, tgt: m(src, tgt, **masks)
    assert_parity(ours, theirs, call, (sample(B, S, E), sample(B, L, E)), terms=1000)
    src, tgt = sample(B, S, E), sample(B, L, E)
    with torch.no_grad():
        a, b = (m.eval()(src, tgt, **masks) for m in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_custom_parts_stay_as_they_are():
    custom = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, HIDDEN), 1)
    ours = fastattn.nn.Transformer(E, H, 1, 1, HIDDEN, custom_encoder=custom)
    assert ours.encoder is custom and type(custom) is nn.TransformerEncoder
    assert type(custom.layers[0]) is nn.TransformerEncoderLayer
    assert type(ours.decoder.layers[0]) is fastattn.nn.TransformerDecoderLayer


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_stacks_take_layers_of_torch_and_ours(kind):
    layer, stack = (getattr(nn, f"Transformer{kind}{part}") for part in ("Layer", ""))
    torch.manual_seed(1)
    one = layer(E, H, HIDDEN, 0.0, batch_first=True)
    x, memory = sample(B, L, E), sample(B, S, E)
    arguments = (x,) if kind == "Encoder" else (x, memory)
    expected = stack(one, 2, nn.LayerNorm(E))(*arguments)
    ours = getattr(fastattn.nn, f"Transformer{kind}")
    for given in (one, fastattn.convert(copy.deepcopy(one))):
        made = ours(given, 2, norm=nn.LayerNorm(E))
        assert isinstance(made, stack)
        assert all(type(m) is getattr(fastattn.nn, f"Transformer{kind}Layer") for m in made.layers)
        torch.testing.assert_close(made(*arguments), expected)
    assert type(one) is layer, "the layer that was given is the caller's"
