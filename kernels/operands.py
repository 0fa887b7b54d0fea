"""A weight laid out for the operators, on a GPU or the CPU: their arguments, in their order."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference
from .checks import padded_outliers
from .reference import Group, Int8Weight, Rotation

RowSums = Callable[[Tensor, Group | None], Tensor]


class Operands(NamedTuple):
    """What the kernels of `gpu/`, and those that are compiled for the CPU, read of a weight.

    Attributes:
        values: int8 [N, K], contiguous.
        scale: float32 [N], `absmax / 127`.
        row_sum: the sums of the rows of `values` over each of G groups of dimensions: int32 [N, 1], or int16 [N, G].
        outlier_dims: int32 [k].
        outlier_weight: float [N, padded_outliers(k)], contiguous: the columns of W at `outlier_dims`, and then zeros.
        bias: float [N] or None.
        threshold, group, rotation: see `Int8Weight`; k is 0 where the threshold is given.

    """

    values: Tensor
    scale: Tensor
    row_sum: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    bias: Tensor | None
    threshold: float | None
    group: Group | None
    rotation: Rotation | None

    @classmethod
    def prepare(cls, weight: Int8Weight, row_sums: RowSums = reference.row_sums) -> Self:
        """Lay out a weight on its device; `row_sums` is that of the reference, or gives the same."""
        weight = weight.without_uncounted()
        dims, columns = weight.outlier_dims, weight.outlier_weight
        values = weight.values.contiguous()
        return cls(
            values=values,
            # By a tensor: on a GPU torch divides by a number as it likes, and by a tensor as IEEE does.
            scale=weight.absmax / torch.full_like(weight.absmax, 127),
            row_sum=row_sums(values.detach(), weight.group),
            outlier_dims=dims.int().contiguous(),
            outlier_weight=pad(columns, (0, padded_outliers(len(dims)) - len(dims))).contiguous(),
            bias=None if weight.bias is None else weight.bias.contiguous(),
            threshold=weight.threshold,
            group=weight.group,
            rotation=weight.rotation,
        )

    def stored(self) -> Int8Weight:
        """Return the weight as it was stored, its absmax to a unit in the last place."""
        columns = self.outlier_weight[:, : len(self.outlier_dims)]
        how = self.bias, self.threshold, self.group, self.rotation
        return Int8Weight(self.values, self.scale * 127, self.outlier_dims, columns, *how)

    @property
    def device(self) -> torch.device:
        """Where it is, and x has to be."""
        return self.values.device

    @property
    def aligned(self) -> bool:
        """Whether rows of the values begin and end at multiples of 16 bytes."""
        k = self.values.shape[1]
        return k > 0 and not (k % 16 or self.values.data_ptr() % 16)
