"""``python -m fastattn tune``: the tiles of the Triton kernels, chosen by measuring on the GPU that is there.

Each kernel's tiles are a choice (kernels/choice.py). A call is made once to see which choices it asks, and is then timed with each
candidate of each, everything else left as it is. A candidate replaces the shipped tiles where it is at least 2 % faster and
the call is still right against float64. What was found goes to a JSON file, one per architecture and version of Triton,
which later processes read: ``FASTATTN_TUNED`` names it, ``FASTATTN_TUNED=off`` ignores it, else it lies in the user's cache folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.cli import bench, cases, check
from fastattn.cli.cases import Case
from fastattn.cli.table import Progress, print_table
from fastattn.kernels import choice, configs
from fastattn.kernels.choice import Arch, Choice, Key
from fastattn.ops import _library

#: What a candidate must gain over the shipped tiles: less is noise.
GAIN = 1.02
#: Candidates that are timed a second time, in turns with the shipped tiles.
_FINALISTS = 3
_WARM_UP, _CALLS, _FINAL_ROUNDS = 3, 7, 5
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Found:
    """The outcome at one point of one choice. ``seconds`` of the call with ``config``, ``shipped_seconds`` with what is shipped;
    ``note``: how many candidates there were, and how many broke."""

    choice: str
    at: dict[str, Any]
    config: dict[str, Any]
    seconds: float
    shipped_seconds: float
    changed: bool
    call: str
    note: str


def gpu_seconds(function: Callable[[], object]) -> float:
    """The median time of a call between two events, after warming up."""
    for _ in range(_WARM_UP):
        function()
    times = []
    for _ in range(_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def search(
    chosen: Choice, point: Key, arch: Arch, call: Callable[[], object], is_right: Callable[[], bool], timer: Timer
) -> tuple[Any, float, float, str]:
    """(the best configuration, its seconds, the shipped one's, a note) of ``chosen`` at ``point`` for ``call``.

    A candidate that does not compile, does not fit or raises is left out. RuntimeError if the shipped one does.
    """

    def seconds(config: Any) -> float:
        with choice.trying(chosen, point, arch, config):
            return timer(call)

    shipped, *others = chosen.possible(point, arch)
    times = {shipped: seconds(shipped)}
    broken = 0
    for config in others:
        try:
            times[config] = seconds(config)
        except Exception:  # Triton raises many kinds: resources, compilation, launch
            broken += 1
    finalists = sorted(times, key=times.__getitem__)[:_FINALISTS]
    rounds: dict[Any, list[float]] = {config: [] for config in dict.fromkeys([shipped, *finalists])}
    for _ in range(_FINAL_ROUNDS):
        for config, samples in rounds.items():
            samples.append(seconds(config))
    final = {config: statistics.median(samples) for config, samples in rounds.items()}
    note = f"{len(others)} candidates" + (f", {broken} broke" if broken else "")
    for config in sorted(final, key=final.__getitem__):
        if config == shipped or final[config] * GAIN > final[shipped]:
            break
        with choice.trying(chosen, point, arch, config):
            if is_right():
                return config, final[config], final[shipped], note
        note += ", one was wrong"
    return shipped, final[shipped], final[shipped], note


def tune_case(case: Case, dtype: str, device: torch.device, done: set[tuple[str, Key]], timer: Timer) -> list[Found]:
    """Search every choice that the case asks, forward and backward, and that is not in ``done`` yet."""
    oracle = check.Oracle(case, cases.DTYPES[dtype], device)
    _, _, reason = check.running(case, oracle.tensors, "triton")
    if reason:
        raise NotImplementedError(f"{case.op} on {device}: {reason}")
    calls = {}
    for direction in ("forward", "backward"):
        with torch.set_grad_enabled(direction == "backward"):
            # The graph of the backward pass is made here, outside what is timed.
            calls[direction] = bench.contenders(case, oracle, "triton", (), direction)[bench.OURS]
    found = []
    for direction, call in calls.items():
        with torch.set_grad_enabled(direction == "backward"):
            with choice.asking() as asked:
                call()
            for chosen, point, arch in dict.fromkeys(asked):
                if (chosen.name, point) in done or len(chosen.possible(point, arch)) < 2:
                    continue
                done.add((chosen.name, point))
                config, seconds, shipped_seconds, note = search(
                    chosen, point, arch, call, lambda: bench.gate(oracle, "triton")[0] == check.OK, timer
                )
                name = f"{cases.title(case.op, case.label)} {'x'.join(map(str, case.shape))} {direction}"
                changed = config != chosen.shipped(point, arch)
                described = (chosen.name, chosen.described(point), choice.config_as_json(config))
                found.append(Found(*described, seconds, shipped_seconds, changed, name, note))
    return found


def default_cases(op: str) -> list[Case]:
    """Calls that between them ask the choices that matter: each head_dim and row length that models have."""
    if op == "attention":
        shapes = [(2, 16, 4096, dim) for dim in (64, 128, 256)]
        extras = {"mask": "additive", "mask_grad": False}
        return [Case(op, shape, {"causal": True}) for shape in shapes] + [Case(op, (2, 16, 2048, 64), extras)]
    if op in ("layer_norm", "rms_norm"):
        own = {"weight": True, "bias": True} if op == "layer_norm" else {"weight": True}
        return [Case(op, ((1 << 24) // columns, columns), own) for columns in (768, 1024, 2048, 4096, 8192, 16384)]
    return [] if op == "scaled_dot_product_attention" else bench.default_cases(op)


def write(path: Path, arch: Arch, found: Sequence[Found], device: str) -> int:
    """Merge what was found into the file; points where the shipped tiles won lose their entry. Returns the number of entries."""
    entries: list[dict[str, Any]] = []
    if path.exists():
        choice.read_tuned(path, arch)  # a file that does not fit is not added to
        entries = json.loads(path.read_text())["entries"]
    searched = [(row.choice, row.at) for row in found]
    entries = [entry for entry in entries if (entry["choice"], entry["at"]) not in searched]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"device": device, "torch": torch.__version__, "date": date}
    entries += [asdict(row) | facts for row in found if row.changed]
    content = {"schema": choice.SCHEMA, "arch": arch.name, "triton": choice.triton_version(), "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return len(entries)


def render(found: Sequence[Found]) -> None:
    lines = []
    for row in found:
        tiles = ", ".join(f"{name} {value}" for name, value in row.config.items() if name != "kind")
        where = ", ".join(f"{name} {value}" for name, value in row.at.items())
        gain = f"{row.shipped_seconds / row.seconds:.2f}" if row.changed else "shipped"
        lines.append((row.choice, where, tiles, gain, f"{row.seconds * 1e3:.4g}", row.call, row.note))
    columns = ("choice", "at", "tiles", "gain", "ms", "call", "note")
    print_table(columns, lines, left=3, title="gain = the call's time with the shipped tiles / with these")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", metavar="OP", help=f"default: all of {', '.join(cases.OPS)}")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default cuda)")
    parser.add_argument("--shape", help="; ".join(f"{op}: {shape}" for op, shape in cases.SHAPES.items()))
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: the file that later processes read")


def main(args: argparse.Namespace) -> int:
    unknown = [op for op in args.op if op not in cases.OPS]
    if unknown:
        raise ValueError(f"no operation {', '.join(unknown)}; there are {', '.join(cases.OPS)}")
    if not torch.cuda.is_available() or not args.device.startswith("cuda"):
        raise ValueError("tiles are chosen by timing on a GPU, and there is none here; the shipped ones stay")
    if not _library.has_triton:
        raise ValueError("triton is not installed")
    device = cases.parse_device(args.device)
    arch = configs.arch_of_device(device)
    chosen: list[Case] = []
    for op in args.op or cases.OPS:
        own = default_cases(op)
        if args.shape:
            options = own[0].options if own else {}
            own = [Case(op, cases.parse_shape(op, args.shape), options)]
        chosen += own
    done: set[tuple[str, Key]] = set()
    found: list[Found] = []
    skipped: dict[str, str] = {}
    with Progress("tune", len(chosen) * len(args.dtype)) as progress, torch.cuda.device(device):
        for case in chosen:
            for dtype in args.dtype:
                progress.step(f"{case.op} {'x'.join(map(str, case.shape))} {dtype}")
                try:
                    found += tune_case(case, dtype, device, done, gpu_seconds)
                except NotImplementedError as error:
                    skipped[case.op] = str(error)
    path = args.output or choice.tuned_path(arch)
    count = write(path, arch, found, torch.cuda.get_device_name(device))
    if args.json:
        print(json.dumps({"path": str(path), "found": [asdict(row) for row in found], "skipped": skipped}, indent=1))
        return 0
    render(found)
    for reason in skipped.values():
        print(f"not tuned: {reason}")
    print(f"{count} configurations in {path}")
    return 0
