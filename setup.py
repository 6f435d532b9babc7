"""Builds the compiled half of fastattn; everything else about the package is in pyproject.toml.

Three shared objects, each optional, all through one generated ninja file:

* ``fastattn/_C.so``      C++ operators behind LibTorch's stable ABI: no Python symbols, loads in torch >= 2.10 and any Python;
* ``fastattn/_native*.so``  the pybind11 module (this Python only): ISA facts and forcing;
* ``fastattn/_cuda.so``   CUDA operators behind the same ABI, if nvcc is found. Neither a GPU nor a CUDA build of torch is
  needed to build or to load it.

A missing compiler (or torch at build time) makes a pure-Python install and one line that says so.

Environment: FASTATTN_BUILD_CPP=0 builds nothing;
FASTATTN_BUILD_CUDA=0/1/only forces CUDA off, or on (then a failure is an error), or builds nothing else;
FASTATTN_CUDA_ARCHS (default "80;90a"; see cuda_architectures); MAX_JOBS; CXX; NVCC;
FASTATTN_SANITIZE=address,undefined for the C++ core under sanitizers, never in place (tests/sanitize.py, `make sanitize`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
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


def cuda_architectures() -> list[str]:
    """FASTATTN_CUDA_ARCHS, such as "80;86;89;90a;120".

    The default has A100 (its code also runs on 86 and 89) and Hopper, whose kernels need the "a"; what is newer compiles the
    PTX of the oldest when it is loaded.
    """
    archs = re.split(r"[;, ]+", os.environ.get("FASTATTN_CUDA_ARCHS") or "80;90a")
    if bad := [arch for arch in archs if not re.fullmatch(r"(8[0-9]|9[0-9]|1[0-9][0-9])[af]?", arch)]:
        raise SystemExit(
            f"FASTATTN_CUDA_ARCHS: {', '.join(bad)} is not an architecture from 80 on, such as 80, 90a or 120"
        )
    return sorted({"90a" if arch == "90" else arch for arch in archs}, key=lambda arch: int(arch.rstrip("af")))


def cuda_sources(archs: list[str]) -> dict[Path, list[str]]:
    """Each .cu with the architectures that it is compiled for: ``*_sm90*`` needs 90a and is left out without it."""
    found = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if "_sm90" not in source.stem:
            found[source] = archs
        elif "90a" in archs:
            found[source] = ["90a"]
    return found


def gencode(archs: list[str]) -> str:
    """Machine code for each, and PTX of the first, for devices that are newer; that of 90a would serve none."""
    options = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if archs[0].isdigit():
        options.append(f"-gencode arch=compute_{archs[0]},code=compute_{archs[0]}")
    return " ".join(options)


def cuda_flags(cxx: str, torch_dir: Path, archs: list[str]) -> list[str]:
    flags = [
        f"-ccbin {cxx.split()[0]} -std=c++17 -O3 -lineinfo -Xfatbin=-compress-all -Xcompiler -fPIC,-fvisibility=hidden"
    ]
    flags += [STABLE_ABI, f"-I{ROOT / 'csrc'}", f"-isystem {torch_dir / 'include'}"]
    flags.append(f"'-DFASTATTN_CUDA_ARCHS=\"{';'.join(archs)}\"'")
    return flags + (["-DFASTATTN_CUDA_SM90"] if "90a" in archs else [])


@dataclass(frozen=True)
class SharedObject:
    """``sources`` with the flags that each is compiled with beyond the common ones."""

    name: str
    sources: dict[Path, str]
    linker: str
    libraries: str


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
        native = {ROOT / "csrc" / "native" / "native.cpp": " ".join(includes + python + defines)}
        self.ninja(
            "cpu",
            f"{cxx} {' '.join(CXX_FLAGS)} {STABLE_ABI}",
            [
                SharedObject("_C.so", dict.fromkeys(core, " ".join(includes)), f"{linker} -Wl,-soname,_C.so", link),
                SharedObject(f"_native{suffix}", native, f"{linker} -Wl,-rpath,'$$ORIGIN'", "_C.so"),
            ],
        )

    def build_cuda(self, cxx: str, torch_dir: Path) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise OSError("nvcc was not found")
        archs = cuda_architectures()
        sources = {source: gencode(own) for source, own in cuda_sources(archs).items()}
        sources[ROOT / "csrc" / "ops" / "tensor.cpp"] = ""
        link = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10 -ldl"
        # The runtime is linked in: the object loads where no CUDA is installed, and says so when it is called.
        self.ninja(
            "cuda",
            f"{nvcc} {' '.join(cuda_flags(cxx, torch_dir, archs))}",
            [SharedObject("_cuda.so", sources, f"{nvcc} -shared -cudart static", link)],
        )

    def ninja(self, name: str, compile_command: str, objects: list[SharedObject]) -> None:
        build_dir = Path(self.build_temp).resolve() / name
        build_dir.mkdir(parents=True, exist_ok=True)
        depfile = "-MD -MF $out.d"
        lines = [
            "ninja_required_version = 1.5",
            f"rule compile\n  command = {compile_command} $flags {depfile} -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
            "rule link\n  command = $linker -o $out $in $libs\n  description = link $out",
        ]
        for target in objects:
            compiled = []
            for source, flags in target.sources.items():
                out = f"{target.name}.{source.parent.name}.{source.stem}.o"
                lines.append(f"build {out}: compile {source}\n  flags = {flags}")
                compiled.append(out)
            linked = target.libraries if target.libraries == "_C.so" else ""
            lines.append(
                f"build {target.name}: link {' '.join([*compiled, linked]).strip()}\n  linker = {target.linker}"
            )
            lines.append(f"  libs = {'' if linked else target.libraries}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir), "-j", jobs], check=True)
        self.package_dir().mkdir(parents=True, exist_ok=True)
        for target in objects:
            # Replace, never overwrite: a running process may have the old file mapped.
            fresh = self.package_dir() / (target.name + ".new")
            shutil.copy2(build_dir / target.name, fresh)
            os.replace(fresh, self.package_dir() / target.name)


setup(ext_modules=[Extension("fastattn._C", [])], cmdclass={"build_ext": NinjaBuild})
