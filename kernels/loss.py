"""Cross-entropy of rows of logits in Triton: the launchers of ``fastattn::triton_cross_entropy_{forward,backward}``.

With z = logits, or c tanh(logits / c) with softcap c, m = max z, l = log Σ e^(z - m), lse = m + l, w = class weights or 1,
V classes, target y and ε = label_smoothing, a row has
    loss = (1 - ε) w[y] (m - z[y] + l) + ε/V Σⱼ w[j] (m - zⱼ + l) + z_loss · lse²
    dloss/dzⱼ = ((1 - ε) w[y] + ε/V Σ w + 2 z_loss · lse) e^(zⱼ - m - l) - (1 - ε) w[y] [j = y] - ε/V w[j],  times 1 - (zⱼ/c)²
and nothing if y is ignored. m and l are kept apart: a sum of both has no digits left for probabilities where |m| is large.

Forward is one pass over a row of any length. Each lane of a tile keeps the maximum and the sum of its own columns, with one
exponential an element and nothing exchanged between threads until the row is done (online softmax: Milakov and Gimelshein,
2018). Which lane takes a column follows from V alone, so a row's bits depend neither on the batch nor on the run. A target out of
bounds reads nothing and makes the loss NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.elementary import tanh

#: Position of "none", "mean", "sum" in the operators' ``reduction``.
NONE, MEAN = 0, 1

#: Elements: an argument that is a multiple of 16 is one to the compiler.
_PADDING = 16

#: Below every finite logit: differences to it are finite, which those to -inf would not be.
_LOWEST = tl.constexpr(-3.0e38)


class Logits(NamedTuple):
    """(T, V) with unit last stride. ``readable``: columns that a row has in memory, V or more; what is beyond V says nothing."""

    ptr: Any
    row: int
    readable: int


class Statistics(NamedTuple):
    """m and l of each row: float32 at ``ptr`` and ``kind`` elements further on."""

    ptr: Any
    kind: int


class Targets(NamedTuple):
    """Classes (T,) int64; ``weight`` (V,) float32 or None, and its sum as a tensor of one element where smoothing asks for it."""

    ptr: Any
    weight: Any
    weight_sum: Any


class Options(NamedTuple):
    """``terms`` of the kernels: Triton has an argument ``options`` of its own."""

    ignore_index: int
    smoothing: float
    softcap: float
    z_loss: float


@triton.jit
def _capped(line, column, readable, inside, terms, CAPPED: tl.constexpr):
    """z at ``column``, float32, -inf outside. ``readable``: where there is memory; 16 bytes are loaded at once if that ends so."""
    z = tl.load(line + column, mask=readable, other=float("-inf")).to(tl.float32)
    if CAPPED:
        z = terms.softcap * tanh(z / terms.softcap)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _label(targets, terms, row, rows, columns):
    """(y, whether it counts, its weight), [ROWS]; the weight is NaN where y is no class."""
    label = tl.load(targets.ptr + row, mask=row < rows, other=0)
    counted = (row < rows) & (label != terms.ignore_index)
    known = counted & (label >= 0) & (label < columns)
    if targets.weight is None:
        weight = tl.where(known, 1.0, float("nan"))
    else:
        weight = tl.load(targets.weight + label, mask=known, other=float("nan"))
    return label, counted, weight


@triton.jit
def cross_entropy_forward_kernel(
    logits, targets, loss, statistics, rows, columns, terms,
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks,). Rows that are ignored are not read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label, counted, label_weight = _label(targets, terms, row, rows, columns)
    line = logits.ptr + row[:, None] * logits.row
    # Of the columns of each lane: m, Σ e^(z - m), and with smoothing Σ w (m - z) and Σ w.
    most = tl.full([ROWS, BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    below = tl.zeros([ROWS, BLOCK], tl.float32)
    weights = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = counted[:, None] & (column < columns)
        z = _capped(line, column, counted[:, None] & (column < logits.readable), inside, terms, CAPPED)
        rise = z - most
        exponential = tl.exp(-tl.abs(rise))
        higher = tl.where(rise > 0, z, most)
        total = tl.where(rise > 0, total * exponential + 1.0, total + exponential)
        if SMOOTH:
            weight = tl.where(inside, 1.0, 0.0)
            if targets.weight is not None:
                weight = weight * tl.load(targets.weight + column, mask=column < columns, other=0.0)
            below += weights * (higher - most) + tl.where(inside, weight * (higher - z), 0.0)
            weights += weight
        most = higher

    # Read with no other column of the row: it may be in any lane.
    picked_inside = counted & (label_weight == label_weight)
    picked = tl.sum(_capped(line, label[:, None], picked_inside[:, None], picked_inside[:, None], terms, CAPPED), 1)
    row_most = tl.max(most, 1)
    row_log = tl.log(tl.sum(total * tl.exp(most - row_most[:, None]), 1))
    lse = row_most + row_log
    row_loss = (1.0 - terms.smoothing) * label_weight * ((row_most - picked) + row_log) + terms.z_loss * lse * lse
    if SMOOTH:
        all_below = tl.sum(below + weights * (row_most[:, None] - most), 1)
        row_loss += terms.smoothing / columns * (all_below + tl.sum(weights, 1) * row_log)
    tl.store(loss + row, tl.where(counted, row_loss, 0.0), mask=row < rows)
    tl.store(statistics.ptr + row, tl.where(counted, row_most, 0.0), mask=row < rows)
    tl.store(statistics.ptr + statistics.kind + row, tl.where(counted, row_log, 0.0), mask=row < rows)


@triton.jit
def cross_entropy_gradient_kernel(
    logits, targets, statistics, factor, dlogits, rows, columns, terms,
    PER_ROW: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor · dloss/dlogits. Grid: (row blocks, column blocks). ``factor``: one number, or PER_ROW (T,). dlogits may be logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    label, counted, label_weight = _label(targets, terms, row, rows, columns)
    row_most = tl.load(statistics.ptr + row, mask=counted, other=0.0)
    row_log = tl.load(statistics.ptr + statistics.kind + row, mask=counted, other=0.0)
    scale = tl.load(factor + row, mask=counted, other=0.0) if PER_ROW else tl.load(factor)
    share = (1.0 - terms.smoothing) * label_weight
    along = share + 2.0 * terms.z_loss * (row_most + row_log)

    inside = counted[:, None] & (column < columns)
    readable = counted[:, None] & (column < logits.readable)
    z = _capped(logits.ptr + row[:, None] * logits.row, column, readable, inside, terms, CAPPED)
    p = tl.exp((z - row_most[:, None]) - row_log[:, None])
    g = along[:, None] * p - tl.where(column == label[:, None], share[:, None], 0.0)
    if SMOOTH:
        # All weights together times p less the class's own: exactly 0 for a class alone, as the other two terms are.
        if targets.weight is None:
            both = columns * p - 1.0
        else:
            weight = tl.load(targets.weight + column, mask=column < columns, other=0.0)
            both = tl.load(targets.weight_sum) * p - weight
        g += terms.smoothing / columns * both
    if CAPPED:
        ratio = z / terms.softcap
        g *= 1.0 - ratio * ratio
    if PER_ROW:
        g *= scale[:, None]
    else:
        g *= scale
    g = tl.where(inside, g, 0.0).to(dlogits.ptr.dtype.element_ty)
    at = row[:, None] * dlogits.row + column
    tl.store(dlogits.ptr + at, g, mask=(row < rows)[:, None] & (column < dlogits.readable))


@triton.jit
def reduction_kernel(
    row_loss, upstream, targets, loss, factor, rows, columns, terms, MEAN_OF: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: loss = Σ row_loss / n and factor = (f, f / 2^e, 2^e), f = upstream / n with exponent e; each unless None.

    n is 1, or for MEAN_OF the weight of the targets that count. f is 0 where n is: nothing has a gradient then.
    """
    total = tl.zeros([1, BLOCK], tl.float32)
    count = tl.zeros([1, BLOCK], tl.float32)
    for start in tl.range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        if row_loss is not None:
            total += tl.load(row_loss + row, mask=row < rows, other=0.0)[None, :]
        if MEAN_OF:
            _, counted, weight = _label(targets, terms, row, rows, columns)
            count += tl.where(counted, weight, 0.0)[None, :]
    # A mean of nothing is NaN, as torch's is: 0 / 0.
    n = tl.sum(count, 1) if MEAN_OF else tl.full([1], 1.0, tl.float32)
    one = tl.arange(0, 1)
    if row_loss is not None:
        tl.store(loss + one, tl.sum(total, 1) / n)
    if factor is not None:
        f = tl.full([1], 1.0, tl.float32)
        if upstream is not None:
            f = tl.load(upstream + one)
        f = tl.where(n == 0.0, 0.0, f / n)
        power = (f.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # 0, a subnormal number, infinity or NaN: f itself is taken.
        power = tl.where((power > 0.0) & (power < float("inf")), power, 1.0)
        tl.store(factor + one, f)
        tl.store(factor + 1 + one, f / power)
        tl.store(factor + 2 + one, power)


def padded_logits(rows: int, classes: int, like: Tensor) -> tuple[Tensor, int]:
    """An empty (rows, classes) and the columns that are readable: rows begin multiples of 32 bytes or more apart, for loads of 16
    bytes whatever the number of classes, and for products that take no other rows fast."""
    readable = triton.cdiv(classes, _PADDING) * _PADDING
    return like.new_empty(rows, readable)[:, :classes], readable


def forward_rows(
    logits: Tensor, readable: int, targets: Targets, options: Options, loss: Tensor, statistics: Tensor
) -> None:
    """Each row's loss (T,) and statistics (2, T), float32 with unit last stride. ``readable``: see ``Logits``."""
    rows, columns = logits.shape
    if rows == 0:
        return
    config = configs.cross_entropy(columns, configs.arch_of(logits))
    cross_entropy_forward_kernel[(triton.cdiv(rows, config.rows),)](
        logits=Logits(logits, logits.stride(0), readable),
        targets=targets,
        loss=loss,
        statistics=Statistics(statistics, statistics.stride(0)),
        rows=rows,
        columns=columns,
        terms=options,
        SMOOTH=options.smoothing > 0,
        CAPPED=options.softcap > 0,
        ROWS=config.rows,
        BLOCK=config.columns,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def gradient_rows(
    logits: Tensor,
    readable: int,
    targets: Targets,
    options: Options,
    statistics: Tensor,
    factor: Tensor,
    dlogits: Tensor,
) -> None:
    """dlogits (T, V): ``factor`` (a number, or (T,)) times each row's gradient. It may be logits itself; it is as readable."""
    rows, columns = logits.shape
    if rows == 0:
        return
    config = configs.cross_entropy_gradient(columns, configs.arch_of(logits))
    cross_entropy_gradient_kernel[(triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns))](
        logits=Logits(logits, logits.stride(0), readable),
        targets=targets,
        statistics=Statistics(statistics, statistics.stride(0)),
        factor=factor,
        dlogits=Logits(dlogits, dlogits.stride(0), readable),
        rows=rows,
        columns=columns,
        terms=options,
        PER_ROW=factor.dim() == 1,
        SMOOTH=options.smoothing > 0,
        CAPPED=options.softcap > 0,
        ROWS=config.rows,
        BLOCK=config.columns,
        num_warps=config.num_warps,
    )


def reduced_loss(row_loss: Tensor, targets: Targets, options: Options, reduction: int, classes: int) -> Tensor:
    """Sum or mean of row_loss (T,), a float32 scalar; ``row_loss`` itself without reduction."""
    if reduction == NONE:
        return row_loss
    loss = row_loss.new_empty(())
    _reduce(row_loss, None, targets, options, reduction, classes, loss, None)
    return loss


def loss_factor(
    upstream: Tensor | None, targets: Targets, options: Options, reduction: int, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(f, f / 2^e, 2^e), float32 scalars: what a row's gradient is multiplied by for ``upstream`` (None: 1) of the reduced loss."""
    factor = torch.empty(3, dtype=torch.float32, device=targets.ptr.device)
    _reduce(None, upstream, targets, options, reduction, classes, None, factor)
    return factor[0], factor[1], factor[2]


def _reduce(
    row_loss: Tensor | None,
    upstream: Tensor | None,
    targets: Targets,
    options: Options,
    reduction: int,
    classes: int,
    loss: Tensor | None,
    factor: Tensor | None,
) -> None:
    config = configs.loss_reduction(configs.arch_of(targets.ptr))
    reduction_kernel[(1,)](
        row_loss=row_loss,
        upstream=upstream,
        targets=targets,
        loss=loss,
        factor=factor,
        rows=targets.ptr.shape[0],
        columns=classes,
        terms=options,
        MEAN_OF=reduction == MEAN,
        BLOCK=config.columns,
        num_warps=config.num_warps,
    )


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """(loss () or (T,), statistics (2, T)), float32."""
    tokens, classes = logits.shape
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    targets = Targets(target, class_weight, None)
    row_loss = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    statistics = row_loss.new_empty(2, tokens)
    forward_rows(logits, classes, targets, options, row_loss, statistics)
    return reduced_loss(row_loss, targets, options, reduction, classes), statistics


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: int,
) -> Tensor:
    """dlogits (T, V) contiguous in logits' dtype; dloss () or (T,) float32."""
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    weight_sum = class_weight.sum() if class_weight is not None and label_smoothing > 0 else None
    targets = Targets(target, class_weight, weight_sum)
    factor = loss_factor(dloss, targets, options, reduction, logits.shape[1])[0] if reduction == MEAN else dloss
    dlogits = logits.new_empty(logits.shape)
    gradient_rows(logits, logits.shape[1], targets, options, statistics, factor, dlogits)
    return dlogits
