"""The experts of a mixture on a GPU: rows to int8 in one launch, and all products in another.

Rows are sorted by expert, on the GPU, and nothing waits for it: where an expert's rows begin is read by the kernels.
Each row is quantized as its expert wants it, without that expert's outlier dimensions. The grid of the product is as
large as any distribution of the rows may need; a program adds up the experts' blocks of rows to find its own, and the
surplus ones return. Everything else is that of `quantize_rows.py` and `matmul.py`. The output is stored in the order
in which the rows came.

Rows of a block that belong to the next expert are multiplied with the wrong weight and not stored.

Over 250 lines: the kernels, and what launches them, are one argument, and read together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..checks import padded_outliers
from ..operands import Operands
from ..reference import Int8Weight, groups
from ..weights import row_sums
from .epilogue import multiply_in_float32
from .launch import Launch, ceil_div, next_power_of_2
from .matmul import MOST_OUTLIER_STEP, finish, int8_sums, sums_of_groups, tile_for_groups, tile_of
from .quantize_rows import WARP_ELEMENTS, quantize_row, quantizer_block
from .tiles import MatmulTile, choose_tile, gpu_of

_HIP = torch.version.hip is not None


@triton.jit(do_not_specialize=["M", "repeats"])
def quantize_expert_rows_kernel(
    x_ptr,
    order_ptr,
    expert_ptr,
    dims_ptr,
    counts_ptr,
    values_ptr,
    scale_ptr,
    zero_point_ptr,
    gathered_ptr,
    M,
    K,
    repeats,
    EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATION: tl.constexpr,
    ZEROPOINT: tl.constexpr,
):
    """Quantize row `program_id(0)` of those sorted by expert; x has one for `repeats` of them."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if (expert < 0) | (expert >= EXPERTS):
        return
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    source = tl.load(order_ptr + row) // repeats
    outliers = 0
    if PADDED > 0:
        outliers = tl.load(counts_ptr + expert)
        dims_ptr += expert * PADDED
    quantize_row(
        x_ptr + source * K, row, dims_ptr, None, values_ptr, scale_ptr, zero_point_ptr, gathered_ptr, M, K, outliers, 1,
        BLOCK_K, BLOCKS, GROUP, PADDED, ROTATION, ZEROPOINT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "blocks"])
def int8_experts_kernel(
    x,
    w,
    out_ptr,
    order_ptr,
    begin_ptr,
    row_scale_ptr,
    w_scale_ptr,
    zero_point_ptr,
    row_sum_ptr,
    x_outliers_ptr,
    w_outliers_ptr,
    bias_ptr,
    M,
    N,
    K,
    blocks,
    EXPERTS: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WGMMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDED: tl.constexpr,
    OUTLIER_STEP: tl.constexpr,
    FLOAT32_OUTLIERS: tl.constexpr,
):
    """Compute tile `program_id(0)`, of one of `blocks` blocks of rows at most; ALL_EXPERTS is a power of two."""
    block, tile_n = tile_of(tl.program_id(0), blocks * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    number = tl.arange(0, ALL_EXPERTS)
    begins = tl.load(begin_ptr + number, mask=number < EXPERTS, other=0)
    ends = tl.load(begin_ptr + number + 1, mask=number < EXPERTS, other=0)
    own_blocks = tl.cdiv(ends - begins, BLOCK_M)
    last = tl.cumsum(own_blocks, 0)
    if block >= tl.sum(own_blocks, 0):
        return
    expert = tl.sum((last <= block).to(tl.int32), 0).to(tl.int64)
    before = tl.sum(tl.where(number < expert, own_blocks, 0), 0)
    first_m = (tl.load(begin_ptr + expert) + (block - before) * BLOCK_M).to(tl.int32)
    end = tl.load(begin_ptr + expert + 1).to(tl.int32)
    m = first_m + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = m % M, n % N
    w += expert * N * K
    w_scale_ptr += expert * N
    row_sum_ptr += expert * N * (tl.cdiv(K, GROUP) if GROUP > 0 else 1)
    if PADDED > 0:
        w_outliers_ptr += expert * N * PADDED
    if bias_ptr is not None:
        bias_ptr += expert * N
    if GROUP > 0:
        sums = sums_of_groups(
            x, w, row_scale_ptr, zero_point_ptr, row_sum_ptr, first_m, tile_n * BLOCK_N, 0, M, row, column, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, 1, WHOLE_K, False, WGMMA,
        )  # fmt: skip
    else:
        sums = int8_sums(
            x, w, first_m, tile_n * BLOCK_N, 0, K, M, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, False
        )
    place = tl.load(order_ptr + row)
    finish(
        sums, out_ptr, place, m < end, row_scale_ptr, w_scale_ptr, zero_point_ptr, row_sum_ptr, x_outliers_ptr,
        w_outliers_ptr, bias_ptr, None, None, M, N, K, row, column, n, 0, 0,
        BLOCK_M, GROUP, PRECISION, PADDED, OUTLIER_STEP, FLOAT32_OUTLIERS,
    )  # fmt: skip


class GpuExperts:
    """Runs `reference.grouped_int8_linear` for the weights of experts, of which it keeps one stacked copy.

    Attributes:
        values: int8 [E, N, K], stacked; whoever keeps the weights can keep parts of it in their place.

    """

    def __init__(self, weights: Sequence[Int8Weight], tile: MatmulTile | None = None) -> None:
        """Stack the weights; `tile` is for tests, None chooses."""
        layers = [Operands.prepare(weight, row_sums) for weight in weights]
        first = layers[0]
        self._tile, self._group, self._rotation = tile, first.group, first.rotation
        self._padded = padded_outliers(max(len(layer.outlier_dims) for layer in layers))
        self.values = torch.stack([layer.values for layer in layers])
        self._scale = torch.stack([layer.scale for layer in layers])
        self._row_sum = torch.stack([layer.row_sum for layer in layers])
        self._columns = self._dims = self._counts = None
        if self._padded:
            columns = [layer.outlier_weight for layer in layers]
            self._columns = torch.stack([pad(part, (0, self._padded - part.shape[1])) for part in columns])
            dims = [layer.outlier_dims for layer in layers]
            self._dims = torch.stack([pad(part, (0, self._padded - len(part))) for part in dims])
            counts = [len(part) for part in dims]
            self._counts = torch.tensor(counts, dtype=torch.int32, device=first.device)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.stack(biases) if biases else None
        self._bounds = torch.arange(len(layers) + 1, device=first.device)
        self.device, self.in_features = first.device, first.values.shape[1]
        self._plans: dict[Any, tuple[MatmulTile, Launch, Launch]] = {}

    def __call__(self, x: Tensor, expert_of_row: Tensor, zeropoint: bool) -> Tensor:
        """Return the output, in the order of the rows."""
        n, rows = self.values.shape[1], len(expert_of_row)
        # Rows of no expert of ours are not written to.
        out = x.new_zeros(rows, n)
        if out.numel() == 0:
            return out
        x = x.contiguous()
        small = _HIP and (x.untyped_storage().nbytes() < 1 << 31, out.nbytes < 1 << 31)
        key = ((rows - 1).bit_length(), x.dtype, x.data_ptr() % 16 == 0, zeropoint, small)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(1 << (rows - 1).bit_length(), x.dtype, zeropoint)
        expert, order = expert_of_row.long().sort(stable=True)
        begin = torch.searchsorted(expert, self._bounds)
        device = x.get_device()
        if device < 0 or device == torch.cuda.current_device():
            self._launch(plan, x, expert, order, begin, out, zeropoint)
        else:
            with torch.cuda.device(x.device):
                self._launch(plan, x, expert, order, begin, out, zeropoint)
        return out

    def _launch(
        self,
        plan: tuple[MatmulTile, Launch, Launch],
        x: Tensor,
        expert: Tensor,
        order: Tensor,
        begin: Tensor,
        out: Tensor,
        zeropoint: bool,
    ) -> None:
        tile, quantize, multiply = plan
        (experts, n, k), rows = self.values.shape, len(order)
        values = x.new_empty(rows, k, dtype=torch.int8)
        scale = x.new_empty(groups(k, self._group)[0], rows, dtype=torch.float32)
        zero_point = torch.empty_like(scale) if zeropoint else None
        gathered = x.new_empty(rows, self._padded) if self._padded else None
        of_rows = values, scale, zero_point, gathered
        quantize((rows, 1, 1), x, order, expert, self._dims, self._counts, *of_rows, rows, k, rows // len(x))
        blocks = rows // tile.block_m + min(experts, rows)
        grid = (blocks * ceil_div(n, tile.block_n), 1, 1)
        multiply(
            grid, values, self.values, out, order, begin, scale, self._scale, zero_point, self._row_sum, gathered,
            self._columns, self._bias, rows, n, k, blocks,
        )  # fmt: skip

    def _plan(self, most_rows: int, dtype: torch.dtype, zeropoint: bool) -> tuple[MatmulTile, Launch, Launch]:
        experts, n, k = self.values.shape
        count, width = groups(k, self._group)
        # For as many rows as an expert has if all have the same; programs neither divide K nor take the copy engine.
        each = max(1, most_rows // experts)
        tile = self._tile or choose_tile(self.device, each, n, k, decode=False)
        assert isinstance(tile, MatmulTile)
        if count > 1:
            tile = tile_for_groups(tile, width, count, each)
        tile = tile._replace(tma=False, split_k=1)
        group = width if count > 1 else 0
        float32 = self._columns is not None and multiply_in_float32(dtype, self._columns.dtype, self.device)
        block, blocks = quantizer_block(k, self._rotation)
        quantize = Launch(
            quantize_expert_rows_kernel,
            num_warps=max(1, block // WARP_ELEMENTS),
            EXPERTS=experts,
            BLOCK_K=block,
            BLOCKS=blocks,
            GROUP=group,
            PADDED=self._padded,
            ROTATION=self._rotation or 0,
            ZEROPOINT=zeropoint,
        )
        multiply = Launch(
            int8_experts_kernel,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            EXPERTS=experts,
            ALL_EXPERTS=next_power_of_2(experts),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            GROUP=group,
            WHOLE_K=k % (width if count > 1 else tile.block_k) == 0,
            WGMMA=tile.block_m >= 64 and gpu_of(self.device).architecture == "sm_90",
            PRECISION="ieee" if _HIP else "tf32",
            PADDED=self._padded,
            OUTLIER_STEP=16 if float32 or self._padded == 16 else MOST_OUTLIER_STEP,
            FLOAT32_OUTLIERS=float32,
        )
        return tile, quantize, multiply
