"""What an install puts where: wheels, the link to kernels/, a machine without a compiler, the metadata."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources that a build needs, without binaries."""
    target = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("fastattn", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    return target


def _run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    done = _run(*build, cwd=tree, FASTATTN_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_wheel_has_the_kernels_inside_the_package_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"fastattn/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected and expected <= names
    assert {"fastattn/py.typed", "fastattn/ops/attention.py", "fastattn/nn/__init__.py"} <= names
    assert not {name.split("/")[0] for name in names} - {"fastattn", f"fastattn-{_version()}.dist-info"}


def _version() -> str:
    import fastattn

    return fastattn.__version__


def test_wheel_metadata_pins_no_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert f"Version: {_version()}\n" in metadata
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.10"]


def test_wheel_imports_from_the_repository_root_and_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    assert _run(*install, cwd=tmp_path).returncode == 0
    code = "import torch, fastattn, fastattn.kernels.configs; print(fastattn.attention(*[torch.ones(1, 1, 2, 4)] * 3).sum())"
    for cwd in (tmp_path, ROOT):
        done = _run(
            sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code, cwd=cwd, PYTHONPATH=str(site)
        )
        assert done.returncode == 0, done.stderr
        assert "tensor(8.)" in done.stdout


def test_without_a_compiler_the_build_succeeds_and_says_so_in_one_line(tree: Path) -> None:
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    done = _run(*command, cwd=tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastattn:")]
    assert lines == ["fastattn: pure-Python install: no C++ compiler found"]
    assert not list((tree / "fastattn").glob("*.so"))


def test_setup_imports_torch_only_to_build(tree: Path) -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = ["setup.py", "--quiet", "--version"]
exec(open("setup.py").read())
"""
    done = _run(sys.executable, "-c", f"__file__ = {str(tree / 'setup.py')!r}\n" + code, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(_version())


def test_the_core_has_no_python_symbols_and_needs_no_newer_torch_than_promised() -> None:
    core = ROOT / "fastattn" / "_C.so"
    if not core.exists() or shutil.which("nm") is None:
        pytest.skip("needs the built core and nm")
    undefined = subprocess.run(
        ["nm", "-D", "-u", "--demangle", str(core)], capture_output=True, text=True, check=True
    ).stdout
    assert " Py" not in undefined
    # The stable ABI of torch 2.10: C functions only, none of those that later versions added, no C++ of torch or c10.
    assert not [line for line in undefined.splitlines() if "at::" in line or "c10::" in line or "torch::" in line]
    assert "torch_exception_get_what" not in undefined
