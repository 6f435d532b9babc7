"""No function of the built core holds an instruction that the processor may lack when it is called."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from instruction_scan import NAMESPACES, tiles_left_configured, violations

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "fastattn" / "_C.so"
# Beside the linked core: weak symbols of which the linker happened to keep the harmless copy are still found in the objects.
BUILT = [path for path in (CORE, *sorted(ROOT.glob("build/temp*/cpu/*.o"))) if path.exists()]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are x86-64's")


@pytest.mark.skipif(not BUILT, reason="the C++ core is not built")
def test_instructions_stay_in_their_target() -> None:
    assert shutil.which("objdump"), "objdump is part of binutils, without which the core was not built here"
    found = [f"{path.name}: {function}: {instruction}" for path in BUILT for function, instruction in violations(path)]
    assert not found, "\n".join(found[:20])


@pytest.mark.skipif(not BUILT, reason="the C++ core is not built")
def test_tile_state_is_released_where_it_is_configured() -> None:
    assert not tiles_left_configured(BUILT[0])


@pytest.mark.skipif(not BUILT, reason="the C++ core is not built")
def test_every_target_is_there_to_be_scanned() -> None:
    """A stripped core, or one whose kernels lost their namespaces, would pass the scan unseen."""
    symbols = subprocess.run(["nm", "--demangle", str(BUILT[0])], capture_output=True, text=True, check=True).stdout
    for target in NAMESPACES:
        assert symbols.count(f"fastattn::{target}::") > 50, target


# Each mistake as it would be made: what the scan must name, and the source with which it happens.
PLANTED = {
    "a weak function of a header": (
        {"float shared_sum<float>(float const*)"},
        """
        #pragma GCC target("avx512f")
        template <class T> __attribute__((noinline)) T shared_sum(const T* x) {
          return _mm512_reduce_add_ps(_mm512_loadu_ps(x));
        }
        namespace fastattn { namespace avx512 { float sum(const float* x) { return shared_sum(x); } } }
        """,
    ),
    "mask registers alone": (
        {"fastattn::avx2::both(unsigned short, unsigned short)"},
        """
        #pragma GCC target("avx512f")
        namespace fastattn {
        namespace avx2 { int both(unsigned short a, unsigned short b) { return _kortestz_mask16_u8(a, b); } }
        }
        """,
    ),
    "sixteen more registers": (
        {"fastattn::avx2::high(float*)"},
        """
        #pragma GCC target("avx512f,avx512vl")
        namespace fastattn {
        namespace avx2 { void high(float* x) { asm volatile("vmovups %0, %%xmm17" : : "m"(*x)); } }
        namespace avx512 { void high(float* x) { asm volatile("vmovups %0, %%xmm17" : : "m"(*x)); } }
        }
        """,
    ),
    "AVX in what everyone runs": (
        {"fastattn::scalar::twice(double)", "static_sum"},
        """
        #pragma GCC target("avx2,fma")
        namespace fastattn { namespace scalar { double twice(double x) { return x + x; } } }
        namespace fastattn { namespace avx2 { double twice(double x) { return x + x; } } }
        extern "C" double static_sum(double x) { return x + 1; }
        """,
    ),
    "SSE4 in the baseline": (
        {"fastattn::scalar::down(double)"},
        """
        #pragma GCC target("sse4.1")
        namespace fastattn { namespace scalar { double down(double x) { return __builtin_floor(x); } } }
        """,
    ),
    "bfloat16 products where only AVX-512 is promised": (
        {"fastattn::avx512::dot(float*)"},
        """
        #pragma GCC target("avx512f,avx512bf16")
        namespace fastattn {
        namespace avx512 { void dot(float* x) { asm volatile("vdpbf16ps %%zmm1, %%zmm2, %%zmm3" : : : "memory"); } }
        namespace avx512_bf16 { void dot(float* x) { asm volatile("vdpbf16ps %%zmm1, %%zmm2, %%zmm3" : : : "memory"); } }
        }
        """,
    ),
    "an extension of no target": (
        {"fastattn::amx::dot(float*)"},
        """
        namespace fastattn {
        namespace amx { void dot(float* x) { asm volatile("vpdpbusd %%zmm1, %%zmm2, %%zmm3" : : : "memory"); } }
        }
        """,
    ),
    "tiles in the emulation": (
        {"fastattn::amx_emulated::clear()"},
        """
        namespace fastattn {
        namespace amx { void clear() { asm volatile("tilezero %%tmm1" : :); } }
        namespace amx_emulated { void clear() { asm volatile("tilezero %%tmm1" : :); } }
        }
        """,
    ),
}


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("objdump")), reason="needs g++ and objdump")
@pytest.mark.parametrize("mistake", PLANTED)
def test_the_scan_finds(mistake: str, tmp_path: Path) -> None:
    expected, source = PLANTED[mistake]
    (tmp_path / "planted.cpp").write_text("#include <immintrin.h>\n" + source)
    command = ["g++", "-std=c++17", "-O2", "-c", "planted.cpp", "-o", "planted.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert {function for function, _ in violations(tmp_path / "planted.o")} == expected


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("objdump")), reason="needs g++ and objdump")
def test_the_scan_finds_tiles_left_configured(tmp_path: Path) -> None:
    source = """
    extern "C" void leaves(void* c) { asm volatile("ldtilecfg (%0)" : : "r"(c)); }
    extern "C" void clean(void* c) { asm volatile("ldtilecfg (%0); tilerelease" : : "r"(c)); }
    struct TileScope {
      __attribute__((noinline)) TileScope() { asm volatile("ldtilecfg (%0)" : : "r"(this)); }
      ~TileScope() { asm volatile("tilerelease"); }
    };
    extern "C" void scoped() { TileScope scope; }
    extern "C" void kept() { new TileScope; }
    """
    (tmp_path / "planted.cpp").write_text(source)
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", "planted.cpp", "-o", "planted.so"], cwd=tmp_path, check=True)
    assert tiles_left_configured(tmp_path / "planted.so") == ["leaves", "kept"]
