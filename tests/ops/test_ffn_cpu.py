"""The C++ feed-forward network where test_ffn.py's shapes do not reach: several row, column and k blocks; special values."""

from __future__ import annotations

import math

import pytest
import torch
from ops.test_ffn import _compare
from torch import Tensor

import fastattn

pytest.importorskip("fastattn._native", reason="the C++ core is not built")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("activation", ["gelu", "geglu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_everything(dtype: torch.dtype, activation: str) -> None:
    """Row blocks are 128, column blocks up to 512, k blocks 128 to 512; dropout counters run on across them."""
    _compare("cpu", (601, 530, 1100, 70), activation, dtype, dropout_p=0.2)


@pytest.mark.parametrize("rows", [127, 129, 255])
def test_around_a_row_block(compiled: str, rows: int) -> None:
    """Up to 128 rows the backward pass packs the weights in each work item, beyond that once for all."""
    _compare(compiled, (rows, 70, 66, 40), "swiglu", torch.bfloat16)


@pytest.mark.parametrize("columns", [1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_weights_in_one_cache_set(dtype: torch.dtype, columns: int) -> None:
    """A multiple of 4 KiB apart they are copied before they are multiplied."""
    _compare("cpu", (37, columns, 50, 45), "gelu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_row_do_not_depend_on_the_batch(compiled: str, dtype: torch.dtype) -> None:
    size = {"x": (140, 70), "w_gate": (150, 70), "w_up": (150, 70), "w_down": (66, 150)}
    tensors = {name: (torch.randn(shape) / math.sqrt(shape[1])).to(dtype) for name, shape in size.items()}
    dout = torch.randn(140, 66).to(dtype)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        x = tensors["x"][rows].clone().requires_grad_()
        out = fastattn.glu_ffn(x, *list(tensors.values())[1:], implementation=compiled)
        return out, torch.autograd.grad(out, x, dout[rows])[0]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(100, 103), slice(5, 135)):
        assert all(torch.equal(part, all_rows[rows]) for part, all_rows in zip(run(rows), whole, strict=True))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_infinities_and_nan(compiled: str, activation: str) -> None:
    one = torch.ones(1, 1)
    x = torch.tensor([[math.inf], [math.nan], [1e30], [-1e30]])
    out = fastattn.ffn(x, one, one, activation=activation, implementation=compiled).squeeze(1)
    assert out[0] == math.inf and out[1].isnan() and out[2] == x[2] and out[3] == 0
