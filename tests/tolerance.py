"""The one place for tolerances: errors are judged against float64, beside the error that plain PyTorch makes in the same dtype.

The rule (of flash-attention's tests): ``max|actual - exact| <= 2 · max|plain - exact| + one rounding of max|exact|``. ``exact`` is
the float64 reference on the same (already rounded) inputs, ``plain`` is ordinary PyTorch in the dtype under test. For float32,
where plain PyTorch may be lucky, the floor is instead the error bound of a sum of ``terms`` products, √terms roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "", terms: int = 1) -> None:
    """Fail unless ``actual`` is about as accurate as ``plain``. ``terms``: length of the longest reduction behind a value."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    dtype = actual.dtype
    actual, plain, exact = actual.detach().double(), plain.detach().double(), exact.detach().double()
    finite = torch.isfinite(exact)
    assert torch.equal(actual[~finite], exact[~finite]), f"{name}: infinities differ"
    actual, plain, exact = actual[finite], plain[finite], exact[finite]
    if exact.numel() == 0:
        return
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    if dtype in (torch.float32, torch.float64):
        rounding *= max(1.0, terms**0.5)
    error, peer = (actual - exact).abs().max().item(), (plain - exact).abs().max().item()
    bound = 2 * peer + rounding
    # `not <=` so that NaN fails.
    assert error <= bound, f"{name} ({dtype}): error {error:.3e} > {bound:.3e} = 2 x {peer:.3e} + {rounding:.3e}"
