"""Choices of configurations: what a choice distinguishes, what it takes, and what a measurement put in its place.

A function of ``configs.py`` under ``@choice(...)`` is enumerable: its parameters and the classes of values that it tells apart are
the decorator's, and values reach the function as the representative of their class. So ``points`` lists every configuration
that can be launched (``tests/triton`` compiles them all), and one measured on the user's GPU can stand in for it.

    @choice(head_dim=(16, 32, 64, 128, 256), dtype=DTYPES, extras=BOTH)
    def attention_forward(head_dim, dtype, extras, arch) -> Attention: ...

    @attention_forward.candidates
    def _(head_dim, dtype, extras, arch) -> Iterator[Attention]: ...

``python -m fastattn tune`` times the candidates and writes a JSON file; nothing is timed otherwise. It is read once per
architecture: the file that ``FASTATTN_TUNED`` names ("off": none), else ``tuned_path(arch)`` if it exists. A file that does not fit
(schema, architecture, Triton's version, a point or a configuration that this version does not have) is a ValueError.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1

#: What choices mostly distinguish: float16 belongs to bfloat16's class, its tiles have the same bytes.
DTYPES = (torch.bfloat16, torch.float32)
BOTH = (False, True)

#: Shared memory of one program in KiB by compute capability (CUDA programming guide); chips that are not listed have at least the
#: smallest of these.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_SHARED_AMD = 64  # LDS of CDNA 3


@dataclass(frozen=True)
class Arch:
    """What a configuration depends on: ``kind`` is "cuda" (``number`` 80, 90, ...), "hip" (gfx942) or "interpreter" (both 0)."""

    kind: str
    number: int = 0

    @property
    def name(self) -> str:
        return {"cuda": f"sm_{self.number}", "hip": "gfx942"}.get(self.kind, self.kind)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may take."""
        kib = _SHARED_AMD if self.kind == "hip" else _SHARED.get(self.number, min(_SHARED.values()))
        return kib * 1024

    @staticmethod
    def of(name: str) -> Arch:
        """The converse of ``name``."""
        return Arch("cuda", int(name[3:])) if name.startswith("sm_") else Arch("hip")


Key = tuple[Any, ...]
#: Every choice by name, in the order of definition.
CHOICES: dict[str, Choice] = {}


def classify(value: Any, representatives: Sequence[Any]) -> Any:
    """The representative of ``value``'s class: itself; the next larger number, or the largest; bfloat16 for float16."""
    if value in representatives:
        return value
    if isinstance(value, torch.dtype):
        if value == torch.float16 and torch.bfloat16 in representatives:
            return torch.bfloat16
    elif isinstance(value, int) and not isinstance(value, bool):
        return min((known for known in representatives if known >= value), default=max(representatives))
    raise ValueError(f"{value!r} belongs to none of {representatives}")


class Choice:
    """A function (one argument per parameter of ``domain``, positional, and the ``Arch`` last) -> configuration, or None where
    the kernel is not for this point. Configurations are frozen dataclasses."""

    def __init__(self, function: Callable[..., Any], domain: Mapping[str, Sequence[Any]]) -> None:
        expected = (*domain, "arch")
        if tuple(inspect.signature(function).parameters) != expected:
            raise TypeError(f"{function.__name__}: its parameters must be {', '.join(expected)}")
        self.name = function.__name__
        self.domain = dict(domain)
        self.__doc__ = function.__doc__
        self._function = function
        self._candidates: Callable[..., Iterator[Any]] | None = None
        self._taken: dict[Key, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        if _asked is not None:
            _asked.append((self, self.point(*arguments[:-1]), arguments[-1]))
        try:
            return self._taken[arguments]
        except KeyError:
            arch = arguments[-1]
            config = self.at(self.point(*arguments[:-1]), arch)
            self._taken[arguments] = config
            return config

    def point(self, *values: Any) -> Key:
        """``values`` as representatives of their classes."""
        return tuple(classify(value, known) for value, known in zip(values, self.domain.values(), strict=True))

    def shipped(self, point: Key, arch: Arch) -> Any:
        """What the function itself says."""
        return self._function(*point, arch)

    def at(self, point: Key, arch: Arch) -> Any:
        """What is launched at ``point``: on trial, measured, or shipped, in this order."""
        if _trial is not None and _trial[:3] == (self, point, arch):
            return _trial[3]
        measured = _measured(arch).get((self.name, point))
        return self.shipped(point, arch) if measured is None else measured

    def points(self, arch: Arch) -> Iterator[tuple[Key, Any]]:
        """Every point with its shipped configuration, where there is one."""
        for point in itertools.product(*self.domain.values()):
            config = self.shipped(point, arch)
            if config is not None:
                yield point, config

    def candidates(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Decorator: what ``tune`` may try at a point (same arguments), beside the shipped configuration."""
        self._candidates = function
        return function

    def possible(self, point: Key, arch: Arch) -> list[Any]:
        """The shipped configuration and the candidates, each once."""
        found = [self.shipped(point, arch)]
        if self._candidates is not None and found[0] is not None:
            found += self._candidates(*point, arch)
        return list(dict.fromkeys(found))

    def described(self, point: Key) -> dict[str, Any]:
        """``point`` as JSON: {parameter: value}, dtypes by name."""
        values = (str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for value in point)
        return dict(zip(self.domain, values, strict=True))


def choice(**domain: Sequence[Any]) -> Callable[[Callable[..., Any]], Choice]:
    """Decorator: ``domain`` gives, in the order of the function's parameters, the classes that it tells apart."""

    def decorate(function: Callable[..., Any]) -> Choice:
        CHOICES[function.__name__] = Choice(function, domain)
        return CHOICES[function.__name__]

    return decorate


def config_as_json(config: Any) -> dict[str, Any]:
    """A configuration by its class and fields."""
    return {"kind": type(config).__name__, **asdict(config)}


#: (choice, point, arch, configuration) while ``trying``.
_trial: tuple[Choice, Key, Arch, Any] | None = None
_asked: list[tuple[Choice, Key, Arch]] | None = None


@contextmanager
def trying(chosen: Choice, point: Key, arch: Arch, config: Any) -> Iterator[None]:
    """Within it ``config`` is launched at that one point."""
    global _trial
    _trial = (chosen, point, arch, config)
    chosen._taken.clear()
    try:
        yield
    finally:
        _trial = None
        chosen._taken.clear()


@contextmanager
def asking() -> Iterator[list[tuple[Choice, Key, Arch]]]:
    """Collects what is asked within it: (choice, point, arch), in order, also several times."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


#: By architecture: {(choice, point): configuration} of the file in force, once it has been read.
_files: dict[Arch, dict[tuple[str, Key], Any]] = {}


def tuned_path(arch: Arch) -> Path:
    """Where ``tune`` writes and later processes look: one file per architecture and version of Triton, which places registers."""
    named = os.environ.get("FASTATTN_TUNED", "")
    if named and named != "off":
        return Path(named).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "fastattn" / f"tuned-{arch.name}-triton-{triton_version()}.json"


def triton_version() -> str:
    import triton

    return str(triton.__version__).partition("+")[0]


def forget_measured() -> None:
    """Read the file anew at the next choice."""
    _files.clear()
    for chosen in CHOICES.values():
        chosen._taken.clear()


def path_in_force(arch: Arch) -> Path | None:
    """The file of measured configurations for ``arch``, None if the shipped ones are used."""
    named = os.environ.get("FASTATTN_TUNED", "")
    if arch.kind == "interpreter" or named == "off":
        return None
    path = tuned_path(arch)
    # A file that was named must be there; the default one need not.
    return path if named or path.exists() else None


def _measured(arch: Arch) -> dict[tuple[str, Key], Any]:
    if arch not in _files:
        path = path_in_force(arch)
        _files[arch] = {} if path is None else read_tuned(path, arch)
    return _files[arch]


def read_tuned(path: Path, arch: Arch) -> dict[tuple[str, Key], Any]:
    """{(choice, point): configuration} of a file that ``tune`` wrote on ``arch``. ValueError saying what does not fit."""

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"{path}: {reason}. Run `python -m fastattn tune` again, delete the file, or set FASTATTN_TUNED=off"
        )

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise refuse(f"not a readable JSON file ({error})") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise refuse(f"not a file of tuned configurations of schema {SCHEMA}")
    for name, here in (("arch", arch.name), ("triton", triton_version())):
        if content.get(name) != here:
            raise refuse(f"measured for {name} {content.get(name)}, this is {here}")
    found = {}
    for entry in content.get("entries", ()):
        name = entry.get("choice")
        if name not in CHOICES:
            raise refuse(f"no choice {name!r} in this version of fastattn")
        chosen = CHOICES[name]
        points = [point for point, _ in chosen.points(arch) if chosen.described(point) == entry.get("at")]
        if not points:
            raise refuse(f"{name} has no point {entry.get('at')}")
        configs = [c for c in chosen.possible(points[0], arch) if config_as_json(c) == entry.get("config")]
        if not configs:
            raise refuse(f"{name} at {entry['at']}: {entry.get('config')} is no candidate of this version")
        found[(name, points[0])] = configs[0]
    return found
