"""Settings of every test: a fixed seed, and NaN in all memory that a kernel should have written."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty``, also from C++, comes filled with NaN: a result that a kernel forgot to write is then seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
