"""A weight of k bits laid out for what runs it: its arguments, in their order."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .packing import unpack
from .reference import KBitWeight, blocks

# Unpacked at a time.
_STEP_ELEMENTS = 1 << 20


class KBitOperands(NamedTuple):
    """What kernels read of a weight: `y = x @ dequantized.T + x[:, outlier_dims] @ columns.T + bias`.

    Attributes:
        packed: uint8 [N, row_bytes], contiguous.
        absmax: float16 [N, G], contiguous.
        levels: float32 [2 ** k].
        outlier_dims: int32 [c].
        columns: float32 [N, c], the columns of W at `outlier_dims`, less what the codes give there: so x is multiplied
            by the codes as it is.
        bias: float [N] or None.
        in_features: K.
        block: see `KBitWeight`.

    """

    packed: Tensor
    absmax: Tensor
    levels: Tensor
    outlier_dims: Tensor
    columns: Tensor
    bias: Tensor | None
    in_features: int
    block: int | None

    @classmethod
    def prepare(cls, weight: KBitWeight) -> Self:
        """Lay out a weight on its device."""
        columns = weight.outlier_weight.float()
        if weight.outlier_dims.numel():
            columns = columns - coded_columns(weight)
        return cls(
            packed=weight.packed.contiguous(),
            absmax=weight.absmax.contiguous(),
            levels=weight.levels.contiguous(),
            outlier_dims=weight.outlier_dims.int().contiguous(),
            columns=columns.contiguous(),
            bias=None if weight.bias is None else weight.bias.contiguous(),
            in_features=weight.in_features,
            block=weight.block,
        )

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return self.levels.shape[0].bit_length() - 1

    @property
    def coded(self) -> KBitWeight:
        """Return the weight that the codes are of, without outliers and bias."""
        dims, columns = self.outlier_dims[:0], self.columns[:, :0]
        return KBitWeight(self.packed, self.absmax, self.levels, self.in_features, self.block, dims, columns)


def coded_columns(weight: KBitWeight) -> Tensor:
    """Return what the codes of a weight give at its outlier dims, float32 [N, c]; some rows are unpacked at a time."""
    found = torch.empty(weight.outlier_weight.shape, device=weight.packed.device)
    dims = weight.outlier_dims.long()
    block = dims // blocks(weight.in_features, weight.block)[1]
    step = max(1, _STEP_ELEMENTS // max(1, weight.in_features))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        codes = unpack(weight.packed[rows], weight.bits, weight.in_features)[:, dims]
        found[rows] = weight.levels[codes.int()] * weight.absmax[rows][:, block].float()
    return found
