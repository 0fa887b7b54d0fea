"""LLM.int8() as published, in Triton: outlier dimensions are searched in every call, and nothing waits for the GPU.

Two launches come before those of `quantize_rows.py` and `matmul.py`. The first flags the dimensions that hold
any |x| >= threshold, the second lists them. The list has room for all K. How much of it is used stays on the GPU, where
the epilogue of the product loops to that count, with columns of x and of the int8 weight as they are. So shapes do not
depend on values, and no number of outliers is too large.

The dimensions are those of `reference.dynamic_outlier_dims` on the CPU exactly: torch compares in the dtype of x, to
which the threshold is rounded, and a NaN is no outlier. No order of programs changes the flags or the list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div

# Columns that one program flags; 256 bytes of a row in 16 bits.
_FLAG_COLUMNS = 128
# Columns that one program lists.
_LIST_COLUMNS = 4096


class Found(NamedTuple):
    """The outlier dimensions of x; only the GPU knows how many there are."""

    x: Tensor  # float [M, K]
    strides: tuple[int, int]  # of x, as they are for the kernels
    flags: Tensor  # int8 [K], 1 in an outlier dimension, else 0
    dims: Tensor  # int32 [K], sorted; only the first `total` hold anything
    total: Tensor  # int32 [1]


@triton.jit(do_not_specialize=["M"])
def flag_kernel(
    x_ptr, flags_ptr, threshold, M, K, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Search one block of x. Programs that share columns may set a flag twice, and none clears one."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    present = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(
        x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk, mask=present, other=0.0
    )
    found = tl.max((present & (tl.abs(x.to(tl.float32)) >= threshold)).to(tl.int32), 0)
    tl.store(flags_ptr + k, found.to(tl.int8), mask=(k < K) & (ALL_ROWS | (found != 0)))


@triton.jit
def list_kernel(flags_ptr, dims_ptr, total_ptr, K, BLOCK_K: tl.constexpr):
    """List one block of the flagged dimensions, behind those of the blocks before; the last program knows how many."""
    first = tl.program_id(0) * BLOCK_K
    index = tl.arange(0, BLOCK_K)
    before = tl.zeros([BLOCK_K], tl.int32)
    start = 0
    while start < first:
        before += tl.load(flags_ptr + start + index).to(tl.int32)
        start += BLOCK_K
    flag = tl.load(flags_ptr + first + index, mask=first + index < K, other=0).to(tl.int32)
    end = tl.sum(before, 0) + tl.cumsum(flag, 0)
    tl.store(dims_ptr + end - 1, first + index, mask=flag != 0)
    if first + BLOCK_K >= K:
        tl.store(total_ptr, tl.max(end, 0))


class OutlierSearch:
    """The two launches that find the dimensions of x with any |x| >= threshold."""

    def __init__(self, threshold: float, dtype: torch.dtype, most_rows: int) -> None:
        """Prepare them for x of a dtype and up to so many rows."""
        self._threshold = float(torch.tensor(threshold, dtype=dtype, device="cpu"))
        self._block = 1 if most_rows == 1 else 16 if most_rows <= 16 else 64
        # A program that sees all rows writes every flag of its columns; others set some.
        self._whole = most_rows <= self._block
        self._flag = Launch(
            flag_kernel,
            num_warps=4 if self._block == 64 else 1,
            BLOCK_M=self._block,
            BLOCK_K=_FLAG_COLUMNS,
            ALL_ROWS=self._whole,
        )
        self._list = Launch(list_kernel, num_warps=8, BLOCK_K=_LIST_COLUMNS)

    def __call__(self, x: Tensor, strides: tuple[int, int]) -> Found:
        """Search x, float [M, K] of these strides."""
        m, k = x.shape
        flags = (x.new_empty if self._whole else x.new_zeros)(k, dtype=torch.int8)
        found = Found(x, strides, flags, x.new_empty(k, dtype=torch.int32), x.new_empty(1, dtype=torch.int32))
        # Without rows or columns there is one program still, which says that nothing was found.
        grid = (max(1, ceil_div(k, _FLAG_COLUMNS)), max(1, ceil_div(m, self._block)), 1)
        self._flag(grid, x, flags, self._threshold, m, k, *strides)
        self._list((max(1, ceil_div(k, _LIST_COLUMNS)), 1, 1), flags, found.dims, found.total, k)
        return found
