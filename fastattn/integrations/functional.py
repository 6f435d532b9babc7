"""``torch.nn.functional``'s attention and norms answered by fastattn, in code that nobody wrote for it: :func:`patch`.

The names of ``torch.nn.functional`` are replaced while somebody is patching, by functions that ask whether the caller is. So
``F.layer_norm(x)``, ``nn.LayerNorm``, ``nn.MultiheadAttention`` and everything else that looks a name up there when it runs is
reached; ``from torch.nn.functional import layer_norm`` before the patch, ``torch.layer_norm`` and the fused evaluation path of
``nn.TransformerEncoderLayer`` (see :func:`fastattn.convert`) are not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from fastattn.ops._select import beats_reference
from fastattn.ops.attention import scaled_dot_product_attention, stands_for_alignment
from fastattn.ops.norm import layer_norm, rms_norm

__all__ = ["Patch", "patch"]


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return layer_norm(input, normalized_shape, weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    return rms_norm(input, normalized_shape, weight, eps)


#: Name in torch.nn.functional: (operation in the ladder, name of the first parameter, fastattn's function with torch's signature).
_REPLACED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "scaled_dot_product_attention": ("attention", "query", scaled_dot_product_attention),
    "layer_norm": ("layer_norm", "input", _layer_norm),
    "rms_norm": ("rms_norm", "input", _rms_norm),
}

#: How many patches the calling thread (or asyncio task) is within, and how many hold everywhere.
_within: ContextVar[int] = ContextVar("fastattn_patches", default=0)
_everywhere = 0
_holders = 0
_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_replacements: dict[str, Callable[..., Any]] = {}


def _overridden(arguments: tuple[Any, ...]) -> bool:
    """Whether a tensor subclass or a mode takes the call, but for masks that only stand for an alignment, which fastattn knows."""
    if not has_torch_function(arguments):
        return False
    return has_torch_function(tuple(x for x in arguments if not stands_for_alignment(x)))


def _replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    op, leading, ours = _REPLACED[name]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While a graph is traced the names are only there because of a patch; Dynamo cannot read a ContextVar.
        if not (torch.compiler.is_compiling() or _everywhere or _within.get()):
            return original(*args, **kwargs)
        first = args[0] if args else kwargs.get(leading)
        if (
            not isinstance(first, Tensor)
            or _overridden((*args, *kwargs.values()))
            or not beats_reference(op, first.device)
        ):
            return original(*args, **kwargs)
        try:
            return ours(*args, **kwargs)
        except (ValueError, TypeError, NotImplementedError):
            # Not fastattn's, or nobody's: torch computes it or says what is wrong, in its own words.
            return original(*args, **kwargs)

    return call


def _hold() -> None:
    """Put the replacements in place, if this is the first patch."""
    global _holders
    with _lock:
        _holders += 1
        if _holders > 1:
            return
        for name in _REPLACED:
            original = getattr(F, name)
            if _originals.get(name) is not original:  # the same functions again: compiled graphs stay valid
                _originals[name], _replacements[name] = original, _replacement(name, original)
            setattr(F, name, _replacements[name])


def _release() -> None:
    """Take them away with the last patch, but for a name that somebody else has replaced since: theirs stays."""
    global _holders
    with _lock:
        _holders -= 1
        if _holders > 0:
            return
        for name, replacement in _replacements.items():
            if getattr(F, name) is replacement:
                setattr(F, name, _originals[name])


class Patch(ContextDecorator):
    """What :func:`patch` returns: a context manager, a decorator, and ``start()`` and ``stop()``."""

    def __init__(self) -> None:
        self._tokens: list[Token[int]] = []
        self._started = False

    def __enter__(self) -> Patch:
        _hold()
        self._tokens.append(_within.set(_within.get() + 1))
        return self

    def __exit__(self, *_: object) -> None:
        _within.reset(self._tokens.pop())
        _release()

    def _recreate_cm(self) -> Patch:
        return Patch()

    def start(self) -> None:
        """Patch every thread of the process until ``stop()``."""
        global _everywhere
        if self._started:
            raise RuntimeError("patch: already started")
        _hold()
        with _lock:
            _everywhere += 1
        self._started = True

    def stop(self) -> None:
        """End what ``start()`` began."""
        global _everywhere
        if not self._started:
            raise RuntimeError("patch: not started")
        self._started = False
        with _lock:
            _everywhere -= 1
        _release()


def patch() -> Patch:
    """Let fastattn answer ``F.scaled_dot_product_attention``, ``F.layer_norm`` and ``F.rms_norm``.

    >>> with fastattn.patch():      # or @fastattn.patch() on a function: the calling thread or asyncio task
    ...     y = model(x)
    >>> patching = fastattn.patch()
    >>> patching.start()            # every thread, until
    >>> patching.stop()

    Signatures and meaning are torch's; one difference is that of :func:`fastattn.scaled_dot_product_attention` in rows whose
    keys are all masked. A call that fastattn has nothing faster for (a device without its kernels), does not take (a dtype, a
    tensor subclass) or finds wrong goes to what was there before: torch computes it or raises its own error. Patches nest; the
    last one to end puts back what the first one found. ``torch.compile`` keeps in a graph what held when it was traced, and
    traces again when the names change.
    """
    return Patch()
