"""Norms and feed-forward networks of Hugging Face transformers, for :func:`fastattn.convert`.

transformers writes the same few formulas in hundreds of classes, one per architecture. They are known here by what they compute:
a stand-in of the instance with random parameters of width 8 runs the class's forward in float64, in training and in evaluation,
with its dropout layers made visible, and the result is compared with the formula. What computes anything else is left.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.nn._convert import SETTINGS, Recognized
from fastattn.nn._fusion import dropout_probability, is_plain_linear, runs_only
from fastattn.nn.ffn import ACTIVATIONS
from fastattn.ops.ffn import ffn, glu_ffn
from fastattn.ops.norm import layer_norm, rms_norm

__all__ = ["FeedForwardOfTransformers", "NormOfTransformers", "recognize"]

_ATTENTION = re.compile(r"Attention$")
_NORM = re.compile(r"(RMSNorm|LayerNorm)$")
_FEED_FORWARD = re.compile(r"(MLP|FeedForward|FFN|DenseActDense|DenseGatedActDense)$")

#: Names of the linear layers: (in, out) and (gate, up, down).
_PLAIN_LAYERS = (
    ("fc1", "fc2"), ("lin1", "lin2"), ("wi", "wo"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"),
    ("linear_fc1", "linear_fc2"), ("intermediate_dense", "output_dense"), ("linear1", "linear2"), ("c_fc", "c_proj"),
)  # fmt: skip
_GATED_LAYERS = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"), ("w1", "w3", "w2"))
_ACTIVATION = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")

_WIDTH, _HIDDEN = 8, 12


class NormSettings(NamedTuple):
    """mean: LayerNorm rather than RMSNorm. eps: the attribute's name. zero_centered: the factor is 1 + weight."""

    mean: bool
    eps: str
    zero_centered: bool


class FeedForwardSettings(NamedTuple):
    """layers: names of (in, out) or (gate, up, down). activation: attribute's name and fastattn's name for it. hidden_dropout,
    out_dropout: names of the dropout layers before and after the last product, or None."""

    layers: tuple[str, ...]
    activation: tuple[str, str]
    hidden_dropout: str | None
    out_dropout: str | None


class NormOfTransformers(nn.Module):
    """A norm of transformers computed by :func:`fastattn.rms_norm` or :func:`fastattn.layer_norm`.

    The product with the weight is rounded once, where transformers' 16-bit norms round before it too. Where weight and input
    differ in dtype the original runs, whose result has the dtype that the two promote to.
    """

    implementation: str = "auto"
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Any:
        """``hidden_states`` (..., width) -> the same shape and dtype."""
        x, weight = hidden_states, self.weight
        mean, eps, zero_centered = self.__dict__[SETTINGS]
        if x.dtype != weight.dtype or x.is_nested:
            return super().forward(x)
        options = {"zero_centered_weight": zero_centered, "implementation": self.implementation}
        if mean:
            return layer_norm(x, weight.shape, weight, None, getattr(self, eps), **options)
        return rms_norm(x, weight.shape, weight, getattr(self, eps), **options)


class FeedForwardOfTransformers(nn.Module):
    """A feed-forward network of transformers computed by :func:`fastattn.ffn` or :func:`fastattn.glu_ffn`.

    As long as its parts are what they were: with hooks on them, adapters or quantized weights the original runs.
    """

    implementation: str = "auto"

    def forward(self, hidden_states: Tensor) -> Any:
        """``hidden_states`` (..., width) -> the same shape and dtype."""
        x = hidden_states
        settings: FeedForwardSettings = self.__dict__[SETTINGS]
        layers = [getattr(self, name) for name in settings.layers]
        attribute, activation = settings.activation
        function = getattr(self, attribute)
        p = 0.0 if settings.hidden_dropout is None else dropout_probability(getattr(self, settings.hidden_dropout))
        calls_only = not isinstance(function, nn.Module) or runs_only(function, type(function))
        if x.is_nested or p is None or not calls_only or not all(is_plain_linear(m) for m in layers):
            return super().forward(x)
        tensors = (x, *(m.weight for m in layers), *(m.bias for m in layers))
        if len(layers) == 2:
            out = ffn(*tensors, activation=activation, dropout_p=p, implementation=self.implementation)
        else:
            gated = ACTIVATIONS[activation][0]
            out = glu_ffn(*tensors, activation=gated, dropout_p=p, implementation=self.implementation)
        return out if settings.out_dropout is None else getattr(self, settings.out_dropout)(out)


def _attention(module: nn.Module) -> str:
    chosen = getattr(module.config, "_attn_implementation", None)
    if chosen == "fastattn":
        return "calls fastattn.attention: attn_implementation is 'fastattn'"
    return f"attn_implementation is {chosen!r}: model.set_attn_implementation('fastattn') changes it"


class _Marked(nn.Module):
    """In the place of a dropout layer: factors of the features, other ones for each layer, which show in the result where they
    stand; a factor for all of them would pass through a product unseen."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + (torch.arange(x.shape[-1]) % (3 + self.index)))


def recognize(module: nn.Module) -> Recognized | str | None:
    """What of fastattn computes the same as ``module``, or why nothing does; None for what is neither attention, norm nor
    feed-forward. Attention is chosen by the model's configuration, not by class."""
    name = type(module).__name__
    if _ATTENTION.search(name) and hasattr(module, "config"):
        return _attention(module)
    probe = _norm if _NORM.search(name) else _feed_forward if _FEED_FORWARD.search(name) else None
    if probe is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            return probe(module)
        except Exception as error:
            # Other people's forward, with arguments that it may not be made for.
            return f"its forward does not run on a small stand-in ({type(error).__name__})"


def _stand_in(module: nn.Module) -> nn.Module:
    """``module`` without its parameters, children and hooks, to be given others."""
    double = copy.copy(module)
    for name in [n for n in module.__dict__ if n.endswith("_hooks")]:
        double.__dict__[name] = type(module.__dict__[name])()
    for name in ("_parameters", "_buffers", "_modules"):
        double.__dict__[name] = dict(module.__dict__[name])
    return double


def _agree(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether the stand-in gives ``expected``, in training and in evaluation. What passes through float32 may differ by that."""
    for training in (True, False):
        module.training = training
        out = module(x)
        if not isinstance(out, Tensor) or out.shape != expected.shape:
            return False
        if not torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-7):
            return False
    return True


def _norm(module: nn.Module) -> Recognized | str | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._buffers or module._modules:
        return "its parameters are not one weight vector"
    if type(weight) is not nn.Parameter:
        return f"weight is a {type(weight).__name__}, not a plain parameter"
    eps = next((n for n in ("variance_epsilon", "eps", "epsilon") if isinstance(getattr(module, n, None), float)), None)
    if eps is None:
        return "it has no epsilon"
    double = _stand_in(module)
    w = torch.randn(_WIDTH, dtype=torch.float64)
    double._parameters["weight"] = nn.Parameter(w)
    # Of the size of sqrt(eps), so that where epsilon stands is seen.
    x = 2 * getattr(module, eps) ** 0.5 * torch.randn(3, _WIDTH, dtype=torch.float64)
    for mean in (False, True):
        for zero_centered in (False, True):
            centered = x - x.mean(-1, keepdim=True) if mean else x
            normal = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + getattr(module, eps))
            if _agree(double, x, normal * (1 + w if zero_centered else w)):
                return Recognized(NormOfTransformers, NormSettings(mean, eps, zero_centered))
    return "it computes neither x / rms(x) · weight nor (x - mean) / std · weight"


def _activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """fastattn's name for an element-wise function, by its values."""
    x = torch.linspace(-9, 9, 361, dtype=torch.float64)
    y = function(x)
    # Between the roundings of one function written in two ways and the distance of GELU from its tanh form, 5e-4.
    names = (name for name, (_, ours) in ACTIVATIONS.items() if torch.allclose(y, ours(x), rtol=1e-8, atol=1e-8))
    return next(names, None)


def _feed_forward(module: nn.Module) -> Recognized | str | None:
    candidates = [names for names in (*_GATED_LAYERS, *_PLAIN_LAYERS) if all(n in module._modules for n in names)]
    if not candidates:
        return "its layers go by names that fastattn does not know"
    layers = candidates[0]
    odd = [n for n in layers if not isinstance(module._modules[n], nn.Linear)]
    if odd:
        return f"{odd[0]} is a {type(module._modules[odd[0]]).__name__}, not a Linear"
    attribute = next((n for n in _ACTIVATION if callable(getattr(module, n, None))), None)
    function = F.silu if attribute is None else getattr(module, attribute)
    if attribute is None or (isinstance(function, nn.Module) and next(function.parameters(), None) is not None):
        return "it has no activation without parameters"
    name = _activation(function)
    if name is None:
        what = getattr(function, "__name__", type(function).__name__)
        return f"{what} is none of the fused activations {', '.join(ACTIVATIONS)}"
    double = _stand_in(module)
    sizes = [(_WIDTH, _HIDDEN)] * (len(layers) - 1) + [(_HIDDEN, _WIDTH)]
    for layer, (inward, outward) in zip(layers, sizes, strict=True):
        has_bias = module._modules[layer].bias is not None  # type: ignore[union-attr]
        double._modules[layer] = nn.Linear(inward, outward, has_bias, dtype=torch.float64)
    dropouts = [n for n, m in module._modules.items() if isinstance(m, nn.Dropout)]
    for i, dropout in enumerate(dropouts):
        double._modules[dropout] = _Marked(i)
    x = torch.randn(2, 3, _WIDTH, dtype=torch.float64)
    places: list[str | None] = [None, *dropouts]
    for hidden_dropout in places:
        for out_dropout in places:
            settings = FeedForwardSettings(layers, (attribute, name), hidden_dropout, out_dropout)
            if _agree(double, x, _formula(double, settings, x)):
                return Recognized(FeedForwardOfTransformers, settings)
    return "it computes something else than a feed-forward network"


def _formula(module: nn.Module, settings: FeedForwardSettings, x: Tensor) -> Tensor:
    layers = [getattr(module, n) for n in settings.layers]
    hidden = ACTIVATIONS[settings.activation[1]][1](layers[0](x))
    if len(layers) == 3:
        hidden = hidden * layers[1](x)
    if settings.hidden_dropout is not None:
        hidden = getattr(module, settings.hidden_dropout)(hidden)
    out = layers[-1](hidden)
    return out if settings.out_dropout is None else getattr(module, settings.out_dropout)(out)
