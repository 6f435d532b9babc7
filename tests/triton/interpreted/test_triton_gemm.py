"""Every way through the products of linear and ffn: torch's with an elementwise kernel, one GEMM by descriptors or by pointers,
halves of a tile, parts along K; operands as they lie; the order of sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_ffn import _compare as compare_ffn
from test_ffn import test_recompute_saves_no_activation_and_changes_no_bit as check_recompute
from test_linear import _compare as compare_linear
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.kernels import configs, gemm, linear
from fastattn.kernels.configs import Elementwise, Matmul

_DTYPES = [torch.float32, torch.bfloat16]
_WAYS = {
    "torch": Elementwise(32, 64, 4),
    "descriptors": Matmul(64, 64, 32, 4, 1, tma=True),
    "pointers": Matmul(32, 64, 32, 4, 1),
    "halves": Matmul(64, 64, 64, 4, 1, tma=True, halves=True),
    "few rows": Matmul(16, 32, 32, 4, 1),
}


@pytest.fixture(params=_WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every product goes this way: as a measurement would have it. Deterministic algorithms have a way of their own."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(configs, "product", lambda *_: _WAYS[request.param])
    return request.param


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ffn(implementation: str, way: str, activation: str, dtype: torch.dtype) -> None:
    """Aligned rows and not, whole tiles and not; with few rows one part along K and several."""
    compare_ffn(implementation, (7, 72, 72, 40), activation, dtype, dropout_p=0.3, residual=True)
    shape = (9, 270, 67, 33) if way == "few rows" else (70, 33, 67, 35)
    compare_ffn(implementation, shape, activation, dtype, bias=activation == "gelu")


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_linear(implementation: str, way: str, dtype: torch.dtype) -> None:
    """270 tokens: the weight's gradient in parts; few rows: the others."""
    few = way == "few rows"
    compare_linear(implementation, (13, 270, 40) if few else (270, 64, 40), dtype, (True, True))
    compare_linear(implementation, (13, 35, 70), dtype, (False, True))
    compare_linear(implementation, (13, 40, 64), dtype, (True, False))


@pytest.mark.parametrize("way", ["torch"], indirect=True)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recompute_changes_no_bit(implementation: str, way: str, activation: str) -> None:
    check_recompute(implementation, activation, torch.bfloat16)


def test_parts_along_k_depend_on_the_shape_alone(implementation: str) -> None:
    few = _WAYS["few rows"]
    assert gemm.splits_of_few_rows(few, 40, 600) == 600 // (4 * 32) > 1
    assert gemm.splits_of_few_rows(_WAYS["pointers"], 40, 600) == 1
    assert gemm.splits_of_weight_gradient(_WAYS["pointers"], 40, 600, 6000) > 1
    for splits in (gemm.splits_of_few_rows(few, 10**6, 10**6), gemm.splits_of_few_rows(few, 0, 0)):
        assert splits == 1


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_deterministic_tiles_do_not_depend_on_the_rows(implementation: str, dtype: torch.dtype) -> None:
    for use in configs.USES:
        tiles = {linear.chosen(use, torch.empty(rows, 64, dtype=dtype), 96) for rows in (1, 16, 17, 600, 9000)}
        assert len(tiles) == 1 and isinstance(tiles.pop(), Matmul)


def test_what_is_not_measured_is_torch_s_product(implementation: str) -> None:
    torch.use_deterministic_algorithms(False)
    for use in configs.USES:
        assert isinstance(linear.chosen(use, torch.empty(4000, 64), 96), Elementwise)


@pytest.mark.parametrize("lying", ["rows apart", "transposed", "every other column", "expanded"])
def test_operands_are_read_where_they_lie(implementation: str, lying: str) -> None:
    def as_it_lies(rows: int, columns: int) -> Tensor:
        if lying == "rows apart":
            return torch.randn(rows, columns + 24)[:, 8 : 8 + columns]
        if lying == "transposed":
            return torch.randn(columns, rows).t()
        if lying == "every other column":
            return torch.randn(rows, 2 * columns)[:, ::2]
        return torch.randn(1, columns).expand(rows, columns)

    tensors = [as_it_lies(70, 48), as_it_lies(80, 48), torch.randn(80), as_it_lies(70, 80)]
    cotangent = as_it_lies(70, 80)

    def run(function, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves[:3], residual=leaves[3])
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    actual = run(lambda *a, **k: fastattn.linear(*a, **k, implementation=implementation), torch.float32)
    peer, exact = run(reference.linear, torch.float32), run(reference.linear, torch.float64)
    for index, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert_accurate(a, p, e, f"result {index}", terms=80)


def test_offsets_beyond_31_bits(implementation: str, tmp_path: Path) -> None:
    """Rows 2²² elements apart in a sparse file: what follows row 512 lies beyond 2³¹ elements."""
    pitch, rows = 2**22, 520
    memory = torch.from_file(str(tmp_path / "x"), shared=True, size=pitch * rows, dtype=torch.float16)
    weight = torch.randn(16, 24).half()
    x = memory.as_strided((rows, 24), (pitch, 1))
    x.copy_(torch.randn(rows, 24))
    out = fastattn.linear(x, weight, implementation=implementation)
    assert_accurate(out, x @ weight.t(), x.double() @ weight.double().t(), terms=24)


@pytest.mark.parametrize("way", ["torch", "few rows"], indirect=True)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_repeat_to_the_bit(implementation: str, way: str, activation: str) -> None:
    x, w, b = torch.randn(70, 48), torch.randn(80, 48), torch.randn(80)
    gate = torch.randn(80, 48)
    w_out = torch.randn(48, 80)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b, gate, w_out)]
        x_, w_, b_, gate_, out_ = leaves
        options = {"activation": activation, "implementation": implementation}
        if activation == "gelu":
            y = fastattn.ffn(x_, w_, out_, b_, **options)
            return [y, *torch.autograd.grad(y.square().sum(), (x_, w_, b_, out_))]
        y = fastattn.glu_ffn(x_, gate_, w_, out_, b_, b_, **options)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
