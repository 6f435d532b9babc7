"""Which instruction set each function of a shared object or object file needs, from its disassembly.

A kernel compiled for AVX-512 that runs where there is none ends the process, and the way it gets there is rarely a wrong table: an
inline function of a header instantiated inside a target region is a weak symbol, and the linker keeps one copy for everyone.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

#: Namespaces of csrc/cpu/target_*.cpp and what isa.cpp demands before it calls them, weakest first.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
NAMESPACES = {
    "scalar": "baseline",
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx",
    "amx_emulated": "avx512_bf16",
    "amx_reduced": "amx",
    "amx_emulated_reduced": "avx512_bf16",
}
#: An extension that no level has: flagged wherever it is.
NEVER = "unknown"

_NAMESPACE = re.compile(r"\bfastattn::(" + "|".join(NAMESPACES) + r")::")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_LEGACY_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3"}
# SSE3 that shares its opcode map with SSE2, and bit counting: not in the first x86-64.
_AFTER_BASELINE = re.compile(r"(popcnt|lzcnt|haddp|hsubp|addsubp|lddqu|movddup|movs[hl]dup|fisttp|cmpxchg16b)")
_AMX = re.compile(r"(ldtilecfg|sttilecfg|tile|tdp)")
_BF16_OR_VBMI = re.compile(r"(vdpbf16ps|vcvtne2?ps2bf16|vpermb|vpermi2b|vpermt2b|vpmultishiftqb)\b")
# F, DQ, BW and VL are the level avx512; these are CD, IFMA, VNNI, VBMI2, BITALG, VPOPCNTDQ, VP2INTERSECT, VAES, GFNI, FP16.
_OTHER_AVX512 = re.compile(
    r"(vpconflict|vplzcnt|vpbroadcastm|vpmadd52|vpdp[bw]|vpcompress[bw]|vpexpand[bw]|vpsh[lr]d|vpshufbitqmb|vpopcnt|vp2intersect"
    r"|vaes|vgf2p8|vpclmulqdq)"
)


def function_level(name: str) -> str:
    """What the function of this demangled name may use: the least of the targets it mentions, else the baseline."""
    mentioned = [NAMESPACES[target] for target in _NAMESPACE.findall(name)]
    return min(mentioned, key=LEVELS.index, default="baseline")


def instruction_level(code: list[str], text: str) -> str:
    """The level of one instruction by its bytes (two hex digits each); in 64-bit mode 62 is EVEX, c4 and c5 are VEX."""
    at = 0
    while at < len(code) and code[at] in _LEGACY_PREFIXES:
        at += 1
    if at == len(code):
        return "baseline"
    if code[at] == "62":
        if int(code[at + 1], 16) & 7 in (5, 6) or _OTHER_AVX512.match(text):  # maps 5 and 6: FP16
            return NEVER
        return "avx512_bf16" if _BF16_OR_VBMI.match(text) else "avx512"
    if code[at] in ("c4", "c5"):
        if _AMX.match(text):
            return "amx" if not re.match(r"tdp(?!bf16ps)", text) else NEVER
        if _OTHER_AVX512.match(text):
            return NEVER
        return "avx512" if re.search(r"%k[0-7]", text) else "avx2"
    if 0x40 <= int(code[at], 16) <= 0x4F:  # REX
        at += 1
    newer = code[at : at + 2] in (["0f", "38"], ["0f", "3a"]) or _AFTER_BASELINE.match(text)
    return NEVER if newer else "baseline"


def functions(binary: Path) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """(demangled name, [(bytes, text) of each instruction]) of every function of ``binary``."""
    command = ["objdump", "-d", "-w", "--demangle", str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, body = "", []
        for line in process.stdout:
            if line[0] == " ":
                _, code, *text = line.rstrip("\n").split("\t")
                body.append((code.split(), text[0].rstrip() if text else ""))
            elif header := _FUNCTION.match(line.rstrip()):
                yield name, body
                name, body = header[1], []
        yield name, body
    assert process.returncode == 0, f"objdump failed on {binary}"


def violations(binary: Path) -> Iterator[tuple[str, str]]:
    """(function, first instruction beyond its level) of every function of ``binary`` that has one."""
    for name, body in functions(binary):
        allowed = LEVELS.index(function_level(name))
        for code, text in body:
            level = instruction_level(code, text)
            if level == NEVER or LEVELS.index(level) > allowed:
                yield name, text
                break


def tiles_left_configured(binary: Path) -> list[str]:
    """Functions that load a tile configuration and hold no release: AMX state that would outlive a kernel.

    Both are in line or calls of TileScope's constructor and destructor (csrc/cpu/tile.h).
    """
    left = []
    for name, body in functions(binary):
        if "TileScope::TileScope()" in name:
            continue
        configures = any(text.startswith("ldtilecfg") or "TileScope::TileScope()" in text for _, text in body)
        releases = any(text.startswith("tilerelease") or "TileScope::~TileScope()" in text for _, text in body)
        if configures and not releases:
            left.append(name)
    return left
