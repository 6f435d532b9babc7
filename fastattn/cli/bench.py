"""``python -m fastattn bench``: fastattn against PyTorch on this machine, every figure behind a green check of its own shape.

A row is one op, shape, dtype, direction and peer. Ours, the peers and (for memory-bound ops) a copy of the same size
run in turns in one process (fastattn/cli/measure.py). The ratio is the peer's median over ours: above 1, fastattn is
faster.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastattn.cli import bars, cases, check, limited, machine, memory, modules, overhead, scaling, sweep
from fastattn.cli.bars import Line
from fastattn.cli.cases import Case, work
from fastattn.cli.measure import MatrixPeak, ReadPeak, Timing, interleave, keep_freed_memory
from fastattn.cli.peers import PEERS, compile_helps, peer_names, peers
from fastattn.cli.plain import plain_outputs, torch_product
from fastattn.cli.plot import plot as plot
from fastattn.cli.plot import plot_scaling
from fastattn.cli.rows import Row, below, render, save
from fastattn.cli.table import Progress
from fastattn.ops import _library

DIRECTIONS = ("forward", "forward+backward")
COPY = "copy"
OURS = "fastattn"
ROW_SECONDS = 1.5
#: A peer whose forward call takes this many budgets (float16 products on a CPU do) is not run backward.
HOPELESS = 5


def default_cases(op: str) -> list[Case]:
    """The shapes of real models: BERT-like batches, long sequences, 2048 tokens through a block."""
    attention = [(16, 12, 128, 64), (8, 12, 384, 64), (1, 12, 1024, 64), (1, 8, 2048, 128)]
    found = {
        "attention": [Case(op, shape, options) for shape in attention for options in ({}, {"causal": True})],
        "scaled_dot_product_attention": [Case(op, (1, 12, 1024, 64), {"is_causal": True})],
        "layer_norm": [Case(op, shape, {"weight": True, "bias": True}) for shape in ((8192, 768), (8192, 4096))],
        "rms_norm": [Case(op, shape, {"weight": True}) for shape in ((8192, 768), (8192, 4096))],
        "ffn": [Case(op, (2048, 768, 3072), {"activation": "gelu", "bias": True})],
        "glu_ffn": [Case(op, (2048, 1024, 2816), {"activation": "swiglu"})],
        "rope": [Case(op, (1, 12, 1024, 64), {})],
        "linear": [Case(op, (2048, 768, 2304), {"bias": True})],
        "cross_entropy": [Case(op, (2048, 50257))],
        "linear_cross_entropy": [Case(op, (2048, 768, 50257))],
    }
    return found[op]


def quick_cases(op: str) -> list[Case]:
    """One shape per op (two for attention), each a few milliseconds."""
    return {
        "attention": [Case(op, (1, 12, 512, 64), options) for options in ({}, {"causal": True})],
        "scaled_dot_product_attention": [],
        "layer_norm": [Case(op, (4096, 768), {"weight": True, "bias": True})],
        "rms_norm": [Case(op, (4096, 768), {"weight": True})],
        "ffn": [Case(op, (256, 768, 3072), {"activation": "gelu", "bias": True})],
        "glu_ffn": [Case(op, (256, 576, 1536), {"activation": "swiglu"})],
        "rope": [Case(op, (1, 12, 1024, 64), {})],
        "linear": [Case(op, (256, 768, 2304), {"bias": True})],
        "cross_entropy": [Case(op, (256, 8192))],
        "linear_cross_entropy": [Case(op, (256, 256, 8192))],
    }[op]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_model()


class Bench:
    """One session: the device, what is the same in all its rows, and its measured limits."""

    def __init__(
        self, device: str, wanted: Sequence[str], implementation: str, budget: float, limits: str = ""
    ) -> None:
        self.device = cases.parse_device(device)
        self.wanted = wanted
        self.implementation = implementation
        self.budget = budget
        self.peak = MatrixPeak(self.device)
        self.read_peak = ReadPeak(self.device)
        self.facts: dict[str, Any] = {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "load": round(machine.load(), 2),
            "limits": limits,
            "torch": torch.__version__,
            "commit": machine.git_commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def rows(self, case: Case, dtype_name: str, directions: Sequence[str] = DIRECTIONS) -> Iterator[Row]:
        """Every direction against every peer, or rows that say why there are no figures."""
        start, oracle, unavailable = self._start(case, dtype_name, directions)
        if unavailable:
            yield Row(**start, direction="", peer="", **unavailable, **self.facts)
            return
        wanted = list(self.wanted)
        for direction in directions:
            timings = self._times(case, oracle, direction, wanted)
            ours = timings.pop(OURS)
            figures = self._figures(case, oracle, direction, ours, timings.pop(COPY, None))
            for peer, theirs in timings.items():
                row = {**start, "direction": direction, "peer": peer, **self.facts}
                yield Row(**row, verdict=check.OK, **timed_fields(ours, theirs), **figures)
                if direction != directions[-1] and theirs.median > HOPELESS * self.budget:
                    wanted.remove(peer.partition(":")[0])
                    note = f"not timed against {peer}, whose forward pass alone took {theirs.median:.1f} s"
                    yield Row(**{**row, "direction": directions[1]}, verdict=check.UNAVAILABLE, note=note)

    def line(self, line: Line, dtype_name: str) -> Iterator[Row]:
        """A row per direction of ``line``, against the fastest of its peers and with its bars."""
        case = line.call(dtype_name)
        start, oracle, unavailable = self._start(case, dtype_name, line.directions)
        wanted = [
            peer for peer in line.peers if peer != "compile" or compile_helps(oracle.tensors, case, line.directions)
        ]
        if not unavailable:
            try:
                errors = compared(oracle, self.implementation)
            except ImportError as error:
                unavailable = {"verdict": check.UNAVAILABLE, "note": str(error)}
        for direction in line.directions:
            row = {**start, "direction": direction, **line.bar(dtype_name, direction, start["isa"]), **self.facts}
            if unavailable:
                yield Row(**row, peer="", **unavailable)
                continue
            timings = self._times(case, oracle, direction, wanted)
            ours = timings.pop(OURS)
            figures = self._figures(case, oracle, direction, ours, timings.pop(COPY, None))
            figures["errors"] = {result: error for result, error in errors.items() if _belongs(result, direction)}
            peer = min(timings, key=lambda name: timings[name].median)
            if row["memory_bar"] is not None:
                figures |= self._memory(case, dtype_name, peer)
            yield Row(**row, peer=peer, verdict=check.OK, **timed_fields(ours, timings[peer]), **figures)

    def _start(
        self, case: Case, dtype_name: str, directions: Sequence[str]
    ) -> tuple[dict[str, Any], check.Oracle, dict[str, Any]]:
        """(the fields that name the case, its oracle, why there are no figures as fields)."""
        gradients = any("backward" in direction for direction in directions)
        oracle = check.Oracle(modules.checked(case), cases.DTYPES[dtype_name], self.device, gradients=gradients)
        implementation, isa, reason = check.running(case, oracle.tensors, self.implementation)
        start: dict[str, Any] = {"op": case.op, "case": case.label, "shape": case.shape, "dtype": dtype_name}
        start |= {"implementation": implementation, "isa": isa}
        verdict, note = (check.UNAVAILABLE, reason) if reason else gate(oracle, self.implementation)
        return start, oracle, {} if verdict == check.OK else {"verdict": verdict, "note": note}

    def _times(self, case: Case, oracle: check.Oracle, direction: str, wanted: Sequence[str]) -> dict[str, Timing]:
        calls = contenders(case, oracle, self.implementation, wanted, direction)
        if cases.roof(case, direction) == "copy":
            x = cases.leading(oracle.tensors).detach()
            target = torch.empty_like(x)
            calls[COPY] = lambda: target.copy_(x)
        with torch.set_grad_enabled(direction != "forward"):
            if "compile" in calls:
                calls["compile"]()  # compilation must not count as the first run
            return interleave(calls, self.budget, self.device)

    def _figures(
        self, case: Case, oracle: check.Oracle, direction: str, ours: Timing, copy: Timing | None
    ) -> dict[str, Any]:
        """Our rate and its limit, in the same unit."""
        first = cases.leading(oracle.tensors)
        amount, unit = work(case, first.dtype, direction)
        if copy:
            # Bytes that one copy of x reads and writes: the limit of the cache level that this row's own tensors live in.
            roofline = 2 * first.nbytes / copy.median / 1e9
        else:
            roofline = (self.peak(first.dtype) if unit == "GFLOP/s" else self.read_peak()) / 1e9
        rate = amount / ours.median / 1e9
        return {"rate": rate, "unit": unit, "roofline": roofline, "roofline_percent": 100 * rate / roofline}

    def _memory(self, case: Case, dtype_name: str, peer: str) -> dict[str, int]:
        """What one training step holds at its highest beside its results: ours and the peer's; and those results."""
        found = {}
        for contender in (OURS, peer):
            peak, results = memory.of_training_step(case, dtype_name, contender, torch.get_num_threads())
            found[contender] = max(0, peak - results)
        return {"memory": found[OURS], "peer_memory": found[peer], "results_memory": results}


def compared(oracle: check.Oracle, implementation: str) -> dict[str, dict[str, float]]:
    """By result: the relative Frobenius and the largest error against float64, fastattn's and torch's own."""
    case, t = oracle.case, oracle.tensors
    ours = oracle.results(cases.prepare(case, t, implementation)())
    theirs = _torchs(oracle)
    return {
        name: {
            "relative": check.relative(ours[name], exact),
            "peer_relative": check.relative(theirs[name], exact),
            "largest": check.largest(ours[name].double() - exact),
            "peer_largest": check.largest(theirs[name].double() - exact),
        }
        for name, exact in oracle.exact.items()
    }


def _torchs(oracle: check.Oracle) -> cases.Outputs:
    """The results of torch's own way, with our dropout mask where there is one: torch draws its own."""
    case, t = oracle.case, oracle.tensors
    if not case.options.get("dropout_p"):
        own = next(peer for peer in peer_names(case.op) if peer != "compile")
        (call,) = peers(case, t, [own]).values()
        return oracle.results(call())
    if "attention" not in case.op:
        return oracle.results(plain_outputs(case, t, torch_product))
    # What SDPA then runs is plain PyTorch in float32, rounded at the end.
    wide = {name: x.detach().float().requires_grad_() if x.requires_grad else x for name, x in t.items()}
    found = check.evaluate(plain_outputs(case, wide), wide, oracle.cotangents)
    return {name: result.to(oracle.plain[name].dtype) for name, result in found.items()}


def _belongs(result: str, direction: str) -> bool:
    """Whether ``direction`` computes ``result``: gradients are called "grad x", outputs otherwise."""
    return direction == "forward+backward" or result.startswith("grad") == (direction == "backward")


def gate(oracle: check.Oracle, implementation: str) -> tuple[str, str]:
    """The check's verdict on this very shape, output and all gradients, and its reason if it is not OK."""
    try:
        for name, error, _, allowed in oracle.judge(implementation):
            if not error <= allowed:
                return check.FAILED, f"{name}: error {error:.1e} > {allowed:.1e}"
    except Exception as error:  # as in check: the others' rows are still wanted
        return check.FAILED, check.brief(error)
    return check.OK, ""


def contenders(
    case: Case, oracle: check.Oracle, implementation: str, wanted: Sequence[str], direction: str
) -> dict[str, Callable[[], object]]:
    """What is timed, ready to call, by name: fastattn first, then the peers among ``wanted`` that exist for the case.

    To be called with gradients off for ``forward``, else on.
    """
    t = oracle.tensors
    if direction == "forward":
        t = {name: tensor.detach() for name, tensor in t.items()}
    calls = {OURS: cases.prepare(case, t, implementation), **peers(case, t, wanted)}
    if direction == "forward":
        return {**calls}
    wrap = {"backward": backward_call, "forward+backward": both_call}[direction]
    return {name: wrap(call, oracle) for name, call in calls.items()}


def timed_fields(ours: Timing, theirs: Timing) -> dict[str, Any]:
    """The fields of a row that say how long both took."""
    return {"ratio": theirs.median / ours.median, **_named(ours, ""), **_named(theirs, "peer_")}


def _named(timing: Timing, prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in asdict(timing).items()}


def backward_call(call: Callable[[], cases.Outputs], oracle: check.Oracle) -> Callable[[], object]:
    """The backward pass alone, again and again from one forward pass."""
    leaves = [tensor for tensor in oracle.tensors.values() if tensor.requires_grad]
    outputs = call()
    upstream = [oracle.cotangents[name] for name in outputs]
    return lambda: torch.autograd.grad(list(outputs.values()), leaves, upstream, retain_graph=True)


def both_call(call: Callable[[], cases.Outputs], oracle: check.Oracle) -> Callable[[], object]:
    leaves = [tensor for tensor in oracle.tensors.values() if tensor.requires_grad]

    def both() -> object:
        outputs = call()
        return torch.autograd.grad(list(outputs.values()), leaves, [oracle.cotangents[name] for name in outputs])

    return both


def run(
    ops: Sequence[str] = cases.OPS,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str = "cpu",
    implementation: str = "auto",
    wanted: Sequence[str] = tuple(PEERS),
    shape: str | None = None,
    quick: bool = False,
    budget: float = ROW_SECONDS,
) -> list[Row]:
    """Measure every op × case × dtype × direction × peer; ``budget`` is seconds per direction, all contenders together."""
    chosen: list[Case] = []
    for op in ops:
        own = quick_cases(op) if quick else default_cases(op)
        if shape is not None:
            size = cases.parse_shape(op, shape)
            own = [Case(op, size, options) for options in {case.label: case.options for case in own}.values()]
        chosen += own
    bench = Bench(device, wanted, implementation, budget)
    rows: list[Row] = []
    with Progress("bench", len(chosen) * len(dtypes)) as progress:
        for case, dtype in itertools.product(chosen, dtypes):
            progress.step(f"{case.op} {'x'.join(map(str, case.shape))} {case.label} {dtype}")
            rows += bench.rows(case, dtype)
    return rows


def run_bars(
    groups: Sequence[str],
    dtypes: Sequence[str] = bars.DTYPES,
    *,
    isa: str = "",
    only: str = "",
    budget: float = bars.SECONDS,
) -> list[Row]:
    """Measure the lines of fastattn/cli/bars.py's ``groups`` with ``only`` in their name, on bars.THREADS threads.

    ``isa`` is "" for the lines without a limit, or the instruction set that this process is limited to.
    """
    torch.set_num_threads(bars.THREADS)
    if list(groups) != ["attention"]:  # its rows stay comparable with those of before
        keep_freed_memory()
    bench = Bench("cpu", (), "auto", budget, limited.text(isa))
    chosen = list(bars.chosen(groups, isa, only, dtypes))
    rows: list[Row] = []
    with Progress("bars", len(chosen)) as progress:
        for line, dtype in chosen:
            progress.step(f"{line.text} {dtype}")
            rows += bench.line(line, dtype)
    return rows


def run_sweep(dtypes: Sequence[str] = bars.DTYPES, *, only: str = "") -> list[Row]:
    """Measure fastattn/cli/sweep.py's calls with ``only`` in their name; what is slower than torch is measured twice."""
    torch.set_num_threads(bars.THREADS)
    chosen = [
        (case, dtype)
        for case in sweep.calls()
        for dtype in dtypes
        if only in bars.name(case.op, case.shape, case.label, "")
    ]
    bench = Bench("cpu", ("sdpa",), "auto", sweep.SECONDS)
    rows: list[Row] = []
    with Progress("sweep", len(chosen)) as progress:
        for case, dtype in chosen:
            progress.step(f"{bars.name(case.op, case.shape, case.label, '')} {dtype}")
            directions = sweep.directions(case, dtype)
            bench.budget = sweep.SECONDS
            found = list(bench.rows(case, dtype, directions))
            if below(found, 1.0):
                bench.budget = sweep.AGAIN_SECONDS
                found = list(bench.rows(case, dtype, directions))
            rows += found
    return rows


def run_scaling(lengths: Sequence[int] = scaling.LENGTHS, budget: float = scaling.SECONDS) -> list[Row]:
    """Measure time and memory of fastattn/cli/scaling.py's call at each length, in a process each."""
    facts = Bench("cpu", ("sdpa",), "auto", 0.0).facts | {"threads": bars.THREADS}
    rows = []
    with Progress("scaling", len(lengths)) as progress:
        for length in lengths:
            progress.step(f"N = {length}")
            case = scaling.case(length)
            tensors = cases.make_tensors(case, cases.DTYPES[scaling.DTYPE], torch.device("cpu"))
            implementation, isa, _ = check.running(case, tensors, "auto")
            found = scaling.in_own_process(length, budget)
            start: dict[str, Any] = {"op": case.op, "case": case.label, "shape": case.shape, "dtype": scaling.DTYPE}
            start |= {
                "direction": "forward",
                "implementation": implementation,
                "isa": isa,
                "peer": scaling.PEER,
                **facts,
            }
            if found["verdict"] != check.OK:
                rows.append(Row(**start, verdict=found["verdict"], note=found["note"]))
                continue
            ours, theirs = (Timing(**found["timings"][name]) for name in (OURS, scaling.PEER))
            amount, unit = work(case, cases.DTYPES[scaling.DTYPE], "forward")
            start |= {"rate": amount / ours.median / 1e9, "unit": unit}
            start |= {"memory": found["memory"][OURS], "peer_memory": found["memory"][scaling.PEER]}
            rows.append(Row(**start, verdict=check.OK, **timed_fields(ours, theirs)))
    return rows


def run_quick() -> list[Row]:
    """The rows of the demo: every op once or twice, below 15 s on two cores."""
    return run(quick=True, budget=0.2, wanted=("eager", "sdpa"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "op",
        nargs="*",
        metavar="OP",
        help=f"default: all of {', '.join(cases.OPS)}; of {', '.join(bars.LINES)}: the table of bars; overhead: what a small call "
        "costs on top of its kernel",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(cases.DTYPES), help="default: float32 bfloat16; bars: float16 too"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--implementation", choices=cases.IMPLEMENTATIONS, help="default: auto")
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), help="default: all")
    parser.add_argument("--shape", help="; ".join(f"{op}: {shape}" for op, shape in cases.SHAPES.items()))
    parser.add_argument("--quick", action="store_true", help="one small shape per op, 0.2 s a row, no torch.compile")
    parser.add_argument(
        "--seconds", type=float, help=f"per row, all contenders together (default {ROW_SECONDS}, bars {bars.SECONDS})"
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="bars: the lines with TEXT in their name, such as 2048x128 or causal"
    )
    parser.add_argument(
        "--isa", choices=list(limited.ENVIRONMENT), help="bars: the lines limited to it, and torch with them"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="attention: many sizes, the worst ratios; exit code 1 if one is below 1"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="attention: time and memory against N up to 131072; --plot draws them"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.jsonl", help="append the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    parser.add_argument("--fail-below", type=float, metavar="RATIO", help="exit code 1 if a row is slower than that")


def wants_bars(args: argparse.Namespace) -> bool:
    """Groups of bars on a CPU (``bench attention``, ``bench norm ffn``), with no other cases, peers or bar asked for."""
    others = (args.quick, args.shape, args.peer, args.implementation, args.fail_below)
    groups = bool(args.op) and set(args.op) <= set(bars.LINES)
    return groups and cases.parse_device(args.device).type == "cpu" and not any(others)


def all_bars(args: argparse.Namespace) -> list[Row]:
    """The rows of the bars asked for: this process's, and those of a process per instruction set to be limited to."""
    groups, only, budget, dtypes = args.op, args.only or "", args.seconds or bars.SECONDS, args.dtype or bars.DTYPES
    if args.isa and limited.in_force(args.isa):
        return run_bars(groups, dtypes, isa=args.isa, only=only, budget=budget)
    rows = [] if args.isa else run_bars(groups, dtypes, only=only, budget=budget)
    for isa in [args.isa] if args.isa else limited.ENVIRONMENT:
        if not list(bars.chosen(groups, isa, only, dtypes)):
            continue
        if isa not in check.isas_to_run("all"):
            print(f"not measured: this machine has no {isa}", file=sys.stderr)
            continue
        found = limited.bench(isa, [*groups, "--dtype", *dtypes, "--only", only, "--seconds", str(budget)])
        rows += [Row(**{**row, "shape": tuple(row["shape"])}) for row in found]
    if not rows:
        names = ", ".join(line.text for group in groups for line in bars.LINES[group])
        raise ValueError(f"no line of the bars has {only!r} in its name: {names}")
    return rows


def run_overhead(args: argparse.Namespace) -> int:
    """``bench overhead``, whose rows are of their own kind; exit code 1 where a bar is missed."""
    if not _library.cpu_is_fast:
        raise ValueError("overhead: is of the C++ operators, which this installation or machine does not have")
    rows = overhead.run(args.seconds or overhead.SECONDS)
    missed = [row for row in rows if overhead.missed(row)]
    if args.json:
        print(json.dumps({"passed": not missed, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        overhead.render(rows)
    return 1 if missed else 0


def main(args: argparse.Namespace) -> int:
    if args.op == ["overhead"]:
        return run_overhead(args)
    with_bars = wants_bars(args)
    unknown = [op for op in args.op if op not in cases.OPS and not with_bars]
    if unknown:
        raise ValueError(
            f"no operation {', '.join(unknown)}; there are {', '.join(cases.OPS)}, and on a CPU without other cases or peers "
            f"the tables of bars {', '.join(bars.LINES)}"
        )
    if (args.only or args.isa) and not with_bars:
        raise ValueError(f"--only and --isa are of the bars on a CPU: {', '.join(bars.LINES)}")
    if (args.sweep or args.scaling) and not (with_bars and args.op == ["attention"]):
        raise ValueError("--sweep and --scaling are of `bench attention` on a CPU, without other cases or peers")
    if args.scaling:
        rows = run_scaling(budget=args.seconds or scaling.SECONDS)
        missed = below(rows, 0.0)
    elif args.sweep:
        rows = run_sweep(args.dtype or bars.DTYPES, only=args.only or "")
        missed = below(rows, 1.0)
    elif with_bars:
        rows = all_bars(args)
        missed = [row for row in rows if bars.missed(row)]
    else:
        rows = run(
            args.op or cases.OPS,
            dtypes=args.dtype or ("float32", "bfloat16"),
            device=args.device,
            implementation=args.implementation or "auto",
            wanted=[peer for peer in args.peer or PEERS if not (args.quick and peer == "compile")],
            shape=args.shape,
            quick=args.quick,
            budget=args.seconds or (0.2 if args.quick else ROW_SECONDS),
        )
        missed = below(rows, args.fail_below or 0.0)
    if args.json:
        print(json.dumps({"passed": not missed, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        show(rows, missed, args)
    if args.save:
        save(rows, args.save)
    if args.plot:
        (plot_scaling if args.scaling else plot)(rows, args.plot)
    return 1 if missed else 0


def show(rows: Sequence[Row], missed: Sequence[Row], args: argparse.Namespace) -> None:
    """Print what was measured and, where there is a bar, what missed it."""
    if args.sweep:
        render(sweep.worst(rows))
        print(sweep.summary(rows))
        return
    render(rows)
    if any(row.bar is not None for row in rows):
        bars.render(rows)
    for row in missed if args.fail_below else []:
        shape = "x".join(map(str, row.shape))
        print(f"below {args.fail_below}: {row.op} [{row.case}] {shape} {row.dtype} {row.direction} against {row.peer}")
