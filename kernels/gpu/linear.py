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
from .matmul import Int8Matmul
from .outlier_search import OutlierSearch
from .quantize_rows import QuantizeRows
from .tiles import DecodeTile, Tile, choose_tile

_HIP = torch.version.hip is not None
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
        self._out_features, self._in_features = operands.values.shape

    def __call__(self, x: Tensor, zeropoint: bool) -> Tensor:
        """Return the output [M, N] in the dtype of x; the rows of x are quantized with a zero point or without."""
        m = x.shape[0]
        if m == 0:
            return x.new_empty(0, self._out_features)
        if x.is_contiguous():
            # The stride of a single row may be anything.
            strides, layout = (self._in_features, 1), None
        else:
            strides = x.stride(0), x.stride(1)
            # All that Triton tells apart.
            layout = tuple((stride == 1, stride % 16 == 0, stride >= 1 << 31) for stride in strides)
        bias = self._operands.bias  # a parameter, whose data may have been cast: PEFT does that for training
        types = x.dtype, None if bias is None else bias.dtype
        key = ((m - 1).bit_length(), types, layout, x.data_ptr() % 16 == 0, zeropoint, _HIP and self._small(x))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(m, x.dtype, zeropoint)
        device = x.get_device()
        if device < 0 or device == torch.cuda.current_device():
            return plan(x, strides)
        # Triton launches on the current device, which need not be that of the layer.
        with torch.cuda.device(device):
            return plan(x, strides)

    def _small(self, x: Tensor) -> tuple[bool, bool]:
        """Tell what AMD's compiler counts on, too: that x, and the output, have less than 2 GB."""
        limit = 1 << 31
        return x.untyped_storage().nbytes() < limit, len(x) * self._out_features * x.element_size() < limit

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
