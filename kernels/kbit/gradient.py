"""The gradient of a layer of k bits with respect to its input; see `kernels/gradient.py`, which asks for it."""

from typing import Any

import torch
from torch import Tensor

from ..gradient import no_second
from .reference import KBitWeight, dequantize_rows

_LIBRARY = torch.library.Library("llmint8", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "kbit_linear_gradient(Tensor gradient, Tensor packed, Tensor absmax, Tensor levels, int in_features, int? block, "
    "Tensor outlier_dims, Tensor outlier_weight) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is dequantized of a weight at a time: 8 MB in float32.
_BLOCK_ELEMENTS = 1 << 21


def kbit_linear_gradient(gradient: Tensor, weight: KBitWeight) -> Tensor:
    """The gradient of a layer of k bits with respect to x: `gradient @ W`, [M, K] for [M, N], in its dtype.

    Rows are dequantized some at a time, and their products added up in float32.
    """
    dtype = torch.float32 if gradient.device.type == "cpu" else gradient.dtype
    n, k = len(weight.packed), weight.in_features
    out = gradient.new_zeros(len(gradient), k, dtype=torch.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, k))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        inside = gradient[:, rows].to(dtype)
        part = torch.empty(len(gradient), k, dtype=dtype, device=out.device)
        out += torch.mm(inside, dequantize_rows(weight, rows).to(dtype), out=part)
    return out.to(gradient.dtype)


def _gradient(
    gradient: Tensor,
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    in_features: int,
    block: int | None,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
) -> Tensor:
    weight = KBitWeight(packed, absmax, levels, in_features, block, outlier_dims, outlier_weight)
    return kbit_linear_gradient(gradient, weight)


def _shaped(gradient: Tensor, packed: Tensor, absmax: Tensor, levels: Tensor, in_features: int, *others: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], in_features)


_LIBRARY.impl("kbit_linear_gradient", _gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmint8::kbit_linear_gradient", _shaped, lib=_LIBRARY)
torch.library.register_autograd("llmint8::kbit_linear_gradient", no_second, lib=_LIBRARY)


def input_gradient(gradient: Tensor, weight: KBitWeight) -> Tensor:
    """Run the operator: [M, K] for a gradient [M, N]."""
    coded = weight.packed, weight.absmax, weight.levels, weight.in_features, weight.block
    found: Tensor = torch.ops.llmint8.kbit_linear_gradient(gradient, *coded, weight.outlier_dims, weight.outlier_weight)
    return found
