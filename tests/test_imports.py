"""Fresh processes: what `import fastattn` needs, and what happens when something is missing."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _python(code: str, cwd: Path, *, path: tuple[Path, ...] = (ROOT,), **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def _forbid(*modules: str) -> str:
    """Code that makes importing ``modules`` fail as if they were not installed."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_import_needs_only_torch(tmp_path: Path) -> None:
    code = (
        _forbid(
            "triton", "numpy", "rich", "matplotlib", "gguf", "tokenizers", "transformers", "pytest", "pybind11", "ninja"
        )
        + """
import torch, fastattn
q = torch.randn(1, 2, 9, 8, requires_grad=True)
fastattn.attention(q, q, q, causal=True).sum().backward()
assert torch.isfinite(q.grad).all()
"""
    )
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_import_does_not_import_triton_or_any_extra(tmp_path: Path) -> None:
    code = """
    import json, sys, torch
    before = set(sys.modules)
    import fastattn
    print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
    """
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    extras = {"triton", "rich", "matplotlib", "gguf", "tokenizers", "transformers"}
    assert not extras & set(json.loads(done.stdout))


def _copy_without_binaries(target: Path) -> Path:
    shutil.copytree(ROOT / "fastattn", target / "fastattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


RUNS_ON_REFERENCE = """
import torch, fastattn
q = torch.randn(1, 2, 9, 8, requires_grad=True)
out = fastattn.attention(q, q, q, causal=True)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
out.sum().backward()
explanation = fastattn.explain(fastattn.attention, q, q, q)
assert explanation.implementation == "reference", explanation
print(dict(explanation.rungs)["cpu"])
try:
    fastattn.attention(q, q, q, implementation="cpu")
except NotImplementedError as error:
    print(error)
"""


def test_without_the_extension_everything_runs_and_one_warning_says_why(tmp_path: Path) -> None:
    done = _python(RUNS_ON_REFERENCE, tmp_path, path=(_copy_without_binaries(tmp_path),))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("_C.so is not built") == 2
    assert done.stderr.count("the C++ core is not built") == 1


def test_a_broken_extension_is_a_warning_not_a_crash(tmp_path: Path) -> None:
    root = _copy_without_binaries(tmp_path)
    (root / "fastattn" / "_C.so").write_bytes(b"\x7fELF not really")
    done = _python(RUNS_ON_REFERENCE, tmp_path, path=(root,))
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stdout and "does not load" in done.stderr


def test_info_survives_a_library_that_kills_the_process(tmp_path: Path) -> None:
    """A truncated library maps fine and dies of SIGBUS when its missing pages are touched."""
    core = ROOT / "fastattn" / "_C.so"
    if not core.exists():
        pytest.skip("needs the built core")
    root = _copy_without_binaries(tmp_path)
    content = core.read_bytes()
    (root / "fastattn" / "_C.so").write_bytes(content[: len(content) // 2])
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "info", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "_C.so" in done.stdout or "SIGBUS" in done.stdout


def test_unavailable_isa_is_said_and_ignored(tmp_path: Path) -> None:
    pytest.importorskip("fastattn._native")
    code = "import fastattn; from fastattn import _native; print(_native.current_isa(), *_native.available_isas())"
    done = _python(code, tmp_path, FASTATTN_ISA="sse9")
    current, *available = done.stdout.split()
    assert done.returncode == 0 and current in available and current != "scalar"
    assert "FASTATTN_ISA=sse9 is not one of" in done.stderr
    done = _python(code, tmp_path, FASTATTN_ISA="scalar")
    assert done.stdout.split()[0] == "scalar" and not done.stderr


def test_kernels_never_shadows_the_package_of_that_name() -> None:
    """`python` in the repository root puts it first on sys.path, and kernels/ lies there."""
    pytest.importorskip("kernels")
    done = _python("import kernels; print(kernels.__file__); kernels.get_kernel", ROOT, path=())
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") not in done.stdout
    code = "import fastattn.kernels.configs as configs; print(configs.__file__)"
    done = _python(code, ROOT, path=())
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == ROOT / "kernels" / "configs.py"


def test_current_directory_may_hold_anything(tmp_path: Path) -> None:
    """Modules of other people's with common names in the current directory change nothing."""
    for name in ("kernels", "ops", "reference", "nn", "benchmarks", "tests", "bench"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported by mistake')")
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "info", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
