"""The one call that runs a quantized linear layer, and the one that prepares its weight for a device.

`prepare` picks the implementation, once: on the CPU that of `cpu/`, compiled if it can be, on CUDA that of `gpu/`,
elsewhere the reference. What it returns knows how to run itself, so callers never see which it is.
"""

import torch
from torch import Tensor

from . import reference
from .calling import call
from .checks import check_weight
from .cpu import native, product
from .cpu.linear import CpuWeight
from .operators import GpuWeight, NativeWeight, OperatorWeight, has_triton
from .prepared import PreparedWeight, ReferenceWeight, StoredWeight
from .reference import Activation, Int8Weight


def prepare(weight: Int8Weight, may_pack: bool = True) -> PreparedWeight:
    """Check a weight and lay it out for the device it is on.

    Args:
        weight: its values are shared where the layout is theirs; nobody may change them then.
        may_pack: allow values in another layout, in the place of those given: it takes no more memory if those are
            given up.

    Raises:
        ValueError: the weight is not what `Int8Weight` says.

    """
    check_weight(weight)
    device = weight.values.device
    if kernels := _kernels(device):
        return kernels.prepare(weight)
    return CpuWeight.prepare(weight, may_pack) if device.type == "cpu" else ReferenceWeight.prepare(weight)


def has_groups(device: torch.device) -> bool:
    """Tell whether a weight there has a product for inputs in groups; they cost many times the product elsewhere."""
    return _kernels(device) is not None


def _kernels(device: torch.device) -> type[OperatorWeight] | None:
    """Return the weights of the kernels for a device, or None where there are none."""
    if device.type == "cpu":
        return NativeWeight if native.kinds() else None
    return GpuWeight if device.type == "cuda" and has_triton() else None


def is_laid_out_anew(weight: StoredWeight) -> bool:
    """Tell whether `prepare` lays the values of a weight out anew, where it may, or shares those given."""
    if not isinstance(weight, Int8Weight):
        return False
    return weight.threshold is None and not native.kinds() and product.packable(weight.values)


def int8_linear(x: Tensor, weight: PreparedWeight, activation: Activation = "absmax") -> Tensor:
    """Compute `x @ dequantized(weight).T + bias`; see `reference.int8_linear`.

    Args:
        x: float16, bfloat16 or float32 [..., K], on the weight's device; float64 is computed as float32. Under
            autocast it is cast first, as that of `nn.Linear`, but for float64.
        weight: from `prepare`.
        activation: how the rows of x are quantized.

    Returns:
        [..., N] in the dtype of x, or of autocast. Gradients flow to x, and to a bias that wants one (`gradient.py`).

    Raises:
        ValueError: x does not fit the weight.

    """
    return call(x, weight, activation)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed, exactly: int32 [M, N]."""
    if x.device.type == "cpu":
        return product.int8_product(x, weight)
    return reference.int8_product(x, weight)
