"""Compile csrc/cuda for GPUs that are not there, and read what the compiler made of every kernel.

    python tests/cuda/compiled.py                           every file, for every architecture that it is for by default
    python tests/cuda/compiled.py norm 'attention_sm90*'    some files
    python tests/cuda/compiled.py --archs 86,89,120         others
    python tests/cuda/compiled.py --page                    and write the CUDA part of docs/kernels.md
    python tests/cuda/compiled.py --page --rows FILE...     the same from rows that were printed before

One JSON line a kernel: what ``Binary`` holds, and under ``wrong`` what it must not do (``faults``). The command is that of
setup.py, ending at machine code; the disassembler is the one in Triton's wheel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"
#: The page's part from here on is this file's; what is above is tests/triton/kernel_table.py's.
TITLE = "# What nvcc makes of the CUDA kernels\n"
#: Most shared memory of a block, static and dynamic (CUDA programming guide, technical specifications per compute capability).
SHARED = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90a": 227 << 10, "100": 227 << 10, "120": 99 << 10}
#: What is counted in the machine code: products by warps and by warpgroups, bulk copies by the tensor memory accelerator into and
#: out of shared memory, its additions to global memory, registers handed over between warpgroups, asynchronous copies, loads of
#: matrices, local memory.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTMALDG", "UTMASTG", "UBLKRED", "USETMAXREG", "LDGSTS", "LDSM", "LDL", "STL")
#: Kernels beside the main loop: they multiply nothing.
AUXILIARY = re.compile(r"delta|convert|merge|combine|reduce|_sum_|zero|fill|norm_|prepare|dropout|elementwise")


@dataclass
class Binary:
    """One kernel of ``file`` for ``arch``: registers a thread; bytes of stack, spilled stores and loads; shared bytes of a block,
    static and dynamic (None: the kernel takes some and does not say how much); instructions of its machine code; why ptxas
    waits after every wgmma of it, if it does."""

    file: str
    arch: str
    kernel: str
    registers: int = 0
    stack: int = 0
    spills: tuple[int, int] = (0, 0)
    static_shared: int = 0
    dynamic_shared: int | None = 0
    serialized: str = ""
    instructions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INSTRUCTIONS, 0))


def faults(binary: Binary) -> Iterator[str]:
    counts = binary.instructions
    if any(binary.spills) or counts["LDL"] or counts["STL"]:
        yield (
            f"spills: {binary.spills[0]} bytes stored, {binary.spills[1]} loaded; "
            f"{counts['STL']} stores and {counts['LDL']} loads of local memory"
        )
    elif binary.stack:
        yield f"keeps {binary.stack} bytes in local memory"
    if binary.dynamic_shared is None:
        yield "does not say how much dynamic shared memory it takes (note_dynamic_shared)"
    elif (total := binary.static_shared + binary.dynamic_shared) > SHARED[binary.arch]:
        yield f"takes {total} bytes of shared memory, the limit is {SHARED[binary.arch]}"
    if AUXILIARY.search(binary.kernel):
        return
    if "_sm90" in binary.file:
        additions = ("UBLKRED",) if "_sums" in binary.file else ()
        for wanted in ("HGMMA", "UTMALDG", "USETMAXREG", *additions):
            if not counts[wanted]:
                yield f"has no {wanted}: {counts}"
        if counts["HMMA"]:
            yield f"multiplies with mma.sync beside wgmma: {counts}"
        if binary.serialized:
            yield f"waits after every wgmma: {binary.serialized}"
    elif "_sm80" in binary.file:
        for wanted in ("HMMA", "LDGSTS", "LDSM"):
            if not counts[wanted]:
                yield f"has no {wanted}: {counts}"


def nvcc() -> str | None:
    found: str | None = _rules()["find_nvcc"]()
    return found


@functools.cache
def disassembler() -> Path | None:
    """nvdisasm of Triton's wheel, looked up without importing Triton."""
    if (own := shutil.which("nvdisasm")) is not None:
        return Path(own)
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


@functools.cache
def _rules() -> dict[str, Any]:
    """What setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def sources(archs: Sequence[str], wanted: Sequence[str] = ()) -> list[tuple[Path, str]]:
    """(file, architecture) of everything that is compiled for ``archs``; ``wanted``: patterns of file stems."""
    with mock.patch.dict(os.environ, FASTATTN_CUDA_ARCHS=";".join(archs)):
        found = _rules()["cuda_sources"](_rules()["cuda_architectures"]())
    return [
        (source, arch)
        for source, own in found.items()
        for arch in own
        if not wanted or any(fnmatch.fnmatch(source.stem, pattern) for pattern in wanted)
    ]


def compiled(source: Path, arch: str, *options: str) -> list[Binary]:
    """Every kernel of ``source`` for ``arch``. RuntimeError with the compiler's words where it does not compile."""
    import torch

    compiler = nvcc()
    assert compiler is not None
    cxx = os.environ.get("CXX") or shutil.which("g++") or "c++"
    flags = " ".join(_rules()["cuda_flags"](cxx, Path(torch.__file__).parent, sorted({arch, "90a"})))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        command = [*shlex.split(compiler), *shlex.split(flags), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas", "-v", "--keep", "--keep-dir", folder, *options, "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        binaries = _resources(source.name, arch, done.stdout + done.stderr)
        for ptx in Path(folder).glob("*.ptx"):
            _note_dynamic_shared(binaries, ptx.read_text())
        _count_instructions(binaries, cubin)
    return list(_demangled(binaries).values())


def _resources(file: str, arch: str, log: str) -> dict[str, Binary]:
    """{mangled name: binary} of what ``ptxas -v`` printed. A function that was not inlined counts for the kernel above it."""
    found: dict[str, Binary] = {}
    current = Binary(file, arch, "")
    serialized: dict[str, str] = {}
    for line in log.splitlines():
        if match := re.search(
            r"wgmma\.mma_async instructions are serialized due to (.*?) in (?:the )?function '(\S+)'", line
        ):
            serialized[match[2]] = match[1]
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            current = found[match[1]] = Binary(file, arch, match[1])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = (int(number) for number in match.groups())
            current.stack += stack
            current.spills = current.spills[0] + stores, current.spills[1] + loads
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current.static_shared = int(shared[1])
    for name, reason in serialized.items():
        if name in found:
            found[name].serialized = reason
    return found


def _note_dynamic_shared(binaries: dict[str, Binary], ptx: str) -> None:
    """From the comment that note_dynamic_shared (csrc/cuda/common.cuh) leaves in the kernel's PTX."""
    dynamic = re.findall(r"\.extern \.shared .*?(\w+)\[\]", ptx)
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, flags=re.DOTALL):
        note = re.search(r"dynamic shared memory: (\d+) bytes", body)
        takes = any(re.search(rf"\b{array}\b", body) for array in dynamic)
        if name in binaries:
            binaries[name].dynamic_shared = int(note[1]) if note else None if takes else 0


def _count_instructions(binaries: dict[str, Binary], cubin: Path) -> None:
    tool = disassembler()
    assert tool is not None
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for text in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]:
        name = re.match(r"[\w$]+", text)
        if name and name[0] in binaries:
            words = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(\w+)", text, flags=re.MULTILINE)
            binaries[name[0]].instructions = {kind: words.count(kind) for kind in INSTRUCTIONS}


def _demangled(binaries: dict[str, Binary]) -> dict[str, Binary]:
    """With names as in the source: ``norm_forward_kernel<BFloat16, Group<32, 4>>``."""
    names = subprocess.run(["c++filt"], input="\n".join(binaries), capture_output=True, text=True, check=True).stdout
    for binary, name in zip(binaries.values(), names.splitlines(), strict=True):
        short = re.sub(r"fastattn::|cuda::|\(anonymous namespace\)::", "", name.removeprefix("void "))
        short = re.sub(r"\([\w ]+\)(?=-?\d)", "", short)  # template arguments with their type: (int)128
        binary.kernel = short[: _end_of_name(short)].replace("> >", ">>")
    return binaries


def _end_of_name(text: str) -> int:
    """Where the arguments of a function begin: the first parenthesis outside template arguments."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return place
    return len(text)


def everything(archs: Sequence[str], wanted: Sequence[str], processes: int) -> Iterator[Binary]:
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for found in pool.map(lambda job: compiled(*job), sources(archs, wanted)):
            yield from found


def read_rows(files: Sequence[Path]) -> Iterator[Binary]:
    """What ``main`` printed; of a kernel that is there twice the later one, in the place of the earlier."""
    found: dict[tuple[str, str, str], Binary] = {}
    for line in (line for path in files for line in path.read_text().splitlines()):
        row = json.loads(line)
        row.pop("wrong")
        binary = Binary(**row | {"spills": tuple(row["spills"])})
        found[binary.file, binary.arch, binary.kernel] = binary
    yield from found.values()


_HEAD = """
Made by `python tests/cuda/compiled.py --page` with {version}, without a GPU: nothing here has been timed, and a kernel that
compiles well has not run. A cell reads

    registers a thread | shared memory of a block in KiB | tensor-core instructions [TMA loads]

No kernel spills: `tests/cuda/test_compiled.py` fails where one does, where shared memory does not suffice, where a kernel of
`*_sm90*.cu` has no wgmma (HGMMA), no TMA load (UTMALDG) or no setmaxnreg (USETMAXREG), or multiplies with mma.sync (HMMA),
where one of `*_sums.cu` adds nothing to memory by TMA (UBLKRED), and where one of `*_sm80*.cu` has no mma.sync, cp.async or
ldmatrix. Kernels that only add up, convert or merge need none.
"""


def page(binaries: Iterable[Binary], version: str) -> str:
    """The CUDA part of docs/kernels.md: a table per file, a line per kernel, a column per architecture."""
    files: dict[str, dict[str, dict[str, str]]] = {}
    for binary in binaries:
        files.setdefault(binary.file, {}).setdefault(binary.kernel, {})[binary.arch] = _cell(binary)
    parts = [TITLE, _HEAD.format(version=version)]
    for file, kernels in sorted(files.items()):
        archs = sorted({arch for cells in kernels.values() for arch in cells}, key=lambda arch: int(arch.rstrip("a")))
        parts.append(f"\n## csrc/cuda/{file}\n\n| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} |\n")
        parts.append("| --- " * (1 + len(archs)) + "|\n")
        for kernel, cells in sorted(kernels.items()):
            parts.append(f"| `{kernel}` | {' | '.join(cells.get(arch, '') for arch in archs)} |\n")
    return "".join(parts)


def _cell(binary: Binary) -> str:
    counts = binary.instructions
    cores = [f"{counts[name]} {name}" for name in ("HMMA", "HGMMA") if counts[name]]
    cores += [f"{counts['UTMALDG']} TMA"] if counts["UTMALDG"] else []
    shared = (binary.static_shared + (binary.dynamic_shared or 0)) / 1024
    return ", ".join([str(binary.registers), f"{shared:.3g}", " ".join(cores) or "-"])


def write_page(text: str) -> None:
    above = PAGE.read_text().partition(TITLE)[0].rstrip("\n")
    PAGE.write_text(f"{above}\n\n{text}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*", help="stems or patterns of csrc/cuda/*.cu; default: all")
    parser.add_argument("--archs", default="80,90a")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--page", action="store_true", help="write the CUDA part of docs/kernels.md; with all files")
    parser.add_argument("--rows", nargs="+", type=Path, help="instead of compiling")
    args = parser.parse_args(argv)
    if args.page and args.file:
        parser.error("--page is for all files")
    rows = read_rows(args.rows) if args.rows else everything(args.archs.split(","), args.file, args.processes)
    binaries, wrong = [], 0
    for binary in rows:
        found = list(faults(binary))
        wrong += len(found)
        print(json.dumps({**dataclasses.asdict(binary), "wrong": found}), flush=True)
        binaries.append(binary)
    if args.page:
        version = subprocess.run([*shlex.split(nvcc() or ""), "--version"], capture_output=True, text=True).stdout
        number = re.search(r"release ([\d.]+)", version)
        write_page(page(binaries, f"nvcc {number[1] if number else ''}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
