"""Count the rows of inputs that are larger than those of the calibration: a sign that it no longer fits.

The conversion chose the outlier columns from a text, and wrote down how large the other inputs of each layer were in
it. The largest input of a group, outliers left out, sets the step in which the group is quantized: larger ones make it
coarser, as if an outlier column were missing. docs/accuracy.md tells which numbers are to be expected.

A layer counts where it runs, in buffers of its own, without a word to the host; they move with the model and are not in
its state dict. Not counted are layers that the calibration did not reach, and outliers that are not the stored ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .layer import Int8Linear


class OutlierMisses(NamedTuple):
    """What a layer has counted. A row is one position of one sequence; magnitudes are those of the kept dimensions.

    `misses` of the `rows` were beyond `limit`, the largest magnitude of the calibration; `largest` is the largest
    magnitude of all rows.
    """

    rows: int
    misses: int
    largest: float
    limit: float


def outlier_misses(model: nn.Module) -> dict[str, OutlierMisses]:
    """Return what each layer of a loaded model has counted since the first call, which begins the counting.

    Until then it costs nothing. A model that is compiled is compiled once more after the first call. The call waits for
    the device; counting does not.

    Args:
        model: from `runtime.load`, of a checkpoint converted with calibration; it may be wrapped.

    Returns:
        The counts by the name of the layer in `model`.

    Raises:
        ValueError: no layer has a limit from a calibration, or none runs with the stored outliers.

    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    limits = {name: layer.kept_limit for name, layer in layers.items() if layer.outliers == "static"}
    found = {name: _counted(layers[name], limit) for name, limit in limits.items() if limit is not None}
    if found:
        return found
    others = sorted({layer.outliers for layer in layers.values()} - {"static"})
    why = f"outliers is {others[0]!r}, expected 'static'" if others else "nothing is known of its calibration"
    raise ValueError(
        f"{type(model).__name__}: {why}; convert the 16-bit model again, with calibration, and load it with "
        "outliers='static'"
    )


def _counted(layer: Int8Linear, limit: float) -> OutlierMisses:
    if layer.miss_counter is None:
        assert layer.outlier_dims is not None  # it has a limit
        # What is made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            layer.miss_counter = MissCounter(limit, layer.outlier_dims)
    counter: Any = layer.miss_counter
    return OutlierMisses(int(counter.rows), int(counter.misses), float(counter.largest), limit)


class MissCounter(nn.Module):
    """Counts for one layer, in place and without reading anything back, so that CUDA graphs and compilers take it.

    Attributes:
        dims: int64 [k], the outlier dimensions.
        limit: float32 [], what the magnitude in another dimension should not exceed.
        rows: int64 [], rows seen.
        misses: int64 [], those beyond the limit.
        largest: float32 [], the largest kept magnitude; NaN once there was one.

    """

    dims: Tensor
    limit: Tensor
    rows: Tensor
    misses: Tensor
    largest: Tensor

    def __init__(self, limit: float, outlier_dims: Tensor) -> None:
        """Begin at zero; `outlier_dims`, integer [k], is on the device where the layer runs."""
        super().__init__()
        self.register_buffer("dims", outlier_dims.to(torch.int64, copy=True), persistent=False)
        zero = torch.zeros((), device=outlier_dims.device)
        for name, value in {"limit": zero + limit, "rows": zero.long(), "misses": zero.long(), "largest": zero}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> None:
        """Count the rows of x [..., K], of any floating-point dtype."""
        # A norm would be one operation instead of two, and on the CPU takes twenty times as long.
        rows = x.abs().index_fill_(-1, self.dims, 0).amax(-1).float().flatten()
        self.rows.add_(rows.numel())
        self.misses.add_((rows > self.limit).sum())
        # There may be no rows, as for an expert that no token goes to.
        self.largest.copy_(torch.cat([self.largest[None], rows]).amax())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as `fn` does, and cast nothing."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self
