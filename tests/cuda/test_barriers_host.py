"""Every barrier of the kernels, left out: the model of a GPU (``host_cuda.h``) must show that results are then wrong.

A copy of the kernels' text is compiled in which each synchronisation asks whether it is left out; weaker waits (one group more may
be under way) and buffers given back before the products that read them are waited for are further mutations. Each is run on small
calls under adverse schedules, in a process of its own, until one sees it: a wrong number, a deadlock, or a crash. What none sees
is ``REDUNDANT`` or ``UNSEEN`` by name, with the reason.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda import test_attention_decode_host as decode
from tests.cuda import test_attention_sm80_host as sm80_forward
from tests.cuda import test_attention_sm90_backward_host as sm90_backward
from tests.cuda import test_attention_sm90_host as sm90_forward
from tests.cuda import test_gemm_host as gemm
from tests.cuda.attention_call import Call, projections
from tests.cuda.host import ROOT, compiled

Case = Callable[[ctypes.CDLL, bool], None]

# (order of warps, seed, whether copies land late; then products are computed early, or the other way round).
SCHEDULES = {
    f"{order} {'late' if late else 'early'}": (number, seed, late)
    for number, seed, order in ((0, 0, "forward"), (1, 0, "reverse"), (2, 1, "shuffled"), (2, 2, "shuffled again"))
    for late in (True, False)
} | {f"random {seed}": (3, seed, True) for seed in (1, 2)}

_CALL = re.compile(
    r"\b(?:__syncthreads|__syncwarp|cluster_sync|named_barrier_(?:sync|arrive)|mbarrier_(?:wait|arrive)|release|bulk_wait(?:_read)?"
    r"|(?P<wait>cp_async_wait|wgmma_wait)<(?P<pending>[^;]*)>)\([^;{}]*\)(?=;)"
)


@dataclass(frozen=True)
class Mutation:
    number: int
    file: str
    line: int
    change: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.change}"


def _mutated(text: str, file: str, found: list[Mutation]) -> str:
    """The text of a kernel whose synchronisations ask ``kept``; what was changed is added to ``found``."""

    def number(line: int, change: str) -> int:
        found.append(Mutation(len(found), file, line, change))
        return found[-1].number

    lines = text.split("\n")
    for index, line in enumerate(lines):
        call = _CALL.search(line)
        if call is None or line.lstrip().startswith(("//", "static", "__device__")):
            continue
        whole, shown = call.group(), call.group().replace("Memory::", "").replace("place.", "")
        kept = f"host_cuda::kept({number(index + 1, f'without {shown}')})"
        changed = f"({kept} ? (void)({whole}) : (void)0)"
        if call["wait"]:
            weaker = f"{call['wait']}<{call['pending']} + 1>()"
            changed = f"(host_cuda::kept({number(index + 1, f'{shown} one group weaker')}) ? {changed} : {weaker})"
        elif whole.startswith(("release", "mbarrier_arrive")):
            before = next((i for i in range(index - 1, index - 9, -1) if "wgmma_wait<" in lines[i]), None)
            if before is not None:
                early = number(index + 1, f"{shown} before the products are done")
                changed = f"(host_cuda::kept({early}) ? {changed} : (void)0)"
                alone = "true" if line.strip() == whole + ";" else line.strip()[4 : -len(whole) - 3]
                lines[before] = f"  if (!host_cuda::kept({early}) && ({alone})) {whole};\n{lines[before]}"
        lines[index] = line[: call.start()] + changed + line[call.end() :]
    return "\n".join(lines)


def mutations_into(folder: Path) -> list[Mutation]:
    """``folder/cuda``: the kernels' headers, mutated."""
    (folder / "cuda").mkdir()
    found: list[Mutation] = []
    for header in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        if header.name != "ptx.cuh":
            text = _mutated(header.read_text(), header.name, found)
            (folder / "cuda" / header.name).write_text(text)
    return found


def _sm80_forward(kernels: ctypes.CDLL, late: bool) -> None:
    sm80_forward.test_against_float64(kernels, ((1, 1), 70, 300, (64, 64), True), torch.bfloat16)
    sm80_forward.test_what_is_not_seen_cannot_reach_a_row(kernels, torch.nan, False)


def _sm90_forward(kernels: ctypes.CDLL, late: bool) -> None:
    q, k, v = projections((1, 1), 200, 700, (64, 64))
    how = sm90_forward.Run(blocks=1, late_copies=late)
    sm90_forward._check(kernels, Call(q, k, v, softmax_scale=0.125, window_right=0, diagonal=450), how)
    sm90_forward.test_keys_that_no_row_sees_may_hold_anything(kernels)


def _sm90_backward(kernels: ctypes.CDLL, late: bool) -> None:
    sm90_backward.test_every_tile(kernels, (2, 1), 140, 200, (64, 64), torch.bfloat16, late)
    # Both warpgroups share lines.
    sm90_backward.test_every_tile(kernels, (2, 1), 70, 200, (200, 256), torch.bfloat16, late)


def _decode(kernels: ctypes.CDLL, late: bool) -> None:
    decode.test_against_float64(kernels, ((4, 2), 2, 300, (64, 64)), torch.bfloat16)
    decode.test_append(kernels, True)


def _gemm(kernel: str) -> Case:
    def case(kernels: ctypes.CDLL, late: bool) -> None:
        for terms in (32, 280):  # the last step's stage is, and is not, the memory of the epilogue
            gemm.test_products(kernels, (130, 600, terms), "x_wt", kernel)
        gemm.test_activation_gradients(kernels, True, "silu", torch.bfloat16, kernel)

    return case


CASES: dict[str, tuple[str, Case]] = {
    "attention_sm80_forward": ("attention_sm80_host.cpp", _sm80_forward),
    "attention_sm90_forward": ("attention_sm90_host.cpp", _sm90_forward),
    "attention_sm90_backward": ("attention_sm90_host.cpp", _sm90_backward),
    "attention_decode": ("attention_decode_host.cpp", _decode),
    "gemm_sm80": ("gemm_host.cpp", _gemm("sm80")),
    "gemm_sm90": ("gemm_host.cpp", _gemm("sm90")),
}


def _survives(kernels: ctypes.CDLL, case: Case, mutation: int, schedule: str) -> bool:
    """Whether the case passes, in a process of its own, without that synchronisation."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()
        signal.alarm(10)
        kernels.remove_barrier(mutation)
        kernels.set_schedule(*SCHEDULES[schedule])
        try:
            case(kernels, SCHEDULES[schedule][2])
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Mutation]]]:
    folder = tmp_path_factory.mktemp("mutated")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process made by fork has one
    yield folder, mutations_into(folder)
    torch.set_num_threads(threads)


def seen_by(
    kernels: ctypes.CDLL, kernel: str, mutations: list[Mutation], all_of_them: bool
) -> dict[Mutation, list[str]]:
    """Of each mutation that the case reaches, the schedules that show it: all, or the first."""
    case = CASES[kernel][1]
    for schedule in SCHEDULES:
        kernels.set_schedule(*SCHEDULES[schedule])
        case(kernels, SCHEDULES[schedule][2])
    kernels.set_schedule(0, 0, True)
    seen: dict[Mutation, list[str]] = {}
    for mutation in mutations:
        other = re.search("sm[89]0", mutation.file)
        if not kernels.reached_barrier(mutation.number) or (other is not None and other.group() not in kernel):
            continue
        seen[mutation] = []
        for schedule in SCHEDULES:
            if not _survives(kernels, case, mutation.number, schedule):
                seen[mutation].append(schedule)
                if not all_of_them:
                    break
    return seen


_EMPTY = "the groups that are left when a block ends are empty, or are nobody's"
# Synchronisation that is not needed where it is, or only for what the hardware asks.
REDUNDANT = {
    "attention_sm80_forward.cuh without cp_async_wait<0>()": _EMPTY,
    "attention_sm80_forward.cuh cp_async_wait<0>() one group weaker": _EMPTY,
    "attention_decode.cuh without cp_async_wait<0>()": _EMPTY,
    "attention_decode.cuh cp_async_wait<0>() one group weaker": _EMPTY,
    "gemm_sm80.cuh without cp_async_wait<0>()": _EMPTY,
    "gemm_sm80.cuh cp_async_wait<0>() one group weaker": _EMPTY,
    "attention_sm90_forward.cuh release(k_empty(stage)) before the products are done": (
        "keys of the next round are brought after values whose stage is given back when these products are done"
    ),
}
# Synchronisation that is needed, and whose absence this model cannot show.
_LANES = "all lanes of a warp run before another warp does: one that arrives for the others cannot be too early"
UNSEEN = {
    "attention_sm90_backward.cuh without __syncwarp()": _LANES,
    "attention_sm90_backward_sums.cuh without __syncwarp()": _LANES,
    "attention_sm90_backward_sums.cuh without named_barrier_sync(1 + consumer, 128)": "needs NaN in what no one sees",
}


def _prepared(kernel: str, folder: Path) -> ctypes.CDLL:
    own = folder / kernel
    own.mkdir()
    kernels = compiled(CASES[kernel][0], own, f"-I{folder}")
    kernels.reached_barrier.restype = ctypes.c_bool
    for name in ("attention_sm90_forward", "attention_sm90_backward"):
        if kernel.startswith("attention_sm90"):
            getattr(kernels, name).restype = ctypes.c_bool
    for name in ("sum_chunks", "gemm_row_blocks", "work"):
        if kernel.startswith("gemm"):
            getattr(kernels, name).restype = ctypes.c_int64
    return kernels


@pytest.mark.parametrize(
    "kernel", [pytest.param(x, marks=[] if x == "attention_sm80_forward" else pytest.mark.slow) for x in CASES]
)
def test_what_is_left_out_is_seen(mutated: tuple[Path, list[Mutation]], kernel: str) -> None:
    folder, mutations = mutated
    seen = seen_by(_prepared(kernel, folder), kernel, mutations, all_of_them=False)
    known = REDUNDANT | UNSEEN
    unseen = [str(x) for x, by in seen.items() if not by and f"{x.file} {x.change}" not in known]
    assert len(seen) > 4 and not unseen, unseen
