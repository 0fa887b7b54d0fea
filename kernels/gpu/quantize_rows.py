"""Row quantization in Triton: activations to int8 in one launch, as `reference.quantize_rows` defines it.

One program per row. The row stays in registers between the search for its range and the rounding; a row longer
than `_LONGEST_BLOCK` is read twice. The same launch gathers the outlier dimensions for the 16-bit product.
Groups of dimensions lie within one block, so a row in groups is read once, however long. What is rotated is rotated
there, too: the six stages of the transform move values between threads, for a third more instructions, and their sums
are those of the reference. A product with the matrix on tensor cores would add up in an order of its own.

Which dimensions are outliers is kept as bits, one 32-bit word for 32 neighbouring dimensions, made by comparing the
words' numbers with the k outlier dims: K * k / 32 comparisons where a test of every dimension would take K * k.

Divisions round as IEEE says and halves round to even, so the int8 values are those of the reference on the CPU, bit for
bit (docs/kernels.md has the one exception, rarer than one in 10**12), and so are scale and zero point. A row with NaN
or infinity gets a scale that is not finite, as in the reference.

Rows may have any strides. Aligned rows with K a multiple of 16 are read 16 bytes at a time; others are right, and
slower.

Over 250 lines: the kernel, its parts and its launch are one argument, and read together.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import padded_outliers
from ..reference import Group, Rotation, groups
from .launch import Launch, ceil_div, next_power_of_2
from .outlier_search import Found

# More per program does not fit the registers (65,536 in one block spills).
_LONGEST_BLOCK = 16384
# What is read twice is rotated twice, and a block of that length then spills.
_LONGEST_ROTATED_BLOCK = 8192
# What a warp holds of it.
WARP_ELEMENTS = 1024
# Adding and subtracting 1.5 * 2**23 rounds half to even; Triton's own rounding is a library call on NVIDIA only.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


class QuantizedInput(NamedTuple):
    """x in int8, `x ~ (values - zero_point) * scale` but for the outlier dimensions: `outliers` or `found`."""

    values: Tensor  # int8 [M, K]
    scale: Tensor  # float32 [M], or of G > 1 groups [G, M]
    zero_point: Tensor | None  # float32 as the scale, whole numbers; None when symmetric
    outliers: Tensor | None  # [M, padded_outliers(k)] in the dtype of x, zero beyond k; None when k is 0
    counters: Tensor | None = None  # int32, zeros, for a product that divides K among programs
    found: Found | None = None


@triton.jit
def _ordered(x):
    """Map float32 to int32 in the same order. NaN lies outside of the infinities, so a maximum shows it."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _extend(low, high, x, ZEROPOINT: tl.constexpr):
    """Widen the range of each row, two values of `_ordered`, by a block; absmax has the magnitude for its upper end."""
    if ZEROPOINT:
        ordered = tl.reshape(_ordered(x), [x.shape[0], x.shape[1] * x.shape[2]])
        return tl.minimum(low, tl.min(ordered, 1)), tl.maximum(high, tl.max(ordered, 1))
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return low, tl.maximum(high, tl.max(tl.reshape(magnitude, [x.shape[0], x.shape[1] * x.shape[2]]), 1))


@triton.jit
def load_rows(x_rows, start, K, stride_xk, BLOCK_K: tl.constexpr):
    """Load one block of rows, given their pointers [R]: [R, BLOCK_K / 32, 32], 0 beyond K."""
    column = start + tl.arange(0, BLOCK_K // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    pointers = x_rows[:, None, None] + (column * tl.cast(stride_xk, tl.int64))[None, :, :]
    return tl.load(pointers, mask=(column < K)[None, :, :], other=0.0)


@triton.jit
def _sums_and_differences(x, DISTANCE: tl.constexpr):
    """Add and subtract what lies at a distance: one stage of the transform, of a block of any shape."""
    pairs = tl.reshape(x, [x.numel // (2 * DISTANCE), 2, DISTANCE])
    low, high = tl.split(tl.permute(pairs, [0, 2, 1]))
    return tl.permute(tl.join(low + high, low - high), [0, 2, 1])


@triton.jit
def _rotated(x, whole):
    """Rotate what comes before dimension `whole` of a block as `reference.rotate` does, in its order, so to the bit."""
    y = x
    for level in tl.static_range(6):
        y = _sums_and_differences(y, 1 << level)
    column = tl.arange(0, x.shape[1])[:, None] * 32 + tl.arange(0, 32)[None, :]
    return tl.where((column < whole)[None, :, :], tl.reshape(y, x.shape) * 0.125, x)


@triton.jit
def kept(x, dims_ptr, flags_ptr, start, K, outliers, PADDED: tl.constexpr, ROTATION: tl.constexpr):
    """Turn a block of `load_rows` to float32, and its outlier dimensions to 0: those listed, or those with a flag.

    With ROTATION above 0 it is then rotated.
    """
    x = x.to(tl.float32)
    if PADDED > 0:
        word = tl.arange(0, x.shape[1])
        bits = tl.zeros([x.shape[1]], tl.int32)
        for first in range(0, PADDED, 16):
            index = first + tl.arange(0, 16)
            # Dimensions of other blocks fall outside of the words of this one.
            dim = tl.load(dims_ptr + index, mask=index < outliers, other=-1).to(tl.int32) - start
            bits += tl.sum(tl.where((dim >> 5)[None, :] == word[:, None], (1 << (dim & 31))[None, :], 0), 1)
        x = tl.where(((bits[:, None] & (1 << tl.arange(0, 32))[None, :]) == 0)[None, :, :], x, 0.0)
    if flags_ptr is not None:
        column = start + tl.arange(0, x.shape[1])[:, None] * 32 + tl.arange(0, 32)[None, :]
        x = tl.where((tl.load(flags_ptr + column, mask=column < K, other=0) == 0)[None, :, :], x, 0.0)
    if ROTATION > 0:
        x = _rotated(x, K // ROTATION * ROTATION - start)
    return x


@triton.jit
def row_parameters(
    x_rows, first, dims_ptr, flags_ptr, K, outliers, stride_xk,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, ROTATION: tl.constexpr,
    ZEROPOINT: tl.constexpr,
):  # fmt: skip
    """Search the range of rows, given their pointers [R] and their first block by `load_rows`.

    Returns their scale, divisor and zero point, float32 [R] each, and their first block as `kept` does.
    """
    # The int32 0 stands for 0.0, which both ranges hold.
    low, high = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    first = kept(first, dims_ptr, flags_ptr, 0, K, outliers, PADDED, ROTATION)
    low, high = _extend(low, high, first, ZEROPOINT)
    for start in range(BLOCK_K, BLOCKS * BLOCK_K, BLOCK_K):
        more = load_rows(x_rows, start, K, stride_xk, BLOCK_K)
        more = kept(more, dims_ptr, flags_ptr, start, K, outliers, PADDED, ROTATION)
        low, high = _extend(low, high, more, ZEROPOINT)
    scale, divisor, zero_point = _parameters(low, high, ZEROPOINT)
    return scale, divisor, zero_point, first


@triton.jit
def _parameters(low, high, ZEROPOINT: tl.constexpr):
    """Return scale, divisor and zero point, float32 [R] each, of the ranges that `_extend` found."""
    upper = high.to(tl.float32, bitcast=True)
    if ZEROPOINT:
        lower = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        scale = tl.div_rn(upper - lower, 254.0)
        divisor = tl.where(scale == 0, 1.0, scale)
        zero_point = ((-127 - tl.div_rn(lower, divisor)) + ROUND) - ROUND
    else:
        scale = tl.div_rn(upper, 127.0)
        divisor = tl.where(upper == 0, 1.0, upper)
        zero_point = tl.zeros_like(upper)
    return scale, divisor, zero_point


@triton.jit
def _divide(numerator, divisor, reciprocal):
    """Divide by a positive number as IEEE does, from its rounded reciprocal: a residual that is exact, and one step.

    A seventh of the instructions of `div_rn`, which would make the kernel wait for the arithmetic. The reciprocal must
    not leave the normal numbers.
    """
    quotient = numerator * reciprocal
    return tl.fma(tl.fma(quotient, -divisor, numerator), reciprocal, quotient)


@triton.jit
def quantized(x, divisor, zero_point, ZEROPOINT: tl.constexpr):
    """Round a block of `kept` to int32 whose last 8 bits are the int8 values."""
    numerator = x
    if not ZEROPOINT:
        numerator = x * 127
    divisors = divisor[:, None, None]
    # Only rows of bfloat16 or float32 near the ends of the range come to the slow branch.
    if tl.min(((divisor > 2.0**-100) & (divisor < 2.0**100)).to(tl.int32), 0) != 0:
        quotient = _divide(numerator, divisors, tl.div_rn(1.0, divisor)[:, None, None])
    else:
        quotient = tl.div_rn(numerator, divisors)
    # The sum's last bits are the integer, in two's complement, without a conversion.
    values = (quotient + ROUND).to(tl.int32, bitcast=True)
    if ZEROPOINT:
        values += zero_point.to(tl.int32)[:, None, None] - ROUND_BITS
        values = tl.minimum(tl.maximum(values, -127), 127)
    return values


@triton.jit
def quantized_groups(x, GROUP: tl.constexpr, ZEROPOINT: tl.constexpr):
    """Quantize a block of `kept` whose groups are rows of their own: to values as `quantized` does, of the same shape.

    Returns scale and zero point, too, float32 [R * groups of the block] each.
    """
    groups: tl.constexpr = x.shape[0] * x.shape[1] * 32 // GROUP
    rows = tl.reshape(x, [groups, GROUP // 32, 32])
    nothing = tl.zeros([groups], tl.int32)
    low, high = _extend(nothing, nothing, rows, ZEROPOINT)
    scale, divisor, zero_point = _parameters(low, high, ZEROPOINT)
    return tl.reshape(quantized(rows, divisor, zero_point, ZEROPOINT), x.shape), scale, zero_point


@triton.jit
def _store(values_rows, values, start, K, BLOCK_K: tl.constexpr):
    column = start + tl.arange(0, BLOCK_K // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(values_rows[:, None, None] + column[None, :, :], values.to(tl.int8), mask=(column < K)[None, :, :])


@triton.jit
def quantize_row(
    x_rows, row, dims_ptr, flags_ptr, values_ptr, scale_ptr, zero_point_ptr, gathered_ptr, M, K, outliers, stride_xk,
    BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, ROTATION: tl.constexpr,
    ZEROPOINT: tl.constexpr,
):  # fmt: skip
    """Quantize a row, given its pointer and its place in the M rows of the result, int64 [1] each."""
    values_rows = values_ptr + row * K
    if GROUP > 0:
        for start in range(0, BLOCKS * BLOCK_K, BLOCK_K):
            x = load_rows(x_rows, start, K, stride_xk, BLOCK_K)
            x = kept(x, dims_ptr, flags_ptr, start, K, outliers, PADDED, ROTATION)
            values, scale, zero_point = quantized_groups(x, GROUP, ZEROPOINT)
            group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            place = group.to(tl.int64) * M + row
            tl.store(scale_ptr + place, scale, mask=group * GROUP < K)
            if ZEROPOINT:
                tl.store(zero_point_ptr + place, zero_point, mask=group * GROUP < K)
            _store(values_rows, values, start, K, BLOCK_K)
    else:
        first = load_rows(x_rows, 0, K, stride_xk, BLOCK_K)
        scale, divisor, zero_point, first = row_parameters(
            x_rows, first, dims_ptr, flags_ptr, K, outliers, stride_xk, 1, BLOCK_K, BLOCKS, PADDED, ROTATION, ZEROPOINT
        )
        tl.store(scale_ptr + row, scale)
        if ZEROPOINT:
            tl.store(zero_point_ptr + row, zero_point)
        _store(values_rows, quantized(first, divisor, zero_point, ZEROPOINT), 0, K, BLOCK_K)
        for start in range(BLOCK_K, BLOCKS * BLOCK_K, BLOCK_K):
            x = load_rows(x_rows, start, K, stride_xk, BLOCK_K)
            x = kept(x, dims_ptr, flags_ptr, start, K, outliers, PADDED, ROTATION)
            _store(values_rows, quantized(x, divisor, zero_point, ZEROPOINT), start, K, BLOCK_K)

    if PADDED > 0:
        for start in range(0, PADDED, 16):
            index = start + tl.arange(0, 16)
            dim = tl.load(dims_ptr + index, mask=index < outliers, other=0).to(tl.int64)
            pointers = x_rows[:, None] + (dim * stride_xk)[None, :]
            column = tl.load(pointers, mask=(index < outliers)[None, :], other=0.0)
            tl.store(gathered_ptr + row[:, None] * PADDED + index[None, :], column)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr,
    dims_ptr,
    flags_ptr,
    values_ptr,
    scale_ptr,
    zero_point_ptr,
    gathered_ptr,
    counters_ptr,
    M,
    K,
    outliers,
    stride_xm,
    stride_xk,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATION: tl.constexpr,
    ZEROPOINT: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Quantize row `program_id(0)`. BLOCKS blocks of BLOCK_K dimensions cover K; PADDED is 0 without outlier dims.

    GROUP is 0 where the row is one group, and ROTATION where it is not rotated.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    x_rows = x_ptr + row * stride_xm
    if COUNTERS > 0:  # known to the compiler, unlike the other condition  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    quantize_row(
        x_rows, row, dims_ptr, flags_ptr, values_ptr, scale_ptr, zero_point_ptr, gathered_ptr, M, K, outliers,
        stride_xk, BLOCK_K, BLOCKS, GROUP, PADDED, ROTATION, ZEROPOINT,
    )  # fmt: skip


def row_block(in_features: int, longest: int) -> tuple[int, int]:
    """Return BLOCK_K and BLOCKS of `row_parameters` for rows of K dimensions, in blocks of up to `longest`."""
    block = min(longest, max(512, next_power_of_2(in_features)))
    return block, max(1, ceil_div(in_features, block))


def quantizer_block(in_features: int, rotation: Rotation | None) -> tuple[int, int]:
    """Return BLOCK_K and BLOCKS of `quantize_row`."""
    long = rotation is not None and in_features > _LONGEST_BLOCK
    return row_block(in_features, _LONGEST_ROTATED_BLOCK if long else _LONGEST_BLOCK)


class QuantizeRows:
    """The launch that quantizes rows and gathers their outlier dimensions; see `reference.quantize_rows`."""

    def __init__(
        self,
        in_features: int,
        outlier_dims: Tensor,
        zeropoint: bool,
        group: Group | None = None,
        rotation: Rotation | None = None,
        counters: int = 0,
    ) -> None:
        """Prepare the launch.

        Args:
            in_features: K.
            outlier_dims: int32 [k] on the device of x, unique; k may be 0. What a search finds is not gathered.
            zeropoint: spread the row's range over the int8 values, in place of its absmax.
            group: how many consecutive dimensions share a scale; None is the whole row.
            rotation: of how many dimensions are the blocks in which rows are rotated; None if they are not.
            counters: how many zeros to return in `QuantizedInput.counters`, 0 or a power of two.

        """
        self._in_features, self._zeropoint, self._counters = in_features, zeropoint, counters
        self._count = len(outlier_dims)
        self._dims = outlier_dims if self._count else None
        self._padded = padded_outliers(self._count)
        self._groups, width = groups(in_features, group)
        block, blocks = quantizer_block(in_features, rotation)
        self._launch = Launch(
            quantize_rows_kernel,
            num_warps=max(1, block // WARP_ELEMENTS),
            BLOCK_K=block,
            BLOCKS=blocks,
            GROUP=width if self._groups > 1 else 0,
            PADDED=self._padded,
            ROTATION=rotation or 0,
            ZEROPOINT=zeropoint,
            COUNTERS=counters,
        )

    def __call__(self, x: Tensor, strides: tuple[int, int], found: Found | None = None) -> QuantizedInput:
        """Quantize x, float16, bfloat16 or float32 [M, K] of these strides, but for what a search has found in it."""
        m, k = x.shape[0], self._in_features
        scales = (m,) if self._groups == 1 else (self._groups, m)
        out = QuantizedInput(
            x.new_empty(m, k, dtype=torch.int8),
            x.new_empty(scales, dtype=torch.float32),
            x.new_empty(scales, dtype=torch.float32) if self._zeropoint else None,
            x.new_empty(m, self._padded) if self._count else None,
            x.new_empty(self._counters, dtype=torch.int32) if self._counters else None,
            found,
        )
        if m:
            self._launch(
                (m, 1, 1),
                x,
                self._dims,
                found.flags if found else None,
                out.values,
                out.scale,
                out.zero_point,
                out.outliers,
                out.counters,
                m,
                k,
                self._count,
                *strides,
            )
        return out
