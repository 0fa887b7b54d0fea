"""The one call that runs a quantized linear layer. It picks the implementation; callers never see which.

On the CPU it is `cpu/linear.py`, on CUDA an operator of `operators.py`, elsewhere the reference: branches on the device
of `x`, behind one signature.
"""

from torch import Tensor

from . import operators, reference
from .cpu import linear as cpu
from .cpu.product import int8_product as cpu_product
from .reference import Activation


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "absmax",
    weight_row_sum: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """Compute `x @ dequantized(weight).T + bias` for x [..., K]; see `reference.int8_linear`.

    Args:
        x: float [..., K].
        weight: int8 [N, K], or packed.
        weight_absmax: float32 [N].
        outlier_dims: int32 [k].
        outlier_weight: float [N, k].
        bias: float [N] or None.
        activation: how the rows of x are quantized.
        weight_row_sum: int32 [N], the sum of each row of the weight, which `zeropoint` needs and computes without it.
        packed: whether the weight is what `cpu.product.pack` returned.

    """
    rows = x.reshape(-1, x.shape[-1])
    tensors = (rows, weight, weight_absmax, outlier_dims, outlier_weight, bias, activation)
    if x.device.type == "cpu" and weight.numel():
        out = cpu.int8_linear(*tensors, weight_row_sum, packed)
    elif x.is_cuda:
        out = operators.int8_linear(*tensors[:6], weight_row_sum, activation == "zeropoint")
    else:
        out = reference.int8_linear(*tensors)
    return out.reshape(*x.shape[:-1], len(weight_absmax))


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed, exactly: int32 [M, N]."""
    if x.device.type == "cpu":
        return cpu_product(x, weight)
    return reference.int8_product(x, weight)


def weight_row_sum(weight: Tensor) -> Tensor:
    """Return the sum of each row of int8 [N, K]: int32 [N]."""
    # On the CPU the product takes a hundredth of the time of `sum`.
    return int8_product(weight.new_ones(1, weight.shape[1]), weight)[0]


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    activation: Activation = "absmax",
    weight_row_sum: Tensor | None = None,
) -> Tensor:
    """LLM.int8() as published: outlier dimensions are searched in every call, `|x| >= threshold`.

    Their weight columns are dequantized from int8, as there is no other copy, so it is not packed. Shapes as in
    `int8_linear`. On CUDA nothing waits for the GPU; elsewhere shapes depend on the values of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        zeropoint = activation == "zeropoint"
        out = operators.dynamic_int8_linear(rows, weight, weight_absmax, bias, weight_row_sum, threshold, zeropoint)
        return out.reshape(*x.shape[:-1], len(weight_absmax))
    dims = reference.dynamic_outlier_dims(rows, threshold)
    columns = reference.dequantize_weight(weight[:, dims], weight_absmax)
    return int8_linear(x, weight, weight_absmax, dims.int(), columns, bias, activation, weight_row_sum)
