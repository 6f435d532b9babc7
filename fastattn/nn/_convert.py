"""``convert``, ``conversion_report`` and ``revert``: fastattn in a model that exists.

A module is converted by changing its class, not by replacing it: fastattn.nn's classes derive from torch.nn's and add no
state. So the object, its parameters, hooks, flags and everything that refers to it (a parent, a second parent, an optimizer,
a list) stay as they are, the model itself can be the module that is converted, and ``revert`` puts the class back.
"""

from __future__ import annotations

import copyreg
import importlib
import re
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn.nn._fusion import activation_name
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.ffn import ACTIVATIONS, Sequential, feed_forward_at
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.ops._select import IMPLEMENTATIONS

__all__ = ["ConversionReport", "ConversionRow", "conversion_report", "convert", "revert"]

M = TypeVar("M", bound=nn.Module)

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Sequential: Sequential,
}

#: Other libraries' modules: package -> fastattn's module whose ``recognize(module)`` says what a module of theirs is, imported
#: when a model has one. It returns a Recognized, why the module is left (str), or None for what is no candidate.
INTEGRATIONS = {"transformers": "fastattn.integrations.huggingface_modules"}

#: Where a converted module keeps the class it had; its presence is what "converted" means.
_ORIGINAL = "_fastattn_original_class"

#: Where a converted module of another library keeps Recognized.settings.
SETTINGS = "_fastattn_settings"

#: Names under which other libraries write the same computations; reported so that nothing is left out in silence.
_LOOKALIKE = re.compile(r"(Attention|RMSNorm|LayerNorm|MLP|FeedForward)$")


class Recognized(NamedTuple):
    """A module of another library that ``replacement`` computes: a Module class that defines forward, and what it has to know of
    the instance (picklable)."""

    replacement: type[nn.Module]
    settings: Any


class ConversionRow(NamedTuple):
    """One module of a model: its path, the name of its (original) class, "swapped" or "left", and why."""

    name: str
    class_name: str
    status: str
    reason: str


class ConversionReport:
    """What :func:`convert` did to a model; ``str()`` is a table.

    Attributes:
        rows: one :class:`ConversionRow` for each module that fastattn replaces or that looks as if it could.
    """

    def __init__(self, rows: list[ConversionRow]) -> None:
        self.rows = rows

    @property
    def swapped(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.status == "swapped"]

    @property
    def left(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.status == "left"]

    def __str__(self) -> str:
        table = [("module", "class", "status", "reason")]
        table += [(row.name or "(the model)", row.class_name, row.status, row.reason) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]) for line in table
        ]
        lines = [line.rstrip() for line in lines]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.left)} left"])

    __repr__ = __str__


class _Picklable:
    """Makes instances of the classes that :func:`_subclass` builds picklable and copyable by what they were built from."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        _, replacement, original = type(self).__bases__
        return (_new_instance, (replacement, original), *reduced[2:])


_subclasses: dict[tuple[type, type], type[nn.Module]] = {}


def _subclass(replacement: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """``original``, a subclass of the torch.nn class that ``replacement`` is for, with the forward of ``replacement``."""
    if (replacement, original) not in _subclasses:
        bases = (_Picklable, replacement, original)
        _subclasses[replacement, original] = type(original.__name__, bases, {"__module__": original.__module__})
    return _subclasses[replacement, original]


def _new_instance(replacement: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    cls = _subclass(replacement, original)
    return cls.__new__(cls)


def _class_for(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    replacement = REPLACEMENTS[base]
    return replacement if type(module) is base else _subclass(replacement, type(module))


def _overridden(cls: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """Which methods of the replacement for ``base`` the classes between ``cls`` and ``base`` define themselves."""
    ours = {name for name, value in vars(REPLACEMENTS[base]).items() if callable(value) and not name.startswith("__")}
    between = cls.__mro__[: cls.__mro__.index(base)]
    return sorted({name for c in between for name in vars(c) if name in ours | {"forward", "__call__"}})


def _why_left(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why ``module``, an instance of ``base``, keeps its class; None if it can be converted."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        return f"parametrized ({', '.join(module.parametrizations)})"  # type: ignore[arg-type]
    if cls.__module__.startswith("torch.ao."):
        return f"{cls.__module__}.{cls.__name__} is a quantized module"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    overridden = _overridden(cls, base)
    if overridden:
        return f"subclass of nn.{base.__name__} with its own {', '.join(overridden)}"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, not a plain parameter"
    return _why_no_feed_forward(module) if base is nn.Sequential else None


def _why_no_feed_forward(sequential: nn.Module) -> str | None:
    """None if the Sequential holds a chain to fuse, else why the chain of its Linears is none."""
    modules = list(sequential.children())
    if any(feed_forward_at(modules, i) for i in range(len(modules))):
        return None
    activations = [m for m in modules if not isinstance(m, (nn.Linear, nn.Dropout)) and activation_name(m) is None]
    if activations:
        return f"{type(activations[0]).__name__} is none of the fused activations {', '.join(ACTIVATIONS)}"
    return "a module in it has hooks, a forward of its own or a weight that is no plain parameter"


def _looks_like_feed_forward(sequential: nn.Module) -> bool:
    """Whether some Linear is followed by one module, perhaps a Dropout, and a second Linear."""
    kinds = "".join(
        "L" if isinstance(m, nn.Linear) else "D" if isinstance(m, nn.Dropout) else "x" for m in sequential.children()
    )
    return re.search("LxD?L", kinds) is not None


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn class by which ``module`` is a candidate for conversion, or None."""
    for base in REPLACEMENTS:
        if isinstance(module, base):
            return base if base is not nn.Sequential or _looks_like_feed_forward(module) else None
    return None


def _recognize(module: nn.Module) -> Recognized | str | None:
    """What an integration says of ``module``, of a class of its library."""
    cls = type(module)
    integration = INTEGRATIONS.get(cls.__module__.partition(".")[0])
    if integration is None:
        return None
    found = importlib.import_module(integration).recognize(module)
    if not isinstance(found, Recognized):
        return found
    if parametrize.is_parametrized(module):
        return f"parametrized ({', '.join(module.parametrizations)})"  # type: ignore[arg-type]
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else found


def _convert_one(module: nn.Module) -> bool:
    """Give ``module`` its new class; False if it stays what it is."""
    base = _base_of(module)
    if base is not None:
        if _is_ours(module) or _why_left(module, base) is not None:
            return False
        replacement = _class_for(module, base)
    else:
        found = _recognize(module)
        if not isinstance(found, Recognized):
            return False
        replacement = _subclass(found.replacement, type(module))
        module.__dict__[SETTINGS] = found.settings
    module.__dict__[_ORIGINAL] = type(module)
    module.__class__ = replacement
    return True


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, tuple(REPLACEMENTS.values()))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def convert(model: M, *, implementation: str = "auto") -> M:
    """Make the torch.nn modules of ``model`` compute with fastattn, in place.

    Converted are LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoder, TransformerDecoder, their layers, and a
    Sequential with Linear → relu | gelu | silu → (Dropout →) Linear inside; of these classes themselves or of subclasses
    that inherit their forward. Of Hugging Face transformers also the RMSNorm, LayerNorm and MLP modules of their own, by
    what they compute (attention there: ``attn_implementation="fastattn"``). Parameters, ``state_dict``, hooks, training
    flags, device and the identity of every object stay; a module used twice is converted once. Modules already converted
    only take the new ``implementation``. Optimizers and compiled models go on working (torch.compile recompiles).

    Args:
        model: any module, which may itself be one of those.
        implementation: "auto" or the name of the implementation that every converted module must use.

    Returns:
        ``model``. :func:`conversion_report` says what was converted and what not, :func:`revert` undoes it.

    Raises:
        TypeError: ``model`` is not a module. ValueError: unknown implementation.
    """
    _check_model(model)
    allowed = ("auto", *IMPLEMENTATIONS)
    if implementation not in allowed:
        raise ValueError(f"implementation: got {implementation!r}, allowed are {', '.join(allowed)}")
    for module in list(model.modules()):
        if _ORIGINAL in module.__dict__ or _convert_one(module):
            module.implementation = implementation  # type: ignore[assignment]
    return model


def revert(model: M) -> M:
    """Undo :func:`convert`: every converted module is of its former class again. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the class of a converted module was changed since (``parametrize``, ``fully_shard``); nothing is
            reverted then.
    """
    _check_model(model)
    converted = [(name, module) for name, module in model.named_modules() if _ORIGINAL in module.__dict__]
    for name, module in converted:
        if not _is_converted_class(type(module), module.__dict__[_ORIGINAL]):
            changed = f"{type(module).__module__}.{type(module).__name__}"
            raise RuntimeError(f"{name or 'the model'} became a {changed} after it was converted; undo that first")
    for _, module in converted:
        module.__class__ = module.__dict__.pop(_ORIGINAL)
        for name in ("implementation", SETTINGS):
            module.__dict__.pop(name, None)
    return model


def _is_converted_class(cls: type[nn.Module], original: type[nn.Module]) -> bool:
    """Whether ``cls`` is what convert makes of ``original``."""
    if cls.__bases__[0] is _Picklable:
        return cls.__bases__[2] is original
    return REPLACEMENTS.get(original) is cls


def conversion_report(model: nn.Module) -> ConversionReport:
    """What of ``model`` computes with fastattn and what does not, and why; before or after :func:`convert`.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    rows = []
    for name, module in model.named_modules(remove_duplicate=False):
        original = module.__dict__.get(_ORIGINAL, type(module))
        status = _status(module)
        if status is not None:
            rows.append(ConversionRow(name, original.__name__, *status))
    return ConversionReport(rows)


def _status(module: nn.Module) -> tuple[str, str] | None:
    """("swapped" | "left", why) of one module, or None for a module that is not worth a row."""
    if _ORIGINAL in module.__dict__:
        return "swapped", _note(module)
    if _is_ours(module):
        return "swapped", f"was built as fastattn.nn.{type(module).__name__}"
    base = _base_of(module)
    if base is not None:
        return "left", _why_left(module, base) or "not converted yet: convert(model) does"
    found = _recognize(module)
    if found is not None:
        return "left", found if isinstance(found, str) else "not converted yet: convert(model) does"
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
        return ("left", "TorchScript modules are compiled code") if _LOOKALIKE.search(name) else None
    if _LOOKALIKE.search(name) and not type(module).__module__.startswith("fastattn."):
        return "left", f"{type(module).__module__}.{name} is not a torch.nn module"
    return None


def _note(module: nn.Module) -> str:
    """What is worth knowing of a converted module: a part that it calls instead of fusing."""
    if (
        isinstance(module, (TransformerEncoderLayer, TransformerDecoderLayer))
        and activation_name(module.activation) is None
    ):
        return "its activation is not fused: linear1, activation and linear2 run one by one"
    return ""
