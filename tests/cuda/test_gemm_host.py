"""The CUDA products of ``linear`` and ``ffn``, run on the CPU: tiles, tails, layouts, epilogues and sums, against float64.

``gemm_sm80.cuh`` and ``epilogue.cuh`` are compiled by the host compiler over ``host_cuda.h``, where each CUDA thread is a fiber and
ldmatrix and mma.sync follow the fragment layouts of the PTX manual.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn.reference.ffn import ACTIVATIONS, FUNCTIONS
from fastattn.reference.philox import matrix_dropout
from tests.cuda.host import compiled
from tests.tolerance import assert_accurate

RNG_STATE = torch.tensor([0x0123456789ABCDEF, 77])
DTYPES = {torch.float16: 2, torch.bfloat16: 3}
STORE, ACTIVATION, ACTIVATION_GRAD = range(3)


class Dropout(ctypes.Structure):
    """``Dropout`` of csrc/cpu/params.h."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    ]


class Product(ctypes.Structure):
    """``MatrixProduct`` of csrc/cpu/params.h."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("lda", ctypes.c_int64),
        ("ldb", ctypes.c_int64),
        ("a_transposed", ctypes.c_bool),
        ("b_transposed", ctypes.c_bool),
        ("packed", ctypes.c_void_p),
    ]


class Call(ctypes.Structure):
    """``GemmCall`` of csrc/cuda/gemm.cuh."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("M", "N", "K")],
        ("products", ctypes.c_int),
        ("second_apart", ctypes.c_bool),
        ("product", Product * 2),
        ("packs", ctypes.c_int),
        ("row_block", ctypes.c_int64),
        ("column_block", ctypes.c_int64),
        ("epilogue", ctypes.c_int),
        ("bias", ctypes.c_void_p * 2),
        *[(name, ctypes.c_void_p) for name in ("residual", "c", "pre", "gate", "dpre", "dgate", "dpre_sums")],
        ("dgate_sums", ctypes.c_void_p),
        ("activation", ctypes.c_int),
        ("dropout", Dropout),
        ("dropout_scale", ctypes.c_double),
        ("first_row", ctypes.c_int64),
        ("residual_stride", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
        ("slices", ctypes.c_int),
        ("operand_aligned", ctypes.c_bool),
        ("aligned", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    loaded = compiled("gemm_host.cpp", Path(tmp_path_factory.mktemp("cuda")))
    for name in ("sum_chunks", "gemm_row_blocks", "work"):
        getattr(loaded, name).restype = ctypes.c_int64
    n = ctypes.c_int64
    loaded.sum_chunks.argtypes = [n]
    loaded.slices_of.argtypes = [n] * 5
    loaded.work.argtypes = [n, n, n, ctypes.c_int, ctypes.c_void_p]
    loaded.column_sum.argtypes = [ctypes.c_bool, ctypes.c_void_p, n, n, n, ctypes.c_void_p, ctypes.c_void_p]
    yield loaded


def _dropout(p: float) -> Dropout:
    seed, offset = RNG_STATE.tolist()
    return Dropout(seed, offset, int(p * 2**32), 1 / (1 - p)) if p > 0 else Dropout(0, 0, 0, 1.0)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _lies_across(x: Tensor) -> bool:
    """Whether the second extent of x is not the one that is contiguous in memory."""
    return x.stride(1) != 1


@dataclass
class Case:
    """A product a bᵀ (+ a2 b2ᵀ, or a gateᵀ apart) with its epilogue; results are poisoned until the kernel has run."""

    a: Tensor  # (M, K) of any layout with one unit stride
    b: Tensor  # (N, K) likewise
    b2: Tensor | None = None  # gate weights, or with a2 the second product's
    a2: Tensor | None = None
    epilogue: int = STORE
    activation: str = "gelu"
    dropout_p: float = 0.0
    bias: list[Tensor | None] = field(default_factory=lambda: [None, None])
    residual: Tensor | None = None
    pre: Tensor | None = None
    gate: Tensor | None = None
    wants: str = "c pre gate dpre dgate sums"
    slices: int = 1
    kernel: str = "sm80"

    def _empty(self, name: str, present: bool = True) -> Tensor | None:
        if not present or name not in self.wants.split():
            return None
        return torch.full((self.a.shape[0], self.b.shape[0]), torch.nan, dtype=self.a.dtype)

    def run(self, kernels: ctypes.CDLL) -> dict[str, Tensor]:
        (m, k), n = self.a.shape, self.b.shape[0]
        apart, gradient = self.b2 is not None and self.a2 is None, self.epilogue == ACTIVATION_GRAD
        blocks = kernels.gemm_row_blocks(self.kernel.encode(), ctypes.c_int64(m))
        found: dict[str, Tensor | None] = {"c": self._empty("c")}
        if gradient:
            found |= {"dpre": self._empty("dpre"), "dgate": self._empty("dgate", self.gate is not None)}
            if "sums" in self.wants:
                found |= {name: torch.full((blocks, n), torch.nan) for name in ("dpre_sums", "dgate_sums")}
        elif self.epilogue == ACTIVATION:
            found |= {"pre": self._empty("pre"), "gate": self._empty("gate", apart)}
        parts = torch.full((self.slices, m, n), torch.nan) if self.slices > 1 else None
        pairs = [(self.a, self.b)]
        if self.b2 is not None:
            pairs.append((self.a if self.a2 is None else self.a2, self.b2))
        call = Call(
            dtype=DTYPES[self.a.dtype], M=m, N=n, K=k, products=len(pairs), second_apart=apart, epilogue=self.epilogue,
            residual=_pointer(self.residual), activation=ACTIVATIONS.index(self.activation),
            dropout=_dropout(self.dropout_p), dropout_scale=1 / (1 - self.dropout_p), parts=_pointer(parts),
            residual_stride=0 if self.residual is None else self.residual.stride(0), slices=self.slices,
            pre=_pointer(self.pre), gate=_pointer(self.gate),
        )  # fmt: skip
        for i, (a, b) in enumerate(pairs):
            across_a, across_b = _lies_across(a), _lies_across(b)
            ld = [x.stride(1) if across else x.stride(0) for x, across in ((a, across_a), (b, across_b))]
            call.product[i] = Product(a.data_ptr(), b.data_ptr(), *ld, across_a, not across_b, None)
            call.bias[i] = _pointer(self.bias[i])
        for name, tensor in found.items():
            if tensor is not None:
                setattr(call, name, tensor.data_ptr())
        kernels.gemm(self.kernel.encode(), ctypes.byref(call))
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by PyTorch in ``dtype``; gradients by autograd through the forward formula, sums over all rows."""
        to = lambda x: None if x is None else x.to(dtype)
        product = to(self.a) @ to(self.b).T
        factors = 1.0
        if self.dropout_p > 0:
            factors = matrix_dropout(product.shape, self.dropout_p, RNG_STATE, product.device).to(dtype)
        act = FUNCTIONS[self.activation]
        if self.epilogue == ACTIVATION_GRAD:
            leaves = [to(x).requires_grad_() for x in (self.pre, self.gate) if x is not None]
            hidden = (act(leaves[0]) if self.gate is None else act(leaves[1]) * leaves[0]) * factors
            grads = torch.autograd.grad(hidden, leaves, product)
            names = ("dpre", "dgate")[: len(leaves)]
            sums = {f"{name}_sums": g.sum(0, keepdim=True) for name, g in zip(names, grads, strict=True)}
            return {"c": hidden.detach()} | dict(zip(names, grads, strict=True)) | sums
        if self.a2 is not None:
            product = product + to(self.a2) @ to(self.b2).T
        biases = [0 if x is None else to(x) for x in self.bias]
        pre = product + biases[0]
        if self.epilogue == STORE:
            return {"c": pre if self.residual is None else pre + to(self.residual)}
        if self.b2 is None:
            return {"c": act(pre) * factors, "pre": pre}
        gate = to(self.a) @ to(self.b2).T + biases[1]
        return {"c": act(gate) * pre * factors, "pre": pre, "gate": gate}

    def check(self, kernels: ctypes.CDLL) -> None:
        ours, plain, exact = self.run(kernels), self.expected(self.a.dtype), self.expected(torch.float64)
        for name, actual in ours.items():
            if name == "dgate_sums" and self.gate is None:
                continue
            if name.endswith("_sums"):
                actual = actual.sum(0, keepdim=True).to(self.a.dtype)
            assert_accurate(actual, plain[name], exact[name], name, terms=self.a.shape[1])


def _operand(lines: int, inner: int, dtype: torch.dtype, across: bool = False, skew: int = 0) -> Tensor:
    """(lines, inner), lying in memory as (inner, lines) if ``across``; rows ``skew`` elements longer and off by as many."""
    rows, columns = (inner, lines) if across else (lines, inner)
    x = torch.randn(rows, columns + 2 * skew).to(dtype)[:, skew : skew + columns]
    return x.T if across else x


KERNELS = ["sm80", "sm90"]
# (M, N, K): one tile and less; several tiles with tails in all three; rows that are not multiples of 16 bytes.
SHAPES = [(16, 8, 32), (130, 200, 72), (150, 67, 45), (1, 300, 33)]
LAYOUTS = {"x_wt": (False, False), "dy_w": (False, True), "dyt_x": (True, True)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_products(kernels, shape, layout, kernel):
    m, n, k = shape
    dtype = torch.bfloat16 if m % 2 == 0 else torch.float16
    across_a, across_b = LAYOUTS[layout]
    a, b = _operand(m, k, dtype, across_a), _operand(n, k, dtype, across_b)
    residual = torch.randn(m, n + 8).to(dtype)[:, :n]
    Case(a, b, bias=[torch.randn(n).to(dtype), None], residual=residual, kernel=kernel).check(kernels)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_unaligned_rows(kernels, layout, kernel):
    across_a, across_b = LAYOUTS[layout]
    for skew in (8, 3):
        a, b = (_operand(lines, 80, torch.float16, across, skew) for lines, across in ((40, across_a), (56, across_b)))
        Case(a, b, kernel=kernel).check(kernels)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_products_added_before_rounding(kernels, kernel):
    a, a2 = (_operand(70, 48, torch.bfloat16) for _ in range(2))
    b, b2 = (_operand(136, 48, torch.bfloat16, across=True) for _ in range(2))
    Case(a, b, b2, a2, kernel=kernel).check(kernels)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(kernels, gated, activation, dtype, kernel):
    m, n, k = 70, 104, 40
    a, b, b_gate = _operand(m, k, dtype), _operand(n, k, dtype), _operand(n, k, dtype) if gated else None
    bias = [torch.randn(n).to(dtype), torch.randn(n).to(dtype) if gated else None]
    case = Case(a, b, b_gate, epilogue=ACTIVATION, activation=activation, dropout_p=0.3, bias=bias, kernel=kernel)
    case.check(kernels)
    case.wants, case.dropout_p = "c", 0.0
    case.check(kernels)


@pytest.mark.parametrize("kernel", [*KERNELS, "epilogue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activation_gradients(kernels, gated, activation, dtype, kernel):
    # Two row blocks of sums, columns that fill no unit.
    m, n, k = 140, 100, 40
    a, b = _operand(m, k, dtype), _operand(n, k, dtype, across=True)
    pre, gate = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype) if gated else None
    options = {"epilogue": ACTIVATION_GRAD, "activation": activation, "kernel": kernel}
    Case(a, b, dropout_p=0.25, pre=pre, gate=gate, **options).check(kernels)
    Case(a, b, pre=pre, gate=gate, wants="dpre dgate", **options).check(kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_the_epilogue_of_products_in_memory(kernels, gated, dtype):
    m, n, k = 66, 140, 24
    a, b, b_gate = _operand(m, k, dtype), _operand(n, k, dtype), _operand(n, k, dtype) if gated else None
    options = {"epilogue": ACTIVATION, "activation": "silu", "dropout_p": 0.4, "kernel": "epilogue"}
    Case(a, b, b_gate, bias=[None, torch.randn(n).to(dtype) if gated else None], **options).check(kernels)
    Case(a, b, residual=torch.randn(m, n).to(dtype), kernel="epilogue").check(kernels)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slices_are_added_in_order(kernels, kernel):
    # 9 and 5 steps: slices of unequal length, the last ones empty for sm90.
    a, b = _operand(40, 270, torch.bfloat16, across=True), _operand(72, 270, torch.bfloat16, across=True)
    case = Case(a, b, slices=4, kernel=kernel)
    case.check(kernels)
    assert torch.equal(case.run(kernels)["c"], case.run(kernels)["c"])


def test_no_terms_leave_the_bias(kernels):
    for kernel in ("sm80", "epilogue"):
        bias = torch.randn(24).half()
        case = Case(torch.empty(3, 0).half(), torch.empty(24, 0).half(), bias=[bias, None], kernel=kernel)
        assert torch.equal(case.run(kernels)["c"], bias.expand(3, 24))


def test_a_row_does_not_depend_on_the_others(kernels):
    a, b = _operand(131, 72, torch.bfloat16), _operand(40, 72, torch.bfloat16)
    for kernel in KERNELS:
        whole = Case(a, b, kernel=kernel).run(kernels)["c"]
        assert torch.equal(whole[130:], Case(a[130:], b, kernel=kernel).run(kernels)["c"])
        gated = Case(a, b, b, epilogue=ACTIVATION, kernel=kernel).run(kernels)
        assert torch.equal(gated["pre"], whole) and torch.equal(gated["gate"], whole)


@pytest.mark.parametrize("shape", [(5, 130), (300, 70), (9000, 12)], ids=lambda s: "x".join(map(str, s)))
def test_column_sums(kernels, shape):
    for skew, dtype in ((0, torch.bfloat16), (8, torch.float16), (1, torch.float16)):
        x = _operand(*shape, dtype, skew=skew)
        partial = torch.full((kernels.sum_chunks(shape[0]), shape[1]), torch.nan)
        sums = torch.full(shape[1:], torch.nan, dtype=dtype)
        pointers = partial.data_ptr(), sums.data_ptr()
        kernels.column_sum(dtype == torch.float16, x.data_ptr(), x.stride(0), *shape, *pointers)
        assert_accurate(sums, x.sum(0), x.double().sum(0), "sums", terms=shape[0])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1000, 300, 77, 1), (2500, 4000, 64, 3), (129, 1200, 1000, 16)])
def test_every_tile_and_step_is_visited_once(kernels, shape):
    m, n, k, slices = shape
    items = kernels.work(m, n, k, slices, None)
    found = torch.empty(items, 5, dtype=torch.int64)
    kernels.work(m, n, k, slices, found.data_ptr())
    rows, columns, steps = (-(-extent // tile) for extent, tile in ((m, 128), (n, 128), (k, 32)))
    visits = torch.zeros(rows, columns, steps, dtype=torch.int64)
    for row, column, _, begin, end in found.tolist():
        visits[row, column, begin:end] += 1
    assert visits.eq(1).all()
    # Tiles that run at the same time share operands: 64 of them lie within 8 row blocks.
    if slices == 1 and items >= 64:
        assert found[:64, 0].max() < 8


def test_slices_fill_a_gpu_and_stay_long(kernels):
    assert kernels.slices_of(768, 768, 16384, 128, 128) == 3
    assert kernels.slices_of(128, 128, 16384, 128, 128) == 16
    assert kernels.slices_of(128, 128, 1024, 128, 128) == 2
    assert kernels.slices_of(4096, 4096, 16384, 128, 128) == 1


@pytest.mark.parametrize("chunks", [4, 8, 16])
def test_shared_memory_chunks_meet_no_bank_twice(kernels, chunks):
    place = lambda row, chunk: kernels.swizzled_chunk(chunks, row, chunk)
    assert {place(r, c) for r in range(32) for c in range(chunks)} == set(range(32 * chunks))
    # Eight lanes of ldmatrix: consecutive rows at one chunk. Eight lanes of cp.async: consecutive chunks.
    for r in range(0, 32, 8):
        for c in range(chunks):
            assert len({place(r + i, c) % 8 for i in range(8)}) == 8
    for i in range(0, 32 * chunks, 8):
        assert len({place((i + j) // chunks, (i + j) % chunks) % 8 for j in range(8)}) == 8


@pytest.mark.parametrize("columns", [32, 64])
def test_staged_accumulators_meet_no_bank_twice(kernels, columns):
    units = columns // 8
    offsets = {kernels.stage_offset(columns, r, u) for r in range(16) for u in range(units)}
    assert offsets == set(range(0, 16 * columns, 8))
    for unit in range(units):
        for first in range(0, 16, 4):  # half a warp stores pairs: four rows, eight columns
            words = [kernels.stage_offset(columns, first + r, unit) + c for r in range(4) for c in range(8)]
            assert len({word % 32 for word in words}) == 32
