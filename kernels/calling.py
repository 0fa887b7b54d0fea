"""How a layer is called with what a model gives it: any number of axes, autocast, float64; and where gradients flow."""

import torch
from torch import Tensor

from .checks import FLOATS, check_input
from .gradient import differentiable
from .prepared import PreparedWeight
from .reference import Activation


def call(x: Tensor, weight: PreparedWeight, activation: Activation) -> Tensor:
    """Run a layer for x [..., K]: [..., N] in the dtype of x, or of autocast; see `linear.int8_linear`."""
    # Asked of any device first, which takes a tenth of the time.
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weight, activation)
    if x.dtype == torch.float64:
        return call(x.float(), weight, activation).double()
    check_input(x, weight.in_features, weight.device)
    if x.ndim == 2:
        return differentiable(x, weight, activation)
    rows = differentiable(x.reshape(-1, weight.in_features), weight, activation)
    return rows.reshape(*x.shape[:-1], weight.out_features)


def _under_autocast(x: Tensor, weight: PreparedWeight, activation: Activation) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):  # the arithmetic inside chooses its dtypes itself
        return call(x.to(dtype) if x.dtype in FLOATS else x, weight, activation)
