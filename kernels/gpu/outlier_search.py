"""LLM.int8() as published, in Triton: outlier dimensions are searched in every call, and nothing waits for the GPU.

Two launches come before those of `quantize_rows.py` and `matmul.py`. The first flags the dimensions that hold
any |x| >= threshold, the second lists them. The list has room for all K. How much of it is used stays on the GPU, where
the epilogue of the product loops to that count, with columns of x and of the int8 weight as they are. So shapes do not
depend on values, and no number of outliers is too large.

The dimensions are those of `reference.dynamic_outlier_dims` on the CPU exactly: torch compares in the dtype of x, to
which the threshold is rounded, and a NaN is no outlier. No order of programs changes the flags or the list.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that one program flags; 256 bytes of a row in 16 bits.
_FLAG_COLUMNS = 128
# Columns that one program lists.
_LIST_COLUMNS = 4096


class Found(NamedTuple):
    """The outlier dimensions of x; only the GPU knows how many there are."""

    x: Tensor  # float [M, K], any strides
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


@functools.cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(threshold, dtype=dtype, device="cpu"))


def search(x: Tensor, threshold: float) -> Found:
    """Find the dimensions of x, float [M, K] of any strides on the GPU, with any |x| >= threshold, in two launches."""
    rows, in_features = x.shape
    block = 1 if rows == 1 else 16 if rows <= 16 else 64
    # A program that sees all rows writes every flag of its columns; others set some.
    flags = (torch.empty if rows <= block else torch.zeros)(in_features, dtype=torch.int8, device=x.device)
    found = Found(
        x,
        flags,
        torch.empty(in_features, dtype=torch.int32, device=x.device),
        torch.empty(1, dtype=torch.int32, device=x.device),
    )
    # Without rows or columns there is one program still, which says that nothing was found.
    kernel: Any = flag_kernel
    kernel[(max(1, triton.cdiv(in_features, _FLAG_COLUMNS)), max(1, triton.cdiv(rows, block)))](
        x,
        flags,
        _rounded(threshold, x.dtype),
        rows,
        in_features,
        *x.stride(),
        BLOCK_M=block,
        BLOCK_K=_FLAG_COLUMNS,
        ALL_ROWS=rows <= block,
        num_warps=4 if block == 64 else 1,
    )
    kernel = list_kernel
    kernel[(max(1, triton.cdiv(in_features, _LIST_COLUMNS)),)](
        flags, found.dims, found.total, in_features, BLOCK_K=_LIST_COLUMNS, num_warps=8
    )
    return found
