"""FeedForward, and a Sequential that runs the Linear → activation → Linear inside it as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.nn._fusion import activation_name, dropout_probability, is_plain_linear
from fastattn.ops.ffn import ffn, glu_ffn

__all__ = ["FeedForward", "Sequential"]

#: activation= of FeedForward -> (its gated form for fastattn.glu_ffn, the function).
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("reglu", F.relu),
    "gelu": ("geglu", F.gelu),
    "gelu_tanh": ("geglu_tanh", functools.partial(F.gelu, approximate="tanh")),
    "silu": ("swiglu", F.silu),
}


def run_feed_forward(
    x: Tensor,
    linear_in: Any,
    activation: Callable[[Tensor], Tensor],
    dropout: Any,
    linear_out: Any,
    implementation: str,
) -> Tensor:
    """``linear_out(dropout(activation(linear_in(x))))``, by :func:`fastattn.ffn` when that is the same computation.

    Args:
        x: (..., in_features of ``linear_in``).
        dropout: a module, or None.
        implementation: handed to :func:`fastattn.ffn`.

    It is not the same, and the modules are called one by one, when one of them has hooks, a forward of its own (an
    adapter, a quantized layer) or a tensor subclass as weight, when the activation is none of relu, gelu, tanh-gelu and
    silu, or when x is nested.
    """
    name = activation_name(activation)
    p = 0.0 if dropout is None else dropout_probability(dropout)
    plain = is_plain_linear(linear_in) and is_plain_linear(linear_out)
    if name is None or p is None or not plain or x.is_nested:
        hidden = activation(linear_in(x))
        return linear_out(hidden if dropout is None else dropout(hidden))
    w_in, w_out, b_in, b_out = linear_in.weight, linear_out.weight, linear_in.bias, linear_out.bias
    return ffn(x, w_in, w_out, b_in, b_out, activation=name, dropout_p=p, implementation=implementation)


class FeedForward(nn.Module):
    """The feed-forward network of a Transformer block, computed by :func:`fastattn.ffn` or :func:`fastattn.glu_ffn`.

    ``linear2(dropout(activation(linear1(x))))``, or with ``gated``
    ``linear2(dropout(activation(linear_gate(x)) · linear1(x)))``. Parameters and their names are those of the
    feed-forward half of ``torch.nn.TransformerEncoderLayer``, initialized as ``torch.nn.Linear`` in the order linear1,
    linear2, linear_gate.

    Args:
        d_model: features of input and output.
        dim_feedforward: features in between.
        activation: "relu", "gelu", "gelu_tanh" or "silu"; gated they are ReGLU, GEGLU, tanh-GEGLU and SwiGLU.
        bias: whether the linear layers have one.
        dropout: probability in training, 0 <= dropout <= 1, of dropping a hidden element.
        gated: whether the hidden layer is gated.
        device, dtype: of the parameters.

    Attributes:
        implementation: "auto", or the name of the implementation this module must use; see :func:`fastattn.ffn`.

    Raises:
        ValueError: unknown activation, a width below 1, or dropout outside [0, 1].

    Sources: Vaswani et al., arXiv:1706.03762; gates: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    implementation: str = "auto"

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if d_model < 1 or dim_feedforward < 1:
            raise ValueError(f"d_model and dim_feedforward must be at least 1, got {d_model} and {dim_feedforward}")
        self.activation = activation
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.linear_gate = nn.Linear(d_model, dim_feedforward, bias, device, dtype) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., d_model) -> (..., d_model)."""
        gated_name, function = ACTIVATIONS[self.activation]
        up, gate, down = self.linear1, self.linear_gate, self.linear2
        if gate is None:
            return run_feed_forward(x, up, function, self.dropout, down, self.implementation)
        p = dropout_probability(self.dropout)
        if p is None or x.is_nested or not all(is_plain_linear(m) for m in (up, gate, down)):
            return down(self.dropout(function(gate(x)) * up(x)))
        tensors = (x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        return glu_ffn(*tensors, activation=gated_name, dropout_p=p, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.linear_gate is not None}"


def feed_forward_at(modules: Sequence[nn.Module], start: int) -> int:
    """How many modules from ``start`` on form Linear → activation → (Dropout →) Linear; 0 if they do not.

    The activation must be one that :func:`fastattn.ffn` has, and no module may have hooks or a forward of its own.
    """
    chain = list(modules[start : start + 4])
    if len(chain) < 3 or not is_plain_linear(chain[0]) or activation_name(chain[1]) is None:
        return 0
    if is_plain_linear(chain[2]):
        return 3
    return 4 if len(chain) == 4 and isinstance(chain[2], nn.Dropout) and is_plain_linear(chain[3]) else 0


class Sequential(nn.Sequential):
    """``torch.nn.Sequential`` that runs every Linear → activation → (Dropout →) Linear in it as one :func:`fastattn.ffn`.

    Children, ``state_dict`` keys and results are torch's; what is fused is decided at each call, so replacing a child, or
    hooking one, only makes that chain run module by module.

    Attributes:
        implementation: "auto", or the name of the implementation the fused chains must use; see :func:`fastattn.ffn`.
    """

    implementation: str = "auto"

    def forward(self, input: Any) -> Any:
        """What ``torch.nn.Sequential`` returns for ``input``."""
        modules = list(self)
        i = 0
        while i < len(modules):
            length = feed_forward_at(modules, i) if isinstance(input, Tensor) else 0
            if length == 0:
                input = modules[i](input)
                i += 1
                continue
            dropout = modules[i + 2] if length == 4 else None
            input = run_feed_forward(
                input, modules[i], modules[i + 1], dropout, modules[i + length - 1], self.implementation
            )
            i += length
        return input
