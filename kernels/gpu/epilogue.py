"""What the products do with their int32 sums, the same operations in the same order everywhere.

The scale of the row comes first, then that of the column, the outlier columns and the bias, as in the reference. What
`decode.py` and `matmul.py` have in common, so that a row gives the same result in both, to the bit.
"""

import torch
import triton
import triton.language as tl

# Groups whose sums in float32 are kept apart, where a row's result must not depend on the kernel that has it.
_CHAINS = 8
# Dimensions from one group of a chain to its next, at most: a block of `decode.py` that fits its registers.
_CHAIN_STEP = 1024


def chains(group: int) -> int:
    """Return how many sums in float32 a row has, in calls of up to 16 rows: group g belongs to sum g modulo that.

    Each is begun with 0 and takes its groups in their order, `in_pairs` adds them up. So whoever has a sum, a program
    of `matmul.py` or the threads of a group in `decode.py`, does the same operations in the same order.
    """
    return min(_CHAINS, _CHAIN_STEP // group)


@triton.jit
def scaled(sums, row_scale, zero_point, row_sum, ZEROPOINT: tl.constexpr):
    """Turn int32 sums [M, N] into float32, scaled by row; row_scale and zero_point are float32 [M, 1], row_sum [N]."""
    if ZEROPOINT:
        sums -= zero_point.to(tl.int32) * row_sum[None, :]
    return sums.to(tl.float32) * row_scale


@triton.jit
def in_pairs(parts):
    """Add up the last dimension of [A, B, C], C a power of two up to 64: neighbours, then their sums, and so on."""
    for _ in tl.static_range(6):
        if parts.shape[2] > 1:
            # A sum of two has one order, whichever threads have them.
            parts = tl.sum(tl.reshape(parts, [parts.shape[0], parts.shape[1], parts.shape[2] // 2, 2]), 3)
    return tl.reshape(parts, [parts.shape[0], parts.shape[1]])


@triton.jit
def add_outliers(
    out, x_rows, w_rows,
    PADDED: tl.constexpr, OUTLIER_STEP: tl.constexpr, FLOAT32_OUTLIERS: tl.constexpr,
):  # fmt: skip
    """Add the product of outlier columns, PADDED of them and the last 0, given pointers to their rows [M] and [N]."""
    for first in tl.static_range(0, PADDED, OUTLIER_STEP):
        index = first + tl.arange(0, OUTLIER_STEP)[None, :]
        x_outliers = tl.load(x_rows[:, None] + index)
        w_outliers = tl.load(w_rows[:, None] + index)
        if FLOAT32_OUTLIERS:
            x_outliers, w_outliers = x_outliers.to(tl.float32), w_outliers.to(tl.float32)
        out = tl.dot(x_outliers, tl.trans(w_outliers), out, input_precision="ieee")
    return out


@triton.jit
def add_found(
    out, x_ptr, w_ptr, dims_ptr, total_ptr, row, column, stride_xm, stride_xk, K,
    STEP: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Add the products of x and the int8 weight, both still without the column's scale, in the dimensions found."""
    total = tl.load(total_ptr)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + column.to(tl.int64)[:, None] * K
    first = 0
    # Not a `for`: that would be pipelined, with buffers in shared memory for steps that are rarely more than one.
    while first < total:
        index = first + tl.arange(0, STEP)
        present = (index < total)[None, :]
        dim = tl.load(dims_ptr + index, mask=index < total, other=0)[None, :]
        x = tl.load(x_rows + dim * tl.cast(stride_xk, tl.int64), mask=present, other=0.0)  # [BLOCK_M, STEP]
        w = tl.load(w_rows + dim, mask=present, other=0)  # [BLOCK_N, STEP]
        if FLOAT32:
            x = x.to(tl.float32)
        # int8 is exact in every one of the dtypes.
        out = tl.dot(x, tl.trans(w.to(x.dtype)), out, input_precision="ieee")
        first += STEP
    return out


def multiply_in_float32(x: torch.dtype, columns: torch.dtype, device: torch.device) -> bool:
    """Tell whether the product of outlier columns of x and of the weight has to leave the 16-bit tensor cores."""
    # On the CPU this is Triton's interpreter, whose bfloat16 product is garbage.
    return x != columns or x == torch.float32 or (device.type == "cpu" and x == torch.bfloat16)
