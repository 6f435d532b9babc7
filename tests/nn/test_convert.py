"""convert, conversion_report and revert on models that exist."""

import copy
import io
import pickle

import pytest
import torch
from module_parity import assert_parity, sample
from torch import nn
from torch.nn.utils import parametrize

import fastattn
from fastattn.nn import conversion_report, convert, revert

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True"
)

B, L, E, H = 2, 6, 16, 4


class Block(nn.Module):
    """A GPT block: pre-norm, MultiheadAttention with a causal mask, a Sequential as feed-forward network."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(E), norm(E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * E, E), nn.Dropout(0.0))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, E)
        self.blocks = nn.ModuleList([Block(), Block(nn.RMSNorm)])
        self.norm = nn.LayerNorm(E)
        self.head = nn.Linear(E, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class RenamedNorm(nn.LayerNorm):
    """A subclass that inherits forward."""

    def describe(self):
        return f"norm over {self.normalized_shape}"


class ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class LlamaRMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class OtherFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def encoder(**kwargs):
    kwargs = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True} | kwargs
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **kwargs), 2)


def transformer():
    return nn.Transformer(E, H, 2, 2, 24, 0.0, batch_first=True)


TOKENS = torch.arange(2 * L).reshape(2, L) % 11
MODELS = {
    "gpt": (GPT, (TOKENS,)),
    "encoder": (encoder, (sample(B, L, E),)),
    "pre-norm encoder": (lambda: encoder(norm_first=True, activation="gelu"), (sample(B, L, E),)),
    "transformer": (transformer, (sample(B, L, E), sample(B, L - 1, E))),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(E, H, 24, 0.0, batch_first=True),
        (sample(B, L, E), sample(B, 3, E)),
    ),
    "one norm": (lambda: nn.LayerNorm(E), (sample(B, L, E),)),
    "one sequential": (lambda: nn.Sequential(nn.Linear(E, 9), nn.ReLU(), nn.Linear(9, E)), (sample(B, E),)),
}


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("train", [True, False])
def test_converted_models_compute_the_same(name, train):
    build, inputs = MODELS[name]
    theirs = build().train(train)
    ours = convert(copy.deepcopy(theirs))
    assert_parity(ours, theirs, lambda m, *x: m(*x), inputs, terms=1500)


@pytest.mark.parametrize("name", list(MODELS))
def test_everything_but_the_classes_is_untouched(name):
    model = MODELS[name][0]()
    next(model.parameters()).requires_grad_(False)
    before = classes(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = list(model.state_dict())

    assert convert(model) is model
    assert any(m.__class__ is not before[n] for n, m in model.named_modules())
    for now in (dict(model.named_modules()), dict(revert(model).named_modules())):
        assert now.keys() == modules.keys() and all(now[n] is modules[n] for n in modules)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert classes(model) == before
    assert all("implementation" not in m.__dict__ for m in model.modules())
    assert not next(model.parameters()).requires_grad


def test_state_dicts_go_both_ways():
    theirs, ours = GPT(), convert(GPT())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS), atol=1e-5, rtol=1e-5)
    theirs.load_state_dict(convert(GPT()).state_dict(), strict=True)


def test_convert_twice_is_convert_once_and_renames_the_implementation():
    model = encoder()
    once = classes(convert(model))
    assert classes(convert(model, implementation="reference")) == once
    assert fastattn.explain(model, sample(B, L, E)).implementation == "reference"
    assert all(type(m).__module__.startswith("torch.") for m in revert(model).modules())


def test_a_shared_module_stays_one_module():
    norm = nn.LayerNorm(E)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.ModuleList([norm])})
    convert(model)
    assert model["a"] is model["b"] is model["c"][0] is norm
    assert type(norm) is fastattn.nn.LayerNorm
    assert [row.name for row in conversion_report(model).swapped] == ["a", "b", "c.0"]
    revert(model)
    assert model["a"] is norm and type(norm) is nn.LayerNorm


def test_hooks_and_optimizers_go_on_working():
    model = encoder()
    seen, grads = [], []
    norm = model.layers[0].norm1
    norm.register_forward_hook(lambda m, x, y: seen.append(type(m)))
    model.layers[1].linear1.register_full_backward_hook(lambda m, gi, go: grads.append(go[0].shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    before = norm.weight.detach().clone()
    model(sample(B, L, E)).square().sum().backward()
    optimizer.step()
    assert seen == [fastattn.nn.LayerNorm]
    assert grads == [(B, L, 24)]
    assert not torch.equal(norm.weight, before)


def test_encoder_in_evaluation_runs_our_layers_and_not_torchs_fast_path(monkeypatch):
    import fastattn.nn.attention as attention
    import fastattn.nn.transformer as transformer_module

    calls = []
    operator = attention.attention
    for module in (attention, transformer_module):
        monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(1) or operator(*a, **k))
    theirs = encoder().eval()
    ours = convert(copy.deepcopy(theirs))
    x, padding = sample(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        for kwargs in (
            {},
            {"src_key_padding_mask": padding},
            {"mask": nn.Transformer.generate_square_subsequent_mask(L)},
        ):
            torch.testing.assert_close(ours(x, **kwargs), theirs(x, **kwargs), atol=1e-5, rtol=1e-5)
    assert len(calls) == 6


def test_report_says_what_and_why():
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(E),
            "renamed": RenamedNorm(E),
            "scaled": ScaledNorm(E),
            "llama": LlamaRMSNorm(),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.MultiheadAttention(E, H), "in_proj_weight"),
            "patched": nn.LayerNorm(E),
            "layer": OtherFeedForward(E, H),
            "elu": nn.TransformerEncoderLayer(E, H, activation=nn.functional.elu),
            "tanh": nn.Sequential(nn.Linear(E, 3), nn.Tanh(), nn.Linear(3, E)),
            "mlp": nn.Sequential(nn.Linear(E, 3), nn.ReLU(), nn.Linear(3, E)),
            "convolutions": nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()),
            "decoder": nn.TransformerDecoderLayer(E, H),
            "native": fastattn.nn.RMSNorm(E),
        }
    )
    model["patched"].forward = lambda x: x
    before = {row.name: row for row in conversion_report(model).rows}
    assert before["norm"] == ("norm", "LayerNorm", "left", "not converted yet: convert(model) does")
    report = conversion_report(convert(model))
    rows = {row.name: row for row in report.rows}
    reasons = {name: (row.status, row.reason) for name, row in rows.items()}

    assert reasons["norm"] == ("swapped", "")
    assert reasons["renamed"] == ("swapped", "") and rows["renamed"].class_name == "RenamedNorm"
    assert reasons["scaled"] == ("left", "subclass of nn.LayerNorm with its own forward")
    assert reasons["llama"][0] == "left" and "LlamaRMSNorm is not a torch.nn module" in reasons["llama"][1]
    assert reasons["spectral"] == ("left", "parametrized (in_proj_weight)")
    assert reasons["patched"] == ("left", "its forward was replaced on the instance")
    assert reasons["layer"] == ("left", "subclass of nn.TransformerEncoderLayer with its own _ff_block")
    assert reasons["elu"] == ("swapped", "its activation is not fused: linear1, activation and linear2 run one by one")
    assert reasons["tanh"] == ("left", "Tanh is none of the fused activations relu, gelu, gelu_tanh, silu")
    assert reasons["mlp"] == ("swapped", "")
    assert "convolutions" not in rows
    assert reasons["decoder"] == ("swapped", "") and reasons["decoder.multihead_attn"] == ("swapped", "")
    assert reasons["native"] == ("swapped", "was built as fastattn.nn.RMSNorm")

    text = str(report).splitlines()
    assert text[0].split() == ["module", "class", "status", "reason"]
    assert len(text) == len(report.rows) + 2
    assert "  RenamedNorm  " in next(line for line in text if line.startswith("renamed"))
    assert text[-1] == f"{len(report.swapped)} swapped, {len(report.left)} left"
    assert (
        str(conversion_report(convert(nn.LayerNorm(3)))).splitlines()[1].startswith("(the model)  LayerNorm  swapped")
    )


def test_quantized_and_adapted_modules_are_left_alone():
    norm = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    model = nn.ModuleList([norm])
    (row, *_) = conversion_report(convert(model)).rows
    assert (
        row.status == "left" and "quantized" in row.reason and type(norm) is torch.ao.nn.quantizable.MultiheadAttention
    )


def test_a_subclass_that_inherits_forward_stays_what_it_is():
    model = convert(nn.ModuleList([RenamedNorm(E)]))
    norm = model[0]
    assert isinstance(norm, RenamedNorm) and isinstance(norm, fastattn.nn.LayerNorm)
    assert norm.describe() == "norm over (16,)"
    x = sample(3, E)
    assert fastattn.explain(norm, x).op == "layer_norm"
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm)
        assert torch.equal(other(x), norm(x))
        assert type(revert(other)) is RenamedNorm
    assert type(convert(RenamedNorm(E))) is type(norm)


@pytest.mark.parametrize("name", list(MODELS))
def test_copies_and_files_of_converted_models(name):
    build, inputs = MODELS[name]
    model = convert(build()).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert classes(other) == classes(model)
        assert torch.equal(other(*inputs), model(*inputs))
        assert classes(revert(other)) == classes(build())
    assert classes(model) != classes(build())


def test_device_and_dtype_moves_after_conversion():
    model = convert(encoder()).double()
    assert model(sample(B, L, E, dtype=torch.float64)).dtype == torch.float64
    meta = convert(encoder().to("meta"))
    assert meta.layers[0].norm1.weight.device.type == "meta"


def test_a_class_changed_after_conversion_stops_revert_before_it_changes_anything():
    model = convert(nn.ModuleList([nn.LayerNorm(E), nn.LayerNorm(E)]))

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(model[1], "weight", Double())
    with pytest.raises(RuntimeError, match=r"1 became a .*Parametrized"):
        revert(model)
    assert type(model[0]) is fastattn.nn.LayerNorm
    x = sample(2, E)
    torch.testing.assert_close(model[1](x), 2 * model[0](x))
    parametrize.remove_parametrizations(model[1], "weight")
    assert [type(m) for m in revert(model)] == [nn.LayerNorm, nn.LayerNorm]


def test_wrong_arguments_are_named():
    for function in (convert, revert, conversion_report):
        with pytest.raises(TypeError, match="model must be"):
            function(torch.zeros(1))
    with pytest.raises(ValueError, match="implementation: got 'fast'"):
        convert(nn.LayerNorm(3), implementation="fast")
    assert type(nn.LayerNorm(3)) is nn.LayerNorm


def test_a_model_compiled_before_conversion_takes_the_converted_modules():
    model = encoder().eval()
    seen = []

    def backend(graph, inputs):
        seen.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = sample(B, L, E)
    expected = compiled(x)
    convert(model, implementation="reference")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    assert "multi_head_attention_forward" in seen[0] and "multi_head_attention_forward" not in seen[-1]
    torch.compiler.reset()


def test_compiles_as_one_graph():
    model = convert(GPT())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    torch.compiler.reset()


def test_trains_like_torch():
    torch.manual_seed(0)
    theirs = GPT()
    ours = convert(copy.deepcopy(theirs))
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    assert losses[1] < 0.5
