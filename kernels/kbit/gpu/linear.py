"""The layer of k bits on a GPU: `GpuKBitLinear`, which keeps what each kind of call launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...gpu.launch import kind_of, on_its_device
from .matmul import Operands, kbit_matmul
from .tiles import KBitTile, choose_tile

Plan = Callable[[Tensor, tuple[int, int]], Tensor]


class GpuKBitLinear:
    """Runs a layer: `kbit/reference.kbit_linear` for x [M, K] of any strides on the GPU.

    In one launch, or two where programs share K; nothing waits for the GPU, and no shape depends on a value. Codes are
    read as they are stored: nothing is laid out anew. As `gpu/linear.py` does, it keeps a plan for each kind of call.
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
            bias,
            in_features,
            block,
        )
        self._plans: dict[Any, Plan] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output [M, N] in the dtype of x, which is float16, bfloat16 or float32."""
        m, n, weight = len(x), self._out_features, self._weight
        if m == 0 or n == 0 or weight.in_features == 0:
            out = x.new_zeros(m, n)
            return out if weight.bias is None else out + weight.bias.to(x.dtype)
        strides, kind = kind_of(x, n)
        bias = weight.bias  # a parameter, whose data may have been cast: PEFT does that for training
        key = kind, None if bias is None else bias.dtype
        plan = self._plans.get(key)
        if plan is None:
            tile = self._tile or choose_tile(x.device, x.dtype, m, n)
            plan = self._plans[key] = kbit_matmul(weight, x.dtype, tile)
        return on_its_device(plan, x, strides)
