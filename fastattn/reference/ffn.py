"""The feed-forward network in plain PyTorch, plain and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.philox import matrix_dropout
from fastattn.reference.precision import accumulation_dtype

#: Position = the integer that the operators take.
ACTIVATIONS: tuple[str, ...] = ("relu", "gelu", "gelu_tanh", "silu")
#: Gated names and the activation of their gate (Shazeer, "GLU variants improve Transformer", 2020).
GATED_ACTIVATIONS: dict[str, str] = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """As :func:`fastattn.ffn`: dropout(act(x w_inᵀ + b_in)) w_outᵀ + b_out + residual."""
    rows = x.shape[:-1].numel()
    out = ffn_rows(
        x.reshape(rows, x.shape[-1]),
        w_in,
        b_in,
        None,
        None,
        w_out,
        b_out,
        None if residual is None else residual.reshape(rows, w_out.shape[0]),
        activation=activation,
        dropout_p=dropout_p,
        rng_state=rng_state,
    )
    return out.reshape(*x.shape[:-1], w_out.shape[0])


def glu_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "swiglu",
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """As :func:`fastattn.glu_ffn`: dropout(act(x w_gateᵀ + b_gate) · (x w_upᵀ + b_up)) w_downᵀ + b_down + residual."""
    rows = x.shape[:-1].numel()
    out = ffn_rows(
        x.reshape(rows, x.shape[-1]),
        w_up,
        b_up,
        w_gate,
        b_gate,
        w_down,
        b_down,
        None if residual is None else residual.reshape(rows, w_down.shape[0]),
        activation=GATED_ACTIVATIONS[activation],
        dropout_p=dropout_p,
        rng_state=rng_state,
    )
    return out.reshape(*x.shape[:-1], w_down.shape[0])


def ffn_rows(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """The operator's form on (M, K) rows: out (M, O)."""
    act = FUNCTIONS[activation]
    pre = F.linear(x, w_in, b_in)
    hidden = act(pre) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * pre
    if dropout_p > 0:
        assert rng_state is not None
        accumulate = accumulation_dtype(x.dtype)
        factors = matrix_dropout(hidden.shape, dropout_p, rng_state, x.device).to(accumulate)
        hidden = (hidden.to(accumulate) * factors).to(x.dtype)
    out = F.linear(hidden, w_out, b_out)
    return out if residual is None else out + residual
