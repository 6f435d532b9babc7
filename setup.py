"""Builds the compiled half of fastattn; everything else about the package is in pyproject.toml.

Three shared objects, each optional, all through one generated ninja file:

* ``fastattn/_C.so``      C++ operators behind LibTorch's stable ABI: no Python symbols, loads in torch >= 2.10 and any Python;
* ``fastattn/_native*.so``  the pybind11 module (this Python only): ISA facts and forcing;
* ``fastattn/_cuda.so``   CUDA operators behind the same ABI, if nvcc is found.

A missing compiler (or torch at build time) makes a pure-Python install and one line that says so.

Environment: FASTATTN_BUILD_CPP=0 builds nothing;
FASTATTN_BUILD_CUDA=0/1/only forces CUDA off, or on (then a failure is an error), or builds nothing else;
FASTATTN_CUDA_ARCHS (default "80;90;100"); MAX_JOBS; CXX; NVCC;
FASTATTN_SANITIZE=address,undefined for the C++ core under sanitizers, never in place (tests/sanitize.py, `make sanitize`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The oldest torch whose ABI the operators use (2.10): newer headers then hide newer symbols.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # gcc 12: its own AVX-512 intrinsics
]
SANITIZE = os.environ.get("FASTATTN_SANITIZE", "")
if SANITIZE:
    CXX_FLAGS += ["-O1", "-g1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # Checks as calls: written out, they make a target file take two minutes to compile.
    CXX_FLAGS += ["--param asan-instrumentation-with-call-threshold=0"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


class NinjaBuild(build_ext):
    """Writes ``build.ninja`` for all three objects, runs ninja, copies the results beside the package."""

    def run(self) -> None:
        if os.environ.get("FASTATTN_BUILD_CPP") == "0":
            return self.skip("FASTATTN_BUILD_CPP=0")
        if SANITIZE and self.inplace:
            raise SystemExit(
                "FASTATTN_SANITIZE: such a core loads only with the sanitizers' runtime, so it is not built in place"
            )
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if cxx is None or shutil.which(cxx.split()[0]) is None:
            return self.skip("no C++ compiler found")
        try:
            with warnings.catch_warnings():  # torch warns if numpy is missing; it is not needed here
                warnings.simplefilter("ignore")
                import torch
        except ImportError:
            return self.skip("torch is not importable in the build environment")
        wanted = os.environ.get("FASTATTN_BUILD_CUDA", "auto")
        if wanted != "only":
            try:
                self.build_cpu(cxx, Path(torch.__file__).parent)
            except (subprocess.CalledProcessError, OSError, ImportError) as error:
                return self.skip(f"the C++ core did not compile ({error})")
        if wanted == "0" or (find_nvcc() is None and wanted == "auto"):
            return None
        try:
            self.build_cuda(cxx, Path(torch.__file__).parent)
        except (subprocess.CalledProcessError, OSError) as error:
            if wanted != "auto":
                raise
            print(f"fastattn: no CUDA extension: it did not compile ({error})", file=sys.stderr)
        return None

    def skip(self, reason: str) -> None:
        print(f"fastattn: pure-Python install: {reason}", file=sys.stderr)
        return None

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.package_dir().glob("_*.so")]

    def package_dir(self) -> Path:
        return ROOT / "fastattn" if self.inplace else Path(self.build_lib).resolve() / "fastattn"

    def build_cpu(self, cxx: str, torch_dir: Path) -> None:
        import pybind11
        import torch

        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        includes = [f"-I{ROOT / 'csrc'}", f"-isystem {torch_dir / 'include'}"]
        python = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
        version = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True, check=True).stdout
        facts = {"COMPILER": version.splitlines()[0], "FLAGS": " ".join(CXX_FLAGS), "TORCH": torch.__version__}
        defines = [f"'-DFASTATTN_{key}=\"{value}\"'" for key, value in facts.items()]
        core = sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) + sorted((ROOT / "csrc" / "ops").glob("*.cpp"))
        link = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10"
        linker = f"{cxx} -shared" + (f" -fsanitize={SANITIZE}" if SANITIZE else "")
        self.ninja(
            "cpu",
            f"{cxx} {' '.join(CXX_FLAGS)} {STABLE_ABI}",
            [
                ("_C.so", core, includes, f"{linker} -Wl,-soname,_C.so", link),
                (
                    f"_native{suffix}",
                    [ROOT / "csrc" / "native" / "native.cpp"],
                    includes + python + defines,
                    f"{linker} -Wl,-rpath,'$$ORIGIN'",
                    "_C.so",
                ),
            ],
        )

    def build_cuda(self, cxx: str, torch_dir: Path) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise OSError("nvcc was not found")
        sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "ops" / "tensor.cpp"]
        archs = os.environ.get("FASTATTN_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
        gencode = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        flags = f"-ccbin {cxx.split()[0]} -std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
        includes = [f"-I{ROOT / 'csrc'}", f"-isystem {torch_dir / 'include'}"]
        link = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10 -ldl"
        # The runtime is linked in: the object loads where no CUDA is installed, and says so when it is called.
        self.ninja(
            "cuda",
            f"{nvcc} {flags} {gencode} {STABLE_ABI}",
            [("_cuda.so", sources, includes, f"{nvcc} -shared -cudart static", link)],
        )

    def ninja(
        self, name: str, compile_command: str, objects: list[tuple[str, list[Path], list[str], str, str]]
    ) -> None:
        """``objects``: (file name, sources, extra compile flags, link command, libraries)."""
        build_dir = Path(self.build_temp).resolve() / name
        build_dir.mkdir(parents=True, exist_ok=True)
        depfile = "-MD -MF $out.d"
        lines = [
            "ninja_required_version = 1.5",
            f"rule compile\n  command = {compile_command} $flags {depfile} -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
            "rule link\n  command = $linker -o $out $in $libs\n  description = link $out",
        ]
        for target, sources, flags, linker, libs in objects:
            compiled = []
            for source in sources:
                out = f"{target}.{source.parent.name}.{source.stem}.o"
                lines.append(f"build {out}: compile {source}\n  flags = {' '.join(flags)}")
                compiled.append(out)
            linked = [libs] if libs == "_C.so" else []
            implicit = f" {' '.join(linked)}" if linked else ""
            lines.append(f"build {target}: link {' '.join(compiled)}{implicit}\n  linker = {linker}")
            lines.append(f"  libs = {'' if linked else libs}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir), "-j", jobs], check=True)
        self.package_dir().mkdir(parents=True, exist_ok=True)
        for target, *_ in objects:
            # Replace, never overwrite: a running process may have the old file mapped.
            fresh = self.package_dir() / (target + ".new")
            shutil.copy2(build_dir / target, fresh)
            os.replace(fresh, self.package_dir() / target)


setup(ext_modules=[Extension("fastattn._C", [])], cmdclass={"build_ext": NinjaBuild})
