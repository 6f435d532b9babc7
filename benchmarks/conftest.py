"""One benchmark = one case, dtype, direction and contender, behind a green check of that very case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.cli import bench, cases, check
from fastattn.cli.cases import Case
from fastattn.cli.peers import peer_names


@functools.lru_cache(maxsize=1)  # contenders of one case follow each other; the tensors of more need not be kept
def _oracle(op: str, shape: tuple[int, ...], options: tuple[tuple[str, Any], ...], dtype: str) -> check.Oracle:
    return check.Oracle(Case(op, shape, dict(options)), cases.DTYPES[dtype], torch.device("cpu"))


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Case, str, str, str], None]:
    """``measure(case, dtype, direction, contender)``; a contender the case does not have is skipped with that reason."""

    def run(case: Case, dtype: str, direction: str, contender: str) -> None:
        oracle = _oracle(case.op, case.shape, tuple(case.options.items()), dtype)
        wanted = [] if contender == bench.OURS else [contender]
        if contender == bench.OURS:
            verdict, reason = bench.gate(oracle, "auto")
            assert verdict == check.OK, reason
        found = bench.contenders(case, oracle, "auto", wanted, direction)
        names = [name for name in found if name.partition(":")[0] == contender]
        if not names:
            pytest.skip(f"{contender} has no call for {cases.title(case.op, case.label)}")
        amount, unit = bench.work(case, cases.DTYPES[dtype], direction)
        benchmark.group = f"{cases.title(case.op, case.label)} {'x'.join(map(str, case.shape))} {dtype} {direction}"
        benchmark.extra_info.update(
            contender=names[0], giga_per_call=amount / 1e9, unit=unit, threads=torch.get_num_threads()
        )
        benchmark.pedantic(found[names[0]], rounds=10, warmup_rounds=2)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every benchmark runs for the module's OPS × the default shapes × dtypes × directions × contenders."""
    if "contender" not in metafunc.fixturenames:
        return
    found = [case for op in metafunc.module.OPS for case in bench.default_cases(op)]
    names = [f"{cases.title(case.op, case.label)}-{'x'.join(map(str, case.shape))}".replace(" ", "-") for case in found]
    # The last parametrization varies slowest: the contenders of one call come one after the other.
    metafunc.parametrize("contender", (bench.OURS, *peer_names(metafunc.module.OPS[0])))
    metafunc.parametrize("direction", bench.DIRECTIONS)
    metafunc.parametrize("dtype", ("float32", "bfloat16"))
    metafunc.parametrize("case", found, ids=names)
