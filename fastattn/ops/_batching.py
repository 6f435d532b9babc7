"""Batching rules for ``torch.func.vmap``: the mapped dimension joins the batch, or the rows, of one call of the operator.

What has no such form (a weight or a table that differs between the samples, dropout, whose masks count elements within a call) is
called once a sample. Arguments and results are those of ``SCHEMAS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _library

Rule = Callable[..., Any]


def _one_by_one(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The operator on each sample; results stacked."""
    found = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)), **kwargs)
        for i in range(size)
    ]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])
    return (None, None) if found[0] is None else (torch.stack(found), 0)


def _joined(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """x of every sample, with the samples as part of its first dimension."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _joined_broadcast(x: Tensor | None, dim: int | None, size: int, extent: int) -> Tensor | None:
    """The same for what has extent 1 or ``extent`` in its first dimension; left as it is where one does for all samples."""
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, extent, *x.shape[2:]).flatten(0, 1)


def _apart(x: Tensor, size: int, dim: int = 0) -> Tensor:
    """The converse of ``_joined`` for a result; one that is absent, (0,), is so for every sample."""
    if x.dim() == 1 and x.numel() == 0:
        return x.expand(size, 0)
    return x.unflatten(dim, (size, -1) if x.shape[dim] else (size, 0)).movedim(dim, 0)


def _attention(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """(q, k, v, attn_mask, alibi_slopes, sinks, options ...): samples join the batch."""
    (q, k, v, mask, slopes, sinks), dims = args[:6], in_dims[:6]
    if dims[5] is not None or args[11] > 0 or any(x is not None for x in args[12:]):
        return _one_by_one(operator, size, in_dims, args, kwargs)
    batch = q.shape[0] if dims[0] is None else q.movedim(dims[0], 0).shape[1]
    joined = [_joined(x, dim, size) for x, dim in zip((q, k, v), dims, strict=False)]
    joined += [_joined_broadcast(x, dim, size, batch) for x, dim in ((mask, dims[3]), (slopes, dims[4]))]
    found = operator(*joined, sinks, *args[6:], **kwargs)
    if isinstance(found, Tensor):
        return _apart(found, size), 0
    out, lse, statistics = found
    return (_apart(out, size), _apart(lse, size), _apart(statistics, size, min(1, statistics.dim() - 1))), (0, 0, 0)


def _attention_backward(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """(dout, dlse, q, k, v, out, lse, attn_mask, alibi_slopes, sinks, options ..., wanted ..., sequences, statistics)."""
    mask, slopes = args[7:9]
    mask_grad, slopes_grad, sinks_grad = args[17:20]
    sequences, statistics = (*args[20:], None, None)[:2]
    q = args[2] if in_dims[2] is None else args[2].movedim(in_dims[2], 0)[0]
    # A gradient that is summed over the batch would be summed over the samples as well.
    summed = sinks_grad or any(
        wanted and (x if dim is None else x.movedim(dim, 0)[0]).shape[0] != q.shape[0]
        for wanted, x, dim in ((mask_grad, mask, in_dims[7]), (slopes_grad, slopes, in_dims[8]))
    )
    if summed or in_dims[9] is not None or args[15] > 0 or sequences is not None:
        return _one_by_one(operator, size, in_dims, args, kwargs)
    joined = [_joined(x, dim, size) for x, dim in zip(args[:7], in_dims, strict=False)]
    for x, dim, wanted in ((mask, in_dims[7], mask_grad), (slopes, in_dims[8], slopes_grad)):
        joined.append(_joined(x, dim, size) if wanted else _joined_broadcast(x, dim, size, q.shape[0]))
    if statistics is not None and statistics.numel():
        dim = in_dims[21]
        each = statistics.unsqueeze(0).expand(size, *statistics.shape) if dim is None else statistics.movedim(dim, 0)
        statistics = each.movedim(0, 1).flatten(1, 2)
    elif statistics is not None:
        statistics = statistics.new_empty(0)
    rest = args[10:20] if len(args) == 20 else (*args[10:20], None, statistics)
    found = operator(*joined, args[9], *rest, **kwargs)
    return tuple(_apart(x, size) for x in found), (0,) * 6


def _rows(
    matrices: tuple[int, ...], whole: tuple[int, ...], dropout: int | None = None, sums: tuple[int, ...] = ()
) -> Rule:
    """A rule for operators on rows: arguments ``matrices`` are joined, ``whole`` must be the same for all samples, and nobody may
    ask for the gradients that are ``sums`` over rows."""

    def rule(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        apart = any(in_dims[i] is not None for i in whole) or any(args[i] for i in sums)
        if apart or (dropout is not None and args[dropout] > 0):
            return _one_by_one(operator, size, in_dims, args, kwargs)
        joined = [_joined(x, in_dims[i], size) if i in matrices else x for i, x in enumerate(args)]
        found = operator(*joined, **kwargs)
        if isinstance(found, Tensor):
            return _apart(found, size), 0
        return tuple(_apart(x, size) for x in found), (0,) * len(found)

    return rule


def _rope(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, cos, sin = args[:3]
    batch = x.shape[0] if in_dims[0] is None else x.movedim(in_dims[0], 0).shape[1]
    angles = [_joined_broadcast(t, dim, size, batch) for t, dim in ((cos, in_dims[1]), (sin, in_dims[2]))]
    return _apart(operator(_joined(x, in_dims[0], size), *angles, *args[3:]), size), 0


#: Operators and their rules; losses are sums over a call, so their samples stay apart.
_RULES: dict[str, Rule] = {
    "attention_forward": _attention,
    "attention_inference": _attention,
    "attention_backward": _attention_backward,
    "norm_forward": _rows((0, 1), (2, 3), 6),
    "norm_backward": _rows((0, 1, 2, 4, 5), (3,), 7, (9, 10)),
    "linear_forward": _rows((0, 3), (1, 2)),
    "linear_backward": _rows((0, 1), (2,), None, (4, 5)),
    "ffn_forward": _rows((0, 7), (1, 2, 3, 4, 5, 6), 9),
    "ffn_backward": _rows((0, 1, 5, 6), (2, 3, 4), 8, (11, 12)),
    "rope": _rope,
}


def _register(name: str, rule: Rule) -> None:
    operator = getattr(torch.ops.fastattn, name).default

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        return rule(operator, info.batch_size, in_dims, args, kwargs)

    torch.library.register_vmap(f"fastattn::{name}", batched, lib=_library._library)


for _op, _rule in _RULES.items():
    for _name in (_op, f"triton_{_op}"):
        if _name in _library.SCHEMAS or _name.removeprefix("triton_") in _library.TRITON_OPS:
            _register(_name, _rule)
