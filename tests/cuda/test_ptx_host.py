"""The host model of the PTX functions that ``csrc/cuda`` uses: it multiplies as the instructions are documented to, and a copy that
nobody waited for has not arrived."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.cuda.host import compiled


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("ptx_host.cpp", Path(tmp_path_factory.mktemp("cuda")))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_product(model: ctypes.CDLL, dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.empty(16, 8)
    given = [x.t().contiguous() if transposed else x for x in (a, b)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*given, d)]
    model.product(*pointers, dtype == torch.float16, transposed, False)
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    model.product(*pointers, dtype == torch.float16, transposed, True)
    assert d.isnan().all()
