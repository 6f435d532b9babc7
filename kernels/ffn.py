"""The feed-forward network in Triton: the launchers of ``fastattn::triton_ffn_{forward,backward}``.

    pre = x W_inᵀ + b_in;   hidden = dropout(act(pre)), or dropout(act(gate) · pre) with gate = x W_gateᵀ + b_gate
    out = hidden W_outᵀ + b_out + residual
Both ways of ``linear.py``, by ``configs.product``. As one GEMM: bias, activation, gate and dropout are applied to the float32
accumulators, neither pre nor gate goes to memory unless ``save_pre`` asks, and both products share each tile of x; backward turns
the accumulators of dhidden = dout W_out into dpre, dgate, hidden (which dW_out needs) and the partial sums of the bias gradients.
As torch's products: one elementwise kernel does the same to pre and gate, and to dhidden, in memory.
"""

import torch
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.column_sum import column_sum
from fastattn.kernels.epilogue import Forward, Gradient, elementwise
from fastattn.kernels.gemm import gemm, splits_of_few_rows
from fastattn.kernels.linear import chosen, input_gradient, linear, weight_gradient
from fastattn.kernels.philox import Dropout, dropout_argument


def _hidden(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    activation: int,
    dropout: Dropout | None,
    save_pre: bool,
    needed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(hidden or None unless ``needed``, pre, gate; these None unless ``save_pre``), gate None without a second weight."""
    shape = (x.shape[0], weights[0].shape[0])
    gated = weights[1] is not None
    config = chosen("gated" if gated else "activation", x, shape[1])
    if isinstance(config, configs.Elementwise):
        pre, gate = (None if w is None else linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        hidden = None
        if needed and pre is not None:
            hidden = torch.empty_like(pre) if save_pre else pre
            if pre.numel():
                elementwise(pre, gate, Forward(out=hidden, dropout=dropout), activation, config)
        return hidden, pre if save_pre else None, gate if save_pre else None
    hidden = x.new_empty(shape) if needed else None
    pre = x.new_empty(shape) if save_pre else None
    gate = x.new_empty(shape) if save_pre and gated else None
    epilogue = Forward(biases[0], biases[1], pre=pre, gate=gate, out=hidden, dropout=dropout)
    splits = splits_of_few_rows(config, shape[1], x.shape[1])
    gemm(x, weights[0], epilogue, config, b_gate=weights[1], activation=activation, splits=splits)
    return hidden, pre, gate


def ffn_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (M, O), pre (M, F), gate (M, F)) in x.dtype; the last two (0,) unless ``save_pre``, gate also without w_gate.

    With O = 0 nothing but pre and gate is computed: what backward without them asks for.
    """
    dropout = dropout_argument(dropout_p, rng_state)
    needed = w_out.shape[0] > 0
    hidden, pre, gate = _hidden(x, (w_in, w_gate), (b_in, b_gate), activation, dropout, save_pre, needed)
    out = x.new_empty(x.shape[0], 0) if hidden is None else linear(hidden, w_out, b_out, residual)
    nothing = x.new_empty(0)
    return out, nothing if pre is None else pre, nothing if gate is None else gate


def _hidden_gradient(
    dout: Tensor,
    w_out: Tensor,
    saved: tuple[Tensor, Tensor | None],
    activation: int,
    dropout: Dropout | None,
    hidden_wanted: bool,
    sums_wanted: bool,
) -> Gradient:
    """dpre, dgate, hidden and the column sums of the first two by row blocks, from pre and gate; what is not wanted is None."""
    pre, gate = saved
    config = chosen("activation_gradient" if gate is None else "gated_gradient", dout, pre.shape[1])
    by_torch = isinstance(config, configs.Elementwise)
    blocks = -(-pre.shape[0] // (config.rows if isinstance(config, configs.Elementwise) else config.block_m))
    sums = [pre.new_empty(blocks, pre.shape[1], dtype=torch.float32) if sums_wanted else None for _ in saved]
    dhidden = torch.mm(dout, w_out) if by_torch else torch.empty_like(pre)
    epilogue = Gradient(
        pre=pre,
        gate=gate,
        dpre=dhidden,
        dgate=None if gate is None else torch.empty_like(gate),
        hidden=torch.empty_like(pre) if hidden_wanted else None,
        pre_sums=sums[0],
        gate_sums=None if gate is None else sums[1],
        dropout=dropout,
    )
    if isinstance(config, configs.Elementwise):
        if pre.numel():
            elementwise(dhidden, None, epilogue, activation, config)
    else:
        gemm(dout, w_out.t(), epilogue, config, activation=activation)
    return epilogue


def ffn_backward(
    dout: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    pre: Tensor,
    gate: Tensor,
    activation: int,
    dropout_p: float,
    rng_state: Tensor | None,
    x_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out), each (0,) unless asked for; biases are summed in float32."""
    saved = (pre, None if w_gate is None else gate)
    dropout = dropout_argument(dropout_p, rng_state)
    found = _hidden_gradient(dout, w_out, saved, activation, dropout, weight_grad, bias_grad)
    nothing = x.new_empty(0)
    dx = dw_in = db_in = dw_gate = db_gate = dw_out = db_out = nothing
    if bias_grad:
        db_in, db_out = column_sum(found.pre_sums, x.dtype), column_sum(dout, x.dtype)
        db_gate = nothing if w_gate is None else column_sum(found.gate_sums, x.dtype)
    if x_grad:
        products = [(found.dpre, w_in)] if w_gate is None else [(found.dpre, w_in), (found.dgate, w_gate)]
        dx = input_gradient(*products)
    if weight_grad:
        dw_in = weight_gradient(found.dpre, x)
        dw_gate = nothing if w_gate is None else weight_gradient(found.dgate, x)
        dw_out = weight_gradient(dout, found.hidden)
    return dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out
