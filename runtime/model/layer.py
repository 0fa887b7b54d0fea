"""The quantized linear layer: tensors named as in the checkpoint, and one call into the kernels.

Quantization is a named step, `from_linear`. Moving or casting the layer moves its tensors and casts bias and
outlier columns; the int8 values and their scales keep their dtypes, and forward changes nothing. The layer is
frozen, and there is no gradient through it yet: backward says so.

Who puts another weight in place calls `prepare` then. It may keep the weight in the layout of a kernel instead of its
own; `unpacked_weight`, the state dict, copies and moves give it back as it was.

Over 250 lines: half of it is that layout's coming and going, which has no home of its own yet.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.kernels.cpu.product import pack, packable, unpack
from llmint8.kernels.linear import dynamic_int8_linear, int8_linear, weight_row_sum
from llmint8.kernels.reference import Activation, dequantize_weight, quantize_weight

from .gradient import refuse_backward

Outliers = Literal["static", "dynamic", "none"]


class Int8Linear(nn.Module):
    """`y = x W^T + b` with W in int8, in the decomposition of LLM.int8() (arXiv 2208.07339, section 3.2).

    Attributes:
        weight: int8 [N, K], all columns; `W ~ weight * weight_absmax[:, None] / 127`. Opaque if `packed`.
        packed: whether the weight is in the layout of a kernel; see `prepare`.
        weight_row_sum: int32 [N], the sums of the weight's rows, or None before `prepare`; not in the state dict.
        SCB: float32 [N], the absmax of each row under the name it has on disk; elsewhere `weight_absmax`.
        weight_format: uint8 [], always 0: row-major. bitsandbytes wants it on disk.
        outlier_dims: int32 [k], sorted, or None for a layer that stores no outliers (bitsandbytes wrote it).
        outlier_weight: float [N, k], the columns of W at `outlier_dims` as they were, or None.
        bias: float [N] or None.
        outliers: which dimensions of x are multiplied in floating point: `static` those stored, `dynamic`
            those with any |x| >= `threshold` in the call, `none` none.
        threshold: see `outliers`.
        activation: how the rows of x are quantized, `absmax` or `zeropoint`.
        kept_limit: the magnitude that x should not exceed outside of the stored outliers, or None where it is unknown.
        miss_counter: counts the rows of x that do; None until `outlier_misses` begins.

    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    SCB: Tensor
    weight_format: Tensor
    weight_row_sum: Tensor | None
    outlier_dims: Tensor | None
    outlier_weight: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, to be filled; `dtype` is that of the bias and the outlier columns."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.outliers, self.threshold, self.activation = outliers, threshold, activation
        self.packed = False
        self.kept_limit: float | None = None
        self.miss_counter: nn.Module | None = None

        def zeros(*shape: int, kind: torch.dtype | None) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self.weight = nn.Parameter(zeros(out_features, in_features, kind=torch.int8), requires_grad=False)
        self.register_buffer("SCB", zeros(out_features, kind=torch.float32))
        self.register_buffer("weight_format", zeros(kind=torch.uint8))
        self.register_buffer("weight_row_sum", None, persistent=False)
        k = outlier_count
        self.register_buffer("outlier_dims", None if k is None else zeros(k, kind=torch.int32))
        self.register_buffer("outlier_weight", None if k is None else zeros(out_features, k, kind=dtype))
        self.bias = nn.Parameter(zeros(out_features, kind=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        outlier_dims: Tensor | None = None,
        outlier_weight: Tensor | None = None,
    ) -> Self:
        """Quantize a linear layer, or GPT-2's Conv1D with its transposed weight; nothing is shared with it.

        Args:
            linear: weight and bias in float16, bfloat16 or float32, finite.
            outlier_dims: integer [k], strictly increasing; None stores no columns, k = 0.
            outlier_weight: float [N, k]; None takes the columns of the weight itself.

        Raises:
            ValueError: outlier dims that are not strictly increasing or not in the layer, columns of another
                shape, or a weight that is not finite.

        """
        weight = linear.weight.detach()
        weight = weight.t() if isinstance(linear, Conv1D) else weight
        dims = _checked_dims(outlier_dims, weight)
        if outlier_weight is None:
            outlier_weight = weight[:, dims.long()]
        elif outlier_dims is None or outlier_weight.shape != (len(weight), len(dims)):
            found, expected = list(outlier_weight.shape), [len(weight), len(dims)]
            raise ValueError(f"outlier_weight has shape {found}, expected {expected}, for {len(dims)} outlier_dims")
        values, absmax = quantize_weight(weight)
        if not bool(absmax.isfinite().all()):
            raise ValueError("the weight holds values that are not finite")
        bias = linear.bias
        layer = cls(weight.shape[1], len(weight), bias is not None, len(dims), device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.SCB, layer.weight_format = absmax, absmax.new_zeros((), dtype=torch.uint8)
        layer.outlier_dims, layer.outlier_weight = dims, outlier_weight.detach().clone()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.prepare()
        return layer

    def prepare(self) -> None:
        """Compute what the kernels want to know of the weight, and lay it out for them; it takes no more memory."""
        weight = self.unpacked_weight()
        self.weight_row_sum = None if weight.is_meta else weight_row_sum(weight)
        self._set_weight(pack(weight) if self.packable else weight)

    @property
    def packable(self) -> bool:
        """Whether `prepare` packs the weight: not for the dynamic search, which takes columns of it in every call."""
        # What accelerate placed has a hook, and moves as it is.
        return self.outliers != "dynamic" and not hasattr(self, "_hf_hook") and packable(self.weight)

    def unpacked_weight(self) -> Tensor:
        """Return the weight, int8 [N, K]; a copy if it is packed."""
        return unpack(self.weight) if self.weight.is_mkldnn else self.weight

    def _set_weight(self, weight: Tensor) -> None:
        if weight is not self.weight:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.packed = weight.is_mkldnn

    @property
    def weight_absmax(self) -> Tensor:
        """The absmax of each row of the weight, float32 [N]."""
        return self.SCB

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] in float16, bfloat16 or float32 to [..., N] in the dtype of x."""
        # The graph through the scales and the outlier columns alone would give gradients that are wrong.
        with torch.no_grad():
            if self.miss_counter is not None:
                self.miss_counter(x)
            out = self._product(x)
        return refuse_backward(out, x) if x.requires_grad and torch.is_grad_enabled() else out

    def _product(self, x: Tensor) -> Tensor:
        if self.outliers == "dynamic":
            weight = unpack(self.weight) if self.packed else self.weight  # packed if the mode was changed since
            return dynamic_int8_linear(
                x, weight, self.weight_absmax, self.threshold, self.bias, self.activation, self.weight_row_sum
            )
        dims, columns = self.outlier_dims, self.outlier_weight
        if self.outliers == "none" or dims is None or columns is None:
            dims = self.SCB.new_empty(0, dtype=torch.int32)
            columns = self.SCB.new_empty(self.out_features, 0)
        absmax, row_sum = self.weight_absmax, self.weight_row_sum
        return int8_linear(x, self.weight, absmax, dims, columns, self.bias, self.activation, row_sum, self.packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in floating point, [N, K]; stored outlier columns are exact."""
        weight = dequantize_weight(self.unpacked_weight(), self.weight_absmax).to(dtype)
        if self.outlier_dims is not None and self.outlier_weight is not None:
            weight[:, self.outlier_dims.long()] = self.outlier_weight.to(dtype)
        return weight

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        count = "" if self.outlier_dims is None else f", outlier_dims={len(self.outlier_dims)}"
        threshold = f", threshold={self.threshold}" if self.outliers == "dynamic" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{count}, outliers={self.outliers!r}{threshold}, activation={self.activation!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as `fn` does, but cast nothing that is part of the quantized weight."""
        packed = self.packed
        self._set_weight(self.unpacked_weight())
        stored = (self.weight, self.SCB, self.weight_format, self.outlier_dims)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is part for part in stored):
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if packed:
            self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along; the packed layout belongs to this machine."""
        state = dict(vars(self))
        if self.packed:
            weight = nn.Parameter(self.unpacked_weight(), requires_grad=False)
            state |= {"_parameters": {**self._parameters, "weight": weight}, "packed": False}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on that state, and pack again what was packed."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.packable:
            self.prepare()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[f"{prefix}weight"] = self.unpacked_weight()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Take on the number of outliers in the state; refuse a weight that has not been quantized."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dtype != torch.int8:
            # copy_ would round it to int8 without a word.
            lists[-1].append(f"{prefix}weight is {weight.dtype}, expected torch.int8; see Int8Linear.from_linear")
            return
        dims, columns = (state_dict.get(prefix + name) for name in ("outlier_dims", "outlier_weight"))
        if dims is not None and columns is not None:
            here = self.outlier_weight
            device, dtype = self.weight.device, columns.dtype if here is None else here.dtype
            if here is None or here.shape[1] != len(dims):
                self.outlier_dims = torch.zeros(len(dims), dtype=torch.int32, device=device)
                self.outlier_weight = torch.zeros(self.out_features, len(dims), dtype=dtype, device=device)
        self._set_weight(self.unpacked_weight())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.prepare()


def _checked_dims(outlier_dims: Tensor | None, weight: Tensor) -> Tensor:
    """Return int32 [k] on the weight's device, in memory of its own."""
    if outlier_dims is None:
        return torch.zeros(0, dtype=torch.int32, device=weight.device)
    dims = outlier_dims.detach().to(weight.device, torch.int64)
    inside = dims.ndim == 1 and bool(((dims >= 0) & (dims < weight.shape[1])).all())
    if not inside or not bool((dims.diff() > 0).all()):
        raise ValueError(
            f"outlier_dims is {outlier_dims.tolist()}, expected strictly increasing numbers from 0 to "
            f"{weight.shape[1] - 1}"
        )
    return dims.to(torch.int32)
