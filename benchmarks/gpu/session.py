"""One measurement: the check of that very shape, the contenders, their times as rows."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import peers, plan, timing
from fastattn.cli import cases, check, machine
from fastattn.cli.bench import backward_call, both_call, gate, timed_fields
from fastattn.cli.cases import Case
from fastattn.cli.plain import plain_outputs
from fastattn.cli.rows import Row
from fastattn.ops._select import arch_name

OURS = "fastattn"
#: A score matrix of this many pairs per head is compared with float64 in a head of each end alone.
_WHOLE_PAIRS = 1 << 22


class Session:
    """The device, its measured limits, and what is the same in all rows."""

    def __init__(
        self, device: torch.device, implementation: str, watch: timing.Stopwatch, limits: dict[str, float]
    ) -> None:
        self.device = device
        self.implementation = implementation
        self.watch = watch
        self.limits = limits
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_model()
        self.facts: dict[str, Any] = {
            "device": self.name,
            "threads": torch.get_num_threads(),
            "load": round(machine.load(), 2),
            "torch": torch.__version__,
            "commit": machine.git_commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arch": arch_name(device) if device.type == "cuda" else "",
            "triton": _version("triton"),
            "limits": "deterministic algorithms" if torch.are_deterministic_algorithms_enabled() else "",
        }

    def rows(self, wanted: plan.Measurement, budget: float, dtype: str = "bfloat16") -> Iterator[Row]:
        """A row per peer; or one row that says why there are no figures."""
        case = wanted.case
        start: dict[str, Any] = {"op": case.op, "case": case.label, "shape": case.shape, "dtype": dtype}
        start |= {"direction": wanted.direction, "implementation": self.implementation, "isa": "", **self.facts}
        try:
            oracle = Tensors(case, cases.DTYPES[dtype], self.device, wanted.direction != "forward")
            _, _, reason = check.running(case, oracle.tensors, self.implementation)
            if reason:
                yield Row(**start, peer="", verdict=check.UNAVAILABLE, note=reason)
                return
            verdict, note = oracle.judged(self.implementation)
        except (
            Exception
        ) as error:  # what it is compared with, mostly for want of memory; the next measurement is still wanted
            verdict, note = check.UNAVAILABLE, check.brief(error)
        if verdict != check.OK:
            yield Row(**start, peer="", verdict=verdict, note=note)
            return
        timings, errors = self._times(wanted, oracle, budget)
        for peer, reason in errors.items():
            yield Row(**start, peer=peer, verdict=check.UNAVAILABLE, note=reason)
        if OURS not in timings:
            return
        ours = timings.pop(OURS)
        figures = self._figures(wanted, oracle, ours.median)
        for peer, theirs in timings.items():
            bar = wanted.ratio_bar if peer == wanted.against else None
            yield Row(**start, peer=peer, verdict=check.OK, **timed_fields(ours, theirs), **figures, bar=bar)

    def _times(self, wanted: plan.Measurement, oracle: Tensors, budget: float) -> tuple[dict[str, Any], dict[str, str]]:
        found: dict[str, Callable[[], object]] = {}
        errors: dict[str, str] = {}
        makers = {OURS: functools.partial(peers.ours, implementation=self.implementation)}
        with torch.set_grad_enabled(wanted.direction != "forward"):
            for name, maker in (makers | peers.for_case(wanted.case, self.implementation)).items():
                try:
                    call = maker(wanted.case, oracle.tensors)
                    wrap = {"forward": lambda call, _: call, "backward": backward_call, "forward+backward": both_call}
                    found[name] = wrap[wanted.direction](call, oracle)
                except Exception as error:  # not installed, or not for this call
                    errors[name] = check.brief(error)
            if wanted.against == "eager":  # a few rows: what a call costs, not what its kernel does
                found = {name: call for name, call in found.items() if name in (OURS, "eager", "compile")}
                return timing.latency(found, self.watch), errors
            timings, broken = timing.interleave(found, budget, self.watch, wanted.memory)
        return timings, errors | broken

    def _figures(self, wanted: plan.Measurement, oracle: Tensors, seconds: float) -> dict[str, Any]:
        amount, unit = cases.work(wanted.case, oracle.dtype, wanted.direction)
        rate = amount / seconds / 1e9
        figures: dict[str, Any] = {"rate": rate, "unit": unit, "roofline_bar": wanted.share_bar}
        if unit in self.limits:
            figures |= {"roofline": self.limits[unit], "roofline_percent": 100 * rate / self.limits[unit]}
        if plan.BAR_DEVICE in self.name:
            figures["rate_bar"] = wanted.rate_bar
        return figures


class Tensors:
    """A case's tensors and cotangents, and how its results are judged: whole, or for long attention a head of each end."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, gradients: bool) -> None:
        self.case, self.dtype, self.gradients = case, dtype, gradients
        self.whole: check.Oracle | None = None
        if "attention" not in case.op or case.attention_shape[2] * case.attention_shape[3] <= _WHOLE_PAIRS:
            self.whole = check.Oracle(case, dtype, device, gradients=gradients)
            self.tensors, self.cotangents = self.whole.tensors, self.whole.cotangents
            return
        self.tensors = cases.make_tensors(case, dtype, device)
        if not gradients:
            self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        generator = torch.Generator(device).manual_seed(1)
        q = self.tensors["q"]
        self.cotangents = {"out": torch.randn(q.shape, generator=generator, device=device, dtype=dtype)}

    def judged(self, implementation: str) -> tuple[str, str]:
        """(verdict, reason) of fastattn's call: its results and, with ``gradients``, theirs."""
        if self.whole is not None:
            return gate(self.whole, implementation)
        try:
            outputs = cases.prepare(self.case, self.tensors, implementation)()
            ours = check.evaluate(outputs, self.tensors, self.cotangents)
        except Exception as error:  # as in gate
            return check.FAILED, check.brief(error)
        for head in {0, self.tensors["k"].shape[1] - 1}:
            for name, error, allowed in self._head(ours, head):
                if not error <= allowed:
                    return check.FAILED, f"{name} of head {head}: error {error:.1e} > {allowed:.1e}"
        return check.OK, ""

    def _head(self, ours: cases.Outputs, head: int) -> Iterator[tuple[str, float, float]]:
        """(result, error, bound) of one key head of the first batch entry and the query heads that read it."""
        group = self.tensors["q"].shape[1] // self.tensors["k"].shape[1]
        where = {"q": slice(head * group, (head + 1) * group)}

        def cut(name: str, x: torch.Tensor) -> torch.Tensor:
            # Results with a head for each query head are q's; a mask may have one for all.
            heads = where["q"] if name in ("q", "out", "grad q") else slice(head, head + 1)
            return x[:1, heads] if x.shape[1] > 1 else x[:1]

        case = Case(self.case.op, (1, group, *self.case.shape[2:]), self.case.options | {"nheads_kv": 1})
        part = {name: cut(name, x.detach()) for name, x in self.tensors.items()}
        upstream = {"out": cut("out", self.cotangents["out"])}
        results = {}
        for kind, dtype in (("exact", torch.float64), ("plain", self.dtype)):
            own = {name: self._as(x, dtype, self.tensors[name].requires_grad) for name, x in part.items()}
            results[kind] = check.evaluate(plain_outputs(case, own), own, upstream)
        for name, exact in results["exact"].items():
            plain_error = check.largest(results["plain"][name].double() - exact)
            allowed = check.bound(plain_error, exact, self.dtype, cases.reduction_length(case))
            yield name, check.largest(cut(name, ours[name]).double() - exact), allowed

    @staticmethod
    def _as(x: torch.Tensor, dtype: torch.dtype, differentiable: bool) -> torch.Tensor:
        return x.to(dtype).requires_grad_(differentiable) if x.is_floating_point() else x


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
