"""The mixed-precision product in Triton: int8 x int8 -> int32 on the tensor cores, everything else in the epilogue.

A program computes one tile [BLOCK_M, BLOCK_N] of the output. Its int32 sums are exact, so they are those of
`reference.int8_product` bit for bit. In the epilogue the zero points are corrected, still in integers; then, in
float32, come the scales in the reference's order, the product of the outlier columns (16-bit inputs, float32 sums) and
the bias; only the result is rounded to the dtype of the output, so nothing overflows on the way to float16.

Both operands are row-major with K innermost, which is what int8 tensor cores read. Aligned rows (K a multiple of 16)
are read 16 bytes at a time; any other M, N, K and number of outliers is right, and slower. The exact correction of the
zero point holds to K = 66,000, the products to 133,000. Tiles come from `tiles.py`. For few rows several programs
divide K, so that the weight streams in through every multiprocessor: the last to be done adds up the sums of all.

Over 250 lines: the kernel, its parts and its launch are one argument, and read together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import Operands
from .epilogue import add_found, add_outliers, multiply_in_float32, scaled
from .launch import Launch, ceil_div, next_power_of_2
from .quantize_rows import QuantizedInput
from .tiles import MatmulTile

# Outlier columns multiplied in one step; `padded_outliers` pads to it. With more, the widest tiles spill registers.
_OUTLIER_STEP = 32


@triton.jit
def _tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Number the tiles so that programs running at one time share rows and columns, for the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (program // in_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % in_group
    return first + inside % height, inside // height


@triton.jit
def _int8_sums(
    x, w, first_m, first_n, first_k, end_k, M, row, column, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return the int32 [BLOCK_M, BLOCK_N] sums over a part of K; x and w are descriptors (TMA) or pointers."""
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    if TMA:
        for start in range(first_k, end_k, BLOCK_K):
            # What lies outside of the matrices is read as 0.
            x_block = x.load([first_m, start])  # [BLOCK_M, BLOCK_K]
            w_block = w.load([first_n, start])  # [BLOCK_N, BLOCK_K]
            sums = tl.dot(x_block, tl.trans(w_block), sums, out_dtype=tl.int32)
    else:
        k = tl.arange(0, BLOCK_K)
        x_pointers = x + row.to(tl.int64)[:, None] * K + first_k + k[None, :]
        w_pointers = w + column.to(tl.int64)[:, None] * K + first_k + k[None, :]
        # The empty places of a small block are not read: for few rows that would be most of the traffic.
        present = (first_m + tl.arange(0, BLOCK_M))[:, None] < M
        for start in range(first_k, end_k, BLOCK_K):
            if not WHOLE_K:
                x_block = tl.load(x_pointers, mask=present & (k[None, :] < K - start), other=0)
                w_block = tl.load(w_pointers, mask=k[None, :] < K - start, other=0)
            elif BLOCK_M < 64:
                x_block = tl.load(x_pointers, mask=present, other=0)
                w_block = tl.load(w_pointers)
            else:
                x_block = tl.load(x_pointers)
                w_block = tl.load(w_pointers)
            sums = tl.dot(x_block, tl.trans(w_block), sums, out_dtype=tl.int32)
            x_pointers += BLOCK_K
            w_pointers += BLOCK_K
    return sums


@triton.jit
def _sums_of_all(sums, partial_ptr, counter_ptr, M, N, m, n, SPLIT_K: tl.constexpr):
    """Hand in the sums over a part of K. The last program of a tile to do so gets those over all of it, and True."""
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    part = tl.cast(M, tl.int64) * N
    tl.store(partial_ptr + tl.program_id(1) * part + place, sums, mask=inside)
    # The stores of all threads come before the one that counts.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        sums = tl.zeros_like(sums)
        for split in range(SPLIT_K):
            # Past the L1 cache, which does not see what others wrote.
            sums += tl.load(partial_ptr + split * part + place, mask=inside, other=0, cache_modifier=".cg")
    return sums, last


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    x,
    w,
    out_ptr,
    row_scale_ptr,
    w_scale_ptr,
    zero_point_ptr,
    row_sum_ptr,
    x_outliers_ptr,
    w_outliers_ptr,
    bias_ptr,
    dims_ptr,
    total_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
    PADDED: tl.constexpr,
    OUTLIER_STEP: tl.constexpr,
    FLOAT32_OUTLIERS: tl.constexpr,
):
    """Compute tile `program_id(0)`, over part `program_id(1)` of K; the pointers to what a layer lacks are None.

    With `total_ptr` the outliers are x and the int8 weight themselves, in the first `total` of the `dims`. An int32
    output takes the sums.
    """
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the first rows are read again: loads without a mask are the faster ones.
    row, column = m % M, n % N
    first_k, end_k = 0, K
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        first_k = tl.program_id(1) * length
        end_k = tl.minimum(first_k + length, K)
    sums = _int8_sums(
        x, w, tile_m * BLOCK_M, tile_n * BLOCK_N, first_k, end_k, M, row, column, K,
        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, TMA,
    )  # fmt: skip
    if SPLIT_K > 1:
        sums, last = _sums_of_all(sums, partial_ptr, counter_ptr, M, N, m, n, SPLIT_K)
        if not last:
            return

    if out_ptr.dtype.element_ty == tl.int32:
        out = sums
    else:
        column_scale = tl.load(w_scale_ptr + column)
        zero_point, row_sum = None, None
        if zero_point_ptr is not None:
            zero_point, row_sum = tl.load(zero_point_ptr + row)[:, None], tl.load(row_sum_ptr + column)
        row_scale = tl.load(row_scale_ptr + row)[:, None]
        out = scaled(sums, row_scale, zero_point, row_sum, zero_point_ptr is not None)
        if total_ptr is not None:
            out = add_found(
                out, x_outliers_ptr, w_outliers_ptr, dims_ptr, total_ptr, row, column, stride_xm, stride_xk, K,
                OUTLIER_STEP, FLOAT32_OUTLIERS,
            )  # fmt: skip
        out *= column_scale[None, :]
        if PADDED > 0:
            x_rows = x_outliers_ptr + row.to(tl.int64) * PADDED
            w_rows = w_outliers_ptr + column.to(tl.int64) * PADDED
            if BLOCK_M == 16:
                # By itself, as `decode.py` has it; larger tiles have no registers for that.
                none = tl.zeros_like(out)
                out += add_outliers(none, x_rows, w_rows, PADDED, OUTLIER_STEP, FLOAT32_OUTLIERS)
            else:
                out = add_outliers(out, x_rows, w_rows, PADDED, OUTLIER_STEP, FLOAT32_OUTLIERS)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    tl.store(
        out_ptr + m.to(tl.int64)[:, None] * N + n[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


class Int8Matmul:
    """The launch that finishes what `quantize_rows` began, for one weight, dtype of x and tile.

    Attributes:
        counters: how many int32 zeros the product takes, 0 where the tile does not divide K. `quantize_rows` sets them
            on its way, and a call uses them up, so nothing lives between calls, graphs or streams.

    """

    def __init__(self, weight: Operands, dtype: torch.dtype, tile: MatmulTile, most_rows: int) -> None:
        """Prepare the launch.

        Args:
            weight: its rows are read 16 bytes at a time if they are aligned.
            dtype: float16, bfloat16 or float32, of x and the output; int32 returns `reference.int8_product` alone.
            tile: what one program computes.
            most_rows: the largest M there will be.

        """
        self._weight, self._dtype, self._tile = weight, dtype, tile
        n, k = weight.values.shape
        # With outliers that are searched in the call, the columns are those of the int8 weight.
        searched, padded = weight.threshold is not None, weight.outlier_weight.shape[1]
        kind = dtype if searched else weight.outlier_weight.dtype
        float32 = (searched or padded > 0) and multiply_in_float32(dtype, kind, weight.device)
        self._split = tile.split_k > 1
        tiles = ceil_div(most_rows, tile.block_m) * ceil_div(n, tile.block_n)
        self.counters = next_power_of_2(tiles) if self._split else 0
        self._columns = weight.values if searched else weight.outlier_weight if padded else None
        self._tma = tile.tma and weight.aligned  # as the copy engine wants it
        self._w = _descriptor(weight.values, tile.block_n, tile.block_k) if self._tma else weight.values
        self._launch = Launch(
            int8_matmul_kernel,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            SPLIT_K=tile.split_k,
            WHOLE_K=k % tile.block_k == 0,
            TMA=self._tma,
            PADDED=padded,
            # Products in float32 take more registers still, and so does finding the columns by a list.
            OUTLIER_STEP=16 if float32 or searched or padded == 16 else _OUTLIER_STEP,
            FLOAT32_OUTLIERS=float32,
        )

    def __call__(self, rows: QuantizedInput) -> Tensor:
        """Return the output [M, N] for rows that came with the `counters` of this product."""
        tile, weight, found = self._tile, self._weight, rows.found
        m, (n, k) = rows.values.shape[0], weight.values.shape
        out = torch.empty(m, n, dtype=self._dtype, device=weight.device)
        if out.numel() == 0:
            return out
        partial = torch.empty(tile.split_k, m, n, dtype=torch.int32, device=weight.device) if self._split else None
        self._launch(
            (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n), tile.split_k, 1),
            _descriptor(rows.values, tile.block_m, tile.block_k) if self._tma else rows.values,
            self._w,
            out,
            rows.scale,
            weight.scale,
            rows.zero_point,
            None if rows.zero_point is None else weight.row_sum,
            found.x if found else rows.outliers,
            self._columns,
            weight.bias,
            found.dims if found else None,
            found.total if found else None,
            partial,
            rows.counters,
            m,
            n,
            k,
            *(found.strides if found else (0, 0)),
        )
        return out


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])
