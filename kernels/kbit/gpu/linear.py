"""The layer of k bits on a GPU: which kernel runs, and in how many launches.

For one or two rows it is `decode.py`, else `matmul.py`; the tile that `tiles.py` chooses says which. Where programs
share K a second launch adds up their sums, in their order and without atomics: the same call gives the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...gpu.launch import Launch, ceil_div, kind_of, on_its_device
from .codes import Operands, width_of
from .decode import kbit_decode_kernel
from .matmul import kbit_matmul_kernel, kbit_sum_kernel
from .tiles import DECODE_ROWS, KBitTile, choose_tile

Plan = Callable[[Tensor, tuple[int, int]], Tensor]

# Outputs for each program that adds up sums over parts of K.
_SUM_BLOCK = 512


class GpuKBitLinear:
    """Runs a layer: `kbit/reference.kbit_linear` for x [M, K] of any strides on the GPU.

    Nothing waits for the GPU, and no shape depends on a value. Codes are read as they are stored: nothing is laid out
    anew. As that of `gpu/linear.py`, it keeps a plan for each kind of call.
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        levels: Tensor,
        outlier_dims: Tensor,
        columns: Tensor,
        bias: Tensor | None,
        in_features: int,
        block: int | None,
        tile: KBitTile | None = None,
    ) -> None:
        """Plan nothing yet.

        Args:
            packed: uint8 [N, row_bytes], the codes.
            absmax: float16 [N, G].
            levels: float32 [2 ** k].
            outlier_dims: int32 [c].
            columns: float [N, c], the columns of W at `outlier_dims` less what the codes give there.
            bias: float [N] or None.
            in_features: K.
            block: how many elements of a row share an absmax, a power of two from 32 on; None is the row.
            tile: for tests; None chooses.

        """
        self._out_features, self._tile = len(packed), tile
        packed = packed.contiguous()
        # Words begin at multiples of their size, which a view of a file's bytes need not.
        aligned = packed if packed.data_ptr() % 16 == 0 else packed.clone()
        self._weight = Operands(
            aligned.view(torch.int32),
            absmax.contiguous(),
            levels.contiguous(),
            outlier_dims.contiguous(),
            columns.contiguous(),
            None if bias is None else bias.contiguous(),
            in_features,
            block,
        )
        self._plans: dict[Any, Plan] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output [M, N] in the dtype of x, which is float16, bfloat16 or float32."""
        m, n, weight = len(x), self._out_features, self._weight
        bias = weight.bias  # a parameter, whose data may have been cast: PEFT does that for training
        if m == 0 or n == 0 or weight.in_features == 0:
            out = x.new_zeros(m, n)
            return out if bias is None else out + bias.to(x.dtype)
        strides, kind = kind_of(x, n)
        key = kind, None if bias is None else bias.dtype
        plan = self._plans.get(key)
        if plan is None:
            tile = self._tile or choose_tile(x.device, x.dtype, m, n)
            plan = self._plans[key] = _plan(weight, x.dtype, tile)
        return on_its_device(plan, x, strides)


def _plan(weight: Operands, dtype: torch.dtype, tile: KBitTile) -> Plan:
    """Return what runs a layer for x [M, K] in `dtype`, and its strides; M, N and K are not 0."""
    n, k, count = len(weight.words), weight.in_features, len(weight.outlier_dims)
    decode = tile.block_m <= DECODE_ROWS
    # As many words for each thread as with 4 bits.
    chunks = max(1, tile.chunks * 4 // width_of(weight.bits)) if decode else tile.chunks
    split_k = min(tile.split_k, ceil_div(weight.chunks, chunks))
    constants: dict[str, Any] = {
        "BITS": weight.bits,
        "BLOCK": weight.kernel_block,
        "BLOCK_N": tile.block_n,
        "CHUNKS": chunks,
        "SPLIT_K": split_k,
        "WHOLE_K": k % (64 * chunks) == 0,
    }
    if decode:
        launch = Launch(kbit_decode_kernel, num_warps=tile.num_warps, ROWS=tile.block_m, **constants)
    else:
        constants |= {"BLOCK_M": tile.block_m, "GROUP_M": tile.group_m}
        # On the CPU this is Triton's interpreter, whose bfloat16 product is garbage.
        constants["FLOAT32"] = dtype == torch.float32 or (weight.words.is_cpu and dtype == torch.bfloat16)
        launch = Launch(kbit_matmul_kernel, num_warps=tile.num_warps, num_stages=tile.num_stages, **constants)
    add = Launch(kbit_sum_kernel, num_warps=4, SPLIT_K=split_k, BLOCK=_SUM_BLOCK)
    dims, columns = (weight.outlier_dims, weight.columns) if count else (None, None)
    sizes = n, k, weight.chunks, weight.absmax.shape[1], count
    tiles_n, bias = ceil_div(n, tile.block_n), weight.bias
    operands = weight.absmax, weight.levels, dims, columns, bias if split_k == 1 else None

    def run(x: Tensor, strides: tuple[int, int]) -> Tensor:
        m = len(x)
        out = x.new_empty(m, n)
        parts = out if split_k == 1 else x.new_empty(split_k, m, n, dtype=torch.float32)
        grid = ceil_div(m, tile.block_m) * tiles_n, split_k, 1
        launch(grid, x, weight.words, parts, *operands, m, *sizes, *strides)
        if split_k > 1:
            add((ceil_div(m * n, _SUM_BLOCK), 1, 1), parts, out, bias, m * n, n)
        return out

    return run
