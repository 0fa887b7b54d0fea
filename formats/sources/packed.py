"""Weights of 2, 4 or 8 bits as GPTQ and AWQ store them, read as the float32 weights that they stand for.

Both keep a weight [K, N] in 32-bit words, with a scale for each group of K and each column, and zero points packed as
the values are: `scale * (value - zero point)`. GPTQ packs along K, its first version has zero points that are one too
small, and `g_idx` says the group of each row. AWQ packs along N, eight values to a word in an order of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..containers.tensors import TensorInfo
from ..errors import SourceError

_WORD = 32
_BITS = (2, 4, 8)
# Where AWQ's kernels want the values of a word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_SECOND_VERSION = "gptq_v2"


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight: its tensors, the bits of a value, and along which dimension of [K, N] words are packed.

    `added` is what the zero points are too small by.
    """

    values: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    groups: TensorInfo | None
    bits: int
    along: int
    added: int

    @property
    def info(self) -> TensorInfo:
        """The weight as it is read, [N, K]."""
        k = self.values.shape[0] * (_WORD // self.bits if self.along == 0 else 1)
        name = f"{self.values.name.removesuffix('.qweight')}.weight"
        return replace(self.values, name=name, dtype="F32", shape=(self.scales.shape[1], k))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all that belong to it."""
        found = (self.values, self.zeros, self.scales, self.groups)
        return tuple(info.name for info in found if info is not None)

    def read(self, read: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Return the weight, float32 [N, K]; `read` returns one of its tensors."""
        values, zeros = self._unpacked(read(self.values), self.along), self._unpacked(read(self.zeros), 1)
        scales, k = read(self.scales).float(), values.shape[0]
        group = torch.arange(k) // (k // len(scales)) if self.groups is None else read(self.groups).long()
        if not bool(((group >= 0) & (group < len(scales))).all()):
            raise SourceError(f"{self.values.file}: {self.tensors[-1]} names groups that are not among {len(scales)}")
        zeros += self.added
        return ((values - zeros[group]) * scales[group]).t().contiguous()

    def _unpacked(self, words: Tensor, dim: int) -> Tensor:
        """Return the values of words that are packed along a dimension, int32."""
        shifts = torch.arange(0, _WORD, self.bits, dtype=torch.int32)
        if self.along == 1:
            shifts = shifts[torch.tensor(_AWQ_ORDER)]
        places = shifts[:, None] if dim == 0 else shifts
        return torch.bitwise_and(words.unsqueeze(dim + 1) >> places, 2**self.bits - 1).flatten(dim, dim + 1)


def packed_weights(path: Path, tensors: Mapping[str, TensorInfo], quantization: Any) -> dict[str, PackedWeight]:
    """Return the packed weights by the names under which they are read.

    Raises:
        SourceError: one is of another layout than those that are known.

    """
    said = quantization if isinstance(quantization, dict) else {}
    added = 0 if said.get("checkpoint_format") == _SECOND_VERSION else 1
    found: dict[str, PackedWeight] = {}
    for name, info in tensors.items():
        base, _, suffix = name.rpartition(".")
        zeros, scales = tensors.get(f"{base}.qzeros"), tensors.get(f"{base}.scales")
        if suffix != "qweight" or info.dtype != "I32" or zeros is None or scales is None:
            continue
        weight = _layout(info, zeros, scales, tensors.get(f"{base}.g_idx"), added)
        if weight is None:
            raise SourceError(
                f"{path / info.file}: {name} is {list(info.shape)}, with scales {list(scales.shape)} and zero points "
                f"{list(zeros.shape)}; known are GPTQ and AWQ (gemm) of 2, 4 and 8 bits"
            )
        found[weight.info.name] = weight
    return found


def _layout(
    values: TensorInfo, zeros: TensorInfo, scales: TensorInfo, groups: TensorInfo | None, added: int
) -> PackedWeight | None:
    """Tell the layout from the shapes; None where it is not known."""
    if {len(info.shape) for info in (values, zeros, scales)} != {2} or zeros.dtype != "I32":
        return None
    (rows, columns), (count, n) = values.shape, scales.shape
    for bits in _BITS:
        pack = _WORD // bits
        if zeros.shape != (count, n // pack) or n % pack or not count:
            continue
        if columns == n and (groups.shape == (rows * pack,) if groups else rows * pack % count == 0):
            return PackedWeight(values, zeros, scales, groups, bits, 0, added)
        if columns * pack == n and pack == len(_AWQ_ORDER) and groups is None and rows % count == 0:
            return PackedWeight(values, zeros, scales, None, bits, 1, 0)
    return None
