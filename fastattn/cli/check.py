"""``python -m fastattn check``: numerical parity with float64, on this machine, beside plain PyTorch's own error.

The rule (that of the tests), for the output and for every gradient: the largest error of an implementation is at most
twice that of plain PyTorch in the same dtype on the same inputs, plus one rounding of the largest value. The exact result
is plain PyTorch in float64 from the same (already rounded) inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.cli import cases
from fastattn.cli.cases import Case, Outputs
from fastattn.cli.explain import explain_call
from fastattn.cli.plain import plain_by_head, plain_outputs
from fastattn.cli.table import Progress, print_table
from fastattn.ops import _library

OK, FAILED, UNAVAILABLE = "ok", "FAILED", "unavailable"


@dataclass(frozen=True)
class Row:
    """One result of one call. ``result`` is "out", "lse" or "grad <input>"; errors are largest absolute differences.

    ``ratio`` is error / plain_error; ``bound`` is what ``error`` may be. ``note`` carries the reason where ``verdict``
    is "unavailable" (the implementation does not take this call: no figures) or the call raised.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    implementation: str
    isa: str
    result: str
    error: float | None
    plain_error: float | None
    bound: float | None
    ratio: float | None
    verdict: str
    note: str = ""


def evaluate(outputs: Outputs, tensors: dict[str, Tensor], cotangents: Outputs) -> Outputs:
    """``outputs`` and, under "grad <name>", the gradient of Σ cotangent·output for each tensor that requires one."""
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if not leaves:
        return outputs
    upstream = [cotangents[name].to(output.dtype) for name, output in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    found = {name: output.detach() for name, output in outputs.items()}
    found.update({f"grad {name}": grad for name, grad in zip(leaves, gradients, strict=True)})
    return found


class Oracle:
    """What one case's results should be: exact (float64), and plain PyTorch's in the case's dtype.

    Without ``gradients`` no tensor requires one, and attention without dropout takes O(B·N²) memory.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, *, gradients: bool = True) -> None:
        self.case = case
        self.terms = cases.reduction_length(case)
        self.tensors = cases.make_tensors(case, dtype, device)
        by_head = not gradients and "attention" in case.op and not case.options.get("dropout_p")
        compute = plain_by_head if by_head else plain_outputs
        if not gradients:
            self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        wide = {name: self._widened(tensor) for name, tensor in self.tensors.items()}
        exact = compute(case, wide)
        generator = torch.Generator().manual_seed(1)
        # Rounded to the outputs' dtype before anyone uses them, so that all three backward passes start from the same
        # numbers.
        plain = compute(case, self.tensors)
        # A scalar is a loss, whose backward() starts from 1.
        self.cotangents = {
            name: (torch.randn(output.shape, generator=generator) if output.dim() else torch.ones(())).to(
                output.device, output.dtype
            )
            for name, output in plain.items()
        }
        self.exact = evaluate(exact, wide, self.cotangents)
        self.plain = evaluate(plain, self.tensors, self.cotangents)

    @staticmethod
    def _widened(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor

    def results(self, outputs: Outputs) -> Outputs:
        """``outputs`` of a call on ``self.tensors``, and the gradients that follow from them."""
        return evaluate(outputs, self.tensors, self.cotangents)

    def judge(self, implementation: str) -> Iterator[tuple[str, float, float, float]]:
        """(result, error, plain error, bound) of fastattn's call; raises what the call raises."""
        actual = self.results(cases.prepare(self.case, self.tensors, implementation)())
        for name, exact in self.exact.items():
            error = largest(actual[name].double() - exact)
            plain_error = largest(self.plain[name].double() - exact)
            yield name, error, plain_error, bound(plain_error, exact, actual[name].dtype, self.terms)


def largest(difference: Tensor) -> float:
    """max |difference|; NaN if there is one, 0 for an empty tensor."""
    return difference.abs().max().item() if difference.numel() else 0.0


def relative(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in the Frobenius norm; the absolute error where ``exact`` is zero."""
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm or 1.0)


def bound(plain_error: float, exact: Tensor, dtype: torch.dtype, terms: int) -> float:
    """The rule's right-hand side: twice plain PyTorch's error, and one rounding of max |exact|.

    In float32 and float64, where plain PyTorch may be lucky, √terms roundings: the error of a sum of that many terms.
    """
    roundings = terms**0.5 if dtype in (torch.float32, torch.float64) else 1.0
    return 2 * plain_error + max(1.0, roundings) * torch.finfo(dtype).eps * largest(exact)


def check_case(case: Case, dtype: str, device: str, runs: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of one case for every (implementation, ISA or "") in ``runs``."""
    oracle = Oracle(case, cases.DTYPES[dtype], cases.parse_device(device))
    rows = []
    for asked, isa in runs:
        with forced_isa(isa):
            implementation, isa, reason = running(case, oracle.tensors, asked)
            start = (case.op, case.label, case.shape, dtype, device, implementation, isa)
            if reason:
                rows.append(Row(*start, "", None, None, None, None, UNAVAILABLE, reason))
                continue
            try:
                for name, error, plain_error, allowed in oracle.judge(asked):
                    verdict = OK if error <= allowed else FAILED  # a NaN compares false
                    ratio = error / plain_error if plain_error else (1.0 if error == 0 else math.inf)
                    numbers = (_finite(error), _finite(plain_error), _finite(allowed), _finite(ratio))
                    rows.append(Row(*start, name, *numbers, verdict))
            except Exception as error:  # a crash of one call is that row's verdict, and the others are still wanted
                rows.append(Row(*start, "", None, None, None, None, FAILED, brief(error)))
    return rows


def running(case: Case, tensors: dict[str, Tensor], asked: str) -> tuple[str, str, str]:
    """(implementation, its ISA or "", "" or the reason why it does not take the call) when ``asked`` is asked for."""
    found = explain_call(case, tensors, asked)
    isa = found.isa or "" if found.implementation == "cpu" else ""
    return found.implementation, isa, dict(found.rungs)[found.implementation] or ""


def brief(error: Exception) -> str:
    """The exception's kind and the start of its text; torch's dispatcher writes pages."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 200 else line[:200] + " …"


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


class forced_isa:
    """Context: the C++ core on the instruction set called ``isa``; "" leaves it alone."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def __enter__(self) -> None:
        if self.isa:
            import fastattn._native as _native

            self.before = _native.current_isa()
            _native.set_isa(self.isa)

    def __exit__(self, *exception: object) -> None:
        if self.isa:
            import fastattn._native as _native

            _native.set_isa(self.before)


def isas_to_run(wanted: str | None) -> list[str]:
    """``--isa``: one name, "all" that this machine has, or (None) the one in force."""
    if wanted is None:
        return [_library.current_isa() or ""]
    try:
        import fastattn._native as _native
    except ImportError as error:
        raise ValueError(f"--isa needs the C++ core, which is not there: {error}") from None
    available = _native.available_isas()
    if wanted != "all" and wanted not in available:
        raise ValueError(f"--isa must be all or one of {', '.join(available)}; got {wanted!r}")
    return available if wanted == "all" else [wanted]


def run(
    *,
    quick: bool = False,
    ops: Sequence[str] = cases.OPS,
    dtypes: Sequence[str] = tuple(cases.DTYPES),
    device: str = "cpu",
    implementations: Sequence[str] = ("cuda", "triton", "cpu", "reference"),
    isa: str | None = None,
    shape: str | None = None,
) -> list[Row]:
    """Check every op × case × dtype × implementation.

    ``quick`` takes one or two cases per op. ``shape`` (text, as on the command line) replaces the cases' own: the plain
    call and the causal one. ``isa`` is None (the one in force), a name, or "all".
    """
    runs = [(name, step) for name in implementations for step in (isas_to_run(isa) if name == "cpu" else [""])]
    chosen: list[Case] = []
    for op in ops:
        own = cases.quick_cases(op) if quick else cases.full_cases(op)
        if shape is not None:
            size = cases.parse_shape(op, shape)
            flag = {"attention": "causal", "scaled_dot_product_attention": "is_causal"}.get(op)
            own = [Case(op, size, own[0].options if flag is None else {})] + (
                [Case(op, size, {flag: True})] if flag else []
            )
        chosen += own
    rows: list[Row] = []
    with Progress("check", len(chosen) * len(dtypes)) as progress:
        for case, dtype in itertools.product(chosen, dtypes):
            progress.step(f"{case.op} {case.label} {dtype}")
            rows += check_case(case, dtype, device, runs)
    return rows


def passed(rows: Sequence[Row]) -> bool:
    """True if something was measured and nothing failed."""
    return any(row.verdict == OK for row in rows) and not any(row.verdict == FAILED for row in rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _worst(rows: Sequence[Row]) -> Row:
    """The row nearest to (or furthest over) its bound; one without figures counts as over."""
    return max(rows, key=lambda row: math.inf if row.error is None else row.error / row.bound if row.bound else 0.0)


def render(rows: Sequence[Row], every: bool = False) -> None:
    """Print one line per op × dtype × implementation (its worst output and its worst gradient), or with ``every`` all rows.

    Failing rows and the reasons of what did not run follow in either form.
    """
    measured = [row for row in rows if row.verdict != UNAVAILABLE]
    if every:
        columns = ("op", "case", "shape", "dtype", "by", "result", "error", "torch's", "ratio", "verdict")
        lines = [
            (row.op, row.case, "x".join(map(str, row.shape)), row.dtype, _by(row), row.result,
             _figure(row.error), _figure(row.plain_error), _ratio(row.ratio), row.verdict)
            for row in measured
        ]  # fmt: skip
        styles = ["red" if row.verdict == FAILED else "" for row in measured]
        print_table(columns, lines, left=6, styles=styles)
    else:
        _render_summary(measured)
    for row in measured:
        if row.verdict == FAILED:
            shape = "x".join(map(str, row.shape))
            figures = row.note or f"error {_figure(row.error)} > {_figure(row.bound)}"
            print(f"FAILED: {row.op} [{row.case}] {shape} {row.dtype} {_by(row)} {row.result}: {figures}")
    reasons: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row.verdict == UNAVAILABLE:
            reasons.setdefault((row.implementation, row.note), set()).add(row.op)
    for (implementation, note), ops in reasons.items():
        print(f"not run: {implementation} for {', '.join(sorted(ops))}: {note}")
    failed = sum(row.verdict == FAILED for row in measured)
    print(f"{len(measured) - failed} of {len(measured)} results within 2x plain PyTorch's error plus one rounding")


def _by(row: Row) -> str:
    return f"{row.implementation} {row.isa}".strip()


def _render_summary(measured: Sequence[Row]) -> None:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in measured:
        groups.setdefault((row.op, row.dtype, _by(row)), []).append(row)
    lines, styles = [], []
    for (op, dtype, by), members in groups.items():
        cells = []
        for part in ([r for r in members if "grad" not in r.result], [r for r in members if "grad" in r.result]):
            worst = _worst(part) if part else None
            cells += [_figure(worst.error), _figure(worst.plain_error), _ratio(worst.ratio)] if worst else ["-"] * 3
        bad = sum(row.verdict == FAILED for row in members)
        lines.append((op, dtype, by, *cells, f"{len(members)}", FAILED if bad else OK))
        styles.append("red" if bad else "")
    columns = (
        "op", "dtype", "by", "output error", "torch's", "ratio", "gradient error", "torch's", "ratio", "results", "verdict",
    )  # fmt: skip
    print_table(
        columns, lines, left=3, styles=styles, title="Largest error against float64 (the row nearest to its bound)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=cases.OPS, default=list(cases.OPS))
    parser.add_argument("--dtype", nargs="+", choices=list(cases.DTYPES), default=list(cases.DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--implementation", nargs="+", choices=cases.IMPLEMENTATIONS, default=None, help="default: all")
    parser.add_argument(
        "--isa", help="instruction set of the cpu implementation: a name, or all (default: the one in force)"
    )
    parser.add_argument("--shape", help="; ".join(f"{op}: {shape}" for op, shape in cases.SHAPES.items()))
    parser.add_argument("--quick", action="store_true", help="one or two cases per operation")
    parser.add_argument("--every", action="store_true", help="print every result, not the worst per group")


def main(args: argparse.Namespace) -> int:
    keywords: dict[str, Any] = {"implementations": args.implementation} if args.implementation else {}
    rows = run(
        quick=args.quick, ops=args.op, dtypes=args.dtype, device=args.device, isa=args.isa, shape=args.shape, **keywords
    )
    if args.json:
        print(json.dumps({"passed": passed(rows), "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        render(rows, args.every)
    return 0 if passed(rows) else 1
