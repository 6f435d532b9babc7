"""``python -m benchmarks.gpu``: correctness of every kernel on this GPU, its measured limits, then the sweep against peers.

    python -m benchmarks.gpu                               all of it within 8 minutes
    python -m benchmarks.gpu --quick --only norm           one size of each norm
    python -m benchmarks.gpu --implementation cuda         the C++ kernels; compute-sanitizer over the small checks first
    python -m benchmarks.gpu --only ffn,linear --deterministic    products by fastattn's own kernels, where else cuBLAS's are taken
    TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu    the checks alone, in Triton's interpreter

Run from the root of the checkout; fastattn need not be installed, nor its C++ core be built. Rows (fastattn/cli/rows.py) and a
markdown table go to benchmarks/results/. Exit code 0: every check is green; 1: one is not, whatever was timed; 2: no such device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="fastattn: the C.. core is not built")
    import fastattn  # noqa: F401

import torch

from benchmarks.gpu import correctness, plan, report, sanitizer, session, timing
from fastattn.cli import cases, check
from fastattn.cli.rows import Row, save
from fastattn.ops import _library

RESULTS = Path(__file__).resolve().parent.parent / "results"
SECONDS = 480.0
#: Share of the time that checks may take; what they leave goes to measuring.
_CHECKS, _SANITIZER = 0.4, 0.25
_ROW_SECONDS, _QUICK_ROW_SECONDS = 1.5, 0.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--implementation", choices=("triton", "cuda"), default="triton")
    parser.add_argument(
        "--only", default=",".join(plan.GROUPS), metavar="GROUP,...", help=f"of {', '.join(plan.GROUPS)}"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="under torch.use_deterministic_algorithms(True); no verdict rests on it",
    )
    parser.add_argument("--quick", action="store_true", help="few checks, one size of each call")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default)s)")
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, ...; cpu: checks in Triton's interpreter, no times"
    )
    parser.add_argument(
        "--processes", type=int, default=min(8, os.cpu_count() or 1), help="that check (default %(default)s)"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE.jsonl", help="default: benchmarks/results/<date>-<device>.jsonl"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.groups = args.only.split(",")
    unknown = [group for group in args.groups if group not in plan.GROUPS]
    if unknown:
        parser.error(f"--only: no group {', '.join(unknown)}; there are {', '.join(plan.GROUPS)}")
    return args


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for; ValueError saying what is missing."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "no GPU here; `TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu` checks the kernels without one"
        )
    device = cases.parse_device(args.device)
    if args.implementation == "cuda":
        if device.type == "cpu":
            raise ValueError("--implementation cuda: these kernels run on a GPU alone")
        if not _library.has_cuda:
            build = "FASTATTN_BUILD_CUDA=only python setup.py build_ext --inplace"
            raise ValueError(f"{_library.load_errors['_cuda']}; {build} builds it")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--device cpu runs Triton's interpreter: set TRITON_INTERPRET=1")
    return device


def check_all(args: argparse.Namespace) -> tuple[bool, list[correctness.Found]]:
    """(no check failed, the verdicts); prints both."""
    started = time.monotonic()
    own = ["--device", args.device, "--implementation", args.implementation, "--only", args.only]
    own += [f"--{flag}" for flag in ("quick", "deterministic") if getattr(args, flag)]
    rows, complete = correctness.run(own, args.processes, _CHECKS * args.seconds)
    if args.implementation == "cuda":
        rows += sanitizer.run(own, _SANITIZER * args.seconds)
    wrong = correctness.failures(rows)
    good = sum(row["verdict"] == check.OK for row in rows)
    print(
        f"{good} results of {args.implementation} within the bound, {len(wrong)} not, {time.monotonic() - started:.0f} s"
    )
    if not complete:
        print("not every check was reached in its time: raise --seconds or use --quick")
    for line in wrong:
        print(f"FAILED: {line}")
    reasons = {(row["op"], row["note"]) for row in rows if row["verdict"] == check.UNAVAILABLE}
    for op, note in sorted(reasons):
        print(f"not run: {op}: {note}")
    return not wrong, rows


def measure_all(args: argparse.Namespace, device: torch.device, end: float) -> tuple[list[Row], dict[str, float]]:
    """The rows of the sweep, as far as time allows, and the limits."""
    watch = timing.Events(device)
    limits = timing.roofline(device, watch)
    print(", ".join(f"{value:.0f} {unit}" for unit, value in limits.items()))
    bench = session.Session(device, args.implementation, watch, limits)
    rows: list[Row] = []
    left = plan.measurements(args.groups, args.quick, args.implementation)
    while left and time.monotonic() < end:
        wanted = left.pop(0)
        found = list(bench.rows(wanted, _QUICK_ROW_SECONDS if args.quick else _ROW_SECONDS))
        rows += found
        figures = [row for row in found if row.verdict == check.OK]
        ratios = ", ".join(f"{row.peer} {row.ratio:.2f}" for row in figures) or found[0].note
        print(f"{wanted.name}: {f'{figures[0].rate:.0f} {figures[0].unit}, ' if figures else ''}{ratios}", flush=True)
        torch.cuda.empty_cache()
    for wanted in left:
        print(f"not reached in {args.seconds:.0f} s: {wanted.name}")
    return rows, limits


def result_path(device: torch.device, what: str) -> Path:
    """benchmarks/results/<date>-<device>-<what>.jsonl"""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return RESULTS / f"{datetime.date.today().isoformat()}-{name}-{what}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    end = time.monotonic() + args.seconds
    if args.deterministic:
        _be_deterministic()
    try:
        device = device_of(args)
    except ValueError as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    if args.part:
        _print_part(args)
        return 0
    good, _ = check_all(args)
    if device.type == "cpu":
        return 0 if good else 1
    rows, limits = measure_all(args, device, end)
    good = good and not any(row.verdict == check.FAILED for row in rows)
    path = args.save or result_path(device, args.implementation + ("-deterministic" if args.deterministic else ""))
    save(rows, path)
    text = report.markdown(rows, limits)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{path}")
    return 0 if good else 1


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses its own products
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a store for every result, timed


def _print_part(args: argparse.Namespace) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    options: dict[str, Any] = {"quick": args.quick, "tiny": interpreting}
    if interpreting:
        _compute_bfloat16()
    for row in correctness.run_part(args.groups, args.part, args.device, args.implementation, **options):
        print(json.dumps(row), flush=True)


def _compute_bfloat16() -> None:
    """The interpreter computes on bfloat16's bits; the tests have what puts that right."""
    sys.path.insert(0, str(RESULTS.parent.parent / "tests" / "triton"))
    import interpreter_bf16

    interpreter_bf16.install()


if __name__ == "__main__":
    sys.exit(main())
