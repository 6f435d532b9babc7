"""Which implementation runs a call: the ladder, asking by name, and explaining the choice."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops import _library, _proven

IMPLEMENTATIONS = ("cuda", "triton", "cpu", "reference")

#: (operation, implementation, architecture) that committed results show correct and not slower than the rung below.
#: `auto` takes a GPU implementation only from here; asking by name always works.
PROVEN_ON_GPU = _proven.load()

#: What ``auto`` means: ``FASTATTN_IMPLEMENTATION`` as it was at import (a look into the environment takes 1 µs a call).
_auto = os.environ.get("FASTATTN_IMPLEMENTATION", "auto")

#: A rung's answer for a call: None if it computes it, else the reason why not.
WhyNot = Callable[[], str | None]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``rungs``: (implementation, None if it could run the call, else the reason why not)."""

    op: str
    implementation: str
    rungs: tuple[tuple[str, str | None], ...]
    isa: str | None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation}" + (f" ({self.isa})" if self.implementation == "cpu" else "")]
        for name, reason in self.rungs:
            verdict = "chosen" if name == self.implementation else "could run it"
            lines.append(f"  {name:<10} {verdict if reason is None else 'no: ' + reason}")
        return "\n".join(lines)


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_explaining = False


def cpu_in_short(implementation: str) -> bool:
    """Whether a call on CPU tensors that the C++ kernels take runs on them, with nothing more to ask: `auto` never takes a rung
    above cpu there. Small calls feel every microsecond."""
    return asked(implementation) == "auto" and _library.cpu_is_fast and not _explaining


def explain(function: Callable[..., object], *args: object, **kwargs: object) -> Explanation:
    """Which implementation ``function(*args, **kwargs)`` would run and why; validates the arguments, computes nothing.

    ``function`` is one of fastattn's operations, or anything that calls one: the first operation reached is explained.

    >>> print(fastattn.explain(fastattn.attention, q, k, v, causal=True))
    """
    global _explaining
    _explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as found:
        return found.explanation
    finally:
        _explaining = False
    raise ValueError(f"function: {getattr(function, '__name__', function)!r} reached no fastattn operation")


@contextmanager
def replacing_auto(implementation: str) -> Iterator[None]:
    """Within it ``auto`` means ``implementation``, in this process: for calls that have no such keyword."""
    global _auto
    before, _auto = _auto, implementation
    try:
        yield
    finally:
        _auto = before


def asked(implementation: str) -> str:
    """``implementation``, or what ``auto`` means now."""
    return _auto if implementation == "auto" else implementation


def choose(op: str, implementation: str, device: torch.device, why_not: dict[str, WhyNot]) -> str:
    """The implementation that runs this call.

    ``why_not`` holds the op's own answer per rung; rungs missing from it are not built for the op. ``auto`` takes the first that
    computes the call; a name computes or raises NotImplementedError. ``FASTATTN_IMPLEMENTATION``, read at import, replaces
    ``auto``.
    """
    implementation = asked(implementation)
    if device.type == "cpu" and cpu_in_short(implementation) and "cpu" in why_not and why_not["cpu"]() is None:
        return "cpu"
    if implementation not in ("auto", *IMPLEMENTATIONS):
        allowed = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation: got {implementation!r}, allowed are {allowed}")
    if _explaining:
        raise _Explained(_explanation(op, implementation, device, why_not))
    if implementation != "auto":
        reason = _reason(op, implementation, device, why_not, named=True)
        if reason is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} does not take this call: {reason}")
        return implementation
    for name in IMPLEMENTATIONS:
        if _reason(op, name, device, why_not, named=False) is None:
            return name
    raise AssertionError("the reference takes every valid call")


def _explanation(op: str, implementation: str, device: torch.device, why_not: dict[str, WhyNot]) -> Explanation:
    named = implementation != "auto"
    rungs = tuple(
        (name, _reason(op, name, device, why_not, named and name == implementation)) for name in IMPLEMENTATIONS
    )
    chosen = implementation if named else next(name for name, reason in rungs if reason is None)
    return Explanation(op, chosen, rungs, _library.current_isa())


def _reason(op: str, name: str, device: torch.device, why_not: dict[str, WhyNot], named: bool) -> str | None:
    if name == "reference":
        return None
    if name not in why_not:
        return f"not written for {op}"
    platform = {"cuda": _no_cuda, "triton": _no_triton, "cpu": _no_cpu}[name](device)
    if platform is not None:
        return platform
    reason = why_not[name]()
    if reason is not None or named:
        return reason
    return _not_in_auto(op, name, device)


def _no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    if not _library.has_cuda:
        return _library.load_errors["_cuda"]
    arch = arch_name(device)
    number = arch.removeprefix("sm_")
    return None if number.isdigit() and int(number) >= 80 else f"{arch}: the CUDA kernels are for sm_80 and later"


def _no_triton(device: torch.device) -> str | None:
    if not _library.has_triton:
        return "triton is not installed"
    if device.type == "cuda":
        return _no_triton_on(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu" and _library.triton_interprets:
        return None
    return f"the tensors are on {device.type} and Triton compiles for GPUs (TRITON_INTERPRET=1 runs it on CPU tensors)"


@functools.cache
def _no_triton_on(index: int) -> str | None:
    """Why the tiles of ``kernels/configs.py`` do not fit the GPU with this index: it is asked once."""
    from fastattn.kernels import configs

    arch = configs.arch_of_device(torch.device("cuda", index))
    if arch.kind == "cuda" and arch.number < 80:
        return f"{arch.name}: the Triton kernels are for sm_80 and later"
    facts = torch.cuda.get_device_properties(index)
    available = getattr(facts, "shared_memory_per_block_optin", None) or arch.shared
    if available < arch.shared:
        return f"this {arch.name} gives a program {available} bytes of shared memory, the tiles may take {arch.shared}"
    return None


#: Rows of the largest tile: offsets within a tile are 32-bit, those of the tile itself 64-bit.
_TILE_ROWS = 256


def triton_dtype(dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not take tensors of ``dtype``, or None: the same for every operation."""
    return "float64 (Triton kernels accumulate in float32)" if dtype == torch.float64 else None


def triton_why_not(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels do not take these tensors, or None: what is the same for every operation. The first has the call's
    dtype."""
    for x in tensors:
        if x is not None and x.dim() > 1 and max(x.stride()[-2:]) * _TILE_ROWS >= 1 << 31:
            return f"rows {x.stride(-2)} elements apart (offsets within a tile of {_TILE_ROWS} rows are 32-bit)"
    return None if tensors[0] is None else triton_dtype(tensors[0].dtype)


def cuda_product_why_not(x: Tensor) -> str | None:
    """Why the CUDA products do not take x, or None."""
    if x.dtype.itemsize == 2:
        return None
    return f"{str(x.dtype).removeprefix('torch.')} (the CUDA products are for float16 and bfloat16)"


def _no_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    return None if _library.has_cpu else _library.load_errors["_C"]


def beats_reference(op: str, device: torch.device) -> bool:
    """Whether ``auto`` has anything for ``op`` on this device but plain PyTorch; a single call may still be refused."""
    if device.type == "cpu":
        return _auto != "reference" and _library.cpu_is_fast
    return device.type == "cuda" and any(_not_in_auto(op, name, device) is None for name in ("cuda", "triton"))


def arch_name(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of a GPU."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _not_in_auto(op: str, name: str, device: torch.device) -> str | None:
    if name == "cpu":
        return None if _library.cpu_is_fast else "this CPU has only the scalar kernels, which are for checking"
    if device.type == "cpu":
        return "the interpreter is for checking: ask for it by name"
    arch = arch_name(device)
    if (op, name, arch) in PROVEN_ON_GPU:
        return None
    return f"no committed result shows it correct and not slower on {arch} yet: ask for it by name"
