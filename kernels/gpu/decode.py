"""A whole layer in one launch, for calls of up to 4 rows. Decoding reads the weight once, and nothing else counts.

A program computes BLOCK_N outputs of every row. Each program quantizes the rows for itself: they are short and in the
L2 cache, and a launch that did it once would take as long as the weight of a small layer. What takes longest is asked
for first: the first block of the weight is on its way while the program searches the rows' ranges and multiplies the
outlier columns, and each further block while the one before is multiplied.

Products are those of four int8 pairs at a time (`dp4a` on NVIDIA). The threads of a program divide K among themselves
and add up their int32 sums at the end. They are exact, so K needs no division among programs, and no order matters.
Of inputs in groups a block is quantized by itself, when it comes, and the threads of a group add up its sums in every
block; of these, in float32, the order is that of `epilogue.chains`. The epilogue is that of `matmul.py` for up to 16
rows, operation for operation: a row gives the same result in both, to the bit.

Rows of the weight have to be aligned to 16 bytes, K to 16, and outliers, multiplied in one step, not to be too many;
`accepts` tells.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Operands
from ..reference import groups
from .epilogue import chains, in_pairs, multiply_in_float32, scaled
from .launch import Launch, ceil_div, next_power_of_2
from .quantize_rows import WARP_ELEMENTS, kept, load_rows, quantized, quantized_groups, row_block, row_parameters
from .tiles import TENSOR_CORE_ROWS, DecodeTile

_TENSOR_CORE_ROWS = tl.constexpr(TENSOR_CORE_ROWS)
# Outlier columns that shared memory holds, with every tile that ships and in every dtype; 1,024 spill registers.
_MOST_OUTLIERS = 256
_MOST_WARPS = 16


@triton.jit
def _packed(values, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Put the last 8 bits of four neighbours into one int32: [R, BLOCK_K / 32, 32] to [R, BLOCK_K / 4]."""
    parts = tl.reshape(values, [ROWS, BLOCK_K // 4, 4])
    shift = 8 * tl.arange(0, 4)
    return tl.sum((parts & 255) << shift[None, None, :], 2)


@triton.jit
def _dot4(x, w, DP4A: tl.constexpr):
    """Multiply four pairs of int8, packed in int32, and add them up."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [x, w], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = (x >> 24) * (w >> 24)
        for shift in tl.static_range(8, 32, 8):
            total += ((x << shift) >> 24) * ((w << shift) >> 24)
        return total


@triton.jit(do_not_specialize=["M"])
def int8_decode_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    w_scale_ptr,
    row_sum_ptr,
    dims_ptr,
    w_outliers_ptr,
    bias_ptr,
    M,
    N,
    K16,
    outliers,
    stride_xm,
    stride_xk,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANGE_K: tl.constexpr,
    RANGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    ZEROPOINT: tl.constexpr,
    DP4A: tl.constexpr,
    PADDED: tl.constexpr,
    OUTLIERS: tl.constexpr,
    FLOAT32_OUTLIERS: tl.constexpr,
):
    """Compute columns `program_id(0) * BLOCK_N` and on; w is in int32 words of four values, K in units of 16.

    GROUP is 0 where rows are one group; else BLOCK_K has one group for each of the `chains`.
    """
    # In this form the compiler sees that every row of w is aligned to 16 bytes.
    K = 16 * K16  # noqa: N806
    first_n = tl.program_id(0) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    # Beyond the edge the last row is read again.
    column = tl.minimum(n, N - 1)

    # A thread has 16 neighbours of K, which are four words.
    word = (4 * tl.arange(0, BLOCK_K // 16)[:, None] + tl.arange(0, 4)[None, :])[None, None, :, :]
    w_rows = w_ptr + first_n.to(tl.int64) * (4 * K16)
    w_pointers = w_rows + ((column - first_n)[None, :, None, None] * (4 * K16) + word)
    w_next = tl.load(w_pointers, mask=word < K // 4, other=0)

    x_rows = x_ptr + tl.minimum(tl.arange(0, ROWS), M - 1).to(tl.int64) * stride_xm
    x_first = load_rows(x_rows, 0, K, stride_xk, RANGE_K)
    w_scale = tl.load(w_scale_ptr + column)
    row_sum = tl.zeros([BLOCK_N], tl.int32)
    if row_sum_ptr is not None:
        row_sum = tl.load(row_sum_ptr + column)
    if PADDED > 0:
        index = tl.arange(0, OUTLIERS)
        w_outlier_pointers = w_outliers_ptr + column.to(tl.int64)[:, None] * PADDED + index[None, :]
        # Into the cache, for later. What the program waits for comes after the barrier, for the compiler, too.
        tl.load(w_outlier_pointers, mask=(index < PADDED)[None, :], other=0.0, volatile=True)
    tl.debug_barrier()

    if GROUP == 0:
        scale, divisor, zero_point, _ = row_parameters(
            x_rows, x_first, dims_ptr, None, K, outliers, stride_xk, ROWS, RANGE_K, RANGES, PADDED, ROTATION, ZEROPOINT
        )
    # The tensor cores' rows are the rows of x, again and again.
    m = tl.arange(0, _TENSOR_CORE_ROWS)
    product = tl.zeros([_TENSOR_CORE_ROWS, BLOCK_N], tl.float32)
    if PADDED > 0:
        dim = tl.load(dims_ptr + index, mask=index < outliers, other=0).to(tl.int64)
        x_pointers = x_ptr + tl.minimum(m % ROWS, M - 1).to(tl.int64)[:, None] * stride_xm + (dim * stride_xk)[None, :]
        x_outliers = tl.load(x_pointers, mask=(index < outliers)[None, :], other=0.0)
        w_outliers = tl.load(w_outlier_pointers, mask=(index < PADDED)[None, :], other=0.0)
        if FLOAT32_OUTLIERS:
            x_outliers, w_outliers = x_outliers.to(tl.float32), w_outliers.to(tl.float32)
        product = tl.dot(x_outliers, tl.trans(w_outliers), product, input_precision="ieee")

    if GROUP > 0:
        groups: tl.constexpr = BLOCK_K // GROUP
        of_groups = tl.zeros([ROWS, BLOCK_N, groups], tl.float32)
        x_next = x_first
        for start in range(0, K, BLOCK_K):
            x_block = x_next
            # Before the weight: as below.
            x_next = load_rows(x_rows, start + BLOCK_K, K, stride_xk, BLOCK_K)
            w = w_next
            w_pointers += BLOCK_K // 4
            w_next = tl.load(w_pointers, mask=word < (K - start - BLOCK_K) // 4, other=0)
            x = kept(x_block, dims_ptr, None, start, K, outliers, PADDED, ROTATION)
            x, scale, zero_point = quantized_groups(x, GROUP, ZEROPOINT)
            x = tl.reshape(_packed(x, ROWS, BLOCK_K), [ROWS, 1, BLOCK_K // 16, 4])
            sums = tl.sum(_dot4(x, w, DP4A), 3)
            if ZEROPOINT:
                # Products with ones: the weight is here, its sums would have to be loaded.
                zeros = tl.reshape(zero_point.to(tl.int32), [ROWS, 1, groups, 1])
                zeros = tl.reshape(tl.broadcast_to(zeros, [ROWS, 1, groups, GROUP // 16]), [ROWS, 1, BLOCK_K // 16])
                sums -= zeros * tl.sum(_dot4(tl.full([1, 1, 1, 1], 0x01010101, tl.int32), w, DP4A), 3)
            # Over the threads of a group in integers, so that no order matters yet.
            part = tl.sum(tl.reshape(sums, [ROWS, BLOCK_N, groups, GROUP // 16]), 3).to(tl.float32)
            of_groups = tl.fma(part, tl.reshape(scale, [ROWS, 1, groups]), of_groups)
        out = _repeated(in_pairs(of_groups), ROWS, BLOCK_N)
    else:
        sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K // 16], tl.int32)
        for start in range(0, K, BLOCK_K):
            # Before the weight: Triton then moves x between the threads for their product, and not the weight.
            x_block = load_rows(x_rows, start, K, stride_xk, BLOCK_K)
            w = w_next
            w_pointers += BLOCK_K // 4
            w_next = tl.load(w_pointers, mask=word < (K - start - BLOCK_K) // 4, other=0)
            x = kept(x_block, dims_ptr, None, start, K, outliers, PADDED, ROTATION)
            x = _packed(quantized(x, divisor, zero_point, ZEROPOINT), ROWS, BLOCK_K)
            sums += tl.sum(_dot4(tl.reshape(x, [ROWS, 1, BLOCK_K // 16, 4]), w, DP4A), 3)
        total = _repeated(tl.sum(sums, 2), ROWS, BLOCK_N)
        row_scale, row_zero_point = _repeated(scale[:, None], ROWS, 1), _repeated(zero_point[:, None], ROWS, 1)
        out = scaled(total, row_scale, row_zero_point, row_sum, ZEROPOINT)
    out = out * w_scale[None, :] + product
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    tl.store(
        out_ptr + m[:, None] * N + n[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def _repeated(rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Repeat [ROWS, COLUMNS] until there are as many rows as tensor cores have."""
    copies: tl.constexpr = _TENSOR_CORE_ROWS // ROWS
    wide = tl.broadcast_to(rows[None, :, :], [copies, ROWS, COLUMNS])
    return tl.reshape(wide, [_TENSOR_CORE_ROWS, COLUMNS])


def accepts(weight: Operands) -> bool:
    """Tell whether the weight is aligned and its outliers are few enough."""
    return weight.aligned and len(weight.outlier_dims) <= _MOST_OUTLIERS


def int8_decode(weight: Operands, dtype: torch.dtype, zeropoint: bool, tile: DecodeTile) -> Callable[..., Tensor]:
    """Return what runs the layer, see `reference.int8_linear`, for x [M, K], M up to `tile.block_m`, and its strides.

    Args:
        weight: one that `accepts` accepts.
        dtype: of x.
        zeropoint: how the rows of x are quantized.
        tile: what one program computes.

    """
    n, k = weight.values.shape
    count, padded = len(weight.outlier_dims), weight.outlier_weight.shape[1]
    in_groups, width = groups(k, weight.group)
    if in_groups > 1:
        block_k = chains(width) * width
        # As much of the weight for each thread as before.
        num_warps = min(max(1, tile.num_warps * block_k // tile.block_k), _MOST_WARPS)
        tile = tile._replace(block_k=block_k, num_warps=num_warps)
        range_k, ranges = block_k, 0
    else:
        width = 0
        # To rotate what is read takes registers, too.
        elements = WARP_ELEMENTS if weight.rotation is None else WARP_ELEMENTS // 2
        range_k, ranges = row_block(k, elements * tile.num_warps // tile.block_m)
    launch = Launch(
        int8_decode_kernel,
        num_warps=tile.num_warps,
        ROWS=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        RANGE_K=range_k,
        RANGES=ranges,
        GROUP=width,
        ROTATION=weight.rotation or 0,
        ZEROPOINT=zeropoint,
        # The other form runs in the interpreter and on AMD's GPUs.
        DP4A=weight.device.type != "cpu" and not torch.version.hip,
        PADDED=padded,
        OUTLIERS=next_power_of_2(padded),
        FLOAT32_OUTLIERS=padded > 0 and multiply_in_float32(dtype, weight.outlier_weight.dtype, weight.device),
    )
    words = weight.values.view(torch.int32)
    row_sum = weight.row_sum if zeropoint and not width else None
    dims, columns = (weight.outlier_dims, weight.outlier_weight) if count else (None, None)
    scale, bias = weight.scale, weight.bias
    grid = (ceil_div(n, tile.block_n), 1, 1)

    def run(x: Tensor, strides: tuple[int, int]) -> Tensor:
        m = x.shape[0]
        out = x.new_empty(m, n)
        launch(grid, x, words, out, scale, row_sum, dims, columns, bias, m, n, k // 16, count, *strides)
        return out

    return run
