"""What is tried: every combination of bits, data type, block size, proxy share and rounding; and the bits it takes.

Bits are counted as "The case for 4-bit precision" (Dettmers & Zettlemoyer 2022, arXiv 2212.09720) counts them: k for
each weight, 16 for each block, and of the share p of columns that proxy quantization keeps in 16 bit, p (16 - k) more.
A file keeps the codes of these columns, too, so it is p k larger. Levels that belong to a layer take 16 bits each, and
all that is not quantized takes 16 bits a number, whatever it is stored in.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

from llmint8.converter.outliers.proxy import proxy_count
from llmint8.kernels.kbit.levels import DataType, check_levels
from llmint8.kernels.kbit.reference import blocks

Rounding = Literal["nearest", "gptq"]
FLOAT_BITS = 16


@dataclass(frozen=True)
class Scheme:
    """How the weights of all layers are coded.

    Attributes:
        bits: k, 3 to 8; 16 is the model as it is, and nothing else matters then.
        data_type: of the levels; None for 16 bit.
        block: elements of a row that share an absmax, None for the row.
        proxy: the share of a layer's input columns that stay in 16 bit, 0 to 1.
        rounding: how codes are found.

    """

    bits: int
    data_type: DataType | None = None
    block: int | None = None
    proxy: float = 0.0
    rounding: Rounding = "nearest"

    def check(self) -> None:
        """Check that there is such a scheme. Raises ValueError."""
        if self.data_type is not None:
            check_levels(self.data_type, self.bits)
        elif self != BASE:
            raise ValueError(f"{self.bits} bits without a data type")
        if self.block is not None and not (32 <= self.block <= 4096 and self.block.bit_count() == 1):
            raise ValueError(f"block size {self.block}, expected a power of two from 32 to 4096, or the row")
        if not 0 <= self.proxy < 1:
            raise ValueError(f"proxy share {self.proxy}, expected 0 or more, and less than 1")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding {self.rounding!r}, expected one of {', '.join(get_args(Rounding))}")

    @property
    def values(self) -> dict[str, Any]:
        """Everything that makes it, as JSON has it."""
        return asdict(self)

    @property
    def label(self) -> str:
        """What it is called: `4-bit float, block 64`."""
        if self.data_type is None:
            return f"{self.bits}-bit"
        proxy = f", proxy {100 * self.proxy:g} %" if self.proxy else ""
        rounding = f", {self.rounding}" if self.rounding != "nearest" else ""
        return f"{self.bits}-bit {self.data_type}, {block_words(self.block)}{proxy}{rounding}"

    def layer_bits(self, layer: "Layer") -> int:
        """Return the bits that a layer's weight takes."""
        weights = layer.out_features * layer.in_features
        if self.data_type is None:
            return self.bits * weights
        count, _ = blocks(layer.in_features, self.block)
        columns = proxy_count(layer.in_features, self.proxy) if self.proxy and layer.follows else 0
        codebook = 2**self.bits if self.data_type == "quantile" else 0
        kept = layer.out_features * columns * (FLOAT_BITS - self.bits)
        return self.bits * weights + FLOAT_BITS * (layer.out_features * count + codebook) + kept


BASE = Scheme(FLOAT_BITS)


def block_words(block: int | None) -> str:
    """Name a block size: `block 64`, or `by row`."""
    return "by row" if block is None else f"block {block}"


class Layer(NamedTuple):
    """A layer to quantize: its shape, and whether proxy quantization finds a layer before it."""

    out_features: int
    in_features: int
    follows: bool


@dataclass(frozen=True)
class Shapes:
    """What a model is made of: its layers to quantize, and how many numbers it has beside them."""

    layers: Sequence[Layer]
    others: int

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    def weight_bits(self, scheme: Scheme) -> int:
        """Return the bits of the weights that are quantized."""
        return sum(scheme.layer_bits(layer) for layer in self.layers)

    def total_bits(self, scheme: Scheme) -> int:
        """Return the bits of the model."""
        return self.weight_bits(scheme) + FLOAT_BITS * self.others


def combinations(
    bits: Iterable[int],
    data_types: Collection[DataType],
    block_sizes: Collection[int | None],
    proxies: Collection[float],
    roundings: Collection[Rounding],
) -> list[Scheme]:
    """Return every combination that there is, 16 bit first and in any case; `nf4` has 4 bits only.

    Raises:
        ValueError: there is no such data type, block size or other value, or no combination.

    """
    found = [BASE]
    for k, data_type, block, proxy, rounding in product(bits, data_types, block_sizes, proxies, roundings):
        if k == FLOAT_BITS or (data_type == "nf4" and k != 4):
            continue
        found.append(Scheme(k, data_type, block, proxy, rounding))
        found[-1].check()
    if len(found) == 1:
        raise ValueError("no combination of these bits and data types: 'nf4' has 4 bits")
    return list(dict.fromkeys(found))
