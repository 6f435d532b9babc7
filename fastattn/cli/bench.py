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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.cli import bars, cases, check, limited, machine, scaling, sweep
from fastattn.cli.bars import Line
from fastattn.cli.cases import Case, work
from fastattn.cli.measure import MatrixPeak, ReadPeak, Timing, interleave
from fastattn.cli.peers import PEERS, peers
from fastattn.cli.plot import plot as plot
from fastattn.cli.plot import plot_scaling
from fastattn.cli.table import Progress, print_table

DIRECTIONS = ("forward", "forward+backward")
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}
COPY = "copy"
OURS = "fastattn"
ROW_SECONDS = 1.5
#: A peer whose forward call takes this many budgets (float16 products on a CPU do) is not run backward.
HOPELESS = 5


@dataclass(frozen=True)
class Row:
    """One measurement. Times are seconds per call, ``rate`` is ours in ``unit``, ``roofline`` is the limit in the same unit.

    ``load`` is the machine's load average before the session began: above its cores, others were competing.
    A row with a bar (fastattn/cli/bars.py) has in ``bar`` what ``ratio`` must reach, in ``roofline_bar`` what
    ``roofline_percent`` must (None: no bar), and in ``errors`` for each of its results the relative Frobenius error against
    float64 and the largest error, ours and the peer's. ``limits`` are the variables that limit ours and torch.
    ``verdict`` is "ok"; or "FAILED" (the check of this very shape did) or "unavailable", and then there are no figures
    and ``note`` says why.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    implementation: str
    isa: str
    peer: str
    verdict: str
    ratio: float | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int | None = None
    peer_median: float | None = None
    peer_p20: float | None = None
    peer_p80: float | None = None
    peer_samples: int | None = None
    rate: float | None = None
    unit: str = ""
    roofline: float | None = None
    roofline_percent: float | None = None
    bar: float | None = None
    roofline_bar: float | None = None
    errors: dict[str, dict[str, float]] | None = None
    limits: str = ""
    memory: int | None = None
    peer_memory: int | None = None
    device: str = ""
    threads: int = 0
    load: float = 0.0
    torch: str = ""
    commit: str | None = None
    date: str = ""
    note: str = ""


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

    def rows(
        self, case: Case, dtype_name: str, directions: Sequence[str] = DIRECTIONS, line: Line | None = None
    ) -> Iterator[Row]:
        """Every direction against every peer, or rows that say why there are no figures; with the bars of ``line``."""
        dtype = cases.DTYPES[dtype_name]
        oracle = check.Oracle(case, dtype, self.device, gradients=len(directions) > 1)
        implementation, isa, reason = check.running(case, oracle.tensors, self.implementation)
        start: dict[str, Any] = {"op": case.op, "case": case.label, "shape": case.shape, "dtype": dtype_name}
        start |= {"implementation": implementation, "isa": isa}
        verdict, note = (check.UNAVAILABLE, reason) if reason else gate(oracle, self.implementation)
        if verdict != check.OK:
            for direction in directions if line else ("",):
                bar = line.bar(dtype_name, direction) if line else {}
                yield Row(**start, direction=direction, peer="", verdict=verdict, note=note, **bar, **self.facts)
            return
        errors = compared(oracle, self.implementation) if line else {}
        wanted = list(self.wanted)
        for direction in directions:
            timings = self._times(case, oracle, direction, wanted)
            ours = timings.pop(OURS)
            figures = self._figures(case, oracle, direction, ours, timings.pop(COPY, None))
            if line:
                figures |= line.bar(dtype_name, direction)
                figures["errors"] = {
                    result: error
                    for result, error in errors.items()
                    if result.startswith("grad") == (direction == "backward")
                }
            for peer, theirs in timings.items():
                row = {**start, "direction": direction, "peer": peer}
                yield Row(
                    **row,
                    verdict=check.OK,
                    ratio=theirs.median / ours.median,
                    **_named(ours, ""),
                    **_named(theirs, "peer_"),
                    **figures,
                    **self.facts,
                )
                if not line and direction != directions[-1] and theirs.median > HOPELESS * self.budget:
                    wanted.remove(peer.partition(":")[0])
                    note = f"not timed against {peer}, whose forward pass alone took {theirs.median:.1f} s"
                    yield Row(**{**row, "direction": directions[1]}, verdict=check.UNAVAILABLE, note=note, **self.facts)

    def _times(self, case: Case, oracle: check.Oracle, direction: str, wanted: Sequence[str]) -> dict[str, Timing]:
        calls = contenders(case, oracle, self.implementation, wanted, direction)
        if "x" in oracle.tensors and work(case, oracle.tensors["x"].dtype, direction)[1] == "GB/s":
            x = oracle.tensors["x"].detach()
            target = torch.empty_like(x)
            calls[COPY] = lambda: target.copy_(x)
        if "compile" in calls:
            calls["compile"]()  # compilation must not count as the first run
        return interleave(calls, self.budget, self.device)

    def _figures(
        self, case: Case, oracle: check.Oracle, direction: str, ours: Timing, copy: Timing | None
    ) -> dict[str, Any]:
        """Our rate and its limit, in the same unit."""
        first = oracle.tensors["q" if "attention" in case.op else "x"]
        amount, unit = work(case, first.dtype, direction)
        if copy:
            # Bytes that one copy of x reads and writes: the limit of the cache level that this row's own tensors live in.
            roofline = 2 * first.nbytes / copy.median / 1e9
        else:
            roofline = (self.peak(first.dtype) if unit == "GFLOP/s" else self.read_peak()) / 1e9
        rate = amount / ours.median / 1e9
        return {"rate": rate, "unit": unit, "roofline": roofline, "roofline_percent": 100 * rate / roofline}


def compared(oracle: check.Oracle, implementation: str) -> dict[str, dict[str, float]]:
    """By result: the relative Frobenius and the largest error against float64, fastattn's and SDPA's."""
    case, t = oracle.case, oracle.tensors
    ours = oracle.results(cases.ours(case, t, implementation))
    if case.options.get("dropout_p"):
        # SDPA draws a mask of its own. What it then runs is plain PyTorch in float32, rounded at the end.
        wide = {name: x.detach().float().requires_grad_() if x.requires_grad else x for name, x in t.items()}
        found = check.evaluate(cases.plain(case, wide), wide, oracle.cotangents)
        theirs = {name: result.to(ours[name].dtype) for name, result in found.items()}
    else:
        (call,) = peers(case, t, ["sdpa"]).values()
        theirs = oracle.results(call())
    return {
        name: {
            "relative": check.relative(ours[name], exact),
            "peer_relative": check.relative(theirs[name], exact),
            "largest": check.largest(ours[name].double() - exact),
            "peer_largest": check.largest(theirs[name].double() - exact),
        }
        for name, exact in oracle.exact.items()
    }


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
    """What is timed, ready to call, by name: fastattn first, then the peers among ``wanted`` that exist for the case."""
    t = oracle.tensors
    calls: dict[str, Callable[[], cases.Outputs]] = {OURS: lambda: cases.ours(case, t, implementation)}
    calls |= peers(case, t, wanted)
    wrap = {"forward": _forward, "backward": _backward, "forward+backward": _both}[direction]
    return {name: wrap(call, oracle) for name, call in calls.items()}


def _named(timing: Timing, prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in asdict(timing).items()}


def _forward(call: Callable[[], cases.Outputs], oracle: check.Oracle) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return call()

    return forward


def _backward(call: Callable[[], cases.Outputs], oracle: check.Oracle) -> Callable[[], object]:
    """The backward pass alone, again and again from one forward pass."""
    leaves = [tensor for tensor in oracle.tensors.values() if tensor.requires_grad]
    outputs = call()
    upstream = [oracle.cotangents[name] for name in outputs]
    return lambda: torch.autograd.grad(list(outputs.values()), leaves, upstream, retain_graph=True)


def _both(call: Callable[[], cases.Outputs], oracle: check.Oracle) -> Callable[[], object]:
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
    dtypes: Sequence[str] = bars.DTYPES, *, isa: str = "", only: str = "", budget: float = bars.SECONDS
) -> list[Row]:
    """Measure the lines of fastattn/cli/bars.py with ``only`` in their name, on bars.THREADS threads.

    ``isa`` is "" for the lines without a limit, or the instruction set that this process is limited to.
    """
    torch.set_num_threads(bars.THREADS)
    bench = Bench("cpu", ("sdpa",), "auto", budget, limited.text(isa))
    chosen = list(bars.chosen(isa, only, dtypes))
    rows: list[Row] = []
    with Progress("bars", len(chosen)) as progress:
        for line, dtype in chosen:
            progress.step(f"{line.text} {dtype}")
            rows += bench.rows(line.case, dtype, line.directions, line)
    return rows


def run_sweep(dtypes: Sequence[str] = bars.DTYPES, *, only: str = "") -> list[Row]:
    """Measure fastattn/cli/sweep.py's calls with ``only`` in their name; what is slower than torch is measured twice."""
    torch.set_num_threads(bars.THREADS)
    chosen = [
        (case, dtype) for case in sweep.calls() for dtype in dtypes if only in bars.name(case.shape, case.label, "")
    ]
    bench = Bench("cpu", ("sdpa",), "auto", sweep.SECONDS)
    rows: list[Row] = []
    with Progress("sweep", len(chosen)) as progress:
        for case, dtype in chosen:
            progress.step(f"{bars.name(case.shape, case.label, '')} {dtype}")
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
            start |= {**_named(ours, ""), **_named(theirs, "peer_"), "rate": amount / ours.median / 1e9, "unit": unit}
            start |= {"memory": found["memory"][OURS], "peer_memory": found["memory"][scaling.PEER]}
            rows.append(Row(**start, verdict=check.OK, ratio=theirs.median / ours.median))
    return rows


def run_quick() -> list[Row]:
    """The rows of the demo: every op once or twice, below 15 s on two cores."""
    return run(quick=True, budget=0.2, wanted=("eager", "sdpa"))


def _milliseconds(median: float, p20: float, p80: float) -> str:
    def text(seconds: float) -> str:
        return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"

    return f"{text(median)} [{text(p20)}, {text(p80)}]"


def render(rows: Sequence[Row]) -> None:
    """Print the table: the ratio first, then times, rate and its share of the measured limit; the reasons of FAILED last."""
    columns = ["op", "shape", "dtype", "pass", "by", "against", "ratio", "ms [p20, p80]", "theirs", "rate", "roof"]
    with_bars = any(row.bar is not None for row in rows)
    with_memory = any(row.memory is not None for row in rows)
    columns += ["error / theirs"] if with_bars else ["memory", "theirs"] if with_memory else []
    lines, styles = [], []
    for row in rows:
        call = (cases.title(row.op, row.case), "x".join(map(str, row.shape)), row.dtype, SHORT.get(row.direction, ""))
        start = (*call, f"{row.implementation} {row.isa}".strip(), row.peer)
        if row.verdict != check.OK:
            lines.append((*start, row.verdict, *[""] * (len(columns) - len(start) - 1)))
            styles.append("red")
            continue
        assert row.ratio is not None and row.rate is not None
        ours = _milliseconds(row.median or 0, row.p20 or 0, row.p80 or 0)
        theirs = _milliseconds(row.peer_median or 0, row.peer_p20 or 0, row.peer_p80 or 0)
        rate = f"{row.rate:.0f} {row.unit}" if row.rate >= 10 else f"{row.rate:.2f} {row.unit}"
        lines.append((*start, bars.cell(row), ours, theirs, rate, bars.share(row)))
        if with_bars:
            result, error = bars.error_ratio(row)
            lines[-1] += (f"{error:.2f} {result}",)
        elif with_memory:
            lines[-1] += tuple(f"{(size or 0) / 2**20:.1f} MiB" for size in (row.memory, row.peer_memory))
        bar = row.bar or 1
        styles.append("green" if row.ratio >= bar else "yellow" if row.ratio >= 0.95 * bar else "red")
    print_table(
        columns, lines, left=6, styles=styles, title="ratio = their time / fastattn's: above 1, fastattn is faster"
    )
    for row in rows:
        if row.note:
            shape = "x".join(map(str, row.shape))
            print(f"{row.verdict}: {cases.title(row.op, row.case)} {shape} {row.dtype}: {row.note}")
    if rows:
        machine_text = f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}"
        print(f"{machine_text}, commit {rows[0].commit or 'unknown'}")
        if rows[0].load > machine.cores() + 0.5:
            print(f"note: load {rows[0].load} on {machine.cores()} cores: others were running, these times mean little")


def save(rows: Sequence[Row], path: Path) -> None:
    """Append the rows to a JSONL file, which is a log: nothing in it is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def below(rows: Sequence[Row], bar: float) -> list[Row]:
    """Rows that miss the bar: slower than ``bar`` × the peer, or without figures because their check failed."""
    return [row for row in rows if row.verdict == check.FAILED or (row.ratio is not None and row.ratio < bar)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "op",
        nargs="*",
        metavar="OP",
        help=f"default: all of {', '.join(cases.OPS)}; attention alone: its table of bars",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(cases.DTYPES), help="default: float32 bfloat16; bars: float16 too"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--implementation", choices=cases.IMPLEMENTATIONS, help="default: auto")
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), help="default: all; bars: sdpa")
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
    """``bench attention`` on a CPU, with no other cases, peers or bar asked for."""
    others = (args.quick, args.shape, args.peer, args.implementation, args.fail_below)
    return args.op == ["attention"] and cases.parse_device(args.device).type == "cpu" and not any(others)


def all_bars(args: argparse.Namespace) -> list[Row]:
    """The rows of the bars asked for: this process's, and those of a process per instruction set to be limited to."""
    only, budget, dtypes = args.only or "", args.seconds or bars.SECONDS, args.dtype or bars.DTYPES
    if args.isa and limited.in_force(args.isa):
        return run_bars(dtypes, isa=args.isa, only=only, budget=budget)
    rows = [] if args.isa else run_bars(dtypes, only=only, budget=budget)
    for isa in [args.isa] if args.isa else limited.ENVIRONMENT:
        if not list(bars.chosen(isa, only, dtypes)):
            continue
        if isa not in check.isas_to_run("all"):
            print(f"not measured: this machine has no {isa}", file=sys.stderr)
            continue
        found = limited.bench(isa, ["attention", "--dtype", *dtypes, "--only", only, "--seconds", str(budget)])
        rows += [Row(**{**row, "shape": tuple(row["shape"])}) for row in found]
    if not rows:
        raise ValueError(f"no line of the bars has {only!r} in its name: {', '.join(line.text for line in bars.LINES)}")
    return rows


def main(args: argparse.Namespace) -> int:
    unknown = [op for op in args.op if op not in cases.OPS]
    if unknown:
        raise ValueError(f"no operation {', '.join(unknown)}; there are {', '.join(cases.OPS)}")
    with_bars = wants_bars(args)
    if (args.only or args.isa or args.sweep or args.scaling) and not with_bars:
        raise ValueError(
            "--only, --isa, --sweep and --scaling are of `bench attention` on a CPU, without other cases or peers"
        )
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
