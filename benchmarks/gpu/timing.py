"""Time on a GPU: pairs of events around single calls, contenders in turns, the L2 cache flushed before each where that matters.

Between flush and call nothing waits for the CPU: clearing the buffer takes the GPU longer than launching takes the CPU, so an event
pair holds the kernels and not their launch. What a call costs the CPU is measured where it is the point (``latency``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from fastattn.cli.check import brief
from fastattn.cli.measure import Timing, percentile

#: Larger than any L2 (H100: 50 MiB, B200: 126 MiB).
_FLUSH_BYTES = 256 << 20
_MIN_ROUNDS, _MAX_ROUNDS = 5, 100


class Stopwatch(Protocol):
    """What timing needs of a device; a test has one that counts."""

    def prepare(self, cold: bool) -> None: ...

    def time(self, function: Callable[[], object]) -> Callable[[], float]:
        """Start the call; the result, asked after ``finish``, is its seconds."""

    def finish(self) -> None: ...


class Events:
    """A CUDA (or HIP) device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def prepare(self, cold: bool) -> None:
        # Also where the cache may stay warm: the GPU is busy while the CPU launches. Then a part is cleared that L2 has room for.
        (self.buffer if cold else self.buffer[: 8 << 20]).zero_()

    def time(self, function: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def interleave(
    contenders: Mapping[str, Callable[[], object]], budget: float, watch: Stopwatch, cold: bool
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings, reasons of those that broke): every contender as often as the others, for about ``budget`` seconds in all.

    The first two calls of each (compilation, allocation) count for nothing. A contender that raises is left out from then on.
    """
    errors: dict[str, str] = {}
    running: dict[str, Callable[[], object]] = {}
    seconds = 0.0
    for name, function in contenders.items():
        try:
            for _ in range(2):
                first = watch.time(function)
                watch.finish()
            seconds += first()
            running[name] = function
        except (
            Exception
        ) as error:  # a peer that does not take this call, or has no memory for it, is a line in the report
            errors[name] = brief(error)
            _release()
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(budget / max(seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        pending = {}
        for name, function in running.items():
            watch.prepare(cold)
            pending[name] = watch.time(function)
        watch.finish()
        for name, elapsed in pending.items():
            samples[name].append(elapsed())
    return {name: summary(values) for name, values in samples.items()}, errors


def latency(contenders: Mapping[str, Callable[[], object]], watch: Stopwatch, calls: int = 50) -> dict[str, Timing]:
    """Seconds per call of ``calls`` calls back to back, CPU and GPU together: what a small call costs."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2 * _MIN_ROUNDS):
        for name, function in contenders.items():
            function()
            watch.finish()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            watch.finish()
            samples[name].append((time.perf_counter() - start) / calls)
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    return Timing(statistics.median(values), percentile(values, 0.2), percentile(values, 0.8), len(values))


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def roofline(device: torch.device, watch: Stopwatch, budget: float = 1.0) -> dict[str, float]:
    """{"GFLOP/s": the best bfloat16 product of cuBLAS, "GB/s": a copy of 1 GiB, bytes read and written}."""
    best = 0.0
    for size in (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        timings, _ = interleave({"product": lambda a=a, b=b: a @ b}, budget / 3, watch, cold=False)
        best = max(best, 2 * size**3 / timings["product"].median / 1e9)
    x = torch.empty(1 << 30, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    timings, _ = interleave({"copy": lambda: y.copy_(x)}, budget / 2, watch, cold=True)
    return {"GFLOP/s": best, "GB/s": 2 * x.nbytes / timings["copy"].median / 1e9}
