"""Every Triton kernel's shipped configuration, compiled ahead of time for GPUs that are not here.

Nothing may spill, shared memory must fit the architecture, and matrix products must run on tensor cores: HMMA on sm_80,
HGMMA (wgmma) on sm_90, UTCHMMA (tcgen05) on sm_100. The compiler cannot share a process with the interpreter, nor may it find
binaries of an earlier run: ``compiled_report.py`` runs in a process of its own with an empty cache and prints one line a kernel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_ROOT = Path(__file__).resolve().parents[2]
_TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_PRODUCTS = ("attention_forward", "attention_backward_keys", "attention_backward_queries", "attention_mask", "ffn_")

# (architecture, cases of compiled_report.py): the main shapes everywhere, all on sm_90, for which the tiles were chosen.
_RUNS = [
    pytest.param(80, ("attention-128", "ffn"), id="sm_80"),
    pytest.param(90, ("attention-64", "attention-128", "attention-128-everything", "norm", "ffn"), id="sm_90"),
    pytest.param(100, ("attention-128",), id="sm_100"),
    pytest.param(80, ("attention-64", "norm"), id="sm_80-rest", marks=pytest.mark.slow),
    pytest.param(
        90, ("attention-256", "attention-64-everything", "attention-float32"), id="sm_90-rest", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("arch, cases", _RUNS)
def test_compiled_kernels_fit(arch: int, cases: tuple[str, ...], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compiled_report.py")), str(arch), *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) >= len(cases)
    wrong = []
    for kernel in kernels:
        label = f"{kernel['case']} {kernel['name']}"
        if kernel["stack"]:
            wrong.append(f"{label} spills {kernel['stack']} bytes a thread")
        if kernel["shared"] > kernel["shared_limit"]:
            wrong.append(
                f"{label} takes {kernel['shared']} bytes of shared memory, the limit is {kernel['shared_limit']}"
            )
        wanted = _TENSOR_CORES[arch]
        if kernel["name"].startswith(_PRODUCTS) and "float32" not in kernel["case"]:
            # The dK/dV tile of head_dim 256 has 32 keys, under the 64 rows of a wgmma (see configs.attention_backward_keys).
            wanted = "HMMA" if arch == 90 and label == "attention-256 attention_backward_keys_kernel" else wanted
            if not kernel["instructions"].get(wanted):
                wrong.append(f"{label} has no {wanted}: {kernel['instructions']}")
    assert not wrong, "\n".join(wrong)
