"""Compile what a launcher launches, for a GPU that is not there.

``compiled(arch, call)`` runs ``call()`` (a launcher on CPU tensors) with a stand-in for the driver: every launch goes
through Triton's own argument specialization and the shipped configuration for ``arch``, is compiled to a binary and not run. The
result is read with the tools of the Triton wheel. Needs TRITON_INTERPRET unset and its own process (the interpreter cannot be
switched off in one).
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastattn.kernels import configs

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: Largest shared memory of one program in bytes (CUDA programming guide, compute capabilities; LDS of CDNA 3).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}


class _Driver:
    """The three questions that a launch asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: per-thread ``registers`` and ``stack`` bytes (local memory: spills), ``shared`` bytes per program."""

    name: str
    registers: int
    stack: int
    shared: int
    num_warps: int
    instructions: dict[str, int]


def target_of(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def compiled(arch: int | str, call: Callable[[], object]) -> list[Binary]:
    """The binaries of every kernel that ``call`` launches, in order, for CUDA compute capability ``arch`` (80, 90, ...) or
    gfx name."""
    target = target_of(arch)
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel.result() if hasattr(kernel, "result") else kernel)

    described = configs.Arch("hip") if isinstance(arch, str) else configs.Arch("cuda", arch)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(configs, "arch_of", lambda tensor: described),
    ):
        triton.runtime.driver.set_active(_Driver(target))
        call()
    return [_amd(kernel) if isinstance(arch, str) else _nvidia(kernel) for kernel in kernels]


def _nvidia(kernel) -> Binary:  # type: ignore[no-untyped-def]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()  # type: ignore[union-attr]
    names = ("HMMA", "HGMMA", "UTCHMMA", "LDL", "STL")
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in names}
    return Binary(
        kernel.metadata.name, int(registers), int(stack), kernel.metadata.shared, kernel.metadata.num_warps, counts
    )


def _amd(kernel) -> Binary:  # type: ignore[no-untyped-def]
    text = kernel.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    counts = {"MFMA": text.count("v_mfma")}
    return Binary(
        kernel.metadata.name, registers, 4 * spilled, kernel.metadata.shared, kernel.metadata.num_warps, counts
    )
