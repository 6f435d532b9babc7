"""Compile named cases for one architecture and print each kernel's resources, one JSON line a kernel.

    python tests/triton/compiled_report.py 90 attention-64 attention-128 norm ffn

Each case calls the launchers themselves on small CPU tensors (``compiling.py`` stands in for the driver): what is compiled
is exactly what they would launch.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compiling

from fastattn.kernels import attention, ffn, norm

_RNG = torch.tensor([20, 5])


def _attention(head_dim: int, dtype: torch.dtype = torch.bfloat16, features: tuple[str, ...] = ()) -> None:
    """Causal, two query heads on one key head: the case with full and edge blocks and the group loop."""
    q = torch.empty(1, 2, 256, head_dim, dtype=dtype)
    k = torch.empty(1, 1, 256, head_dim, dtype=dtype)
    mask = torch.empty(1, 2, 256, 256, dtype=dtype) if "mask" in features else None
    slopes = torch.empty(1, 2) if "alibi" in features else None
    options = (mask, slopes, None, 0.1, -1, 0, 0, 30.0 if "softcap" in features else 0.0)
    dropout = (0.1 if "dropout" in features else 0.0, _RNG)
    out, lse, _ = attention.attention_forward(q, k, k, *options, *dropout)
    wanted = ("mask" in features, "alibi" in features, False)
    attention.attention_backward(out, None, q, k, k, out, lse, *options, *dropout, *wanted)


def _norm() -> None:
    """Layer norm with everything at a register-resident and at a looped length."""
    for columns in (4096, 32768):
        x = torch.empty(64, columns, dtype=torch.bfloat16)
        weight = torch.empty(columns, dtype=torch.bfloat16)
        y, h, mean, rstd = norm.norm_forward(x, x, weight, weight, 1e-5, False, 0.1, _RNG)
        norm.norm_backward(y, y, h, weight, mean, rstd, False, 0.1, _RNG, True, True)


def _ffn() -> None:
    """Plain GELU and SwiGLU with biases and dropout."""
    x, w, b = torch.zeros(256, 256, dtype=torch.bfloat16), torch.zeros(256, 256, dtype=torch.bfloat16), torch.zeros(256)
    b = b.bfloat16()
    for gate, activation in ((None, 1), (w, 3)):
        b_gate = None if gate is None else b
        out, pre, gated = ffn.ffn_forward(x, w, b, gate, b_gate, w, b, None, activation, 0.1, _RNG, True)
        ffn.ffn_backward(out, x, w, gate, w, pre, gated, activation, 0.1, _RNG, True, True, True)


CASES: dict[str, Callable[[], None]] = {
    "attention-64": lambda: _attention(64),
    "attention-128": lambda: _attention(128),
    "attention-256": lambda: _attention(256),
    "attention-64-everything": lambda: _attention(64, features=("mask", "dropout", "softcap", "alibi")),
    "attention-128-everything": lambda: _attention(128, features=("mask", "dropout", "softcap", "alibi")),
    "attention-float32": lambda: _attention(64, torch.float32),
    "norm": _norm,
    "ffn": _ffn,
}


def main(arch: int | str, cases: list[str]) -> None:
    for case in cases:
        for binary in compiling.compiled(arch, CASES[case]):
            row = {
                "case": case,
                "arch": arch,
                **dataclasses.asdict(binary),
                "shared_limit": compiling.SHARED_LIMIT[arch],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1], sys.argv[2:])
