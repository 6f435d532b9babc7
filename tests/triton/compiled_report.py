"""Compile the cases of ``families.py`` for one architecture and print each kernel's resources, one JSON line a kernel.

    python tests/triton/compiled_report.py sm_90                         every family
    python tests/triton/compiled_report.py gfx942 attention norm         some
    python tests/triton/compiled_report.py sm_90 attention --part 1/4    a quarter of the cases
    python tests/triton/compiled_report.py sm_90 attention --only head_dim=128 dtype=bfloat16
    python tests/triton/compiled_report.py sm_80,sm_90 --launches        what would be compiled, in seconds

The cases call the public operations on small CPU tensors (``compiling.py`` stands in for the driver): what is compiled is
exactly what they would launch. ``wrong`` lists what the kernel must not do (see ``faults``).
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compiling
import families
from compiling import Binary

from fastattn.kernels import choice
from fastattn.kernels.choice import Arch

#: Rows of the smallest tile that wgmma (one warpgroup) and tcgen05 multiply; below it Triton takes mma.sync.
_WIDE_ROWS = 64


def tensor_core(arch: Arch, rows: int) -> str:
    """The instruction that products of ``rows`` rows run on."""
    if arch.kind == "hip":
        return "MFMA"
    generation = arch.number // 10
    if rows < _WIDE_ROWS or generation not in (9, 10):
        return "HMMA"
    return {9: "HGMMA", 10: "UTCHMMA"}[generation]


def faults(arch: Arch, binary: Binary) -> Iterator[str]:
    """What is wrong with a binary: spills, too much shared memory, products beside the tensor cores' best instruction."""
    counts = binary.instructions
    if binary.error:
        yield f"does not compile: {binary.error[:300]}"
    if binary.stack or counts.get("LDL") or counts.get("STL"):
        yield f"spills: {binary.stack} bytes a thread, {counts.get('LDL', 0)} loads, {counts.get('STL', 0)} stores"
    if binary.shared > arch.shared:
        yield f"takes {binary.shared} bytes of shared memory, the limit is {arch.shared}"
    if rows := binary.products.rows:
        wanted = tensor_core(arch, rows)
        if not counts.get(wanted):
            yield f"has no {wanted}: {counts}"
        if wanted == "HGMMA" and counts["HMMA"]:
            yield f"multiplies with mma.sync beside wgmma: {counts}"
    if binary.products.tma and arch.kind == "cuda" and arch.number >= 90 and not counts["UTMALDG"]:
        yield f"loads descriptors without TMA: {counts}"


def selected(wanted: list[str], only: list[str], part: str) -> list[families.Case]:
    """The cases of the families ``wanted`` with all of ``only`` ("key=value") in their point; ``part`` "i/n" of them."""
    index, count = (int(number) for number in part.split("/"))
    needed = {text.partition("=")[0]: text for text in only}
    found = [
        case
        for case in families.cases(wanted)
        if all(f"{key}={value}" == needed.get(key, f"{key}={value}") for key, value in case.point.items())
    ]
    return found[index - 1 :: count]


def compiled_rows(arch: Arch, case: families.Case) -> Iterator[dict[str, Any]]:
    for binary in compiling.compiled(arch, case.call):
        row = dataclasses.asdict(binary)
        yield {**row.pop("launch"), **row, "wrong": list(faults(arch, binary))}


def launched_rows(arch: Arch, case: families.Case) -> Iterator[dict[str, Any]]:
    """Each kernel once, and in a row of its own the points of choices that were asked for: ``asked``."""
    with choice.asking() as asked:
        launches = compiling.launched(arch, case.call)
    for launch in {str(launch): launch for launch in launches}.values():
        yield dataclasses.asdict(launch)
    yield {"asked": [(chosen.name, chosen.described(point)) for chosen, point, _ in dict.fromkeys(asked)]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", help="sm_80, sm_90, gfx942, ...; several with commas")
    parser.add_argument("family", nargs="*", help=f"of {', '.join(families.names())}")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--launches", action="store_true", help="what is launched, without compiling it")
    args = parser.parse_args(argv)
    rows = launched_rows if args.launches else compiled_rows
    for arch in map(Arch.of, args.arch.split(",")):
        for case in selected(args.family, args.only, args.part):
            start = {"arch": arch.name, "case": case.name, "family": case.family, "point": case.point}
            for row in rows(arch, case):
                print(json.dumps({**start, **row}), flush=True)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # tearing Triton's compiler down after many kernels can end in a segmentation fault
