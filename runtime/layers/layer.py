"""The linear layer in int8: weight and inputs are quantized, outlier dimensions excepted."""

from dataclasses import replace
from typing import Self, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import BITSANDBYTES, Layout
from llmint8.kernels.reference import Activation, Int8Weight, Rotation
from llmint8.kernels.weights import quantize_weight

from .arguments import (
    ACTIVATION_GROUPS,
    ActivationGroup,
    Outliers,
    check_choice,
    check_searchable,
    check_threshold,
    chosen_dims,
    kernels_group,
)
from .linear import QuantizedLinear, setting


class Int8Linear(QuantizedLinear):
    """`y = x W^T + b` with W in int8, in the decomposition of LLM.int8() (arXiv 2208.07339, section 3.2).

    Attributes:
        outliers, threshold, activation, activation_group: how it runs, see `configure`.
        kept_limit, miss_counter: see `QuantizedLinear`.

    """

    threshold: float = setting("threshold")
    activation: Activation = setting("activation")
    activation_group: ActivationGroup = setting("activation_group")

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
        dims = chosen_dims(outlier_dims, weight)
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
        check_searchable(outliers, self.rotation, None)
        group = activation_group or self._activation_group
        self._activation = activation or self._activation
        searches = "dynamic" in (outliers, self._outliers) and threshold != self._threshold
        other = outliers != self._outliers or searches or group != self._activation_group
        self._outliers, self._threshold, self._activation_group = outliers, threshold, group
        if other and self.prepared is not None:
            self.prepare()

    def stored(self) -> Int8Weight:
        """Return the tensors as they are stored, without the outliers that do not count, and how they are to run."""
        weight = super().stored()
        assert isinstance(weight, Int8Weight)
        threshold = self.threshold if self.outliers == "dynamic" else None
        return replace(weight, group=kernels_group(self.activation_group), threshold=threshold)

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        threshold = f", threshold={self.threshold}" if self.outliers == "dynamic" else ""
        rotation = "" if self.rotation is None else f", rotation={self.rotation}"
        how = f"activation={self.activation!r}, activation_group={self.activation_group!r}"
        return f"{super().extra_repr()}{threshold}, {how}{rotation}"
