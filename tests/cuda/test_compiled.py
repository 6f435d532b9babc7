"""Every CUDA kernel, compiled for GPUs that are not here: nothing spills, shared memory fits, the tensor cores' best instructions.

What is compiled is what setup.py would compile (``compiled.py``); a new file of csrc/cuda is taken up by its name. A spread runs
always, everything for every architecture with the slow tests.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compiled
from compiled import Binary

pytestmark = [
    pytest.mark.skipif(compiled.nvcc() is None, reason="nvcc was not found"),
    pytest.mark.skipif(compiled.disassembler() is None, reason="nvdisasm was not found (Triton's wheel has it)"),
]

#: Of every kind of kernel one file, the architecture that it is most for.
_SPREAD = [
    ("norm", "80"),
    ("norm_sm90", "90a"),
    ("attention_decode", "90a"),
    ("attention_sm80_forward", "80"),
    ("attention_sm90_forward", "90a"),
    ("attention_sm90_backward_sums", "90a"),
    ("gemm_sm80", "86"),
    ("gemm_sm90", "90a"),
]
_ARCHITECTURES = ("80", "86", "89", "90a", "120")


def _check(source: Path, arch: str) -> None:
    wrong = [f"{b.kernel}: {fault}" for b in compiled.compiled(source, arch) for fault in compiled.faults(b)]
    assert not wrong, f"{source.name} for sm_{arch}\n" + "\n".join(wrong)


@pytest.mark.parametrize(("name", "arch"), _SPREAD, ids=lambda word: word)
def test_a_spread_of_files(name: str, arch: str) -> None:
    _check(compiled.ROOT / "csrc" / "cuda" / f"{name}.cu", arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "arch"),
    compiled.sources(_ARCHITECTURES) if compiled.nvcc() else [],
    ids=lambda word: word if isinstance(word, str) else word.stem,
)
def test_every_file(source: Path, arch: str) -> None:
    _check(source, arch)


_SPILLING = """
#include "cuda/common.cuh"
template <int kCount>
__global__ void __launch_bounds__(1024) spilling(float* x) {
  float kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i * 1024 + threadIdx.x] = kept[i] * kept[(i * 7 + 3) % kCount];
}
template __global__ void spilling<256>(float*);
template __global__ void spilling<4>(float*);
"""
_SHARED = """
#include "cuda/common.cuh"
extern __shared__ float pool[];
__global__ void noted(float* x) { fastattn::cuda::note_dynamic_shared<4096>(); pool[threadIdx.x] = x[0]; x[1] = pool[3]; }
__global__ void silent(float* x) { pool[threadIdx.x] = x[0]; x[1] = pool[3]; }
__global__ void fixed(float* x) { __shared__ float own[256]; own[threadIdx.x] = x[0]; x[1] = own[3]; }
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Callable[[str], dict[str, Binary]]:
    def compile(text: str) -> dict[str, Binary]:
        source = tmp_path / "probe.cu"
        source.write_text(text)
        return {binary.kernel: binary for binary in compiled.compiled(source, "80")}

    return compile


def test_a_spill_is_seen(kernels: Callable[[str], dict[str, Binary]]) -> None:
    found = kernels(_SPILLING)
    assert set(found) == {"spilling<256>", "spilling<4>"}
    assert not list(compiled.faults(found["spilling<4>"]))
    (fault,) = compiled.faults(found["spilling<256>"])
    assert re.match(r"spills: [1-9]\d* bytes stored", fault)
    assert found["spilling<256>"].instructions["STL"] > 0


def test_shared_memory_is_what_compiler_and_kernel_say(kernels: Callable[[str], dict[str, Binary]]) -> None:
    found = kernels(_SHARED)
    amounts = {name: (binary.static_shared, binary.dynamic_shared) for name, binary in found.items()}
    assert amounts == {"noted": (0, 4096), "silent": (0, None), "fixed": (1024, 0)}
    assert "does not say" in next(compiled.faults(found["silent"]))
    assert not list(compiled.faults(found["noted"]))


def _binary(file: str, arch: str, kernel: str = "attention_forward_kernel", **counts: int) -> Binary:
    binary = Binary(file, arch, kernel)
    binary.instructions |= counts
    return binary


def test_what_a_hopper_kernel_must_have() -> None:
    good = {"HGMMA": 8, "UTMALDG": 4, "USETMAXREG": 3}
    assert not list(compiled.faults(_binary("attention_sm90.cu", "90a", **good)))
    for missing in good:
        (fault,) = compiled.faults(_binary("attention_sm90.cu", "90a", **{**good, missing: 0}))
        assert missing in fault
    (fault,) = compiled.faults(_binary("attention_sm90_backward_sums.cu", "90a", "attention_sm90_sums_kernel", **good))
    assert "UBLKRED" in fault
    assert not list(compiled.faults(_binary("attention_sm90_backward_sums.cu", "90a", UBLKRED=1, **good)))
    (fault,) = compiled.faults(_binary("attention_sm90.cu", "90a", HMMA=1, **good))
    assert "mma.sync beside wgmma" in fault
    log = """ptxas info    : Compiling entry function '_Z4good' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function '_Z4slow'
ptxas info    : Compiling entry function '_Z4slow' for 'sm_90a'
"""
    found = compiled._resources("attention_sm90.cu", "90a", log)
    assert not found["_Z4good"].serialized and found["_Z4slow"].serialized.startswith("non wgmma instructions")
    assert not list(compiled.faults(_binary("attention_sm90.cu", "90a", "attention_delta_kernel")))
    assert len(list(compiled.faults(_binary("gemm_sm80.cu", "80")))) == 3
    assert not list(compiled.faults(_binary("gemm_sm80.cu", "80", HMMA=1, LDGSTS=1, LDSM=1)))
    large = _binary("norm.cu", "86")
    large.static_shared, large.dynamic_shared = 1024, 99 << 10
    (fault,) = compiled.faults(large)
    assert "the limit is 101376" in fault


def test_the_page_lists_kernels_and_keeps_what_is_above(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = _binary("attention_sm90.cu", "90a", "kernel<128>", HGMMA=8, UTMALDG=4, USETMAXREG=3)
    binary.registers, binary.dynamic_shared = 168, 200 << 10
    text = compiled.page([binary, _binary("norm.cu", "80", "norm")], "nvcc 13.0")
    assert "| `kernel<128>` | 168, 200, 8 HGMMA 4 TMA |" in text and "## csrc/cuda/norm.cu" in text
    monkeypatch.setattr(compiled, "PAGE", tmp_path / "kernels.md")
    compiled.PAGE.write_text("# Triton's\n\nabove\n")
    for _ in range(2):
        compiled.write_page(text)
        assert compiled.PAGE.read_text() == f"# Triton's\n\nabove\n\n{text}"
