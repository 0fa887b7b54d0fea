"""The layer on a GPU: which Triton kernels run, and in how many launches.

For a few rows it is one, `decode.py`. Else it is two, rows to int8 (`quantize_rows.py`) and the product
(`matmul.py`). The tile that `tiles.py` chooses says which. Outliers that are searched take two more, before
(`outlier_search.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operands import Operands
from .decode import accepts, int8_decode
from .launch import kind_of, on_its_device
from .matmul import Int8Matmul
from .outlier_search import OutlierSearch
from .quantize_rows import QuantizeRows
from .tiles import DecodeTile, Tile, choose_tile

Plan = Callable[[Tensor, tuple[int, int]], Tensor]


class GpuLinear:
    """Runs a layer: `reference.int8_linear` for x [M, K] of any strides on the GPU.

    In a call of a few rows the GPU works for less time than Python takes to choose kernels and arguments. So a plan is
    made for each kind of call, which has chosen them: for M up to a power of two, and a dtype and layout of x.
    """

    def __init__(self, operands: Operands, tile: Tile | None = None) -> None:
        """Plan nothing yet; `tile` is for the tuner and tests, None chooses."""
        self._operands, self._tile = operands, tile
        self._plans: dict[Any, Plan] = {}
        self._out_features = operands.values.shape[0]

    def __call__(self, x: Tensor, zeropoint: bool) -> Tensor:
        """Return the output [M, N] in the dtype of x; the rows of x are quantized with a zero point or without."""
        m = x.shape[0]
        if m == 0:
            return x.new_empty(0, self._out_features)
        strides, kind = kind_of(x, self._out_features)
        bias = self._operands.bias  # a parameter, whose data may have been cast: PEFT does that for training
        key = kind, None if bias is None else bias.dtype, zeropoint
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(m, x.dtype, zeropoint)
        return on_its_device(plan, x, strides)

    def _plan(self, m: int, dtype: torch.dtype, zeropoint: bool) -> Plan:
        operands = self._operands
        n, k = operands.values.shape
        if n == 0:
            return lambda x, strides: x.new_empty(x.shape[0], 0)
        searched = operands.threshold is not None
        tile = self._tile or choose_tile(operands.device, m, n, k, decode=not searched and accepts(operands))
        if isinstance(tile, DecodeTile):
            return int8_decode(operands, dtype, zeropoint, tile)
        most_rows = 1 << (m - 1).bit_length()
        product = Int8Matmul(operands, dtype, tile, most_rows)
        quantize = QuantizeRows(
            k, operands.outlier_dims, zeropoint, operands.group, operands.rotation, product.counters
        )
        if operands.threshold is None:
            return lambda x, strides: product(quantize(x, strides))
        search = OutlierSearch(operands.threshold, dtype, most_rows)
        return lambda x, strides: product(quantize(x, strides, search(x, strides)))
