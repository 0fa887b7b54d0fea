"""The mixed-precision product in Triton: int8 x int8 -> int32 on the tensor cores, everything else in the epilogue.

A program computes one tile [BLOCK_M, BLOCK_N] of the output. Its int32 sums are exact, so they are those of
`reference.int8_product` bit for bit. In the epilogue the zero points are corrected, still in integers; then, in
float32, come the scales in the reference's order, the product of the outlier columns (16-bit inputs, float32 sums) and
the bias; only the result is rounded to the dtype of the output, so nothing overflows on the way to float16.

Both operands are row-major with K innermost, which is what int8 tensor cores read. Aligned rows (K a multiple of 16)
are read 16 bytes at a time; any other M, N, K and number of outliers is right, and slower. The exact correction of the
zero point holds to K = 66,000, the products to 133,000.

Of inputs in groups the int32 sums of each group are exact, and float32 from there on: a second accumulator, beside
which tiles are narrower. Up to 16 rows have the sums of `epilogue.chains`; in larger calls the zero points are
subtracted in the end, by a product of their own.

Tiles come from `tiles.py`. For few rows several programs divide K, so that the weight streams in through every
multiprocessor: the last to be done adds up the sums of all.

Over 250 lines: the kernel, its parts and its launch are one argument, and read together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import Operands
from ..reference import groups
from .epilogue import add_found, add_outliers, chains, in_pairs, multiply_in_float32, scaled
from .launch import Launch, ceil_div, next_power_of_2
from .quantize_rows import ROUND, ROUND_BITS, QuantizedInput
from .tiles import TENSOR_CORE_ROWS, MatmulTile, gpu_of

# Outlier columns multiplied in one step; `padded_outliers` pads to it. With more, the widest tiles spill registers.
MOST_OUTLIER_STEP = 32


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Number the tiles so that programs running at one time share rows and columns, for the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (program // in_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % in_group
    return first + inside % height, inside // height


@triton.jit
def _load_blocks(
    x_pointers, w_pointers, present, k, left, BLOCK_M: tl.constexpr, WHOLE_K: tl.constexpr
):  # fmt: skip
    """Load a step of K of x and of w, [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], of which `left` dimensions are left.

    The empty places of a small block are not read: for few rows that would be most of the traffic.
    """
    if not WHOLE_K:
        x_block = tl.load(x_pointers, mask=present & (k[None, :] < left), other=0)
        w_block = tl.load(w_pointers, mask=k[None, :] < left, other=0)
    elif BLOCK_M < 64:
        x_block = tl.load(x_pointers, mask=present, other=0)
        w_block = tl.load(w_pointers)
    else:
        x_block = tl.load(x_pointers)
        w_block = tl.load(w_pointers)
    return x_block, w_block


@triton.jit
def int8_sums(
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
        present = (first_m + tl.arange(0, BLOCK_M))[:, None] < M
        for start in range(first_k, end_k, BLOCK_K):
            x_block, w_block = _load_blocks(x_pointers, w_pointers, present, k, K - start, BLOCK_M, WHOLE_K)
            sums = tl.dot(x_block, tl.trans(w_block), sums, out_dtype=tl.int32)
            x_pointers += BLOCK_K
            w_pointers += BLOCK_K
    return sums


@triton.jit
def sums_of_groups(
    x, w, row_scale_ptr, zero_point_ptr, row_sum_ptr, first_m, first_n, first, M, row, column, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Return the float32 [BLOCK_M, BLOCK_N] sums over every SPLIT_K-th group, each scaled by the row's scale of it.

    Those of few rows are without their zero points, as in `decode.py`.
    """
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k = tl.arange(0, BLOCK_K)
    present = (first_m + tl.arange(0, BLOCK_M))[:, None] < M
    groups = tl.cdiv(K, GROUP)
    exact: tl.constexpr = BLOCK_M == 16 and zero_point_ptr is not None
    for group in range(first, groups, SPLIT_K):
        # Asked for before the product, which takes longer. Places fit 32 bits where x and its int8 values fit a GPU.
        scale = tl.load(row_scale_ptr + group * M + row)
        if exact:
            zero_point = tl.load(zero_point_ptr + group * M + row)
            row_sum = tl.load(row_sum_ptr + column * groups + group).to(tl.float32)
        # Hopper's instruction begins with zeros for nothing, the others with any integer, and no conversion follows.
        sums = tl.full([BLOCK_M, BLOCK_N], 0 if WGMMA else ROUND_BITS, tl.int32)
        for step in tl.static_range(0, GROUP, BLOCK_K):
            start = group * GROUP + step
            if TMA:
                x_block = x.load([first_m, start])
                w_block = w.load([first_n, start])
            else:
                x_pointers = x + row.to(tl.int64)[:, None] * K + start + k[None, :]
                w_pointers = w + column.to(tl.int64)[:, None] * K + start + k[None, :]
                x_block, w_block = _load_blocks(x_pointers, w_pointers, present, k, K - start, BLOCK_M, WHOLE_K)
            sums = tl.dot(x_block, tl.trans(w_block), sums, out_dtype=tl.int32)
        # Sums of up to 256 dimensions are below 2**22, and 2**23 without the zero point: nothing is rounded before
        # the scale, and the bits of 1.5 * 2**23 plus such an integer are those of their sum.
        part = sums.to(tl.float32) if WGMMA else sums.to(tl.float32, bitcast=True) - ROUND
        if exact:
            part = tl.fma(-zero_point[:, None], row_sum[None, :], part)
        out = tl.fma(part, scale[:, None], out)
    return out


@triton.jit
def _subtract_zero_points(
    out, row_scale_ptr, zero_point_ptr, row_sum_ptr, M, row, column, groups, PRECISION: tl.constexpr
):  # fmt: skip
    """Subtract, for all groups, the zero point times the scale times the sum of the weight's row.

    A product of tensor cores, which take 11 bits of a float32: so 16 groups of the sums are multiplied in two steps,
    their upper bits and their lower ones, and the other factor in two parts, 22 bits of it.
    """
    step = 0
    # Not a `for`, as in `add_found`.
    while step < 2 * tl.cdiv(groups, 16):
        group = step // 2 * 16 + tl.arange(0, 16)
        present = (group < groups)[None, :]
        place = row[:, None] + group[None, :] * M
        shift = -tl.load(row_scale_ptr + place, mask=present, other=0)
        shift *= tl.load(zero_point_ptr + place, mask=present, other=0)  # [BLOCK_M, 16]
        row_sum = tl.load(row_sum_ptr + column[:, None] * groups + group[None, :], mask=present, other=0)
        row_sum = (row_sum & tl.where(step % 2 == 0, -32, 31)).to(tl.float32)  # [BLOCK_N, 16]
        upper = (shift.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        out = tl.dot(upper, tl.trans(row_sum), out, input_precision=PRECISION)
        out = tl.dot(shift - upper, tl.trans(row_sum), out, input_precision=PRECISION)
        step += 1
    return out


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
        # The loads go past the L1 cache, which does not see what others wrote.
        if sums.dtype == tl.float32:
            pointers = partial_ptr + place[:, :, None] + tl.arange(0, SPLIT_K)[None, None, :] * part
            sums = in_pairs(tl.load(pointers, mask=inside[:, :, None], other=0, cache_modifier=".cg"))
        else:
            sums = tl.zeros_like(sums)
            for split in range(SPLIT_K):
                sums += tl.load(partial_ptr + split * part + place, mask=inside, other=0, cache_modifier=".cg")
    return sums, last


@triton.jit
def finish(
    sums, out_ptr, place, inside, row_scale_ptr, w_scale_ptr, zero_point_ptr, row_sum_ptr, x_outliers_ptr,
    w_outliers_ptr, bias_ptr, dims_ptr, total_ptr, M, N, K, row, column, n, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PADDED: tl.constexpr,
    OUTLIER_STEP: tl.constexpr, FLOAT32_OUTLIERS: tl.constexpr,
):  # fmt: skip
    """Turn the sums of a tile into its output, and store the rows that are `inside` at their places."""
    if out_ptr.dtype.element_ty == tl.int32:
        out = sums
    else:
        column_scale = tl.load(w_scale_ptr + column)
        if GROUP > 0:
            out = sums
            if BLOCK_M > 16 and zero_point_ptr is not None:
                out = _subtract_zero_points(
                    out, row_scale_ptr, zero_point_ptr, row_sum_ptr, M, row, column, tl.cdiv(K, GROUP), PRECISION
                )
        else:
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
        out_ptr + place.to(tl.int64)[:, None] * N + n[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (n < N)[None, :],
    )


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
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
    WGMMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDED: tl.constexpr,
    OUTLIER_STEP: tl.constexpr,
    FLOAT32_OUTLIERS: tl.constexpr,
):
    """Compute tile `program_id(0)`, over part `program_id(1)` of K; the pointers to what a layer lacks are None.

    With `total_ptr` the outliers are x and the int8 weight themselves, in the first `total` of the `dims`. An int32
    output takes the sums. GROUP is 0 where rows are one group.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the first rows are read again: loads without a mask are the faster ones.
    row, column = m % M, n % N
    if GROUP > 0:
        first = 0
        if SPLIT_K > 1:
            first = tl.program_id(1)
        sums = sums_of_groups(
            x, w, row_scale_ptr, zero_point_ptr, row_sum_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, first, M, row, column,
            K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SPLIT_K, WHOLE_K, TMA, WGMMA,
        )  # fmt: skip
    else:
        first_k, end_k = 0, K
        if SPLIT_K > 1:
            length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
            first_k = tl.program_id(1) * length
            end_k = tl.minimum(first_k + length, K)
        sums = int8_sums(
            x, w, tile_m * BLOCK_M, tile_n * BLOCK_N, first_k, end_k, M, row, column, K,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, TMA,
        )  # fmt: skip
    if SPLIT_K > 1:
        sums, last = _sums_of_all(sums, partial_ptr, counter_ptr, M, N, m, n, SPLIT_K)
        if not last:
            return

    finish(
        sums, out_ptr, m, m < M, row_scale_ptr, w_scale_ptr, zero_point_ptr, row_sum_ptr, x_outliers_ptr,
        w_outliers_ptr, bias_ptr, dims_ptr, total_ptr, M, N, K, row, column, n, stride_xm, stride_xk,
        BLOCK_M, GROUP, PRECISION, PADDED, OUTLIER_STEP, FLOAT32_OUTLIERS,
    )  # fmt: skip


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
        n, k = weight.values.shape
        count, width = groups(k, weight.group)
        if count > 1:
            tile = tile_for_groups(tile, width, count, most_rows)
        self._weight, self._dtype, self._tile = weight, dtype, tile
        self._partial = torch.float32 if count > 1 else torch.int32
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
            GROUP=width if count > 1 else 0,
            SPLIT_K=tile.split_k,
            # A group takes all of its steps, those beyond K, too.
            WHOLE_K=k % (width if count > 1 else tile.block_k) == 0,
            TMA=self._tma,
            WGMMA=tile.block_m >= 64 and gpu_of(weight.device).architecture == "sm_90",
            PRECISION="ieee" if torch.version.hip else "tf32",
            PADDED=padded,
            # Products in float32 take more registers still, and so does finding the columns by a list.
            OUTLIER_STEP=16 if float32 or searched or padded == 16 else MOST_OUTLIER_STEP,
            FLOAT32_OUTLIERS=float32,
        )

    def __call__(self, rows: QuantizedInput) -> Tensor:
        """Return the output [M, N] for rows that came with the `counters` of this product."""
        tile, weight, found = self._tile, self._weight, rows.found
        m, (n, k) = rows.values.shape[0], weight.values.shape
        out = torch.empty(m, n, dtype=self._dtype, device=weight.device)
        if out.numel() == 0:
            return out
        partial = torch.empty(tile.split_k, m, n, dtype=self._partial, device=weight.device) if self._split else None
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


def tile_for_groups(tile: MatmulTile, width: int, count: int, most_rows: int) -> MatmulTile:
    """Return the tile that takes the place of one for rows of one group, where there are `count` of this width."""
    # A step is a group or a part of one, with as many bytes on their way as before.
    block_k = min(tile.block_k, width)
    num_stages = tile.num_stages * tile.block_k // block_k
    # An accumulator of integers and one of floats: no more than 64 registers of a thread for each.
    block_n = tile.block_n
    while tile.block_m * block_n > 64 * 32 * tile.num_warps and block_n > TENSOR_CORE_ROWS:
        block_n //= 2
    # In calls of so many rows the sums are those of `decode.py`.
    few = most_rows <= TENSOR_CORE_ROWS
    most = chains(width) if few else 1 << (tile.split_k.bit_length() - 1)
    split_k = min(most, next_power_of_2(count))
    return tile._replace(block_n=block_n, block_k=block_k, num_stages=num_stages, split_k=split_k)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])
