"""How attention's time and memory grow with the sequence: forward, one head of 64, bfloat16, up to 131072 tokens.

Every length runs in a process of its own (``python -m fastattn.cli.scaling N SECONDS``), so that its memory is that call's.
The scores of all rows are too many to check, so SAMPLE of them are, against float64.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import ops
from fastattn.cli import bars, cases, check
from fastattn.cli.cases import Case
from fastattn.cli.measure import interleave
from fastattn.cli.memory import peak_growth
from fastattn.cli.plain import plain_outputs

LENGTHS = tuple(2**power for power in range(10, 18))
DTYPE, HEAD_DIM = "bfloat16", 64
PEER = "sdpa"
SAMPLE = 64
SECONDS = 2.0


def case(length: int) -> Case:
    return Case("attention", (1, 1, length, HEAD_DIM), {})


def accurate(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """(error, bound) of SAMPLE rows of ``out``, by the rule of ``check``."""
    rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLE, q.shape[2])).long()
    some = {"q": q[:, :, rows], "k": k, "v": v}
    exact = plain_outputs(case(q.shape[2]), {name: tensor.double() for name, tensor in some.items()})["out"]
    plain = plain_outputs(case(q.shape[2]), some)["out"]
    error = check.largest(out[:, :, rows].double() - exact)
    return error, check.bound(check.largest(plain.double() - exact), exact, out.dtype, q.shape[2])


def measure(length: int, seconds: float) -> dict[str, Any]:
    """Both contenders at one length: {"verdict", "note", "timings", "memory"}, the latter two by contender."""
    torch.set_num_threads(bars.THREADS)
    generator = torch.Generator().manual_seed(0)
    dtype = cases.DTYPES[DTYPE]
    shape = case(length).shape
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    functions: dict[str, Callable[..., Any]] = {"fastattn": ops.attention, PEER: F.scaled_dot_product_attention}
    for function in functions.values():
        function(*(tensor[:, :, :64] for tensor in (q, k, v)))  # from here on, threads and libraries are there
    calls = {name: functools.partial(function, q, k, v) for name, function in functions.items()}
    memory = {name: peak_growth(call) for name, call in calls.items()}
    error, bound = accurate(calls["fastattn"](), q, k, v)
    if not error <= bound:
        return {"verdict": check.FAILED, "note": f"out: error {error:.1e} > {bound:.1e}"}
    timings = interleave(calls, seconds, torch.device("cpu"))
    return {
        "verdict": check.OK,
        "note": "",
        "timings": {name: vars(t) for name, t in timings.items()},
        "memory": memory,
    }


def in_own_process(length: int, seconds: float) -> dict[str, Any]:
    """``measure`` in a fresh process; RuntimeError with its last words if that breaks."""
    command = [sys.executable, "-m", "fastattn.cli.scaling", str(length), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
