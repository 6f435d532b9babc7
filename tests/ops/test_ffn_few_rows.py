"""Up to 512 rows the C++ feed-forward packs no weight, a few rows stream it: the same bits as in a large batch."""

from __future__ import annotations

import pytest
import torch

import fastattn

pytest.importorskip("fastattn._native", reason="the C++ core is not built")


@pytest.mark.parametrize("sizes", [(576, 300, 70), (301, 130, 65), (37, 45, 19), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_few_rows_have_the_bits_they_have_in_a_batch(
    compiled: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    model, hidden, out = sizes
    x = torch.randn(530, model).to(dtype)
    w_gate, w_up = ((torch.randn(hidden, model) / model**0.5).to(dtype) for _ in range(2))
    w_down = (torch.randn(out, hidden) / hidden**0.5).to(dtype)
    bias = torch.randn(hidden).to(dtype)
    calls = (
        lambda rows: fastattn.glu_ffn(rows, w_gate, w_up, w_down, bias, bias, implementation=compiled),
        lambda rows: fastattn.ffn(rows, w_up, w_down, bias, implementation=compiled),
    )
    for call in calls:
        whole = call(x)
        for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 300):
            assert torch.equal(call(x[7 : 7 + rows]), whole[7 : 7 + rows]), f"{rows} rows"
