"""The layer on a GPU: which Triton kernels run, and in how many launches.

For a few rows it is one, `decode.py`. Else it is two, rows to int8 (`quantize_rows.py`) and the product
(`matmul.py`). The tile that `tiles.py` chooses says which.
"""

import torch
from torch import Tensor

from .decode import accepts, int8_decode
from .matmul import counters, int8_matmul
from .outlier_search import Found
from .quantize_rows import quantize_rows
from .tiles import TENSOR_CORE_ROWS, Tile, choose_tile


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor | Found,
    outlier_weight: Tensor,
    bias: Tensor | None,
    weight_row_sum: Tensor | None,
    *,
    zeropoint: bool,
    tile: Tile | None = None,
) -> Tensor:
    """Run a layer: `reference.int8_linear` for x [M, K] of any strides on the GPU.

    Outliers may be those that `outlier_search.search` found in x; `outlier_weight` is [N, 0] then. Where
    `weight_row_sum` (int32 [N]) is missing and needed, a launch of its own computes it. `tile` is for the tuner and
    tests; None chooses.
    """
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if zeropoint and weight_row_sum is None:
        weight_row_sum = weight.sum(1, dtype=torch.int32)
    columns = outlier_weight.contiguous()
    m, n, k = x.shape[0], *weight.shape
    if tile is None:
        tile = choose_tile(x.device, m, n, k)
        if tile.block_m < TENSOR_CORE_ROWS and (isinstance(outlier_dims, Found) or not accepts(weight, outlier_dims)):
            tile = choose_tile(x.device, TENSOR_CORE_ROWS, n, k)
    if tile.block_m < TENSOR_CORE_ROWS:
        assert isinstance(outlier_dims, Tensor)
        return int8_decode(x, weight, weight_absmax, weight_row_sum, outlier_dims, columns, bias, zeropoint, tile)
    rows = quantize_rows(x, outlier_dims, zeropoint, counters(tile, m, n))
    return int8_matmul(rows, weight, weight_absmax, weight_row_sum, columns, bias, x.dtype, tile)
