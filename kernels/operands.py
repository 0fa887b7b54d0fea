"""A weight laid out for a GPU: the arguments of the operators, in their order."""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import padded_outliers, row_sum_dtype
from .reference import Group, Int8Weight, groups


class Operands(NamedTuple):
    """What the kernels of `gpu/` read of a weight.

    Attributes:
        values: int8 [N, K], contiguous.
        scale: float32 [N], `absmax / 127`.
        row_sum: the sums of the rows of `values` over each of G groups of dimensions: int32 [N, 1], or int16 [N, G].
        outlier_dims: int32 [k].
        outlier_weight: float [N, padded_outliers(k)], contiguous: the columns of W at `outlier_dims`, and then zeros.
        bias: float [N] or None.
        threshold, group: see `Int8Weight`; k is 0 where the threshold is given.

    """

    values: Tensor
    scale: Tensor
    row_sum: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    bias: Tensor | None
    threshold: float | None
    group: Group | None

    @classmethod
    def prepare(cls, weight: Int8Weight) -> Self:
        """Lay out a weight on its device."""
        dims, columns = weight.outlier_dims, weight.outlier_weight
        if weight.threshold is not None:
            dims, columns = dims.new_empty(0), columns.new_empty(len(columns), 0)
        values = weight.values.contiguous()
        return cls(
            values=values,
            # By a tensor: on a GPU torch divides by a number as it likes, and by a tensor as IEEE does.
            scale=weight.absmax / torch.full_like(weight.absmax, 127),
            row_sum=row_sums(values, weight.group),
            outlier_dims=dims.int().contiguous(),
            outlier_weight=pad(columns, (0, padded_outliers(len(dims)) - len(dims))).contiguous(),
            bias=None if weight.bias is None else weight.bias.contiguous(),
            threshold=weight.threshold,
            group=weight.group,
        )

    def stored(self) -> Int8Weight:
        """Return the weight as it was stored, its absmax to a unit in the last place."""
        columns = self.outlier_weight[:, : len(self.outlier_dims)]
        absmax = self.scale * 127
        return Int8Weight(self.values, absmax, self.outlier_dims, columns, self.bias, self.threshold, self.group)

    @property
    def device(self) -> torch.device:
        """Where it is, and x has to be."""
        return self.values.device

    @property
    def aligned(self) -> bool:
        """Whether rows of the values begin and end at multiples of 16 bytes."""
        k = self.values.shape[1]
        return k > 0 and not (k % 16 or self.values.data_ptr() % 16)


def row_sums(values: Tensor, group: Group | None) -> Tensor:
    """Return the sums of the rows of int8 [N, K] over each of G groups of dimensions: int32 [N, 1], or int16 [N, G]."""
    k = values.shape[1]
    count, width = groups(k, group)
    dtype = row_sum_dtype(count)
    if count == 1:
        return values.sum(1, keepdim=True, dtype=dtype)
    whole = k // width
    sums = values[:, : whole * width].reshape(-1, whole, width).sum(2, dtype=dtype)
    return sums if whole == count else torch.cat([sums, values[:, whole * width :].sum(1, True, dtype=dtype)], 1)
