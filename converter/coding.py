"""A layer's weight as its scheme codes it: the grid that its elements are rounded to, and their codes on it.

Int8 by row and k bits are both a grid: what a code stands for, by its row and dimension, and which code is nearest. All
that rounds a weight, asks what was lost by it or writes it down knows no more of a scheme than that.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from llmint8.formats import Layout, Quantization, Scheme
from llmint8.formats.int8.schemes import KBit
from llmint8.kernels.kbit import reference as kbit
from llmint8.kernels.kbit.levels import quantiles, sample_step
from llmint8.kernels.kbit.packing import pack, unpack
from llmint8.kernels.weights import quantize_weight


class Grid(Protocol):
    """What the elements of a weight [N, K] may become.

    Attributes:
        dtype: of the codes.

    """

    dtype: ClassVar[torch.dtype]

    @property
    def absmax(self) -> Tensor:
        """That of each row, float32 [N], or of the blocks of each row, float16 [N, G]."""

    def units(self) -> Tensor:
        """Return what `nearest` takes each row in, float32 [N]; never 0."""

    def nearest(self, column: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return the nearest codes, and what they stand for, of a column at a dimension, float32 [N] in units."""

    def dequantize(self, codes: Tensor, rows: slice = ...) -> Tensor:
        """Return what the codes of some rows, or of all, stand for, float32 [n, K]; rotated where the weight was."""

    def with_absmax(self, absmax: Tensor) -> Self:
        """Return the grid of other rows, of which this is the absmax."""

    def stored(self, codes: Tensor) -> Tensor:
        """Return codes [N, K] as they stand in a file."""

    def codes(self, stored: Tensor, in_features: int) -> Tensor:
        """Return codes [N, K] from what stands in a file."""

    def scales(self, layout: Layout) -> dict[str, Tensor]:
        """Return what stands in a file beside them, by the ends of the tensors' names."""


@dataclass(frozen=True, eq=False)
class Int8Grid:
    """-127 to 127 times a step by row."""

    absmax: Tensor

    dtype: ClassVar[torch.dtype] = torch.int8

    def units(self) -> Tensor:
        """Return the steps; see `Grid`."""
        return (self.absmax / 127).where(self.absmax > 0, 1)

    def nearest(self, column: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Round to whole steps; see `Grid`."""
        rounded = column.round().clamp_(-127, 127)
        return rounded, rounded

    def dequantize(self, codes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return steps times their size; see `Grid`."""
        return codes.float() * (self.absmax[rows] / 127)[:, None]

    def with_absmax(self, absmax: Tensor) -> Self:
        """Return the grid of other rows; see `Grid`."""
        return replace(self, absmax=absmax)

    def stored(self, codes: Tensor) -> Tensor:
        """Return them as they are; see `Grid`."""
        return codes

    def codes(self, stored: Tensor, in_features: int) -> Tensor:
        """Return them as they are; see `Grid`."""
        return stored

    def scales(self, layout: Layout) -> dict[str, Tensor]:
        """Return the absmax, and in format 1 what bitsandbytes wants; see `Grid`."""
        more = {"weight_format": torch.zeros((), dtype=torch.uint8)} if layout.weight_format else {}
        return {layout.absmax: self.absmax, **more}


@dataclass(frozen=True, eq=False)
class KBitGrid:
    """The levels of a data type, float32 [2 ** k], times the absmax of a block of so many elements of a row."""

    absmax: Tensor
    levels: Tensor
    block: int | None
    own_levels: bool  # whether each layer has its own

    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return len(self.levels).bit_length() - 1

    @cached_property
    def _scales(self) -> Tensor:
        return self.absmax.t().float().contiguous()

    def units(self) -> Tensor:
        """Return ones: the scale is another in each block; see `Grid`."""
        return torch.ones(len(self.absmax), device=self.absmax.device)

    def nearest(self, column: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return the nearest levels; see `Grid`."""
        scale = self._scales[0 if self.block is None else dim // self.block]
        codes = kbit.nearest(torch.where(scale == 0, 0, column / torch.where(scale == 0, 1, scale)), self.levels)
        return codes, self.levels[codes.int()] * scale

    def dequantize(self, codes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return levels times absmax; see `Grid`."""
        return kbit.dequantize_codes(codes, self.absmax[rows], self.levels, self.block)

    def with_absmax(self, absmax: Tensor) -> Self:
        """Return the grid of other rows; see `Grid`."""
        return replace(self, absmax=absmax)

    def stored(self, codes: Tensor) -> Tensor:
        """Return them packed; see `Grid`."""
        return pack(codes, self.bits)

    def codes(self, stored: Tensor, in_features: int) -> Tensor:
        """Return them unpacked; see `Grid`."""
        return unpack(stored, self.bits, in_features)

    def scales(self, layout: Layout) -> dict[str, Tensor]:
        """Return the absmax, and the levels where each layer has its own; see `Grid`."""
        more = {"codebook": self.levels.half()} if self.own_levels else {}
        return {layout.absmax: self.absmax, **more}


def round_to_nearest(weight: Tensor, scheme: Scheme, levels: Tensor | None = None) -> tuple[Tensor, Grid]:
    """Return the codes of a weight, float [N, K], rounded to nearest, and the grid of a scheme for it.

    `levels` are those of a layer of which this is a part of the rows, where they are found for each layer.
    """
    if scheme.kbit is None:
        values, absmax = quantize_weight(weight, scheme.rotation)
        return values, Int8Grid(absmax)
    how = scheme.kbit
    if levels is None:
        codes, absmax, levels = kbit.quantize_weight(weight, how.bits, how.data_type, how.block)
    else:
        codes, absmax = kbit.quantize_to(weight, levels, how.block)
    return codes, KBitGrid(absmax, levels, how.block, how.has_codebook)


def levels_of_rows(blocks: Iterable[Tensor], shape: tuple[int, int], how: KBit) -> Tensor:
    """Return the levels of a layer that has some of its own, from blocks of its rows [n, K].

    They are what the whole weight of that shape gives to the bit: of all elements, those at equal distances count.
    """
    step, place, found = sample_step(shape[0] * shape[1]), 0, []
    for block in blocks:
        flat = kbit.normalized(block, kbit.block_absmax(block, how.block), how.block).flatten()
        found.append(flat[-place % step :: step].cpu())
        place += len(flat)
    return quantiles(torch.cat(found), how.bits)


def kbits_of(quantization: Quantization) -> Counter[KBit]:
    """Return how the layers of k bits are coded, and how many so; none of int8."""
    return Counter(kbit for name in quantization.outliers if (kbit := quantization.scheme_of(name).kbit))


def coded_in(quantization: Quantization) -> str:
    """Say in what the layers are: `int8`, `4 bits` or `3 to 5 bits`."""
    bits = sorted({kbit.bits for kbit in kbits_of(quantization)})
    if not bits:
        return "int8"
    return f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"


def coding_in_words(quantization: Quantization) -> str:
    """Say how the weights are coded."""
    rotation, rounded = quantization.scheme.rotation, ", rounded by GPTQ" if quantization.rounding == "gptq" else ""
    if kbits := kbits_of(quantization):
        several = len(kbits) > 1
        return ", ".join(f"{kbit.name}{f' in {n}' if several else ''}" for kbit, n in kbits.most_common()) + rounded
    rotated = "" if rotation is None else f", rotated in blocks of {rotation}"
    return f"one scale per row (absmax){rotated}{rounded}"


def method_in_words(quantization: Quantization) -> tuple[str, str]:
    """Say with what a model was made, and after which paper, in Markdown."""
    if kbits_of(quantization):
        how = "as in [The case for 4-bit precision](https://arxiv.org/abs/2212.09720)"
        return f"the weights of its linear layers in {coded_in(quantization)}", how
    how = "with the method of [LLM.int8()](https://arxiv.org/abs/2208.07339)"
    return "its linear layers in 8-bit integers", how
