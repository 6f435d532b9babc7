"""Settings of every test: a fixed seed, and NaN in all memory that a kernel should have written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_sessionstart() -> None:
    """A run that is to test a build of its own (``tests/sanitize.py``) must not test another that lies before it on the path."""
    if build := os.environ.get("FASTATTN_TESTED_BUILD"):
        from fastattn import _native

        assert Path(_native.__file__).is_relative_to(build), f"{_native.__file__} is tested, not {build}"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty``, also from C++, comes filled with NaN: a result that a kernel forgot to write is then seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _implementations() -> list[str]:
    """reference, and cpu once per instruction set that runs here."""
    try:
        from fastattn import _native
    except ImportError:
        return ["reference"]
    return ["reference", *(f"cpu-{isa}" for isa in _native.available_isas())]


def _forced(name: str) -> Iterator[str]:
    name, _, isa = name.partition("-")
    if not isa:
        yield name
        return
    from fastattn import _native

    before = _native.current_isa()
    _native.set_isa(isa)
    yield name
    _native.set_isa(before)


@pytest.fixture(params=_implementations())
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the CPU in turn; for ``cpu`` the instruction set is forced while the test runs."""
    yield from _forced(request.param)


@pytest.fixture(params=_implementations()[1:])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without the reference: for promises that PyTorch itself does not make."""
    yield from _forced(request.param)
