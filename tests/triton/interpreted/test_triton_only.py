"""What only the Triton kernels have: blocks and their skipping, strides, looped rows, what they refuse."""

import math

import plain
import pytest
import torch
from test_attention import _run as run_attention
from test_norm import _compare as compare_norm
from tolerance import assert_accurate
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.kernels import configs
from fastattn.ops._select import replacing_auto
from fastattn.reference.philox import attention_dropout, matrix_dropout


def _compare_attention(inputs: list[Tensor], dtype: torch.dtype, implementation: str, **options: object) -> None:
    q, k, v = inputs
    cotangents = (torch.randn(*q.shape[:3], v.shape[3]).to(dtype), torch.randn(q.shape[:3]).to(dtype))
    actual = run_attention(
        lambda *a, **o: fastattn.attention(*a, return_lse=True, implementation=implementation, **o),
        inputs,
        options,
        cotangents,
        dtype,
    )
    exact = run_attention(
        lambda *a, **o: reference.attention(*a, return_lse=True, **o), inputs, options, cotangents, torch.float64
    )
    peer = run_attention(plain.attention, inputs, options, cotangents, dtype)
    names = ("out", "lse", "dq", "dk", "dv", "dmask")
    for name, a, p, e in zip(names, actual, peer, exact, strict=False):
        assert_accurate(a, p, e, name, terms=k.shape[2] * q.shape[3])


# More than two blocks of 64 in both directions, with full, partly visible and skipped ones among them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (70, -1)},
        {"window_size": (-1, 70)},
        {"window_size": (40, 9)},
        {"window_size": (0, 0)},
    ],
    ids=str,
)
def test_skipped_and_full_blocks(implementation: str, options: dict[str, object], dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, heads, rows, 16).to(dtype) for heads, rows in ((2, 150), (1, 210), (1, 210))]
    _compare_attention(inputs, dtype, implementation, **options)


@pytest.mark.parametrize("rows, keys", [(150, 210), (210, 150)])
def test_upper_left_causal_blocks(implementation: str, rows: int, keys: int) -> None:
    """torch's is_causal: the diagonal starts at the first key whatever the lengths. Output and gradients."""
    tensors = [torch.randn(1, 1, n, 16) for n in (rows, keys, keys)]
    cotangent = torch.randn(1, 1, rows, 16)

    def run(function, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    theirs = torch.nn.functional.scaled_dot_product_attention
    with replacing_auto(implementation):
        actual = run(fastattn.scaled_dot_product_attention, torch.float32)
    peer, exact = run(theirs, torch.float32), run(theirs, torch.float64)
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, peer, exact, strict=True):
        assert_accurate(a, p, e, name, terms=keys * 16)


@pytest.mark.parametrize("order", ["bnhd", "sliced", "expanded"])
def test_strides_are_read_in_place(implementation: str, order: str) -> None:
    dtype = torch.float32
    if order == "bnhd":
        inputs = [torch.randn(2, 70, 2, 24).transpose(1, 2) for _ in range(3)]
    elif order == "sliced":
        packed = torch.randn(2, 70, 3, 2, 40)
        inputs = [packed[:, :, i, :, 8:32].transpose(1, 2) for i in range(3)]
    else:
        inputs = [torch.randn(1, 1, 70, 24).expand(2, 2, 70, 24) for _ in range(3)]
    mask = torch.randn(70, 2, 2).permute(1, 2, 0).unsqueeze(2)
    _compare_attention(inputs, dtype, implementation, attn_mask=mask)


def test_attention_dropout_draws_the_reference_mask(implementation: str) -> None:
    """With constant scores and v = identity, out is the mask itself over the number of keys."""
    rng, p = torch.tensor([-(2**62) + 12345, 2**32 + 77]), 0.37
    q, k = torch.zeros(2, 3, 70, 16), torch.zeros(2, 3, 130, 16)
    v = torch.eye(130).expand(2, 3, 130, 130)
    out = fastattn.attention(q, k, v, dropout_p=p, rng_state=rng, implementation=implementation)
    mask = attention_dropout(torch.Size((2, 3, 70, 130)), p, rng, q.device)
    assert torch.equal(out > 0, mask > 0)
    torch.testing.assert_close(out, (mask / 130).float())


def test_matrix_dropout_draws_the_reference_mask(implementation: str) -> None:
    rng, p = torch.tensor([2**40 + 3, -1]), 0.5
    x = torch.ones(37, 530)
    _, h = fastattn.rms_norm(x, (530,), dropout_p=p, rng_state=rng, return_residual=True, implementation=implementation)
    assert torch.equal(h, matrix_dropout(x.shape, p, rng, x.device).float())
    hidden = torch.eye(150)
    out = fastattn.ffn(
        torch.ones(70, 1),
        torch.ones(150, 1),
        hidden,
        activation="relu",
        dropout_p=p,
        rng_state=rng,
        implementation=implementation,
    )
    assert torch.equal(out, matrix_dropout(torch.Size((70, 150)), p, rng, x.device).float())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [8300, 16500])
def test_rows_longer_than_a_block(implementation: str, rms: bool, dtype: torch.dtype, columns: int) -> None:
    """8300: the backward pass loops; 16500: forward too."""
    assert configs.norm_backward(columns, configs.Arch("interpreter")).columns < columns
    compare_norm(implementation, rms, (3, columns), dtype, residual=True, dropout_p=0.25)


def test_gradients_repeat_to_the_bit(implementation: str) -> None:
    x, weight, bias = torch.randn(150, 96), torch.randn(96), torch.randn(96)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = fastattn.layer_norm(leaves[0], (96,), *leaves[1:], implementation=implementation)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("precision, expected", [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_follow_torch(implementation: str, precision: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert configs.matmul_precision(torch.float32) == expected
        assert configs.matmul_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_it_does_not_take(implementation: str) -> None:
    q = torch.randn(1, 1, 4, 300)
    with pytest.raises(NotImplementedError, match="256"):
        fastattn.attention(q, q, q, implementation=implementation)
    for call in (
        lambda: fastattn.attention(*[q[..., :8].double()] * 3, implementation=implementation),
        lambda: fastattn.rms_norm(q.double(), (300,), implementation=implementation),
        lambda: fastattn.ffn(q.double(), *[torch.randn(300, 300).double()] * 2, implementation=implementation),
    ):
        with pytest.raises(NotImplementedError, match="float64"):
            call()


def test_a_window_that_hides_everything(implementation: str) -> None:
    """More rows than keys under bottom-right causal alignment: the first rows see nothing."""
    q, k = torch.randn(1, 1, 150, 16, requires_grad=True), torch.randn(1, 1, 20, 16, requires_grad=True)
    out, lse = fastattn.attention(q, k, k, causal=True, return_lse=True, implementation=implementation)
    assert out[:, :, :130].abs().max() == 0 and (lse[:, :, :130] == -math.inf).all()
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq[:, :, :130].abs().max() == 0 and torch.isfinite(dk).all() and dk.abs().max() > 0


def test_appending_is_an_operator(implementation: str) -> None:
    """torch's own check of schema, fake and mutation; keys of more than one part, and pages."""
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs
    q, new = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 2, 16)
    table = torch.tensor([[0, 2, 0, 300, 298], [0, 2, 0, 40, 38]])
    pages = torch.randperm(8).view(2, 4).int()
    operator = torch.ops.fastattn.triton_attention_append.default
    for cache, block_table in ((torch.randn(2, 2, 320, 16), None), (torch.randn(8, 2, 80, 16), pages)):
        arguments = (q, cache, cache.clone(), new, new + 1, None, None, 0.25, -1, 0, 0.0, table, block_table)
        torch.library.opcheck(operator, arguments)
