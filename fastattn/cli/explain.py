"""``python -m fastattn explain OP``: the op's ladder for one call, each rung chosen or with the reason why not."""

from __future__ import annotations

import argparse
import json

from torch import Tensor

from fastattn.cli import cases
from fastattn.cli.cases import Case
from fastattn.cli.table import print_table
from fastattn.ops import Explanation, explain


def explain_call(case: Case, tensors: dict[str, Tensor], implementation: str) -> Explanation:
    """``fastattn.explain``'s answer for ``cases.prepare(case, tensors, implementation)``; of a module, for its first operation."""
    return explain(cases.prepare(case, tensors, implementation))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", choices=cases.OPS, help=", ".join(cases.OPS))
    parser.add_argument("--shape", help="; ".join(f"{op}: {shape}" for op, shape in cases.SHAPES.items()))
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grad", action="store_true", help="the call's inputs require grad")
    parser.add_argument("--implementation", choices=cases.IMPLEMENTATIONS, default="auto", help="ask for this one")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    attention = parser.add_argument_group("attention")
    attention.add_argument("--causal", action="store_true")
    attention.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1 is unlimited")
    attention.add_argument("--softcap", type=float)
    attention.add_argument("--nheads-kv", type=int, metavar="N", help="heads of k and v (GQA)")
    attention.add_argument("--mask", choices=("bool", "additive"))
    attention.add_argument("--alibi", action="store_true")
    attention.add_argument("--sinks", action="store_true")
    others = parser.add_argument_group("norm, linear, ffn, rope")
    others.add_argument("--residual", action="store_true")
    others.add_argument("--activation", help="default: gelu for ffn, swiglu for glu_ffn")
    others.add_argument("--interleaved", action="store_true")


#: Which of the flags above an operation takes, by the name of the option of ``Case``.
TAKES = {
    "attention": ("causal", "window_size", "softcap", "nheads_kv", "mask", "alibi", "sinks", "dropout_p"),
    "scaled_dot_product_attention": ("is_causal", "nheads_kv", "mask", "dropout_p"),
    "layer_norm": ("residual", "dropout_p"),
    "rms_norm": ("residual", "dropout_p"),
    "ffn": ("activation", "dropout_p"),
    "glu_ffn": ("activation", "dropout_p"),
    "rope": ("interleaved",),
    "linear": ("residual",),
    "cross_entropy": ("softcap",),
    "linear_cross_entropy": ("softcap",),
}


def requested_case(args: argparse.Namespace) -> Case:
    """The call that the flags describe; ValueError for a flag that the operation does not have."""
    start = cases.quick_cases(args.op)[0]
    given = {
        "causal" if args.op != "scaled_dot_product_attention" else "is_causal": args.causal,
        "window_size": tuple(args.window) if args.window else None,
        "softcap": args.softcap,
        "nheads_kv": args.nheads_kv,
        "mask": args.mask,
        "alibi": args.alibi,
        "sinks": args.sinks,
        "dropout_p": args.dropout,
        "residual": args.residual,
        "activation": args.activation,
        "interleaved": args.interleaved,
    }
    options = {name: value for name, value in given.items() if value}
    foreign = [name for name in options if name not in TAKES[args.op]]
    if foreign:
        raise ValueError(f"{args.op} has no {', '.join(foreign)}; it takes {', '.join(TAKES[args.op])}")
    shape = cases.parse_shape(args.op, args.shape) if args.shape else start.shape
    return Case(args.op, shape, {**start.options, **options})


def main(args: argparse.Namespace) -> int:
    case = requested_case(args)
    tensors = cases.make_tensors(case, cases.DTYPES[args.dtype], cases.parse_device(args.device))
    if not args.grad:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    found = explain_call(case, tensors, args.implementation)
    if args.json:
        rungs = [
            {"name": name, "chosen": name == found.implementation, "reason": reason} for name, reason in found.rungs
        ]
        call = {"op": case.op, "shape": case.shape, "options": case.options, "dtype": args.dtype, "device": args.device}
        print(json.dumps({**call, "implementation": found.implementation, "isa": found.isa, "rungs": rungs}, indent=2))
        return 0
    rows = []
    for name, reason in found.rungs:
        chosen = f"chosen ({found.isa})" if name == "cpu" and found.isa else "chosen"
        rows.append((name, f"no: {reason}" if reason else chosen if name == found.implementation else "could run it"))
    title = f"{case.op} {'x'.join(map(str, case.shape))} {args.dtype} on {args.device}"
    print_table(("rung", ""), rows, left=2, title=f"{title} [{case.label}]" if case.label else title)
    return 0
