"""How much memory one call takes, ours or a peer's, in a process of its own (``python -m fastattn.cli.memory``).

Elsewhere it would be measured wrong: what earlier calls have freed serves the next one, or lies between what is still in use.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastattn.cli import cases
from fastattn.cli.cases import Case
from fastattn.cli.peers import peers

OURS = "fastattn"


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which ``call`` raises this process's resident memory at its highest, its result included (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what others have freed must not serve this call
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = _status("VmRSS")
    result = call()
    grown = _status("VmHWM") - before
    del result
    return max(0, grown)


def _status(name: str) -> int:
    """A size of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def of_training_step(case: Case, dtype_name: str, contender: str, threads: int) -> tuple[int, int]:
    """(bytes of the peak, bytes of the results) of one forward and backward call; the results, which every contender must
    leave in memory, are the gradients. ``contender``: "fastattn" or a peer's name. RuntimeError if the process breaks."""
    described = json.dumps([case.op, case.shape, case.options])
    command = [sys.executable, "-m", "fastattn.cli.memory", described, dtype_name, contender, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    peak, results = json.loads(done.stdout)
    return peak, results


def _measured(case: Case, dtype_name: str, contender: str) -> tuple[int, int]:
    tensors = cases.make_tensors(case, cases.DTYPES[dtype_name], torch.device("cpu"))
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    if contender == OURS:
        call = cases.prepare(case, tensors, "auto")
    else:
        (call,) = peers(case, tensors, [contender]).values()

    def step() -> object:
        outputs = list(call().values())
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])

    if contender == "compile":
        step()  # what compiling takes is not the call's
    return peak_growth(step), sum(leaf.nbytes for leaf in leaves)


if __name__ == "__main__":
    (_op, _shape, _options), _dtype, _contender = json.loads(sys.argv[1]), *sys.argv[2:4]
    torch.set_num_threads(int(sys.argv[4]))
    _small = Case(_op, tuple(min(size, 64) for size in _shape), _options)
    _measured(_small, _dtype, _contender)  # from here on, threads and libraries are there
    print(json.dumps(_measured(dataclasses.replace(_small, shape=tuple(_shape)), _dtype, _contender)))
