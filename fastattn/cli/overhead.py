"""What a call costs on top of its kernel, on an input of 1 × 1 × 8 × 16: ``python -m fastattn bench overhead``.

*Kernel* is the C++ operator called directly (``torch.ops.fastattn.<op>.default``) with arguments that need no more work, so its own
way through PyTorch's dispatcher, checks and allocations count as kernel; *on top* is the time of the public function less that.

    no grad   under ``no_grad``: autocast and implementation are looked at
    grad      every input requires a gradient: the same, and the call is recorded for backward
    step      ``grad`` and the backward pass, less the forward and the backward operator: most of it is PyTorch's engine; no bar

The function and the operator run in turns, on one thread, and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn.cli import check
from fastattn.cli.measure import interleave
from fastattn.cli.table import print_table

SHAPE = (1, 1, 8, 16)
HIDDEN = 64
#: Microseconds on top of the kernel.
BARS = {"no grad": 3.0, "grad": 10.0, "step": None}
#: Seconds per row, all contenders together.
SECONDS = 1.0


@dataclass(frozen=True)
class Overhead:
    """One row; times are medians in seconds a call, ``bar`` is what ``on_top`` may be. ``torch`` is PyTorch's own function."""

    op: str
    mode: str
    verdict: str
    function: float = 0.0
    kernel: float = 0.0
    on_top: float = 0.0
    torch: float = 0.0
    bar: float | None = None


@dataclass(frozen=True)
class Call:
    """A public function and torch's, of the same ``inputs``; the operators as functions of the same (x as rows where they take
    rows). What is to be equal comes first in every result."""

    op: str
    inputs: tuple[Tensor, ...]
    function: Callable[..., Any]
    torch: Callable[..., Tensor]
    inference: Callable[..., Any]
    forward: Callable[..., Any]
    #: (upstream gradient, what forward gave, inputs) -> gradients.
    backward: Callable[..., Any]


def calls() -> Iterator[Call]:
    """attention, layer_norm and ffn."""
    ops, columns = torch.ops.fastattn, SHAPE[-1]
    options = (columns**-0.5, -1, -1, 0, 0.0, 0.0, None)
    attend, attend_back = ops.attention_forward.default, ops.attention_backward.default
    yield Call(
        "attention",
        tuple(torch.randn(SHAPE) for _ in range(3)),
        fastattn.attention,
        F.scaled_dot_product_attention,
        lambda q, k, v: ops.attention_inference.default(q, k, v, None, None, None, *options),
        lambda q, k, v: attend(q, k, v, None, None, None, *options),
        lambda dout, saved, q, k, v: attend_back(
            dout, None, q, k, v, *saved[:2], None, None, None, *options, False, False, False, None, saved[2]
        ),
    )
    norm, norm_back = ops.norm_forward.default, ops.norm_backward.default
    yield Call(
        "layer_norm",
        (torch.randn(SHAPE), torch.randn(columns), torch.randn(columns)),
        lambda x, w, b: fastattn.layer_norm(x, (columns,), w, b),
        lambda x, w, b: F.layer_norm(x, (columns,), w, b),
        lambda x, w, b: ops.norm_inference.default(x, w, b, columns, 1e-5, False),
        lambda x, w, b: norm(x, None, w, b, 1e-5, False, 0.0, None),
        lambda dy, saved, x, w, b: norm_back(dy, None, x, w, *saved[2:], False, 0.0, None, True, True),
    )
    ffn, ffn_back = ops.ffn_forward.default, ops.ffn_backward.default
    yield Call(
        "ffn",
        (torch.randn(SHAPE), *(torch.randn(s) for s in ((HIDDEN, columns), (columns, HIDDEN), HIDDEN, columns))),
        fastattn.ffn,
        lambda x, w_in, w_out, b_in, b_out: F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out),
        lambda x, w_in, w_out, b_in, b_out: ops.ffn_inference.default(x, w_in, b_in, None, None, w_out, b_out, None, 1),
        lambda x, w_in, w_out, b_in, b_out: ffn(x, w_in, b_in, None, None, w_out, b_out, None, 1, 0.0, None, True),
        lambda dout, saved, x, w_in, w_out, b_in, b_out: ffn_back(
            dout, x, w_in, None, w_out, *saved[1:], 1, 0.0, None, True, True, True
        ),
    )


def _rows_of(x: Tensor, call: Call) -> Tensor:
    """As the operator takes it."""
    return x if call.op == "attention" else x.flatten(0, -2)


def contenders(call: Call, mode: str) -> dict[str, Callable[[], Any]]:
    """The public function, torch's and the operator, each with everything at hand; what they give first is the same."""
    plain = (_rows_of(call.inputs[0], call), *call.inputs[1:])
    if mode == "no grad":
        return {
            "function": lambda: call.function(*call.inputs),
            "torch": lambda: call.torch(*call.inputs),
            "kernel": lambda: call.inference(*call.inputs),
        }
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    if mode == "grad":
        return {
            "function": lambda: call.function(*leaves),
            "torch": lambda: call.torch(*leaves),
            "kernel": lambda: call.forward(*plain),
        }
    upstream = torch.randn(SHAPE)
    rows = _rows_of(upstream, call)
    return {
        "function": lambda: torch.autograd.grad(call.function(*leaves), leaves, upstream),
        "torch": lambda: torch.autograd.grad(call.torch(*leaves), leaves, upstream),
        "kernel": lambda: call.backward(rows, call.forward(*plain), *plain),
    }


def _first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


def measured(call: Call, mode: str, seconds: float) -> Overhead:
    """One row; FAILED, without figures, if the public function runs something else than the operator."""
    with torch.set_grad_enabled(mode != "no grad"):
        running = contenders(call, mode)
        ours, kernels = (_first(running[name]()) for name in ("function", "kernel"))
        if not torch.equal(ours.detach().reshape(-1), kernels.reshape(-1)):
            return Overhead(call.op, mode, check.FAILED)
        found = interleave(running, seconds, torch.device("cpu"))
    times = {name: timing.median for name, timing in found.items()}
    bar = BARS[mode]
    on_top = times["function"] - times["kernel"]
    return Overhead(call.op, mode, check.OK, on_top=on_top, bar=None if bar is None else bar * 1e-6, **times)


def run(seconds: float = SECONDS) -> list[Overhead]:
    """Every call in every mode."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [measured(call, mode, seconds) for call in calls() for mode in BARS]
    finally:
        torch.set_num_threads(threads)


def missed(row: Overhead) -> bool:
    return row.verdict != check.OK or (row.bar is not None and row.on_top > row.bar)


def render(rows: list[Overhead]) -> None:
    """The table, in microseconds."""

    def text(seconds: float) -> str:
        return f"{seconds * 1e6:.1f}"

    lines = [
        (row.op, row.mode, *map(text, (row.function, row.kernel, row.on_top)), text(row.bar) if row.bar else "", text(row.torch))
        if row.verdict == check.OK
        else (row.op, row.mode, row.verdict, "", "", "", "")
        for row in rows
    ]  # fmt: skip
    print_table(
        ("op", "call", "fastattn", "kernel", "on top", "bar", "torch"),
        lines,
        left=2,
        styles=["red" if missed(row) else "green" if row.bar else "" for row in rows],
        title=f"microseconds a call on {' x '.join(map(str, SHAPE))}, float32, one thread",
    )
    for row in filter(missed, rows):
        print(f"missed: {row.op}, {row.mode}")
