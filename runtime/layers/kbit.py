"""The linear layer of 3 to 8 bits: the weight is quantized, and inputs stay in floating point."""

from typing import Self, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import NATIVE, KBit, Layout
from llmint8.kernels.kbit.packing import pack
from llmint8.kernels.kbit.reference import quantize_weight
from llmint8.kernels.reference import Activation

from .arguments import ActivationGroup, Outliers, check_choice, check_searchable, chosen_dims
from .linear import QuantizedLinear


class KBitLinear(QuantizedLinear):
    """`y = x W^T + b` with W in k bits ("The case for 4-bit precision", arXiv 2212.09720).

    Attributes:
        outliers: how it runs, see `configure`.

    """

    kbit: KBit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        outlier_count: int | None = 0,
        *,
        kbit: KBit,
        outliers: Outliers = "static",
        layout: Layout = NATIVE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, to be filled and prepared; `dtype` is that of the bias and the outlier columns."""
        super().__init__(in_features, out_features, bias, outlier_count, None, layout, device, dtype, kbit)
        self._outliers = outliers
        self.configure(outliers=outliers)

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, kbit: KBit, outlier_dims: Tensor | None = None) -> Self:
        """Quantize a linear layer, or GPT-2's Conv1D with its transposed weight; nothing is shared with it.

        Args:
            linear: weight and bias in float16, bfloat16 or float32, finite.
            kbit: bits, data type and block.
            outlier_dims: integer [c], strictly increasing; None stores no columns.

        Raises:
            ValueError: outlier dims that are not strictly increasing or not in the layer, or a weight that is not
                finite, or beyond float16.

        """
        weight = linear.weight.detach()
        weight = weight.t() if isinstance(linear, Conv1D) else weight
        codes, absmax, levels = quantize_weight(weight, kbit.bits, kbit.data_type, kbit.block)
        if not bool(absmax.isfinite().all()):
            raise ValueError("the weight holds values that are not finite, or that float16 cannot hold")
        dims = chosen_dims(outlier_dims, weight)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        shape = weight.shape[1], len(weight), bias is not None, len(dims)
        layer = cls(*shape, kbit=kbit, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(pack(codes, kbit.bits), requires_grad=False)
        layer.absmax = absmax
        if kbit.has_codebook:
            layer.codebook = levels.half()
        layer.outlier_dims, layer.outlier_weight = dims.to(torch.int32, copy=True), weight[:, dims]
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
        """Change how the layer runs; None leaves it as it is.

        Args:
            outliers: whether the stored columns count, `static` or `none`.
            threshold, activation, activation_group: nothing of this layer, whose inputs are not quantized.

        Raises:
            ValueError: outliers is something else.

        """
        check_choice("outliers", outliers, get_args(Outliers))
        check_searchable(outliers or self._outliers, None, self.kbit)
        other = outliers is not None and outliers != self._outliers
        self._outliers = outliers or self._outliers
        if other and self.prepared is not None:
            self.prepare()

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        return f"{super().extra_repr()}, weight={self.kbit.name!r}"
