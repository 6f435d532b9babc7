"""DTensor's rules for fastattn's operators: which placements of the inputs give which placements of the results.

A rule is a pair (placements of the results, placements of the arguments), None for an argument that is no tensor; DTensor picks
the one that costs the least communication. Shapes and arguments are those of ``SCHEMAS``. Besides replicating everything:

    attention      batch; heads, where every rank gets whole groups of query heads (Shoeybi et al., "Megatron-LM", 2019);
                   its weights likewise
    norms          rows
    linear         rows; outputs (column parallel); inputs (row parallel: the result is a partial sum)
    ffn, glu_ffn   rows; hidden features (column then row parallel: the output is a partial sum)
    rope           batch; heads
    losses         rows, with reduction sum or none: ``cross_entropy`` takes a mean as that sum over the number of tokens

Logits that are split along classes come together, by rows or whole, and so does a head's weight. Gradients of what a rule
replicates are partial sums. Dropout is refused: the mask is drawn by the element's index in the whole tensor, which a rank
does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastattn.reference.loss import REDUCTIONS

__all__ = ["register"]

#: Placements of results and arguments on one dimension of the mesh.
Rule = tuple[list[Any], list[Any]]

_R, _S0, _S1 = Replicate(), Shard(0), Shard(1)


def _given(x: Any, placement: Any) -> Any:
    """The placement of an optional argument, None where it is absent."""
    return None if x is None else placement


def _along(x: Any, dim: int, placement: Any = None) -> Any:
    """Split along ``dim``, whole where that extent is 1 (broadcast) or the argument is absent."""
    if x is None:
        return None
    return _R if x.shape[dim] == 1 else placement or Shard(dim)


def _onto(x: Any, wanted: bool, dim: int, placement: Any = None) -> Any:
    """Of the gradient of such an argument: a partial sum where it was whole; (0,) if nobody wants it."""
    if not wanted:
        return _R
    return Partial() if x.shape[dim] == 1 else placement or Shard(dim)


def _replicated(op: str, results: int, arguments: Sequence[Any]) -> Rule:
    return [_R] * results, [_R if _is_tensor(x) else None for x in arguments]


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "placements")


def _refuse_dropout(op: str, dropout_p: float) -> None:
    if dropout_p > 0:
        raise NotImplementedError(
            f"fastattn::{op}: dropout on sharded tensors: a rank does not know its elements' indices"
        )


def _splits_groups(q: Any, k: Any) -> bool:
    """Whether every rank of the mesh can have whole groups of query heads with their key head."""
    return k.shape[1] % q.mesh.size() == 0


def _attention_forward(*arguments: Any) -> list[Rule]:
    q, k, v, mask, slopes, sinks = arguments[:6]
    _refuse_dropout("attention_forward", arguments[11])
    rest = [None] * (len(arguments) - 6)
    kept = q.tensor_meta.dtype == torch.float32
    rules = [_replicated("attention_forward", 3, arguments)]
    if any(_is_tensor(x) for x in arguments[12:]):  # sequences, whose rows are counted in the whole tensors
        return rules
    inputs = [_S0, _S0, _S0, _along(mask, 0), _along(slopes, 0), _given(sinks, _R)]
    rules.append(([_S0, _S0, _S1 if kept else _R], inputs + rest))
    if _splits_groups(q, k):
        inputs = [_S1, _S1, _S1, _along(mask, 1), _given(slopes, _S1), _given(sinks, _S0)]
        rules.append(([_S1, _S1, Shard(2) if kept else _R], inputs + rest))
    return rules


def _attention_inference(*arguments: Any) -> list[Rule]:
    return [(results[:1], inputs) for results, inputs in _attention_forward(*arguments)]


def _attention_backward(*arguments: Any) -> list[Rule]:
    dout, dlse, q, k, v, out, lse, mask, slopes, sinks = arguments[:10]
    _refuse_dropout("attention_backward", arguments[15])
    mask_grad, slopes_grad, sinks_grad = arguments[17:20]
    sequences = arguments[20] if len(arguments) > 20 else None
    statistics = arguments[21] if len(arguments) > 21 else None
    rules = [_replicated("attention_backward", 6, arguments)]
    if _is_tensor(sequences):
        return rules

    def rule(split: Any, of_statistics: Any, dim: int, of_slopes: Any, of_sinks: Any) -> Rule:
        kept = statistics is not None and len(statistics.shape) == 4
        inputs = [split, _given(dlse, split), split, split, split, split, split]
        inputs += [_along(mask, dim), of_slopes[0], of_sinks[0]]
        rest: list[Any] = [None] * (len(arguments) - 10)
        if _is_tensor(statistics):
            rest[11] = of_statistics if kept else _R
        return [split] * 3 + [_onto(mask, mask_grad, dim), of_slopes[1], of_sinks[1]], inputs + rest

    by_batch = (_along(slopes, 0), _onto(slopes, slopes_grad, 0)), (_given(sinks, _R), Partial() if sinks_grad else _R)
    rules.append(rule(_S0, _S1, 0, *by_batch))
    if _splits_groups(q, k):
        by_heads = (_given(slopes, _S1), _S1 if slopes_grad else _R), (_given(sinks, _S0), _S0 if sinks_grad else _R)
        rules.append(rule(_S1, Shard(2), 1, *by_heads))
    return rules


def _attention_weights(*arguments: Any) -> list[Rule]:
    q, k, _, mask, slopes = arguments[:5]
    _refuse_dropout("attention_weights", arguments[10])
    rest = [None] * (len(arguments) - 5)
    rules = [
        _replicated("attention_weights", 1, arguments),
        ([_S0], [_S0, _S0, _S0, _along(mask, 0), _along(slopes, 0), *rest]),
    ]
    if _splits_groups(q, k):
        # The mean over a rank's heads is averaged over ranks, which have as many each.
        result = Partial("avg") if arguments[12] else _S1
        rules.append(([result], [_S1, _S1, _S1, _along(mask, 1), _given(slopes, _S1), *rest]))
    return rules


def _norm_forward(*arguments: Any) -> list[Rule]:
    x, residual, weight, bias, _, rms, dropout_p, _ = arguments
    _refuse_dropout("norm_forward", dropout_p)
    inputs = [_S0, _given(residual, _S0), _given(weight, _R), _given(bias, _R), None, None, None, None]
    results = [_S0, _R if residual is None else _S0, _R if rms else _S0, _S0]
    return [_replicated("norm_forward", 4, arguments), (results, inputs)]


def _norm_inference(*arguments: Any) -> list[Rule]:
    x, weight, bias = arguments[:3]
    rules = [_replicated("norm_inference", 1, arguments)]
    # The last dimension is one row; `columns` says how many elements a row has, which may be more dimensions.
    for dim in range(len(x.shape) - 1):
        if x.shape[-1] == arguments[3]:
            rules.append(([Shard(dim)], [Shard(dim), _given(weight, _R), _given(bias, _R), None, None, None]))
    return rules


def _norm_backward(*arguments: Any) -> list[Rule]:
    dy, dh, h, weight, mean, rstd, rms, dropout_p, _, weight_grad, bias_grad = arguments
    _refuse_dropout("norm_backward", dropout_p)
    inputs = [_S0, _given(dh, _S0), _S0, _given(weight, _R), _R if rms else _S0, _S0, None, None, None, None, None]
    results = [_S0, _R, Partial() if weight_grad else _R, Partial() if bias_grad else _R]
    return [_replicated("norm_backward", 4, arguments), (results, inputs)]


def _linear_forward(x: Any, weight: Any, bias: Any, residual: Any) -> list[Rule]:
    *rows, columns = (Shard(dim) for dim in range(len(x.shape)))
    rules = [_replicated("linear_forward", 1, (x, weight, bias, residual))]
    rules += [([split], [split, _R, _given(bias, _R), _given(residual, split)]) for split in rows]
    rules.append(([columns], [_R, _S0, _given(bias, _S0), _given(residual, columns)]))
    if bias is None and residual is None:
        rules.append(([Partial()], [columns, _S1, None, None]))
    return rules


def _linear_backward(*arguments: Any) -> list[Rule]:
    x_grad, weight_grad, bias_grad = arguments[3:]
    flags: list[Any] = [None, None, None]

    def results(dx: Any, dweight: Any, dbias: Any) -> list[Any]:
        return [dx if x_grad else _R, dweight if weight_grad else _R, dbias if bias_grad else _R]

    return [
        _replicated("linear_backward", 3, arguments),
        (results(_S0, Partial(), Partial()), [_S0, _S0, _R, *flags]),
        (results(Partial(), _S0, _S0), [_S1, _R, _S0, *flags]),
        (results(_S1, _S1, _R), [_R, _S1, _S1, *flags]),
    ]


def _whole_weights(arguments: Sequence[Any]) -> list[Any]:
    """Of ffn's w_in .. b_out, each whole."""
    return [_R if _is_tensor(t) else None for t in arguments[1:7]]


def _hidden_split(arguments: Sequence[Any]) -> list[Any]:
    """Of the same, the hidden features split."""
    _, _, b_in, w_gate, b_gate = arguments[:5]
    return [_S0, _given(b_in, _S0), _given(w_gate, _S0), _given(b_gate, _S0), _S1, None]


def _ffn_forward(*arguments: Any) -> list[Rule]:
    x, _, _, w_gate, _, _, b_out, residual, _, dropout_p, _, save_pre = arguments
    _refuse_dropout("ffn_forward", dropout_p)
    flags: list[Any] = [None] * 4

    def results(out: Any, hidden: Any) -> list[Any]:
        return [out, hidden if save_pre else _R, hidden if save_pre and w_gate is not None else _R]

    rules = [_replicated("ffn_forward", 3, arguments)]
    if len(x.shape) == 2:  # else the rows of a rank's share of x are not its share of the rows
        rules.append((results(_S0, _S0), [_S0, *_whole_weights(arguments), _given(residual, _S0), *flags]))
    if b_out is None and residual is None:
        rules.append((results(Partial(), _S1), [_R, *_hidden_split(arguments), None, *flags]))
    return rules


def _ffn_inference(*arguments: Any) -> list[Rule]:
    x, b_out, residual = arguments[0], arguments[6], arguments[7]
    rules = [_replicated("ffn_inference", 1, arguments)]
    for split in map(Shard, range(len(x.shape) - 1)):
        rules.append(([split], [split, *_whole_weights(arguments), _given(residual, split), None]))
    if b_out is None and residual is None:
        rules.append(([Partial()], [_R, *_hidden_split(arguments), None, None]))
    return rules


def _ffn_backward(*arguments: Any) -> list[Rule]:
    dout, x, w_in, w_gate, w_out, pre, gate, _, dropout_p, _, x_grad, weight_grad, bias_grad = arguments
    _refuse_dropout("ffn_backward", dropout_p)
    flags: list[Any] = [None] * 6
    gated = w_gate is not None

    def results(dx: Any, weight: Any, bias: Any, w_out: Any, b_out: Any) -> list[Any]:
        dw, db = weight if weight_grad else _R, bias if bias_grad else _R
        gates = [dw if gated else _R, db if gated else _R]
        return [dx if x_grad else _R, dw, db, *gates, w_out if weight_grad else _R, b_out if bias_grad else _R]

    # gate is (0,) without a gate, and whole then.
    rows = [_S0, _S0, _R, _given(w_gate, _R), _R, _S0, _S0 if gated else _R]
    hidden = [_R, _R, _S0, _given(w_gate, _S0), _S1, _S1, _S1 if gated else _R]
    return [
        _replicated("ffn_backward", 7, arguments),
        (results(_S0, *[Partial()] * 4), rows + flags),
        (results(Partial(), _S0, _S0, _S1, _R), hidden + flags),
    ]


def _rope(x: Any, cos: Any, sin: Any, interleaved: bool, conjugate: bool) -> list[Rule]:
    return [
        _replicated("rope", 1, (x, cos, sin, interleaved, conjugate)),
        ([_S0], [_S0, _along(cos, 0), _along(sin, 0), None, None]),
        ([_S1], [_S1, _R, _R, None, None]),
    ]


def _of_rows(reduction: int) -> tuple[Any, Any] | None:
    """Placements of the loss and of its gradient where rows are split; None for a mean, which a rank cannot take alone."""
    return {"none": (_S0, _S0), "sum": (Partial(), _R), "mean": None}[REDUCTIONS[reduction]]


def _cross_entropy_forward(*arguments: Any) -> list[Rule]:
    class_weight, reduction = arguments[2], arguments[7]
    rules = [_replicated("cross_entropy_forward", 2, arguments)]
    if by_rows := _of_rows(reduction):
        rules.append(([by_rows[0], _S1], [_S0, _S0, _given(class_weight, _R), *[None] * 5]))
    return rules


def _cross_entropy_backward(*arguments: Any) -> list[Rule]:
    class_weight, reduction = arguments[3], arguments[9]
    rules = [_replicated("cross_entropy_backward", 1, arguments)]
    if by_rows := _of_rows(reduction):
        rules.append(([_S0], [by_rows[1], _S0, _S0, _given(class_weight, _R), _S1, *[None] * 5]))
    return rules


def _linear_loss_gradients(wanted: Sequence[bool]) -> list[Any]:
    """Placements of dx, dweight, dbias where rows are split."""
    return [placement if want else _R for placement, want in zip((_S0, Partial(), Partial()), wanted, strict=True)]


def _linear_cross_entropy_forward(*arguments: Any) -> list[Rule]:
    bias, reduction, wanted = arguments[2], arguments[8], arguments[9:]
    rules = [_replicated("linear_cross_entropy_forward", 5, arguments)]
    if by_rows := _of_rows(reduction):
        inputs = [_S0, _R, _given(bias, _R), _S0, *[None] * 8]
        rules.append(([by_rows[0], _S1, *_linear_loss_gradients(wanted)], inputs))
    return rules


def _linear_cross_entropy_backward(*arguments: Any) -> list[Rule]:
    bias, reduction, wanted = arguments[3], arguments[10], arguments[11:]
    rules = [_replicated("linear_cross_entropy_backward", 3, arguments)]
    if by_rows := _of_rows(reduction):
        inputs = [by_rows[1], _S0, _R, _given(bias, _R), _S0, _S1, *[None] * 8]
        rules.append((_linear_loss_gradients(wanted), inputs))
    return rules


_RULES = {
    "attention_forward": _attention_forward,
    "attention_inference": _attention_inference,
    "attention_backward": _attention_backward,
    "attention_weights": _attention_weights,
    "norm_forward": _norm_forward,
    "norm_inference": _norm_inference,
    "norm_backward": _norm_backward,
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "ffn_forward": _ffn_forward,
    "ffn_inference": _ffn_inference,
    "ffn_backward": _ffn_backward,
    "rope": _rope,
    "cross_entropy_forward": _cross_entropy_forward,
    "cross_entropy_backward": _cross_entropy_backward,
    "linear_cross_entropy_forward": _linear_cross_entropy_forward,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
}


def register() -> None:
    """Give DTensor the rules of every operator, of the CPU's and of Triton's."""
    for op, rules in _RULES.items():
        for name in (op, f"triton_{op}"):
            if hasattr(torch.ops.fastattn, name):
                register_sharding(getattr(torch.ops.fastattn, name).default)(rules)
