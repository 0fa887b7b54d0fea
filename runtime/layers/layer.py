"""The quantized linear layer: the tensors of a checkpoint (`tensors.py`), and one call into the kernels.

Quantization is a named step, `from_linear` or `overwrite`, and forward changes nothing. The weight is frozen; gradients
flow through it to the input, and to the bias where it wants one (`kernels/gradient.py`), but not in forward mode (jvp):
it says so. Who writes into one of its tensors calls `prepare` then. For adapters, and all who look for linear layers,
it is an `nn.Linear`.
"""

from dataclasses import replace
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from llmint8.formats import BITSANDBYTES, Layout
from llmint8.kernels.checks import check_outlier_dims
from llmint8.kernels.linear import int8_linear
from llmint8.kernels.reference import Activation, Int8Weight, Rotation
from llmint8.kernels.weights import quantize_weight

from .arguments import (
    ACTIVATION_GROUPS,
    ActivationGroup,
    Outliers,
    check_choice,
    check_rotated,
    check_threshold,
    kernels_group,
)
from .float_weight import dequantized
from .tensors import QuantizedTensors
from .writing import quantized_into


def _setting(name: str) -> Any:
    """Make an attribute of `configure`'s settings: it may be read and assigned to."""
    return property(lambda self: getattr(self, f"_{name}"), lambda self, value: self.configure(**{name: value}))


class Int8Linear(QuantizedTensors, nn.Linear):  # type: ignore[misc]
    """`y = x W^T + b` with W in int8, in the decomposition of LLM.int8() (arXiv 2208.07339, section 3.2).

    Attributes:
        outliers, threshold, activation, activation_group: how it runs, see `configure`.
        kept_limit: the magnitude that x should not exceed outside of the stored outliers, or None where it is unknown.
        miss_counter: counts the rows of x that do; None until `outlier_misses` begins.

    """

    outliers: Outliers = _setting("outliers")
    threshold: float = _setting("threshold")
    activation: Activation = _setting("activation")
    activation_group: ActivationGroup = _setting("activation_group")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        outlier_count: int | None = 0,
        *,
        outliers: Outliers = "static",
        threshold: float = 6.0,
        activation: Activation = "absmax",
        activation_group: ActivationGroup = "row",
        rotation: Rotation | None = None,
        layout: Layout = BITSANDBYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, to be filled and prepared.

        `dtype` is that of the bias and the outlier columns, `layout` says what tensors are called in its state.
        """
        super().__init__(in_features, out_features, bias, outlier_count, rotation, layout, device, dtype)
        self._outliers, self._threshold = outliers, threshold
        self._activation, self._activation_group = activation, activation_group
        self.configure(outliers=outliers, threshold=threshold, activation=activation, activation_group=activation_group)
        self.kept_limit: float | None = None
        self.miss_counter: nn.Module | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        outlier_dims: Tensor | None = None,
        outlier_weight: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Self:
        """Quantize a linear layer, or GPT-2's Conv1D with its transposed weight; nothing is shared with it.

        Args:
            linear: weight and bias in float16, bfloat16 or float32, finite.
            outlier_dims: integer [k], strictly increasing; None stores no columns, k = 0.
            outlier_weight: float [N, k]; None takes the columns of the weight itself.
            rotation: rotate weight and inputs in blocks of so many dimensions.

        Raises:
            ValueError: outlier dims that are not strictly increasing or not in the layer, columns of another
                shape, or a weight that is not finite.

        """
        weight = linear.weight.detach()
        weight = weight.t() if isinstance(linear, Conv1D) else weight
        values, absmax = quantize_weight(weight, rotation)
        if not bool(absmax.isfinite().all()):
            raise ValueError("the weight holds values that are not finite")
        dims = values.new_empty(0, dtype=torch.int64)
        if outlier_dims is not None:
            if outlier_dims.is_floating_point() or outlier_dims.dtype == torch.bool:
                raise ValueError(f"outlier_dims is {outlier_dims.dtype}, expected integers")
            dims = outlier_dims.to(weight.device, torch.int64)
            check_outlier_dims(dims, weight.shape[1])
        columns = weight[:, dims] if outlier_weight is None else outlier_weight.detach().clone()
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(
            weight.shape[1],
            len(weight),
            bias is not None,
            len(dims),
            device="meta",
            dtype=weight.dtype,
            rotation=rotation,
        )
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.SCB, layer.weight_format = absmax, absmax.new_zeros((), dtype=torch.uint8)
        layer.outlier_dims, layer.outlier_weight = dims.to(torch.int32, copy=True), columns
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer.prepare()
        return layer

    def configure(
        self,
        *,
        outliers: Outliers | None = None,
        threshold: float | None = None,
        activation: Activation | None = None,
        activation_group: ActivationGroup | None = None,
    ) -> None:
        """Change how the layer runs; None leaves a setting as it is. Assigning to the attributes does the same.

        Args:
            outliers: which dimensions of x are multiplied in floating point: `static` those stored, `dynamic` those
                with any |x| >= `threshold` in the call, `none` none.
            threshold: see there.
            activation: how the rows of x are quantized, `absmax` or `zeropoint`.
            activation_group: how many consecutive dimensions of x share a scale, 64, 128 or 256; `row` is all of them.

        Raises:
            ValueError: a setting is not one of those, the threshold of a search not a number above 0, or the layer
                rotated, which has no columns that a search could take.

        """
        check_choice("outliers", outliers, get_args(Outliers))
        check_choice("activation", activation, get_args(Activation))
        check_choice("activation_group", activation_group, ACTIVATION_GROUPS)
        outliers, threshold = outliers or self._outliers, self._threshold if threshold is None else threshold
        check_threshold(outliers, threshold)
        check_rotated(outliers, self.rotation)
        group = activation_group or self._activation_group
        self._activation = activation or self._activation
        searches = "dynamic" in (outliers, self._outliers) and threshold != self._threshold
        other = outliers != self._outliers or searches or group != self._activation_group
        self._outliers, self._threshold, self._activation_group = outliers, threshold, group
        if other and self.prepared is not None:
            self.prepare()

    def stored(self) -> Int8Weight:
        """Return the tensors as they are stored, without the outliers that do not count, and how they are to run."""
        weight = replace(super().stored(), group=kernels_group(self.activation_group))
        if self.outliers == "static":
            return weight
        threshold = self.threshold if self.outliers == "dynamic" else None
        dims, columns = weight.outlier_dims.new_empty(0), weight.outlier_weight.new_empty(self.out_features, 0)
        return replace(weight, outlier_dims=dims, outlier_weight=columns, threshold=threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] in float16, bfloat16 or float32 to [..., N] in the dtype of x."""
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError("there is no derivative in forward mode (jvp) through Int8Linear yet")
        if self.miss_counter is not None:
            self.miss_counter(x.detach())
        return int8_linear(x, self.ready(), self._activation)

    def overwrite(self, weight: Tensor) -> None:
        """Quantize another weight into the layer, in the place of the one it has; a line of the log says what it cost.

        It is what an adapter is merged by, as `layer.weight.data = weight` and `layer.weight.data += change` call it.

        Args:
            weight: float [N, K], finite. Its columns at `outlier_dims` are stored as they are, in the layer's dtype.

        Raises:
            LLMInt8Error: it has another shape, is not floating point, or not finite; the layer is as it was then.

        """
        written = quantized_into(super().stored(), weight, self.name)
        self._unprepare()
        self.weight = nn.Parameter(written.values, requires_grad=False)
        self._buffers[self._layout.absmax] = written.absmax
        if self.outlier_weight is not None:
            self.outlier_weight = written.outlier_weight
        self.prepare()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in floating point, [N, K]; stored outlier columns are exact."""
        return dequantized(super().stored(), dtype)

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        count = "" if self.outlier_dims is None else f", outlier_dims={len(self.outlier_dims)}"
        threshold = f", threshold={self.threshold}" if self.outliers == "dynamic" else ""
        rotation = "" if self.rotation is None else f", rotation={self.rotation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{count}, outliers={self.outliers!r}{threshold}, activation={self.activation!r}, "
            f"activation_group={self.activation_group!r}{rotation}"
        )
