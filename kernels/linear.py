"""The linear map in Triton: the launchers of ``fastattn::triton_linear_{forward,backward}``, and the products of ``ffn.py``.

    y = x weightᵀ + bias + residual;   dx = dy weight;   dweight = dyᵀ x;   dbias = Σ_rows dy
``configs.product`` says how: as one GEMM with bias and residual in its epilogue (``gemm.py``, rounded once), or as torch's product
with its bias (cuBLAS) and, for a residual, one elementwise kernel, which rounds the product before it adds the residual as
``F.linear(...) + residual`` does. cuBLAS picks its algorithm by the number of rows: under
``torch.use_deterministic_algorithms(True)`` all products run here with tiles that do not depend on it, so that a row has the same
bits in every batch.
"""

import torch
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.column_sum import column_sum
from fastattn.kernels.epilogue import IDENTITY, Forward, elementwise
from fastattn.kernels.gemm import gemm, splits_of_few_rows, splits_of_weight_gradient


def chosen(use: str, x: Tensor, columns: int) -> configs.Matmul | configs.Elementwise:
    """How to compute products of x (M, K) with ``columns`` columns that ``use`` (one of ``configs.USES``) follows."""
    precision, arch = configs.product_precision(x.dtype), configs.arch_of(x)
    if torch.are_deterministic_algorithms_enabled():
        return configs.gemm(use, precision, arch)
    return configs.product(use, x.shape[0], columns, precision, arch)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias + residual."""
    config = chosen("linear", x, weight.shape[0])
    if isinstance(config, configs.Elementwise):
        product = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        if residual is not None and product.numel():
            elementwise(product, None, Forward(residual=residual, out=product), IDENTITY, config)
        return product
    y = x.new_empty(x.shape[0], weight.shape[0])
    splits = splits_of_few_rows(config, weight.shape[0], x.shape[1])
    gemm(x, weight, Forward(bias=bias, residual=residual, out=y), config, splits=splits)
    return y


def input_gradient(*products: tuple[Tensor, Tensor]) -> Tensor:
    """Σ dy weight over one or two (dy (M, N), weight (N, K)); two are added up before they are rounded, but for cuBLAS's."""
    (dy, weight), *second = products
    config = chosen("linear", dy, weight.shape[1])
    if isinstance(config, configs.Elementwise):
        dx = torch.mm(dy, weight)
        for more in second:
            dx.addmm_(*more)
        return dx
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    if second:
        gemm(dy, weight.t(), Forward(out=dx), config, second=(second[0][0], second[0][1].t()))
    else:
        splits = splits_of_few_rows(config, weight.shape[1], weight.shape[0])
        gemm(dy, weight.t(), Forward(out=dx), config, splits=splits)
    return dx


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x (N, K)."""
    config = chosen("linear", dy.t(), x.shape[1])
    if isinstance(config, configs.Elementwise):
        return torch.mm(dy.t(), x)
    dweight = dy.new_empty(dy.shape[1], x.shape[1])
    splits = splits_of_weight_gradient(config, *dweight.shape, dy.shape[0])
    gemm(dy.t(), x.t(), Forward(out=dweight), config, splits=splits)
    return dweight


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y (M, N) in x.dtype."""
    return linear(x, weight, bias, residual)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, x_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (M, K), dweight (N, K), dbias (N,)), each (0,) unless asked for; the bias is summed in float32."""
    nothing = x.new_empty(0)
    return (
        input_gradient((dy, weight)) if x_grad else nothing,
        weight_gradient(dy, x) if weight_grad else nothing,
        column_sum(dy, x.dtype) if bias_grad else nothing,
    )
