"""A weight laid out for a GPU: the arguments of the operators, in their order."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import padded_outliers
from .reference import Int8Weight


def _row_sums(values: Tensor) -> Tensor:
    return values.sum(1, dtype=torch.int32)


class Operands(NamedTuple):
    """What the kernels of `gpu/` read of a weight.

    Attributes:
        values: int8 [N, K], contiguous.
        scale: float32 [N], `absmax / 127`.
        row_sum: int32 [N], the sums of the rows of `values`.
        outlier_dims: int32 [k].
        outlier_weight: float [N, padded_outliers(k)], contiguous: the columns of W at `outlier_dims`, and then zeros.
        bias: float [N] or None.
        threshold: see `Int8Weight`; k is 0 where it is given.

    """

    values: Tensor
    scale: Tensor
    row_sum: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    bias: Tensor | None
    threshold: float | None

    @classmethod
    def prepare(cls, weight: Int8Weight, row_sums: Callable[[Tensor], Tensor] = _row_sums) -> Self:
        """Lay out a weight on its device; `row_sums` adds up the rows of int8 [N, K], contiguous, to int32 [N]."""
        dims, columns = weight.outlier_dims, weight.outlier_weight
        if weight.threshold is not None:
            dims, columns = dims.new_empty(0), columns.new_empty(len(columns), 0)
        values = weight.values.contiguous()
        return cls(
            values=values,
            # By a tensor: on a GPU torch divides by a number as it likes, and by a tensor as IEEE does.
            scale=weight.absmax / torch.full_like(weight.absmax, 127),
            row_sum=row_sums(values.detach()),
            outlier_dims=dims.int().contiguous(),
            outlier_weight=pad(columns, (0, padded_outliers(len(dims)) - len(dims))).contiguous(),
            bias=None if weight.bias is None else weight.bias.contiguous(),
            threshold=weight.threshold,
        )

    def stored(self) -> Int8Weight:
        """Return the weight as it was stored, its absmax to a unit in the last place."""
        columns = self.outlier_weight[:, : len(self.outlier_dims)]
        return Int8Weight(self.values, self.scale * 127, self.outlier_dims, columns, self.bias, self.threshold)

    @property
    def device(self) -> torch.device:
        """Where it is, and x has to be."""
        return self.values.device

    @property
    def aligned(self) -> bool:
        """Whether rows of the values begin and end at multiples of 16 bytes."""
        k = self.values.shape[1]
        return k > 0 and not (k % 16 or self.values.data_ptr() % 16)
