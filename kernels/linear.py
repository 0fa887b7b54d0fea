"""The one call that runs a quantized linear layer. It picks the implementation; callers never see which.

On CUDA this is the operator of `operators.py`, elsewhere the reference.
"""

from torch import Tensor

from llmint8.kernels import operators, reference
from llmint8.kernels.reference import Activation


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "absmax",
    weight_row_sum: Tensor | None = None,
) -> Tensor:
    """Compute `x @ dequantized(weight).T + bias` for x [..., K]; see `reference.int8_linear`.

    `weight_row_sum`, int32 [N], are the sums of the rows of the int8 weight, computed in every call if missing.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        out = operators.int8_linear(
            rows, weight, weight_absmax, outlier_dims, outlier_weight, bias, weight_row_sum, activation == "zeropoint"
        )
    else:
        out = reference.int8_linear(rows, weight, weight_absmax, outlier_dims, outlier_weight, bias, activation)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    activation: Activation = "absmax",
) -> Tensor:
    """LLM.int8() as published: outlier dimensions are searched in every call, `|x| >= threshold`.

    Their weight columns are dequantized from int8, as there is no other copy. Shapes as in `int8_linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    dims = reference.dynamic_outlier_dims(rows, threshold)
    columns = reference.dequantize_weight(weight[:, dims], weight_absmax)
    return int8_linear(x, weight, weight_absmax, dims, columns, bias, activation)
