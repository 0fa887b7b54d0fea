"""The definition of weights of 3 to 8 bits, and of the layer that multiplies by them, in plain torch.

Only the weight is quantized; inputs stay in floating point ("The case for 4-bit precision", Dettmers & Zettlemoyer
2022, arXiv 2212.09720). A row of the weight is cut into blocks of consecutive elements, each with its absmax in
float16, and an element is the number of the level that is nearest to what it is of that absmax. The columns at
`outlier_dims` are multiplied as they were; the codes have all columns, so that they do not depend on these.

What was said of `kernels/reference.py` holds here: a fast path is right when it agrees with the function of the same
name. Their bound: sums are float32 in any order, and a path may round levels, absmax and x to 16 bit first.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .levels import DataType, levels_of, quantiles
from .packing import pack, unpack

# Rows are quantized in blocks, of which the temporaries stay in the cache.
_STEP_ELEMENTS = 1 << 19


@dataclass(frozen=True, eq=False)
class KBitWeight:
    """A layer of k bits as it is stored: `W ~ levels[code] * absmax` of the block, outlier columns excepted.

    Attributes:
        packed: uint8 [N, row_bytes(K, k)], the codes, see `packing.py`.
        absmax: float16 [N, G], of each block of a row.
        levels: float32 [2 ** k], rising, in [-1, 1].
        in_features: K.
        block: how many elements of a row share an absmax, the last may be fewer; None is the whole row.
        outlier_dims: integer [c], strictly increasing: the dimensions of x that are multiplied by columns as they were.
        outlier_weight: float [N, c], the columns of W at `outlier_dims`.
        bias: float [N] or None.

    """

    packed: Tensor
    absmax: Tensor
    levels: Tensor
    in_features: int
    block: int | None
    outlier_dims: Tensor
    outlier_weight: Tensor
    bias: Tensor | None = None

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return len(self.levels).bit_length() - 1

    @property
    def values(self) -> Tensor:
        """What is stored for the weight: the packed codes."""
        return self.packed

    def rows(self, chosen: Tensor) -> "KBitWeight":
        """Return the weight of these rows alone, integer [M], as they are looked up: without a bias."""
        packed, absmax, columns = self.packed[chosen], self.absmax[chosen], self.outlier_weight[chosen]
        return replace(self, packed=packed, absmax=absmax, outlier_weight=columns, bias=None)

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [N, K], outlier columns as they were."""
        return dequantize_rows(self, slice(None))


def dequantize_rows(weight: KBitWeight, rows: slice) -> Tensor:
    """Return some rows of a weight, float32, outlier columns as they were."""
    codes = unpack(weight.packed[rows], weight.bits, weight.in_features)
    found = dequantize_codes(codes, weight.absmax[rows], weight.levels, weight.block)
    if weight.outlier_dims.numel():
        found[:, weight.outlier_dims.long()] = weight.outlier_weight[rows].float()
    return found


def blocks(in_features: int, block: int | None) -> tuple[int, int]:
    """Return how many blocks K elements make, at least one, and how many elements a block has."""
    width = max(1, in_features) if block is None else block
    return max(1, -(-in_features // width)), width


def block_absmax(weight: Tensor, block: int | None) -> Tensor:
    """Return the largest magnitude of each block of a weight [N, K], rounded to float16: [N, G]; infinite beyond it."""
    count, width = blocks(weight.shape[1], block)
    padded = pad(weight.float(), (0, count * width - weight.shape[1]))
    return padded.view(len(weight), count, width).abs().amax(2).half()


def normalized(weight: Tensor, absmax: Tensor, block: int | None) -> Tensor:
    """Return a weight [N, K] over the absmax of its blocks, in float32; 0 where that is 0."""
    scale = by_element(absmax, weight.shape[1], block)
    return torch.where(scale == 0, 0, weight.float() / torch.where(scale == 0, 1, scale))


def by_element(absmax: Tensor, in_features: int, block: int | None) -> Tensor:
    """Return the absmax of each element, float32 [N, K], from those of its blocks [N, G]."""
    _, width = blocks(in_features, block)
    return absmax.float().repeat_interleave(width, 1)[:, :in_features]


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the codes of the levels that are nearest to float32 values, of two equally near the lower one: uint8.

    That is how many of the middles between neighbours, in float32, are below a value; where the last level stands there
    more than once, at most the first of it.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    # Quantiles of a weight with many zeros are the same in the midst, too: only what follows the first 1 has no code.
    below = int((levels < levels[-1]).sum())
    return torch.bucketize(values, middles[:below]).to(torch.uint8)


def quantize_weight(weight: Tensor, bits: int, data_type: DataType, block: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to codes of k bits.

    Args:
        weight: float16, bfloat16 or float32 [N, K], finite.
        bits: k, 3 to 8.
        data_type: what the levels are.
        block: how many elements of a row share an absmax; None is the whole row.

    Returns:
        the codes, uint8 [N, K]; the absmax of the blocks, float16 [N, G], infinite where float16 does not hold it; and
        the levels, float32 [2 ** k].

    """
    if data_type == "quantile":
        levels = quantiles(normalized(weight, block_absmax(weight, block), block), bits)
    else:
        levels = levels_of(data_type, bits).to(weight.device)
    return *quantize_to(weight, levels, block), levels


def quantize_to(weight: Tensor, levels: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to given levels, float32 [2 ** k]; returns the codes and the absmax, see `quantize_weight`."""
    absmax = weight.new_empty(len(weight), blocks(weight.shape[1], block)[0], dtype=torch.float16)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, _STEP_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        absmax[rows] = block_absmax(weight[rows], block)
        codes[rows] = nearest(normalized(weight[rows], absmax[rows], block), levels)
    return codes, absmax


def dequantize_codes(codes: Tensor, absmax: Tensor, levels: Tensor, block: int | None) -> Tensor:
    """Return `levels[codes] * absmax` in float32 [N, K], for uint8 [N, K], float16 [N, G] and float32 [2 ** k]."""
    return levels[codes.int()] * by_element(absmax, codes.shape[1], block)


def from_float(
    weight: Tensor, bits: int, data_type: DataType, block: int | None, outlier_dims: Tensor, bias: Tensor | None = None
) -> KBitWeight:
    """Quantize a weight, float [N, K], with its columns at `outlier_dims` kept."""
    codes, absmax, levels = quantize_weight(weight, bits, data_type, block)
    columns = weight[:, outlier_dims.long()]
    return KBitWeight(pack(codes, bits), absmax, levels, weight.shape[1], block, outlier_dims, columns, bias)


def kbit_linear(x: Tensor, weight: KBitWeight) -> Tensor:
    """Multiply x [M, K] in float16, bfloat16 or float32 by the dequantized weight, plus bias: [M, N] in its dtype."""
    out = torch.empty(len(x), len(weight.packed), device=x.device)
    torch.mm(x.float(), weight.dequantize().t(), out=out)  # autocast leaves alone what is told where to write
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)
