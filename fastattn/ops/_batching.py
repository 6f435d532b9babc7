"""Batching rules for ``torch.func.vmap``: the mapped dimension joins the batch, or the rows, of one call of the operator.

Gradients that are sums over a call come for each sample from ``_batching_sums.py``. What has no such form is called once a sample:

* dropout: its mask counts elements within a call, and that of a sample starts at 0;
* attention with sinks, a norm, ffn or loss with weights of its own for each sample: the operators take one for all rows;
* sequences of their own lengths: their rows are counted in one table;
* the weight's gradient of linear_cross_entropy: the logits, never whole in memory, would be.

Arguments and results are those of ``SCHEMAS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _batching_sums as sums
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


def _dims(x: Tensor, dim: int | None) -> int:
    """Of one sample of x."""
    return x.dim() - (dim is not None)


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
    x = x.expand(size, extent, *x.shape[2:]).flatten(0, 1)
    return x.contiguous() if x.dim() == 2 else x  # slopes; a mask is read with any strides


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
    mask_grad, slopes_grad, sinks_grad = args[17:20]
    sequences, statistics = (*args[20:], None, None)[:2]
    if in_dims[9] is not None or args[15] > 0 or sequences is not None:
        return _one_by_one(operator, size, in_dims, args, kwargs)
    batch = (args[2] if in_dims[2] is None else args[2].movedim(in_dims[2], 0)[0]).shape[0]
    joined = [_joined(x, dim, size) for x, dim in zip(args[:7], in_dims, strict=False)]
    summed = []
    for i, wanted in ((7, mask_grad), (8, slopes_grad)):
        x, dim = args[i], in_dims[i]
        # A gradient that is summed over the batch would be summed over the samples as well: it is taken before that sum.
        summed.append(wanted and batch > 1 and (x if dim is None else x.movedim(dim, 0)[0]).shape[0] == 1)
        if wanted and dim is None:
            x, dim = x.expand(size, *x.shape), 0
        joined.append(_joined_broadcast(x, dim, size, batch))
    if statistics is not None and statistics.numel():
        dim = in_dims[21]
        each = statistics.unsqueeze(0).expand(size, *statistics.shape) if dim is None else statistics.movedim(dim, 0)
        statistics = each.movedim(0, 1).flatten(1, 2)
    elif statistics is not None:
        statistics = statistics.new_empty(0)
    rest = (*args[10:19], False, *(() if len(args) == 20 else (None, statistics)))
    found = [_apart(x, size) for x in operator(*joined, args[9], *rest, **kwargs)]
    for i, over_batch in zip((3, 4), summed, strict=True):
        if over_batch:
            found[i] = sums.wide(found[i]).sum(1, keepdim=True).to(found[i].dtype)
    if sinks_grad:
        parts: list[Any] = [None if x is None else x.unflatten(0, (size, batch)) for x in joined[:7]]
        found[5] = sums.sinks_gradient(parts[0], parts[1], parts[5], parts[6], args[9])
    return tuple(found), (0,) * 6


def _each(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """x of every sample, the samples in front."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _attention_weights(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """(q, k, lse, attn_mask, alibi_slopes, options ...): samples join the batch."""
    if args[10] > 0:
        return _one_by_one(operator, size, in_dims, args, kwargs)
    joined = [_joined(x, dim, size) for x, dim in zip(args[:3], in_dims, strict=False)]
    batch = joined[0].shape[0] // size if joined[0] is not None and size else 0
    joined += [_joined_broadcast(args[i], in_dims[i], size, batch) for i in (3, 4)]
    return _apart(operator(*joined, *args[5:], **kwargs), size), 0


def _rows(
    matrices: tuple[int, ...],
    whole: tuple[int, ...],
    dropout: int | None = None,
    flags: tuple[int, ...] = (),
    add: Callable[..., None] | None = None,
) -> Rule:
    """A rule for operators on rows: arguments ``matrices`` are joined, ``whole`` must be the same for all samples. The gradients
    that ``flags`` ask for are sums over rows: ``add(results, each, args)`` puts them among the results, from the matrices of each
    sample."""

    def rule(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one_row = _dims(args[0], in_dims[0]) == 1
        if one_row or any(in_dims[i] is not None for i in whole) or (dropout is not None and args[dropout] > 0):
            return _one_by_one(operator, size, in_dims, args, kwargs)
        joined = [_joined(x, in_dims[i], size) if i in matrices else x for i, x in enumerate(args)]
        found = operator(*(False if i in flags else x for i, x in enumerate(joined)), **kwargs)
        if isinstance(found, Tensor):
            return _apart(found, size), 0
        results = [_apart(x, size) for x in found]
        if add is not None and any(args[i] for i in flags):
            add(results, [_each(x, in_dims[i], size) if i in matrices else x for i, x in enumerate(args)], args)
        return tuple(results), (0,) * len(results)

    return rule


def _norm_sums(results: list[Tensor], each: list[Any], args: tuple[Any, ...]) -> None:
    (dy, _, h, weight, mean, rstd), wanted = each[:6], args[9:11]
    found = sums.norm_gradients(dy, h, mean, rstd, h.dtype if weight is None else weight.dtype)
    results[2:] = [g if want else none for g, want, none in zip(found, wanted, results[2:], strict=True)]


def _ffn_sums(results: list[Tensor], each: list[Any], args: tuple[Any, ...]) -> None:
    dout, x, _, w_gate, w_out, pre, gate, activation = each[:8]
    weight_grad, bias_grad = args[11:13]
    into, of_gate, out = sums.ffn_gradients(dout, x, w_out, pre, None if w_gate is None else gate, activation)
    for at, found in ((1, into), (3, of_gate), (5, out)):
        if found is not None:
            results[at] = found[0] if weight_grad else results[at]
            results[at + 1] = found[1] if bias_grad else results[at + 1]


def _linear_forward(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if in_dims[1] is None and in_dims[2] is None:
        return _rows((0, 3), (1, 2))(operator, size, in_dims, args, kwargs)
    if _dims(args[0], in_dims[0]) != 2:
        return _one_by_one(operator, size, in_dims, args, kwargs)
    each = [_each(x, dim, size) for x, dim in zip(args, in_dims, strict=True)]
    return sums.linear(*each), 0  # type: ignore[arg-type]


def _linear_backward(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x_grad, weight_grad, bias_grad = args[3:6]
    each = [_each(x, dim, size) for x, dim in zip(args[:3], in_dims, strict=False)]
    dy, x, weight = each
    results = [x.new_empty(size, 0) for _ in range(3)]  # type: ignore[union-attr]
    if x_grad and in_dims[2] is None:
        rows = (_joined(args[0], in_dims[0], size), _joined(args[1], in_dims[1], size), args[2])
        results[0] = _apart(operator(*rows, True, False, False, **kwargs)[0], size)
    elif x_grad:
        results[0] = sums.linear(dy, weight.mT, None, None)  # type: ignore[arg-type, union-attr]
    if weight_grad or bias_grad:
        dweight, dbias = sums.linear_gradients(dy, x)  # type: ignore[arg-type]
        results[1:] = [dweight if weight_grad else results[1], dbias if bias_grad else results[2]]
    return tuple(results), (0, 0, 0)


def _loss(first: int, constants: tuple[int, ...]) -> Rule:
    """A rule for a loss's forward operator: (rows, ..., target at ``first``, ...), ``constants`` the same for all samples; the
    losses of all tokens in one call, reduced for each sample."""

    def rule(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        linear = first == 3
        options = 4 if linear else 3
        reduction, wanted = args[options + 4], args[options + 5 :]
        if any(in_dims[i] is not None for i in constants) or any(wanted[1:]):
            return _one_by_one(operator, size, in_dims, args, kwargs)
        class_weight = None if linear else args[2]
        changed = list(args)
        changed[0], changed[first] = (_joined(args[i], in_dims[i], size) for i in (0, first))
        changed[options + 4 :] = [0, *[False] * len(wanted)]
        losses, statistics, *_ = operator(*changed, **kwargs)
        each_target = _each(args[first], in_dims[first], size)
        loss = sums.reduced(_apart(losses, size), each_target, class_weight, args[options], reduction)  # type: ignore[arg-type]
        results = [loss, _apart(statistics, size, 1)]
        if linear:
            results += [losses.new_empty(size, 0, dtype=args[0].dtype) for _ in range(3)]
        if any(wanted):  # dx of a plain backward() of each sample's loss
            ones = sums.onto_tokens(torch.ones_like(loss), each_target, None, args[options], reduction)  # type: ignore[arg-type]
            gradient = getattr(torch.ops.fastattn, _name_of(operator).replace("forward", "backward")).default
            flags = (True, False, False)
            made = gradient(ones.flatten(), *changed[:4], statistics, *changed[4:9], *flags, **kwargs)
            results[2] = _apart(made[0], size)
        return tuple(results), (0,) * len(results)

    return rule


def _loss_backward(target: int, constants: tuple[int, ...]) -> Rule:
    """The same for the backward operators, (dloss, rows, ..., target, ..., statistics, ...): one gradient a token."""

    def rule(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        linear = target == 4
        saved = target + (1 if linear else 2)
        ignore_index, reduction, wanted = args[saved + 1], args[saved + 5], args[saved + 6 :]
        if any(in_dims[i] is not None for i in constants) or any(wanted[1:]):
            return _one_by_one(operator, size, in_dims, args, kwargs)
        changed = list(args)
        changed[1], changed[target] = (_joined(args[i], in_dims[i], size) for i in (1, target))
        each_target, dloss = (_each(args[i], in_dims[i], size) for i in (target, 0))
        class_weight = None if linear else args[3]
        tokens = sums.onto_tokens(dloss, each_target, class_weight, ignore_index, reduction)  # type: ignore[arg-type]
        changed[0], changed[saved + 5] = tokens.flatten().contiguous(), 0
        statistics = _each(args[saved], in_dims[saved], size)
        changed[saved] = statistics.movedim(0, 1).flatten(1, 2).contiguous()  # type: ignore[union-attr]
        found = operator(*changed, **kwargs)
        if isinstance(found, Tensor):
            return _apart(found, size), 0
        return tuple(_apart(x, size) for x in found), (0,) * len(found)

    return rule


def _name_of(operator: Any) -> str:
    return operator._schema.name.removeprefix("fastattn::")


def _rope(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, cos, sin = args[:3]
    batch = x.shape[0] if in_dims[0] is None else x.movedim(in_dims[0], 0).shape[1]
    angles = [_joined_broadcast(t, dim, size, batch) for t, dim in ((cos, in_dims[1]), (sin, in_dims[2]))]
    return _apart(operator(_joined(x, in_dims[0], size), *angles, *args[3:]), size), 0


#: Operators and their rules.
_RULES: dict[str, Rule] = {
    "attention_forward": _attention,
    "attention_inference": _attention,
    "attention_backward": _attention_backward,
    "norm_forward": _rows((0, 1), (2, 3), 6),
    "attention_weights": _attention_weights,
    "norm_backward": _rows((0, 1, 2, 4, 5), (3,), 7, (9, 10), _norm_sums),
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "ffn_forward": _rows((0, 7), (1, 2, 3, 4, 5, 6), 9),
    "ffn_inference": _rows((0, 7), (1, 2, 3, 4, 5, 6)),
    "ffn_backward": _rows((0, 1, 5, 6), (2, 3, 4), 8, (11, 12), _ffn_sums),
    "cross_entropy_forward": _loss(1, (2,)),
    "cross_entropy_backward": _loss_backward(2, (3,)),
    "linear_cross_entropy_forward": _loss(3, (1, 2)),
    "linear_cross_entropy_backward": _loss_backward(4, (2, 3)),
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
