"""The quantized linear layer on the CPU: plain torch operators around one int8 product.

Everything around the product is written for two readers. Run eagerly, operators work in place and on so many rows
at a time that what they pass on stays in the cache. Under `torch.compile` all of it fuses into loops before and
after the product.
"""

import torch
from torch import Tensor

from ..reference import Activation, QuantizedRows
from .product import int8_product, packed_product

# How much of x, and of the output, is worked on at a time: 1 MB and 8 MB in float32.
_QUANTIZE_ELEMENTS = 1 << 18
_OUTPUT_ELEMENTS = 1 << 21
# The smallest normal float32: under the scale of a row, so that a row of zeros is not divided by zero.
_TINY = 2.0**-126


def quantize_rows(x: Tensor, outlier_dims: Tensor, activation: Activation) -> QuantizedRows:
    """As `reference.quantize_rows`, to the bit, for x [M, K] with K > 0; scale and zero point are [M, 1].

    Only a scale below 2**-126 differs: it is 2**-126.
    """
    kept = x.index_fill(1, outlier_dims.long(), 0).float() if outlier_dims.numel() else x.to(torch.float32, copy=True)
    low, high = kept.amin(1, True), kept.amax(1, True)
    if activation == "absmax":
        absmax = torch.maximum(high, low.neg_()).clamp_(min=_TINY)
        values = kept.mul_(127).div_(absmax).round_()
        return QuantizedRows(values.to(torch.int8), absmax / 127, None)
    if not outlier_dims.numel():  # with outliers there is a zero in every row
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = high.sub_(low).div_(254).clamp_(min=_TINY)
    zero_point = torch.rsub(low.div_(scale), -127).round_()
    values = kept.div_(scale).round_().add_(zero_point).clamp_(-127, 127)
    return QuantizedRows(values.to(torch.int8), scale, zero_point)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    weight_row_sum: Tensor | None,
    packed: bool,
) -> Tensor:
    """As `reference.int8_linear`, for neither K nor N 0, and a weight that may be packed.

    The integers are the same. The floating-point sums after them may be rounded in another order, which changes the
    result by a few units in the last place of float32.

    Args:
        weight_row_sum: int32 [N]; None computes it here. `absmax` has no use for it.
        packed: whether `pack` returned the weight. A tensor does not know it under torch.compile.

    """
    out_features = len(weight_absmax)

    def product(values: Tensor) -> Tensor:
        return packed_product(values, weight, out_features) if packed else int8_product(values, weight)

    if weight_row_sum is None and activation == "zeropoint":
        weight_row_sum = product(torch.ones(1, x.shape[1], dtype=torch.int8, device="cpu"))[0]
    row_sum = None if weight_row_sum is None else weight_row_sum.float()
    column_scale = weight_absmax / 127
    columns = outlier_weight.float().t()

    # In place from here on: what is large enough to be new memory from the system costs more than all the arithmetic.
    def block(x: Tensor) -> Tensor:
        values, scale, zero_point = quantize_in_blocks(x, outlier_dims, activation)
        out = product(values).float()
        if zero_point is not None and row_sum is not None:
            out = out.addcmul_(zero_point, row_sum, value=-1)
        out = out.mul_(scale).mul_(column_scale)
        if outlier_dims.numel():
            out = out.addmm_(x.index_select(1, outlier_dims).float(), columns)
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    step = _rows_at_a_time(_OUTPUT_ELEMENTS // out_features)
    if step is None or len(x) <= step:
        return block(x)
    return torch.cat([block(rows) for rows in torch.split(x, step)])


def quantize_in_blocks(x: Tensor, outlier_dims: Tensor, activation: Activation) -> QuantizedRows:
    """As `quantize_rows`, so many rows at a time that they stay in the cache."""
    step = _rows_at_a_time(_QUANTIZE_ELEMENTS // x.shape[1])
    if step is None or len(x) <= step:
        return quantize_rows(x, outlier_dims, activation)
    blocks = [quantize_rows(rows, outlier_dims, activation) for rows in torch.split(x, step)]
    values, scales, zero_points = zip(*blocks, strict=True)
    return QuantizedRows(torch.cat(values), torch.cat(scales), None if None in zero_points else torch.cat(zero_points))


def _rows_at_a_time(wanted: int) -> int | None:
    """Return how many rows make a block; None, all of them, for torch.compile, which makes blocks of its own."""
    return None if torch.compiler.is_compiling() else max(1, wanted)
