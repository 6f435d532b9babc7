"""Compile what a launcher launches, for a GPU that is not there.

``compiled(arch, call)`` runs ``call()`` (public operations on CPU tensors) with a stand-in for the driver: every launch
goes through Triton's own argument specialization and the shipped configuration for ``arch``, is compiled to a binary and not run.
The result is read with the tools of the Triton wheel. ``launched`` says what would be compiled without compiling. Both need
TRITON_INTERPRET unset and their own process (the interpreter cannot be switched off in one).
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastattn.kernels import configs
from fastattn.kernels.choice import Arch
from fastattn.ops import _library

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Multiply-accumulate instructions of the tensor cores, loads by the tensor memory accelerator, local memory (spills).
_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDL", "STL")
#: Compile-time arguments that are part of a configuration.
_TILE = re.compile(r"BLOCK|ROWS|COLUMNS|TOKENS|HEADS|SPLITS|STAGES|CHUNK")


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
class Launch:
    """A kernel with the configuration it is launched with: ``tile`` holds the compile-time sizes. None: Triton's default."""

    name: str
    tile: dict[str, int]
    num_warps: int | None
    num_stages: int | None


@dataclass(frozen=True)
class Products:
    """What a kernel multiplies on tensor cores, by its intermediate code: ``rows`` of the smallest product, 0 if there is none."""

    rows: int
    tma: bool


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: per-thread ``registers`` and ``stack`` bytes (local memory: spills), ``shared`` bytes per program.

    With ``error`` it did not compile and the rest is 0."""

    launch: Launch
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    products: Products
    error: str = ""


def target_of(arch: Arch) -> GPUTarget:
    return GPUTarget("hip", arch.name, 64) if arch.kind == "hip" else GPUTarget("cuda", arch.number, 32)


#: What was compiled and read in this process: the compiled kernel, which stays alive so that its identity does, and its binary.
_known: dict[int, tuple[Any, Binary]] = {}
_known_arch: Arch | None = None


def compiled(arch: Arch, call: Callable[[], object]) -> list[Binary]:
    """The binaries of the kernels that ``call`` launches, in order, each once; nothing is compiled a second time."""
    global _known_arch
    binaries: dict[object, Binary] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(self, kwargs)
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
        except Exception as error:  # the compiler raises many kinds; the next kernel may be compiled all the same
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            binaries[str(launch)] = Binary(launch, 0, 0, 0, {}, Products(0, False), f"{type(error).__name__}: {error}")
            return
        if id(kernel) not in _known:
            _known[id(kernel)] = (kernel, (_amd if arch.kind == "hip" else _nvidia)(kernel, launch))
        binaries[id(kernel)] = dataclasses.replace(_known[id(kernel)][1], launch=launch)

    with _instead_of_launching(arch, compile_only):
        if arch != _known_arch:
            for function in _kernels():
                function.device_caches.clear()
            _known_arch = arch
        call()
    return list(binaries.values())


def launched(arch: Arch, call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would launch on ``arch``, in order, without compiling it."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(self, kwargs))

    with _instead_of_launching(arch, note):
        call()
    return launches


@contextmanager
def _instead_of_launching(arch: Arch, run: Callable[..., None]) -> Iterator[None]:
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "arch_of", lambda tensor: arch),
        mock.patch.object(_library, "triton_interprets", True),  # CPU tensors are taken
    ):
        triton.runtime.driver.set_active(_Driver(target_of(arch)))
        yield


def _kernels() -> list[JITFunction]:
    """Every kernel of the modules that are loaded."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastattn.kernels.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


def _launch(function: JITFunction, arguments: dict[str, Any]) -> Launch:
    tile: dict[str, int] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value) and name.isupper():
            fields = dataclasses.asdict(value)  # type: ignore[call-overload]
            tile |= {key: size for key, size in fields.items() if _TILE.match(key.upper())}
        elif _TILE.match(name) and isinstance(value, int):
            tile[name] = value
    return Launch(function.fn.__name__, tile, arguments.get("num_warps"), arguments.get("num_stages"))


def _products(kernel: Any) -> Products:
    """From the kernel's intermediate code; products of float32 operands without TF32 run on no tensor core."""
    rows = []
    for line in re.findall(r"tt\.dot [^\n]*", kernel.asm.get("ttir", "")):
        left, *_, result = re.findall(r"tensor<([^>]*)>", line)
        if not left.endswith("xf32") or "inputPrecision = tf32" in line:
            rows.append(int(result.split("x")[-3]))
    text = kernel.asm.get("ttgir", "")
    if not rows and re.search(r"warp_group_dot|tc_gen5_mma", text):
        rows.append(64)
    tma = "descriptor_load" in kernel.asm.get("ttir", "") or "async_tma_copy_global" in text
    return Products(min(rows, default=0), tma)


def _nvidia(kernel: Any, launch: Launch) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()  # type: ignore[union-attr]
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in _INSTRUCTIONS}
    return Binary(launch, int(registers), int(stack), kernel.metadata.shared, counts, _products(kernel))


def _amd(kernel: Any, launch: Launch) -> Binary:
    text = kernel.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    counts = {"MFMA": text.count("v_mfma")}
    return Binary(launch, registers, 4 * spilled, kernel.metadata.shared, counts, _products(kernel))
