"""Cross-entropy of a linear map: the launchers of ``fastattn::triton_linear_cross_entropy_{forward,backward}``.

The logits x Wᵀ + b (T tokens, V classes) exist for a chunk of tokens at a time (Hsu et al., "Liger kernel", 2024):
    L = x[chunk] Wᵀ + b;   row losses, statistics;   L becomes its own gradient G;   dx[chunk] = G W,  dW += Gᵀ x[chunk],  db += Σ G
The products are cuBLAS's. G is of the size of a probability: of the factor that the reduction brings, which may be far below
what 16 bits hold, G takes the part in [1, 2) and its results the power of two, which rounds nothing.

Memory beside the results: a chunk of logits, at most a quarter of all logits or 16 MiB where that is more, and at most 512 MiB
(or 128 rows); and where 16-bit gradients of W are summed over several chunks, a float32 copy of W. Chunks follow from the shape
alone, sums over them have one order, and there are no atomics: the same bits in every run. A row's bits do not depend on the
batch as far as those of cuBLAS do not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.kernels.column_sum import column_sum
from fastattn.kernels.loss import (
    NONE,
    Options,
    Targets,
    forward_rows,
    gradient_rows,
    loss_factor,
    padded_logits,
    reduced_loss,
)

_LEAST_SCRATCH, _MOST_SCRATCH = 16 << 20, 512 << 20
#: Rows of the widest tile of a product: a chunk that is no multiple of it multiplies rows that are not there.
_TILE_ROWS = 128


def chunk_rows(tokens: int, classes: int, itemsize: int) -> int:
    """Tokens of a chunk of logits, by the shape alone."""
    row = classes * itemsize
    scratch = min(max(tokens * row // 4, _LEAST_SCRATCH), _MOST_SCRATCH)
    return min(tokens, max(_TILE_ROWS, scratch // row // _TILE_ROWS * _TILE_ROWS))


@dataclass(frozen=True)
class _Layer:
    """x (T, K) and weight (V, K) contiguous, bias (V,), target (T,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    options: Options

    @property
    def chunk(self) -> int:
        return chunk_rows(self.x.shape[0], self.weight.shape[0], self.x.element_size())

    @property
    def targets(self) -> Targets:
        return Targets(self.target, None, None)

    def logits(self, rows: slice, scratch: Tensor) -> Tensor:
        out = scratch[: min(rows.stop, self.x.shape[0]) - rows.start]
        if self.bias is None:
            return torch.mm(self.x[rows], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.x[rows], self.weight.t(), out=out)


class _Gradients:
    """Of x, weight and bias, (0,) where not wanted: the sums over chunks of tokens, and the power of two at the end."""

    def __init__(self, layer: _Layer, wanted: tuple[bool, bool, bool]) -> None:
        x, weight = layer.x, layer.weight
        self._in_parts = layer.chunk < x.shape[0]
        wide = torch.float32 if self._in_parts else x.dtype
        nothing = x.new_empty(0)
        self.dx = x.new_empty(x.shape) if wanted[0] else nothing
        # Without tokens nothing is added to it.
        empty = weight.new_empty if x.shape[0] > 0 else weight.new_zeros
        self.dweight = empty(weight.shape) if wanted[1] else nothing
        self.dbias = weight.new_empty(weight.shape[0]) if wanted[2] else nothing
        self._wanted = wanted
        self._weight_sum = weight.new_empty(weight.shape, dtype=wide) if wanted[1] and wide != x.dtype else self.dweight
        self._bias_sum = weight.new_zeros(weight.shape[0], dtype=torch.float32) if wanted[2] else nothing

    def add(self, rows: slice, x: Tensor, weight: Tensor, g: Tensor) -> None:
        """``g``: the gradient of the logits of ``rows``."""
        if self._wanted[0]:
            torch.mm(g, weight, out=self.dx[rows])
        if self._wanted[1]:
            _add_product(self._weight_sum, g.t(), x[rows], rows.start == 0)
        if self._wanted[2]:
            self._bias_sum += column_sum(g, torch.float32)

    def multiplied(self, power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All gradients times ``power`` (a float32 scalar) in their dtype."""
        if self._wanted[0]:
            self.dx.mul_(power)
        if self._wanted[1]:
            torch.mul(self._weight_sum, power, out=self.dweight)
        if self._wanted[2]:
            torch.mul(self._bias_sum, power, out=self.dbias)
        return self.dx, self.dweight, self.dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b (``first``), or total += a b, which is float32; 16-bit factors are multiplied as such and summed in float32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: int,
    x_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss () or (T,), statistics (2, T), dx, dweight, dbias): the gradients of a reduced loss, (0,) where not wanted."""
    layer = _Layer(x, weight, bias, target, Options(ignore_index, label_smoothing, softcap, z_loss))
    tokens, classes = x.shape[0], weight.shape[0]
    row_loss = torch.empty(tokens, dtype=torch.float32, device=x.device)
    statistics = row_loss.new_empty(2, tokens)
    gradients = _Gradients(layer, (x_grad, weight_grad, bias_grad))
    wanted = x_grad or weight_grad or bias_grad
    if wanted:
        _, part, power = loss_factor(None, layer.targets, layer.options, reduction, classes)
    scratch, readable = padded_logits(layer.chunk, classes, x)
    for begin in range(0, tokens, max(layer.chunk, 1)):
        rows = slice(begin, begin + layer.chunk)
        logits = layer.logits(rows, scratch)
        targets = Targets(target[rows], None, None)
        forward_rows(logits, readable, targets, layer.options, row_loss[rows], statistics[:, rows])
        if wanted:
            gradient_rows(logits, readable, targets, layer.options, statistics[:, rows], part, logits)
            gradients.add(rows, x, weight, logits)
    made = gradients.multiplied(power) if wanted else (x.new_empty(0),) * 3
    return reduced_loss(row_loss, layer.targets, layer.options, reduction, classes), statistics, *made


def linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: int,
    x_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), (0,) where not wanted; the logits are computed again. dloss () or (T,) float32."""
    layer = _Layer(x, weight, bias, target, Options(ignore_index, label_smoothing, softcap, z_loss))
    tokens, classes = x.shape[0], weight.shape[0]
    if reduction == NONE:
        power = _power_of_two(dloss)
        part = dloss / power
    else:
        _, part, power = loss_factor(dloss, layer.targets, layer.options, reduction, classes)
    gradients = _Gradients(layer, (x_grad, weight_grad, bias_grad))
    scratch, readable = padded_logits(layer.chunk, classes, x)
    for begin in range(0, tokens, max(layer.chunk, 1)):
        rows = slice(begin, begin + layer.chunk)
        logits = layer.logits(rows, scratch)
        factor = part[rows] if reduction == NONE else part
        targets = Targets(target[rows], None, None)
        gradient_rows(logits, readable, targets, layer.options, statistics[:, rows], factor, logits)
        gradients.add(rows, x, weight, logits)
    return gradients.multiplied(power)


def _power_of_two(dloss: Tensor) -> Tensor:
    """That of the largest |dloss|, 1 where that is 0 or not finite: a float32 scalar on dloss's device."""
    if dloss.numel() == 0:
        return dloss.new_ones(())
    most = (dloss.abs().amax().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((most > 0) & torch.isfinite(most), most, 1.0)
