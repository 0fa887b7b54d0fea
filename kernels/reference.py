"""The definition of every operation, in plain torch.

A fast path elsewhere is right when it agrees with the function of the same name here. Notation, as in
LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): a layer computes `x [M, K] @ weight [N, K].T`; `absmax`
is the largest magnitude of a row; int8 values lie in [-127, 127].

The outlier dimensions of `x` are multiplied in floating point with their own columns of the weight; all
other dimensions go through int8. The int8 weight keeps all K columns, so nothing is compacted: the int8 row
of `x` holds the value that stands for 0.0 in the outlier dimensions.

A row of `x` has one scale, or one for each group of so many consecutive dimensions. The weight has one for each row in
any case: the groups are of the inputs alone, so a weight in int8 can be multiplied with any of them.

A weight may be rotated: its values are those of `W H`, and x is multiplied by H, too, once its outlier dimensions are
out. H is orthonormal and its own inverse, so the product is the same, and what was large in one dimension is spread
over many (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

Nothing here knows a file or a model, and nothing here is tuned: blocks exist to bound memory only. Over 250 lines, as
each operation is defined here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Activation = Literal["absmax", "zeropoint"]
Group = Literal[64, 128, 256]
Rotation = Literal[64]

# Rows are independent, so the weight is quantized in blocks: their temporaries stay in the cache, and they are large
# enough for two threads not to wait for each other's turn in the interpreter.
_BLOCK_ELEMENTS = 1 << 19
# 127 * 127 * 1024 < 2**24: that many products add up exactly in float32.
_EXACT_FLOAT32_K = 1024
# What the product turns to float32 of the weight at a time: 8 MB of it.
_PRODUCT_ELEMENTS = 1 << 21


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A quantized linear layer as it is stored: `W ~ values * absmax[:, None] / 127`, outlier columns excepted.

    Of a rotated one `W ~ rotate(values * absmax[:, None] / 127)`.

    Attributes:
        values: int8 [N, K], all columns.
        absmax: float32 [N], of the rows of W, or of what it is rotated to.
        outlier_dims: integer [k], strictly increasing: the dimensions of x that are multiplied in floating point.
        outlier_weight: float [N, k], the columns of W at `outlier_dims`.
        bias: float [N] or None.
        threshold: where it is given, nothing of the stored outliers counts: the outliers are searched in every call,
            `|x| >= threshold`, and their columns dequantized from int8, as there is no other copy (LLM.int8() as
            published).
        group: how many consecutive dimensions of x share a scale in what it is multiplied with; None is all of them.
        rotation: of how many dimensions are the blocks in which it is rotated, see `rotate`; None if it is not. A
            threshold cannot be given then: no single column can be taken from the values.

    """

    values: Tensor
    absmax: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    bias: Tensor | None = None
    threshold: float | None = None
    group: Group | None = None
    rotation: Rotation | None = None

    def rows(self, chosen: Tensor) -> "Int8Weight":
        """Return the weight of these rows alone, integer [M], as they are looked up: without a bias."""
        values, absmax, columns = self.values[chosen], self.absmax[chosen], self.outlier_weight[chosen]
        return replace(self, values=values, absmax=absmax, outlier_weight=columns, bias=None)

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [N, K], outlier columns as they were."""
        weight = dequantize_weight(self.values, self.absmax, self.rotation)
        if self.outlier_dims.numel():
            weight[:, self.outlier_dims.long()] = self.outlier_weight.float()
        return weight

    def without_uncounted(self) -> "Int8Weight":
        """Return it without stored outliers where these do not count, as the threshold is given."""
        if self.threshold is None:
            return self
        dims, columns = self.outlier_dims.new_empty(0), self.outlier_weight.new_empty(len(self.outlier_weight), 0)
        return replace(self, outlier_dims=dims, outlier_weight=columns)


def outliers_among(outlier_dims: Tensor, columns: Tensor, inputs: range) -> tuple[Tensor, Tensor]:
    """Return the outlier dims [k] and columns [N, k] of a layer that has some consecutive inputs of a larger one.

    What is given is that one's; the dims that are returned are counted from the first of these inputs.
    """
    here = (outlier_dims >= inputs.start) & (outlier_dims < inputs.stop)
    return outlier_dims[here] - inputs.start, columns[:, here]


class QuantizedRows(NamedTuple):
    """Rows of activations in int8, in G groups: `x ~ (values - zero_point) * scale`, outlier dimensions excepted.

    Where they are rotated, that is what x is rotated to.
    """

    values: Tensor  # int8 [M, K]
    scale: Tensor  # float32 [M, G]
    zero_point: Tensor | None  # float32 [M, G], whole numbers; None when symmetric
    group: int  # dimensions in each group, but for the last

    def dequantize(self) -> Tensor:
        """Return the values in float32 [M, K], rotated or not; if not, 0 in the outlier dimensions."""
        values = self.values.float()
        if self.zero_point is not None:
            values -= self._by_dimension(self.zero_point)
        return values * self._by_dimension(self.scale)

    def _by_dimension(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]


def groups(in_features: int, group: Group | None) -> tuple[int, int]:
    """Return how many groups K dimensions make, at least one, and how many dimensions a group has."""
    if group is None or in_features <= group:
        return 1, max(1, in_features)
    return -(-in_features // group), group


def row_sum_dtype(groups: int) -> torch.dtype:
    """Return the dtype of a weight's row sums: those of a group, of at most 256 dimensions, fit in 16 bits."""
    return torch.int32 if groups == 1 else torch.int16


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Multiply blocks of so many dimensions of x [..., K] by the Hadamard matrix H, orthonormal and symmetric: float32.

    H is Sylvester's. This is the fast transform, with sums and differences in float32 of values at a distance of 1,
    then of 2, and so on, and a product with the power of two `rotation ** -0.5` at the end: so it is the same to the
    bit wherever float32 is. Dimensions at the end that make up no whole block stay as they are. Done twice, it gives x
    back, but for rounding.
    """
    x = x.float()
    if rotation is None or x.shape[-1] < rotation:
        return x
    whole = x.shape[-1] // rotation * rotation
    blocks, distance = x[..., :whole], 1
    while distance < rotation:
        low, high = blocks.reshape(*x.shape[:-1], whole // (2 * distance), 2, distance).unbind(-2)
        blocks = torch.stack([low + high, low - high], -2)
        distance *= 2
    blocks = blocks.reshape(*x.shape[:-1], whole).mul_(rotation**-0.5)
    return blocks if whole == x.shape[-1] else torch.cat([blocks, x[..., whole:]], -1)


def quantize_weight(weight: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row of a weight to int8: `round_half_even(127 * w / absmax)`, in exact arithmetic.

    Args:
        weight: float16, bfloat16 or float32 [N, K], finite, any strides.
        rotation: rotate it first; w and absmax are of the result then.

    Returns:
        int8 [N, K] in [-127, 127], and float32 [N], the absmax of each row. A row of zeros has absmax 0.

    """
    out_features, in_features = weight.shape
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.zeros(out_features, dtype=torch.float32, device=weight.device)
    step = max(1, min(out_features, _BLOCK_ELEMENTS // max(1, in_features)))
    scratch = torch.empty(2, step, in_features, device=weight.device)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        block, magnitude = scratch[:, : len(weight[rows])]
        block.copy_(weight[rows])
        if rotation is not None:
            block.copy_(rotate(block, rotation))
        if in_features:
            absmax[rows] = torch.abs(block, out=magnitude).amax(1)
        # 127 * w is exact in float32 for 16-bit weights, and the quotient is then far enough from every
        # tie that rounding it once more changes nothing. Other weights need the longer significand.
        wide = weight.dtype == torch.float32 or rotation is not None or not bool((absmax[rows] < 2.0**120).all())
        block, divisor = (block.double(), absmax[rows].double()) if wide else (block, absmax[rows])
        divisor = torch.where(divisor == 0, 1, divisor)[:, None]
        values[rows] = block.mul_(127).div_(divisor).round_()
    return values, absmax


def dequantize_weight(values: Tensor, absmax: Tensor, rotation: Rotation | None = None) -> Tensor:
    """Return `values * absmax / 127` in float32 [N, K], for int8 [N, K] and float32 [N]; rotated back if it was."""
    return rotate(values.float() * (absmax / 127)[:, None], rotation)


def quantize_rows(
    x: Tensor,
    outlier_dims: Tensor,
    activation: Activation = "absmax",
    group: Group | None = None,
    rotation: Rotation | None = None,
) -> QuantizedRows:
    """Quantize each row of the activations to int8, group by group, leaving the outlier dimensions out.

    `absmax` (vector-wise quantization, section 2.1 of the paper): scale = absmax / 127. `zeropoint`: the
    range [min, max], widened to contain 0, is spread over the 255 values -127..127, so that
    scale = (max - min) / 254 and zero_point = round(-127 - min / scale). In the outlier dimensions the result
    holds the value of 0.0: 0, or the zero point.

    Args:
        x: float [M, K], finite.
        outlier_dims: integer [k], the dimensions left out; k may be 0.
        activation: `absmax` or `zeropoint`.
        group: how many consecutive dimensions share a scale, the last may be fewer; None takes the whole row.
        rotation: rotate x first, with 0 in its outlier dimensions; they are dimensions like others then.

    """
    m, k = x.shape
    count, width = groups(k, group)
    kept = x.float()
    if outlier_dims.numel():
        kept = kept.index_fill(1, outlier_dims.long(), 0)
    kept = rotate(kept, rotation)
    kept = pad(kept, (0, count * width - k)).view(m, count, width)  # zeros, which every range holds
    if activation == "absmax":
        absmax = kept.abs().amax(2)
        scale = absmax / 127
        divisor = torch.where(absmax == 0, 1, absmax)[:, :, None]
        values, zero_point = (kept * 127 / divisor).round(), None
    else:
        low, high = kept.amin(2).clamp(max=0), kept.amax(2).clamp(min=0)
        scale = (high - low) / 254
        divisor = torch.where(scale == 0, 1, scale)
        zero_point = (-127 - low / divisor).round()
        values = ((kept / divisor[:, :, None]).round() + zero_point[:, :, None]).clamp(-127, 127)
    return QuantizedRows(values.to(torch.int8).view(m, count * width)[:, :k], scale, zero_point, width)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed, exactly: int32 [M, N]. K up to 132,104 cannot overflow."""
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for n in range(0, weight.shape[0], _PRODUCT_ELEMENTS // _EXACT_FLOAT32_K):
        rows = slice(n, n + _PRODUCT_ELEMENTS // _EXACT_FLOAT32_K)
        for k in range(0, x.shape[1], _EXACT_FLOAT32_K):
            columns = slice(k, k + _EXACT_FLOAT32_K)
            out[:, rows] += _float32_product(x[:, columns], weight[rows, columns]).to(torch.int32)
    return out


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in float32 [M, N]; autocast leaves alone what is told where to write."""
    out = torch.empty(x.shape[0], weight.shape[0], device=x.device)
    return torch.mm(x.float(), weight.float().t(), out=out)


def row_sums(values: Tensor, group: Group | None) -> Tensor:
    """Add up the rows of int8 [N, K] over each of G groups of dimensions: int32 [N, 1], or int16 [N, G]."""
    k = values.shape[1]
    count, width = groups(k, group)
    dtype = row_sum_dtype(count)
    if count == 1:
        return values.sum(1, keepdim=True, dtype=dtype)
    whole = k // width
    sums = values[:, : whole * width].reshape(-1, whole, width).sum(2, dtype=dtype)
    return sums if whole == count else torch.cat([sums, values[:, whole * width :].sum(1, True, dtype=dtype)], 1)


def dynamic_outlier_dims(x: Tensor, threshold: float) -> Tensor:
    """Return the dimensions of `x` [M, K] that hold any |x| >= threshold, sorted: int64 [k] (section 2.2)."""
    return (x.abs() >= threshold).any(0).nonzero().flatten()


def int8_linear(x: Tensor, weight: Int8Weight, activation: Activation = "absmax") -> Tensor:
    """The mixed-precision product of LLM.int8(), equation 8 of the paper, plus bias.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: of N rows and K columns.
        activation: how the rows of x are quantized.

    Returns:
        [M, N] in the dtype of x. The products of a group add up in integers, those of all groups in float32, in their
        order; sums are float32 until the end.

    """
    dims, columns = weight.outlier_dims, weight.outlier_weight
    if weight.threshold is not None:
        dims = dynamic_outlier_dims(x, weight.threshold)
        columns = dequantize_weight(weight.values[:, dims], weight.absmax)
    rows = quantize_rows(x, dims, activation, weight.group, weight.rotation)
    # A row of ones gives the sums of the weight's rows, without another pass over the weight.
    values = torch.cat([rows.values, rows.values.new_ones(1, x.shape[1])])
    out = torch.zeros(len(x), len(weight.values), device=x.device)
    for group in range(rows.scale.shape[1]):
        columns_of_group = slice(group * rows.group, (group + 1) * rows.group)
        product = int8_product(values[:, columns_of_group], weight.values[:, columns_of_group]).float()
        product, row_sum = product[:-1], product[-1]
        if rows.zero_point is not None:
            product -= rows.zero_point[:, group, None] * row_sum
        out += product * rows.scale[:, group, None]
    out *= weight.absmax / 127
    if dims.numel():
        out += _float32_product(x[:, dims.long()], columns)
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)


def linear_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """The gradient of `int8_linear` with respect to x: `gradient @ W`, W dequantized, outlier columns as they are.

    Rounding x to int8 counts as if it were not there (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).

    Args:
        gradient: float [M, N], that with respect to the output.
        weight: of N rows and K columns. Outliers that are searched come from the int8 values, like all other columns.

    Returns:
        [M, K] in the dtype of the gradient; sums are float32.

    """
    weight = weight.without_uncounted()
    return _float32_product(gradient, weight.dequantize().t()).to(gradient.dtype)


def grouped_int8_linear(
    x: Tensor, weights: Sequence[Int8Weight], expert_of_row: Tensor, activation: Activation = "absmax"
) -> Tensor:
    """Multiply every row by the weight of its expert, as `int8_linear` does.

    Args:
        x: float [T, K].
        weights: those of the experts, of one shape, group and rotation.
        expert_of_row: integer [T * r], r rows for every one of x, next to each other. Rows of an expert that is not
            among the weights give 0.
        activation: how the rows of x are quantized.

    Returns:
        [T * r, N] in the dtype of x.

    """
    rows = x.repeat_interleave(len(expert_of_row) // max(1, len(x)), 0)
    out = x.new_zeros(len(rows), len(weights[0].values))
    for expert, weight in enumerate(weights):
        own = (expert_of_row == expert).nonzero().flatten()
        out[own] = int8_linear(rows[own], weight, activation)
    return out
