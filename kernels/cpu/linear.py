"""The quantized linear layer on the CPU: plain torch operators around one int8 product.

Everything around the product is written for two readers. Run eagerly, operators work in place and on so many rows
at a time that what they pass on stays in the cache. Under `torch.compile` all of it fuses into loops before and
after the product. Where outliers are searched it stays one operator.

Inputs in groups would take an int8 product for each group, and the operators around it as often. So they are
dequantized, and multiplied in float32.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .. import reference
from ..operands import Operands
from ..prepared import PreparedInt8
from ..reference import (
    Activation,
    Group,
    Int8Weight,
    QuantizedRows,
    Rotation,
    dynamic_outlier_dims,
    groups,
    rotate,
    row_sum_dtype,
    row_sums,
)
from . import native
from .product import Product, int8_product, multiply, pack, packable, unpack, unpacked_product

# How much of x, and of the output, is worked on at a time: 1 MB and 8 MB in float32.
_QUANTIZE_ELEMENTS = 1 << 18
_OUTPUT_ELEMENTS = 1 << 21
# The smallest normal float32: under the scale of a row, so that a row of zeros is not divided by zero.
_TINY = 2.0**-126


def quantize_rows(
    x: Tensor, outlier_dims: Tensor, activation: Activation, rotation: Rotation | None = None
) -> QuantizedRows:
    """As `reference.quantize_rows`, to the bit, for K > 0, dims in int64 and one group.

    Only a scale below 2**-126 differs: it is 2**-126.
    """
    kept = x.index_fill(1, outlier_dims, 0).float() if outlier_dims.numel() else x.to(torch.float32, copy=True)
    kept = rotate(kept, rotation)
    low, high = kept.amin(1, True), kept.amax(1, True)
    if activation == "absmax":
        absmax = torch.maximum(high, low.neg_()).clamp_(min=_TINY)
        values = kept.mul_(127).div_(absmax).round_()
        return QuantizedRows(values.to(torch.int8), absmax / 127, None, x.shape[1])
    if rotation is not None or not outlier_dims.numel():  # with outliers there is a zero in every row
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = high.sub_(low).div_(254).clamp_(min=_TINY)
    zero_point = torch.rsub(low.div_(scale), -127).round_()
    values = kept.div_(scale).round_().add_(zero_point).clamp_(-127, 127)
    return QuantizedRows(values.to(torch.int8), scale, zero_point, x.shape[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuWeight(PreparedInt8):
    """A weight prepared for the CPU; its values are packed if that is its product.

    Attributes:
        product: what multiplies it, see `product.py`.
        scale: float32 [N], `absmax / 127`.
        row_sum: float32 [N, G], the sums of the rows of `values` over each group of dimensions.
        outlier_dims: int64 [k].
        outlier_weight: float32 [k, N], contiguous: the columns of W as rows.
        threshold: see `Int8Weight`; nothing is packed then, as every call takes columns of `values`.
        group: see `Int8Weight`; nothing is packed then, as no int8 product is made.
        rotation: see `Int8Weight`.

    """

    product: Product
    scale: Tensor
    row_sum: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    threshold: float | None
    group: Group | None
    rotation: Rotation | None

    @classmethod
    def prepare(cls, weight: Int8Weight, may_pack: bool = True) -> Self:
        """Lay out a weight; `may_pack` allows other values in the place of those given."""
        values = weight.values.contiguous()
        n, k = values.shape
        grouped = groups(k, weight.group)[0] > 1
        # A row of ones: the product takes a hundredth of the time of `sum`.
        row_sum = row_sums(values, weight.group) if grouped else int8_product(values.new_ones(1, k), values).t()
        packs = may_pack and weight.threshold is None and not grouped and packable(values)
        product = "packed" if packs else unpacked_product()
        return cls(
            in_features=k,
            out_features=n,
            values=pack(values) if packs else values,
            runs_on=f"{product} on the CPU ({native.why_not()})",
            product=product,
            scale=weight.absmax / 127,
            row_sum=row_sum.float(),
            outlier_dims=weight.outlier_dims.long(),
            outlier_weight=weight.outlier_weight.float().t().contiguous(),
            bias=weight.bias,
            threshold=weight.threshold,
            group=weight.group,
            rotation=weight.rotation,
        )

    @classmethod
    def of_operands(cls, operands: Operands) -> Self:
        """Take a weight as it is laid out for a GPU, on the CPU."""
        (n, k), count = operands.values.shape, len(operands.outlier_dims)
        product = unpacked_product()
        return cls(
            in_features=k,
            out_features=n,
            values=operands.values,
            runs_on=f"{product} on the CPU ({native.why_not()})",
            product=product,
            scale=operands.scale,
            row_sum=operands.row_sum.float(),
            outlier_dims=operands.outlier_dims.long(),
            outlier_weight=operands.outlier_weight[:, :count].float().t(),
            bias=operands.bias,
            threshold=operands.threshold,
            group=operands.group,
            rotation=operands.rotation,
        )

    def unpack(self) -> Tensor:
        """Return the values; see `PreparedWeight`."""
        return unpack(self.values) if self.product == "packed" else self.values

    def stored(self) -> Int8Weight:
        """Return the weight; see `PreparedWeight`."""
        how = self.bias, self.threshold, self.group, self.rotation
        weight = Int8Weight(self.unpack(), self.scale * 127, self.outlier_dims, self.outlier_weight.t(), *how)
        return weight.without_uncounted()

    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer; see `PreparedWeight`.

        The integers are those of the reference. The floating-point sums after them may be rounded in another order,
        which changes the result by a few units in the last place of float32.
        """
        if not self.values.numel():
            zeros = x.new_zeros(len(x), self.out_features)
            return zeros if self.bias is None else zeros + self.bias.to(x.dtype)
        dims, columns = self.outlier_dims, self.outlier_weight
        if self.threshold is not None and torch.compiler.is_compiling():
            # By the operator of `operators.py`, as the number of outliers is no size that a compiler can know.
            sums, zeropoint = self.row_sum.to(row_sum_dtype(self.row_sum.shape[1])), activation == "zeropoint"
            found: Tensor = torch.ops.llmint8.dynamic_int8_linear(
                x, self.values, self.scale, sums, self.bias, self.threshold, self.group, zeropoint
            )
            return found
        if self.threshold is not None:
            dims = dynamic_outlier_dims(x, self.threshold)
            columns = (self.values[:, dims].float() * self.scale[:, None]).t()
        step = _rows_at_a_time(_OUTPUT_ELEMENTS // self.out_features)
        if step is None or len(x) <= step:
            return self._block(x, dims, columns, activation)
        return torch.cat([self._block(rows, dims, columns, activation) for rows in torch.split(x, step)])

    def _block(self, x: Tensor, dims: Tensor, columns: Tensor, activation: Activation) -> Tensor:
        # In place from here on: what is large enough to be new memory from the system costs more than all the
        # arithmetic. And what works in place is left alone by autocast.
        if self.row_sum.shape[1] > 1:
            rows = reference.quantize_rows(x, dims, activation, self.group, self.rotation).dequantize()
            out = self._product(rows)
        else:
            values, scale, zero_point, _ = quantize_in_blocks(x, dims, activation, self.rotation)
            out = multiply(values, self.values, self.out_features, self.product).float()
            if zero_point is not None:
                out = out.addcmul_(zero_point, self.row_sum[:, 0], value=-1)
            out = out.mul_(scale)
        out = out.mul_(self.scale)
        if dims.numel():
            out = out.addmm_(x.index_select(1, dims).float(), columns)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)

    def _product(self, rows: Tensor) -> Tensor:
        """Multiply float32 [M, K] by the int8 values: float32 [M, N]; of the values, a part at a time is in float32."""
        parts = torch.split(self.values, max(1, _OUTPUT_ELEMENTS // self.in_features))
        with torch.autocast("cpu", enabled=False):
            return torch.cat([rows @ part.float().t() for part in parts], 1)


def quantize_in_blocks(
    x: Tensor, outlier_dims: Tensor, activation: Activation, rotation: Rotation | None = None
) -> QuantizedRows:
    """As `quantize_rows`, so many rows at a time that they stay in the cache."""
    step = _rows_at_a_time(_QUANTIZE_ELEMENTS // x.shape[1])
    if step is None or len(x) <= step:
        return quantize_rows(x, outlier_dims, activation, rotation)
    blocks = [quantize_rows(rows, outlier_dims, activation, rotation) for rows in torch.split(x, step)]
    values, scales, zero_points, _ = zip(*blocks, strict=True)
    zero_point = None if None in zero_points else torch.cat(zero_points)
    return QuantizedRows(torch.cat(values), torch.cat(scales), zero_point, x.shape[1])


def _rows_at_a_time(wanted: int) -> int | None:
    """Return how many rows make a block; None, all of them, for torch.compile, which makes blocks of its own."""
    return None if torch.compiler.is_compiling() else max(1, wanted)
