"""``python -m fastattn info``: what this installation is made of, and what is wrong with it.

Whatever can fail to import, or take the process down while loading (a cut-off shared object ends in SIGBUS), is looked
at in a child process that writes one JSON line per section. The parent needs only the standard library: it prints what
came back, and for the rest the exception, or the signal.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastattn.cli import machine
from fastattn.cli.table import print_table

PACKAGE = Path(__file__).resolve().parent.parent
#: Everything that fastattn can use; only torch is required.
PACKAGES = ("torch", "triton", "numpy", "transformers", "gguf", "tokenizers", "rich", "matplotlib", "pytest-benchmark")
#: Variables that change what runs, or how fast.
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD", "PYTHONPATH",
)  # fmt: skip
PROBE_SECONDS = 120
Facts = dict[str, Any]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def local_facts() -> Facts:
    """What can be said without importing anything that could be broken."""
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    variables.update({name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTATTN_")})
    return {
        "fastattn": {"version": _version("fastattn"), "path": str(PACKAGE), "commit": machine.git_commit()},
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": machine.cpu_model(), "cores": machine.cores(), "flags": machine.cpu_flags()},
        "environment": variables,
    }


def _torch_facts() -> Facts:
    import torch

    devices = [
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "version": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or torch.version.hip,
        "devices": devices,
    }


def _library_facts() -> Facts:
    """Which of the shared objects this process loaded; one that is missing, broken or of no use here says why."""
    from fastattn.ops import _library

    return {"_C": _library.load_errors.get("_C", "loaded"), "_cuda": _library.cuda_state()}


def _native_facts() -> Facts:
    import torch  # noqa: F401  _native links against _C.so, which links against torch's libraries

    import fastattn._native as _native

    return {
        "isas": _native.available_isas(),
        "isa": _native.current_isa(),
        "why": _native.isa_message(),
        "build": _native.build_facts(),
    }


def _ladder_facts() -> Facts:
    """The implementation that ``auto`` takes for a small float32 call of each operation, per device."""
    import torch

    from fastattn.cli import cases
    from fastattn.cli.explain import explain_call

    found: Facts = {}
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        found[device] = {}
        for op in cases.OPS:
            case = cases.quick_cases(op)[0]
            tensors = cases.make_tensors(case, torch.float32, torch.device(device))
            found[device][op] = explain_call(case, tensors, "auto").implementation
    return found


def _tuned_facts() -> Facts:
    """Per GPU, the file of measured configurations that is used there. Raises what reading it raises."""
    import torch

    from fastattn.kernels import choice, configs

    found: Facts = {}
    for index in range(torch.cuda.device_count()):
        arch = configs.arch_of_device(torch.device("cuda", index))
        path = choice.path_in_force(arch)
        count = 0 if path is None else len(choice.read_tuned(path, arch))
        found[f"cuda:{index}"] = "shipped configurations" if path is None else f"{count} configurations of {path}"
    return found


def _import_facts() -> Facts:
    """Raises what ``import fastattn`` raises."""
    import fastattn
    from fastattn import models, nn, ops, reference  # noqa: F401

    if fastattn.import_error is not None:
        raise fastattn.import_error
    return {"version": fastattn.__version__}


SECTIONS: dict[str, Callable[[], Facts]] = {
    "torch": _torch_facts,
    "import": _import_facts,
    "native": _native_facts,
    "libraries": _library_facts,
    "auto": _ladder_facts,
    "tuned": _tuned_facts,
}


def probe(sections: Sequence[str]) -> None:
    """Print each section as one JSON line: its facts, or {"error": text}."""
    for section in sections:
        try:
            facts = SECTIONS[section]()
        except BaseException as error:  # a broken package may raise anything, SystemExit included
            facts = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps({section: facts}), flush=True)


def probed_facts() -> Facts:
    """Every section, from a child process; where one dies, the section it died in says so and a new child does the rest."""
    facts: Facts = {}
    # The child finds this very package, wherever this process found it.
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    while missing := [name for name in SECTIONS if name not in facts]:
        command = [sys.executable, "-m", "fastattn", "info", "--probe", *missing]
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            out, err = child.communicate(timeout=PROBE_SECONDS)
            ending = f"exit code {child.returncode}"
            if child.returncode < 0:
                ending = f"the process died of {signal.Signals(-child.returncode).name}"
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            ending = f"no answer in {PROBE_SECONDS} s"
        for line in out.splitlines():
            if line.startswith("{"):
                facts.update(json.loads(line))
        if left := [name for name in missing if name not in facts]:
            last = err.strip().splitlines()[-1:] or [""]
            facts[left[0]] = {"error": f"{ending}. {last[0]}".strip(" .")}
    return facts


def collect() -> Facts:
    """Every fact, JSON-serializable; a section that could not be read is {"error": reason}."""
    facts = {**local_facts(), **probed_facts()}
    facts["problems"] = problems(facts)
    return facts


def problems(facts: Facts) -> list[str]:
    """What a user should act on, one sentence each; empty for a healthy install (an absent GPU is not a problem)."""
    found = []
    for section in SECTIONS:
        if "error" in facts[section]:
            found.append(f"{section}: {facts[section]['error']}")
    core = facts["libraries"].get("_C", "loaded")
    if core != "loaded":
        found.append(f"the C++ core is missing: {core}; calls run in plain PyTorch")
    cuda = facts["libraries"].get("_cuda", "")
    if "does not load" in cuda:
        found.append(cuda)
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "no" if value is None else str(value)


def render(facts: Facts) -> None:
    """Print ``collect()``'s facts as one table per section, and the problems last."""
    rows: list[tuple[str, str, str]] = []
    for section, entries in facts.items():
        if section == "problems":
            continue
        for index, (key, value) in enumerate(entries.items() or [("none", "")]):
            rows.append((section if index == 0 else "", key, _text(value)))
    styles = ["red" if row[1] == "error" else "" for row in rows]
    print_table(("section", "fact", "value"), rows, left=3, styles=styles)
    for problem in facts["problems"]:
        print(f"problem: {problem}")
    if not facts["problems"]:
        print("no problems found")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", nargs="+", choices=list(SECTIONS), help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    if args.probe:
        probe(args.probe)
        return 0
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        render(facts)
    return 0
