"""What a call holds besides its results: nothing of Nq times Nk in attention, a part of the logits in the loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastattn._native", reason="the C++ core is not built")

ROOT = Path(__file__).resolve().parent.parent

# The peak of the process grows by less than an eighth of one N x N matrix of bytes: scores in any dtype would not fit.
MEASURED = """
import resource, torch, fastattn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def call(rows, dtype, options):
    q, k, v = (torch.randn(1, 1, rows, 8).to(dtype).requires_grad_() for _ in range(3))
    made = {name: make(rows) for name, make in options.items()}
    out = fastattn.attention(q, k, v, implementation="cpu", **made)
    wanted = [q, k, v, *(x for x in made.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    torch.autograd.grad(out.float().sum(), wanted)

FEATURES = {
    "key mask with gradient": {"attn_mask": lambda n: torch.randn(1, 1, 1, n, requires_grad=True)},
    "row mask with gradient": {"attn_mask": lambda n: torch.randn(1, 1, n, 1, requires_grad=True)},
    "expanded boolean mask": {"attn_mask": lambda n: (torch.rand(1, 1, 1, n) < 0.9).expand(1, 1, n, n)},
    "dropout": {"dropout_p": lambda n: 0.1},
    "softcap, slopes, sinks": {
        "softcap": lambda n: 5.0,
        "alibi_slopes": lambda n: torch.rand(1, requires_grad=True),
        "sinks": lambda n: torch.rand(1, requires_grad=True),
    },
}
N = 12299
for dtype in (torch.float32, torch.bfloat16):
    for name, options in FEATURES.items():
        call(131, dtype, options)
        before = peak()
        call(N, dtype, options)
        grown = peak() - before
        assert grown < N * N / 8, f"{name} in {dtype}: {grown / 2**20:.1f} MiB"
"""

# Beside the gradients less than a third of the logits: torch's own backward holds them three times.
LOSS = """
import resource, sys, torch, fastattn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def grown(tokens, width, classes, dtype):
    x, w = (torch.empty(n, width, dtype=dtype).uniform_(-0.1, 0.1).requires_grad_() for n in (tokens, classes))
    target = torch.randint(0, classes, (tokens,))
    before = peak()
    fastattn.linear_cross_entropy(x, w, target, implementation="cpu").backward()
    return peak() - before - (x.numel() + w.numel()) * x.element_size()

dtype = getattr(torch, sys.argv[1])
grown(64, 32, 1000, dtype)
T, V = 2048, 30011
used = grown(T, 256, V, dtype) / (T * V * dtype.itemsize)
assert used < 0.33, f"{used:.3f} of the logits"
"""


def _run(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", *arguments], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr


def test_peak_memory_does_not_grow_with_the_square() -> None:
    _run(MEASURED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_never_holds_its_logits(dtype: str) -> None:
    _run(LOSS, dtype)
