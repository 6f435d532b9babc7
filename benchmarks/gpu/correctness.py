"""Every kernel against float64 on the device, in several processes: most of the time goes to compiling.

The rule is that of ``python -m fastattn check`` (twice plain PyTorch's error in the same dtype, plus one rounding). Beside it,
promises that have no tolerance: dropout masks are those of the reference bit for bit, two runs give the same bits, a row that sees
nothing gives zeros.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

import fastattn
from benchmarks.gpu import plan
from fastattn.cli import check
from fastattn.reference.philox import attention_dropout, matrix_dropout

Found = dict[str, Any]


def run_part(
    groups: Sequence[str], part: str, device: str, implementation: str, quick: bool, tiny: bool
) -> Iterator[Found]:
    """Verdicts of every n-th check, from the i-th: ``part`` is "i/n". The promises belong to the first part."""
    index, count = (int(number) for number in part.split("/"))
    for wanted in plan.checks(groups, quick, tiny)[index - 1 :: count]:
        yield from _checked(wanted, device, implementation)
    if index == 1:
        yield from promises(groups, device, implementation)


def _checked(wanted: plan.Check, device: str, implementation: str) -> Iterator[Found]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted.tf32 else "highest")
    try:
        for found in check.check_case(wanted.case, wanted.dtype, device, [(implementation, "")]):
            yield asdict(found) | {"dtype": "tf32" if wanted.tf32 else wanted.dtype}
    except Exception as error:  # the oracle itself: out of memory, a dtype that torch does not multiply here
        yield row(
            wanted.case.op, wanted.case.label, implementation, wanted.dtype, check.UNAVAILABLE, check.brief(error)
        )
    finally:
        torch.set_float32_matmul_precision(before)


def promises(groups: Sequence[str], device: str, implementation: str) -> Iterator[Found]:
    """A row per promise of the groups' operations."""
    found: dict[str, list[Callable[[torch.device, str], str]]] = {
        "attention": [_attention_mask_bits, _attention_repeats, _blind_rows, _cache, _cache_in_pages, _cache_appended],
        "norm": [_norm_mask_bits, _norm_repeats],
        "ffn": [_ffn_mask_bits],
        "rope": [_rope_in_place],
        "loss": [_loss_repeats],
    }
    for group in groups:
        for promise in found.get(group, ()):
            name = promise.__name__.strip("_").replace("_", " ")
            try:
                wrong = promise(torch.device(device), implementation)
                verdict = check.FAILED if wrong else check.OK
            except NotImplementedError as error:
                wrong, verdict = check.brief(error), check.UNAVAILABLE
            except Exception as error:
                wrong, verdict = check.brief(error), check.FAILED
            yield row(group, name, implementation, "", verdict, wrong)


def row(op: str, case: str, implementation: str, dtype: str, verdict: str, note: str) -> Found:
    return {
        "op": op, "case": case, "shape": (), "dtype": dtype, "implementation": implementation, "result": "",
        "verdict": verdict, "note": note, "error": None, "bound": None,
    }  # fmt: skip


def _attention_mask_bits(device: torch.device, implementation: str) -> str:
    """With equal scores and v = identity the output is the mask over the number of keys."""
    rng, p = torch.tensor([-(2**62) + 12345, 2**32 + 77]), 0.37
    q, k = torch.zeros(2, 3, 70, 16, device=device), torch.zeros(2, 3, 130, 16, device=device)
    v = torch.eye(130, device=device).expand(2, 3, 130, 130)
    out = fastattn.attention(q, k, v, dropout_p=p, rng_state=rng, implementation=implementation)
    mask = attention_dropout(torch.Size((2, 3, 70, 130)), p, rng, device)
    return "" if torch.equal(out > 0, mask > 0) else f"{int(((out > 0) != (mask > 0)).sum())} places differ"


def _norm_mask_bits(device: torch.device, implementation: str) -> str:
    rng, p, x = torch.tensor([2**40 + 3, -1]), 0.5, torch.ones(37, 530, device=device)
    options: dict[str, Any] = {"dropout_p": p, "rng_state": rng, "return_residual": True}
    _, h = fastattn.rms_norm(x, (530,), implementation=implementation, **options)
    return "" if torch.equal(h, matrix_dropout(x.shape, p, rng, device).float()) else "the masks differ"


def _ffn_mask_bits(device: torch.device, implementation: str) -> str:
    rng, p = torch.tensor([2**40 + 3, -1]), 0.5
    x, first, second = (t.to(device, torch.bfloat16) for t in (torch.ones(70, 1), torch.ones(150, 1), torch.eye(150)))
    options: dict[str, Any] = {"activation": "relu", "dropout_p": p, "rng_state": rng}
    out = fastattn.ffn(x, first, second, implementation=implementation, **options)
    mask = matrix_dropout(torch.Size((70, 150)), p, rng, device).to(out.dtype)
    return "" if torch.equal(out, mask) else "the masks differ"


def _attention_repeats(device: torch.device, implementation: str) -> str:
    # The CUDA kernels take 16 bits, and promise the bits of q's gradient under deterministic algorithms alone.
    cuda, before = implementation == "cuda", torch.are_deterministic_algorithms_enabled()
    kind = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}

    def call() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 300, 64, generator=generator).to(**kind).requires_grad_() for h in (4, 2, 2))
        out = fastattn.attention(q, k, v, causal=True, implementation=implementation)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    torch.use_deterministic_algorithms(before or cuda)
    try:
        return _differences(call)
    finally:
        torch.use_deterministic_algorithms(before)


def _norm_repeats(device: torch.device, implementation: str) -> str:
    def call() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*s, generator=generator).to(device).requires_grad_() for s in ((999, 520), (520,)))
        y = fastattn.rms_norm(x, (520,), weight, implementation=implementation)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    return _differences(call)


def _differences(call: Callable[[], list[torch.Tensor]]) -> str:
    first, *others = (call() for _ in range(3))
    same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return "" if same else "two runs differ"


def _blind_rows(device: torch.device, implementation: str) -> str:
    """More rows than keys under bottom-right causal alignment: the first rows see nothing."""
    q, k = torch.randn(1, 1, 150, 64, device=device), torch.randn(1, 1, 20, 64, device=device)
    out, lse = fastattn.attention(q, k, k, causal=True, return_lse=True, implementation=implementation)
    good = not out[:, :, :130].any() and bool((lse[:, :, :130] == float("-inf")).all())
    return "" if good else "rows that see no key are not zero"


def _cache(device: torch.device, implementation: str) -> str:
    return _with_cache(device, implementation, paged=False, append=False)


def _cache_in_pages(device: torch.device, implementation: str) -> str:
    return _with_cache(device, implementation, paged=True, append=False)


def _cache_appended(device: torch.device, implementation: str) -> str:
    return _with_cache(device, implementation, paged=True, append=True)


def _with_cache(device: torch.device, implementation: str, paged: bool, append: bool) -> str:
    """Decoding, one and three new tokens of sequences of very different lengths, by the rule of ``check``."""
    pages, size = (25, 16) if paged else (3, 400)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([399, 5, 130])
    table = torch.randperm(75, generator=generator).view(3, pages).to(torch.int32) if paged else None
    for dtype, rows in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 3)):
        shapes = [(3, 8, rows, 64), *[(75 if paged else 3, 2, size, 64)] * 2, *[(3, 2, rows, 64)] * 2]
        tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

        def call(name: str, wide: torch.dtype, given: Sequence[torch.Tensor] = tensors) -> torch.Tensor:
            q, k_cache, v_cache, k, v = (x.to(wide, copy=True) for x in given)
            new: dict[str, Any] = {"k": k, "v": v} if append else {}
            out = fastattn.attention_with_kv_cache(
                q, k_cache, v_cache, lengths, block_table=table, implementation=name, **new
            )
            assert isinstance(out, torch.Tensor)
            return out.double()

        exact, plain, actual = call("reference", torch.float64), call("reference", dtype), call(implementation, dtype)
        allowed = check.bound(check.largest(plain - exact), exact, dtype, 400)
        error = check.largest(actual - exact)
        if not error <= allowed:
            return f"{dtype}, {rows} rows: error {error:.1e} > {allowed:.1e}"
    return ""


def _rope_in_place(device: torch.device, implementation: str) -> str:
    x = torch.randn(2, 3, 37, 64, device=device)
    cos, sin = (torch.randn(37, 32, device=device) for _ in range(2))
    out = fastattn.rope(x, cos, sin, implementation=implementation)
    fastattn.rope(x, cos, sin, inplace=True, implementation=implementation)
    return "" if torch.equal(out, x) else "in place differs"


def _loss_repeats(device: torch.device, implementation: str) -> str:
    def call() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*s, generator=generator).to(device).requires_grad_() for s in ((99, 64), (1031, 64)))
        target = torch.randint(0, 1031, (99,), generator=generator).to(device)
        loss = fastattn.linear_cross_entropy(x, weight, target, implementation=implementation)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    return _differences(call)


def run(arguments: Sequence[str], processes: int, seconds: float) -> tuple[list[Found], bool]:
    """(verdicts, whether all were reached) of ``python -m benchmarks.gpu <arguments> --part i/n`` in ``processes`` processes.

    A process that dies is a failed check; what is not reached in ``seconds`` is not.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    started = [
        subprocess.Popen(
            [*command, "--part", f"{i + 1}/{processes}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    end = time.monotonic() + seconds
    # A thread each: a process whose pipe is full would wait.
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(lambda process: _collected(process, end), started))
    return [found for rows, _ in parts for found in rows], all(complete for _, complete in parts)


def _collected(process: subprocess.Popen[str], end: float) -> tuple[list[Found], bool]:
    """(the rows of a process, whether it came to its end before ``end``, a time of the monotonic clock)."""
    rows: list[Found] = []
    complete = True
    try:
        out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        complete = False
    else:
        if process.returncode:
            last = err.strip().splitlines()[-1:] or [""]
            rows.append(row("process", "", "", "", check.FAILED, f"exit code {process.returncode}: {last[0]}"))
    # The last line of a process that was killed may be cut off.
    rows += [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return rows, complete


def failures(rows: Sequence[Found]) -> list[str]:
    """A line for each failed verdict."""
    lines = []
    for found in rows:
        if found["verdict"] == check.FAILED:
            shape = "x".join(map(str, found["shape"]))
            reason = found["note"] or "error {error} > {bound}".format(**found)
            lines.append(
                "{op} [{case}] {shape} {dtype} {result}: {reason}".format(**found | {"shape": shape, "reason": reason})
            )
    return lines
