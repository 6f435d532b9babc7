"""Checks that several operations share. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


#: Numbers in memory and nothing more: any other class (sharded, quantized, fake) has an idea of its own of what a call is.
PLAIN = (Tensor, torch.nn.Parameter)


class ShapeError(ValueError, RuntimeError, AssertionError):
    """A shape that does not fit: a ValueError, and what torch raises there, in its operators (RuntimeError) and in its modules
    (AssertionError), for code that was written for those."""


class DtypeError(TypeError, RuntimeError, AssertionError):
    """The same of a dtype: a TypeError, and what torch raises there."""


def tensor(name: str, x: object, dim: int | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a {kind} one")
    if dim is not None and x.dim() != dim:
        raise ShapeError(f"{name}: expected {dim} dimensions, got shape {tuple(x.shape)}")
    return x


def floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise DtypeError(f"{name}: got dtype {x.dtype}, allowed are float64, float32, float16, bfloat16")


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise DtypeError(f"{name}: dtype {x.dtype} differs from {other_name}'s {other.dtype}")
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: on {x.device}, but {other_name} is on {other.device}")


def shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ShapeError(f"{name}: expected shape {tuple(expected)}, got {tuple(x.shape)}")


def readable(x: Tensor | None, triton: bool) -> Tensor | None:
    """x as kernels read it: contiguous; on a GPU a matrix in place where its rows are, by Triton also where its columns are."""
    if x is None or (x.dim() == 2 and ((x.is_cuda and x.stride(1) == 1) or (triton and 1 in x.stride()))):
        return x
    return x.contiguous()


def as_matrix(x: Tensor) -> Tensor:
    """The rows of x (..., K), one after the other."""
    # Not flatten, for which autograd's is_grads_batched has no rule.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def number(name: str, value: object) -> None:
    # What people pass by mistake; a list of what is right would break the graph of torch.compile's symbolic numbers.
    if value is None or isinstance(value, str | bytes | list | tuple | dict):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def dropout(dropout_p: float) -> float:
    number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, allowed is 0 <= dropout_p < 1")
    return float(dropout_p)


def positive_finite(name: str, value: float) -> float:
    number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, allowed are positive finite numbers")
    return float(value)


def rng_state(state: Tensor | None, dropout_p: float, x: Tensor) -> Tensor | None:
    """The (seed, offset) of a call on x with dropout: the given one, or a fresh draw from torch's CPU generator."""
    if dropout_p == 0:
        return None
    if hasattr(x, "placements"):
        raise NotImplementedError(
            f"dropout_p: got {dropout_p}, but on sharded tensors (DTensor) only 0 is allowed: the mask is drawn by an element's "
            "index in the whole tensor, which a rank does not know"
        )
    if state is None:
        return torch.randint(0, 2**32, (2,), dtype=torch.int64)
    if tensor("rng_state", state).dtype != torch.int64 or state.shape != (2,) or state.device.type != "cpu":
        given = f"{state.dtype} {tuple(state.shape)} on {state.device}"
        raise ValueError(f"rng_state: expected an int64 CPU tensor (seed, offset) of shape (2,), got {given}")
    return state.contiguous()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which matrix products run under the autocast that is active for the device, None without autocast."""
    # torch knows no autocast on some devices; asking whether it knows takes as long as asking whether it is on.
    known = device_type == "cpu" or device_type == "cuda" or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under ``torch.autocast`` cast floating tensors to its dtype, as torch does for matmuls; float64 stays."""
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
