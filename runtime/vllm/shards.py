"""What becomes of a quantized layer where an engine merges layers, or gives each of several devices a part of one.

An engine stacks the matrices that share an input (q, k and v; gate and up) into one layer. Each of them has outlier
dimensions of its own. The converter gives all that share an input the same ones, so as a rule the whole layer is one
product; where they differ, each run of matrices that agree is one (`joined`).

Tensor parallelism gives each rank some rows of a layer, which changes nothing in them, or some of its inputs
(`of_inputs`): then its outlier dimensions are those among its inputs, counted from the first of them. Each rank has
scales of its own for its inputs. This module knows tensors and no engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor, nn

from llmint8.kernels.checks import check_weight
from llmint8.kernels.operands import Operands
from llmint8.kernels.operators import dynamic_int8_linear, int8_linear
from llmint8.kernels.reference import Activation, Group, Int8Weight, Rotation, outliers_among
from llmint8.kernels.weights import row_sums


@dataclass(frozen=True)
class How:
    """How a matrix is multiplied; see `Int8Weight`, and `int8_linear` for the activation."""

    activation: Activation = "absmax"
    threshold: float | None = None
    group: Group | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Matrix:
    """One of those that are merged: its number of rows, its outlier dims, integer [k], and how it is multiplied."""

    rows: int
    outlier_dims: Tensor
    how: How


def joined(
    values: Tensor, absmax: Tensor, columns: Tensor, matrices: Sequence[Matrix]
) -> Iterator[tuple[slice, Int8Weight, Activation]]:
    """Yield the products of a merged layer: which of its rows, their weight, and how its inputs are quantized.

    Args:
        values, absmax: int8 [N, K] and float32 [N], of all matrices.
        columns: float [N, k], their outlier columns; a matrix that has fewer than k has them first.
        matrices: in the order of their rows.

    """
    start = 0
    for (dims, how), group in groupby(matrices, key=lambda matrix: (matrix.outlier_dims.tolist(), matrix.how)):
        same = list(group)
        rows = slice(start, start + sum(matrix.rows for matrix in same))
        start = rows.stop
        rest = None, how.threshold, how.group, how.rotation
        outliers = same[0].outlier_dims, columns[rows, : len(dims)]
        yield rows, Int8Weight(values[rows], absmax[rows], *outliers, *rest), how.activation


def of_inputs(weight: Int8Weight, start: int, count: int) -> Int8Weight:
    """Return the part of a layer that has some of its inputs.

    Args:
        weight: the values are int8 [N, K], those of its inputs only; the outliers are still those of the whole layer.
        start: the first of its K inputs in the whole layer.
        count: how many inputs the whole layer has.

    Raises:
        ValueError: the layer is rotated, and its inputs are no whole blocks.

    """
    k = weight.values.shape[1]
    if k == count:
        return weight
    if weight.rotation is not None and k % weight.rotation:
        raise ValueError(
            f"{k} of {count} inputs are no whole blocks of {weight.rotation}, in which the layer is rotated; "
            "take fewer ranks, or a checkpoint that is not rotated"
        )
    dims, columns = outliers_among(weight.outlier_dims, weight.outlier_weight, range(start, start + k))
    return replace(weight, outlier_dims=dims, outlier_weight=columns)


class Int8Rows(nn.Module):
    """Rows of a layer that are one product: the arguments of the operators (`kernels/operators.py`)."""

    values: Tensor
    scale: Tensor
    row_sum: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor

    def __init__(self, weight: Int8Weight, activation: Activation) -> None:
        """Lay a weight out on its device; its values are shared. Raises ValueError: it is not what it should be."""
        super().__init__()
        check_weight(weight)
        operands = Operands.prepare(weight, row_sums)
        for name in ("values", "scale", "row_sum", "outlier_dims", "outlier_weight"):
            self.register_buffer(name, getattr(operands, name), persistent=False)
        self._threshold, self._group, self._rotation = weight.threshold, weight.group, weight.rotation
        self._zeropoint = activation == "zeropoint"

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map x [M, K] in float16, bfloat16 or float32 to [M, N] in its dtype; bias is float [N]."""
        weight = self.values, self.scale, self.row_sum
        if self._threshold is not None:
            return dynamic_int8_linear(x, *weight, bias, self._threshold, self._group, self._zeropoint)
        how = self._group, self._rotation, self._zeropoint
        return int8_linear(x, *weight, self.outlier_dims, self.outlier_weight, bias, *how)
