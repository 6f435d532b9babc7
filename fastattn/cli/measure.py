"""Timing: interleaved runs of several contenders in one process, and the machine's own limits measured the same way.

Interleaving (a, b, c, a, b, c, …) makes what comes and goes on a machine (clock, temperature, a neighbour's load) hit
all contenders alike; medians and the 20th and 80th percentiles leave out what hits one run.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: A sample is at least this long (s): shorter calls are repeated within it, so that the clock's own cost stays below 1
#: %.
SAMPLE_SECONDS = 2e-4
#: Every contender is timed at least this often, unless one call alone outlasts the budget.
MIN_SAMPLES = 5


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    samples: int


def percentile(values: list[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def timed(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call of ``calls`` consecutive calls, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _drain(device)
    return (time.perf_counter() - start) / calls


def keep_freed_memory() -> None:
    """From now on memory that a call frees serves the next one (glibc); else every large result is fresh pages from the system.

    What the system then takes to map and clear them is a good part of a training step, and depends on who freed what before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    contenders: Mapping[str, Callable[[], object]], budget: float, device: torch.device
) -> dict[str, Timing]:
    """Time every contender for about ``budget`` seconds in all, in turns.

    The next to run is always the one that is least far with its part: an equal share of the budget, and MIN_SAMPLES samples
    where one call takes long. So everyone's samples spread over the same stretch of time. The first call of each counts for
    nothing, except where it alone outlasts the whole budget: then it is the only sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    calls = dict.fromkeys(contenders, 1)
    running = []
    for name, function in contenders.items():
        first = timed(function, device)
        if first > budget:
            samples[name].append(first)
        else:
            calls[name] = max(1, math.ceil(SAMPLE_SECONDS / timed(function, device)))
            running.append(name)

    def progress(name: str) -> float:
        return min(len(samples[name]) / MIN_SAMPLES, spent[name] * len(contenders) / budget)

    while running:
        name = min(running, key=progress)
        samples[name].append(timed(contenders[name], device, calls[name]))
        spent[name] += samples[name][-1] * calls[name]
        if progress(name) >= 1:
            running.remove(name)
    return {
        name: Timing(statistics.median(values), percentile(values, 0.2), percentile(values, 0.8), len(values))
        for name, values in samples.items()
    }


class MatrixPeak:
    """The matrix unit's measured limit in FLOP/s per dtype: the best square product of this process."""

    SIZES = (512, 1024, 2048)
    #: A product that takes longer (s) is not run again, and no larger one: 16-bit products without instructions for them.
    SLOW = 0.2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[torch.dtype, float] = {}

    def __call__(self, dtype: torch.dtype) -> float:
        if dtype.itemsize == 2 and self.device.type == "cpu":
            # Whoever has no (or no fast) instruction for 16-bit products converts to float32. x86 without AMX-FP16 has
            # none for float16.
            wide = self._best(torch.float32)
            return wide if dtype == torch.float16 else max(wide, self._best(dtype))
        return self._best(dtype)

    def _best(self, dtype: torch.dtype) -> float:
        if dtype not in self.found:
            self.found[dtype] = 0.0
            for size in self.SIZES:
                seconds = self._seconds(size, dtype)
                # One multiplication and one addition per term.
                self.found[dtype] = max(self.found[dtype], 2 * size**3 / seconds)
                if seconds > self.SLOW:
                    break
        return self.found[dtype]

    def _seconds(self, size: int, dtype: torch.dtype) -> float:
        """The fastest of 8 products of ``size``."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        products = [lambda: a @ b]
        if dtype == torch.float32 and self.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # torch's float32 product is MKL's, which uses no AVX-512 on AMD; oneDNN's does.
            packed = (a.to_mkldnn(), b.to_mkldnn())
            products.append(lambda: torch.nn.functional.linear(*packed))
        best = math.inf
        for product in products:
            for _ in range(8):
                best = min(best, timed(product, self.device))
                if best > self.SLOW:
                    break
        return best


class ReadPeak:
    """The measured rate in bytes/s at which all threads together read memory: the best of torch's reductions over 1 GiB."""

    BYTES = 1 << 30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found = 0.0

    def __call__(self) -> float:
        if not self.found:
            x = torch.ones(self.BYTES // 4, device=self.device)
            wide = x.view(torch.int64)
            half = x.numel() // 2
            reads = (x.sum, wide.sum, lambda: torch.dot(x[:half], x[half:]))
            self.found = self.BYTES / min(timed(read, self.device) for read in reads for _ in range(5))
        return self.found
