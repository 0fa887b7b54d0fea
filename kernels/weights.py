"""The facade for weights before they are in a layer: it picks what rotates and quantizes one, and adds up its rows.

On the CPU these are compiled functions where there are any; elsewhere, and for what stands for other numbers than its
own, the reference and torch. All return the same bits.
"""

import torch
from torch import Tensor

from . import reference
from .checks import FLOATS, is_watched
from .cpu import native, weights
from .reference import Group, Rotation, groups


def quantize_weight(weight: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row of a weight; see `reference.quantize_weight`."""
    if _is_compiled(weight) and weight.dtype in FLOATS:
        return weights.quantize_weight(weight, rotation)
    return reference.quantize_weight(weight, rotation)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate float [M, K]; see `reference.rotate`."""
    if rotation is not None and _is_compiled(x):
        return weights.rotate(x)
    return reference.rotate(x, rotation)


def row_sums(values: Tensor, group: Group | None) -> Tensor:
    """Add up the rows of int8 [N, K]; see `reference.row_sums`."""
    if _is_compiled(values):
        several = groups(values.shape[1], group)[0] > 1
        return weights.row_sums(values, group if several else None)
    return reference.row_sums(values, group)


def _is_compiled(tensor: Tensor) -> bool:
    here = tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_watched(tensor)
    return here and bool(native.kinds())
