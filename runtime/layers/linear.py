"""What quantized linear layers have in common: the tensors of a checkpoint (`tensors.py`), and one call.

Quantization is a named step, `from_linear` or `overwrite`, and forward changes nothing. The weight is frozen; gradients
flow through it to the input, and to the bias where it wants one (`kernels/gradient.py`), but not in forward mode (jvp):
it says so. Who writes into one of its tensors calls `prepare` then. For adapters, and all who look for linear layers,
it is an `nn.Linear`.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llmint8.kernels.calling import call
from llmint8.kernels.prepared import StoredWeight
from llmint8.kernels.reference import Activation

from .arguments import ActivationGroup, Outliers
from .float_weight import dequantized
from .tensors import QuantizedTensors
from .writing import quantized_into


def setting(name: str) -> Any:
    """Make an attribute of `configure`'s settings: it may be read and assigned to."""
    return property(lambda self: getattr(self, f"_{name}"), lambda self, value: self.configure(**{name: value}))


class QuantizedLinear(QuantizedTensors, nn.Linear):  # type: ignore[misc]
    """`y = x W^T + b` with W quantized.

    Attributes:
        outliers: how it runs, see `configure`.
        kept_limit: the magnitude that x should not exceed outside of the stored outliers, or None where it is unknown,
            or nothing depends on it.
        miss_counter: counts the rows of x that do; None until `outlier_misses` begins.

    """

    outliers: Outliers = setting("outliers")
    _outliers: Outliers
    _activation: Activation = "absmax"

    def __init__(self, *arguments: Any, **tensors: Any) -> None:
        """Make a layer of zeros, to be filled and prepared; arguments as of `QuantizedTensors`."""
        super().__init__(*arguments, **tensors)
        self.kept_limit: float | None = None
        self.miss_counter: nn.Module | None = None

    @abstractmethod
    def configure(
        self,
        *,
        outliers: Outliers | None = None,
        threshold: float | None = None,
        activation: Activation | None = None,
        activation_group: ActivationGroup | None = None,
    ) -> None:
        """Change how the layer runs; None leaves a setting as it is. Assigning to the attributes does the same."""

    def stored(self) -> StoredWeight:
        """Return the tensors as they are stored, without the outliers that do not count."""
        weight = super().stored()
        if self._outliers == "static":
            return weight
        dims, columns = weight.outlier_dims.new_empty(0), weight.outlier_weight.new_empty(self.out_features, 0)
        return replace(weight, outlier_dims=dims, outlier_weight=columns)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] in float16, bfloat16 or float32 to [..., N] in the dtype of x."""
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            made = type(self).__name__
            raise NotImplementedError(f"there is no derivative in forward mode (jvp) through {made} yet")
        if self.miss_counter is not None:
            self.miss_counter(x.detach())
        return call(x, self.ready(), self._activation)

    def overwrite(self, weight: Tensor) -> None:
        """Quantize another weight into the layer, in the place of the one it has; a line of the log says what it cost.

        It is what an adapter is merged by, as `layer.weight.data = weight` and `layer.weight.data += change` call it.

        Args:
            weight: float [N, K], finite. Its columns at `outlier_dims` are stored as they are, in the layer's dtype.

        Raises:
            LLMInt8Error: it has another shape, is not floating point, or not finite; the layer is as it was then.

        """
        written = quantized_into(QuantizedTensors.stored(self), weight, self.name)
        self._unprepare()
        self.weight = nn.Parameter(written.values, requires_grad=False)
        self._buffers[self._layout.absmax] = written.absmax
        if self.outlier_weight is not None:
            self.outlier_weight = written.outlier_weight
        self.prepare()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in floating point, [N, K]; stored outlier columns are exact."""
        return dequantized(QuantizedTensors.stored(self), dtype)

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        count = "" if self.outlier_dims is None else f", outlier_dims={len(self.outlier_dims)}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}{count}, outliers={self.outliers!r}"
