"""What must hold for a quantized weight and for what it is multiplied with: the one place where that is checked.

A kernel believes its arguments: a dimension that is too large reads foreign memory on a GPU, and an x of another width
gives numbers. So a weight is checked once, when it is prepared, values of its outlier dims included, and an input in
every call. Operators check shapes, dtypes and devices only: values would make them wait for the GPU.
"""

from typing import get_args

import torch
from torch import Tensor

from .reference import Group, Int8Weight, Rotation, groups, row_sum_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MOST_FEATURES = 133_144  # 127 * 127 * K < 2**31
COLUMNS = (*FLOATS, torch.float64)  # of what a layer holds; a model may be cast to it


def check_weight(weight: Int8Weight) -> None:
    """Check a weight, values of its outlier dims included, which waits for a GPU.

    Raises:
        ValueError: a tensor is not what `Int8Weight` says, or they do not fit each other.

    """
    values, dims = weight.values, weight.outlier_dims
    device = values.device
    check_tensor("values", values, (torch.int8,), (None, None), device)
    n, k = values.shape
    if k > _MOST_FEATURES:
        raise ValueError(
            f"values has {k} columns, at most {_MOST_FEATURES} add up in 32 bits; keep the layer in 16 bit"
        )
    check_tensor("absmax", weight.absmax, (torch.float32,), (n,), device)
    check_tensor("outlier_dims", dims, (torch.int32, torch.int64), (None,), device)
    check_tensor("outlier_weight", weight.outlier_weight, COLUMNS, (n, len(dims)), device)
    if weight.bias is not None:
        check_tensor("bias", weight.bias, COLUMNS, (n,), device)
    check_group(weight.group)
    check_rotation(weight.rotation)
    if weight.rotation is not None and weight.threshold is not None:
        raise ValueError("threshold is given for a rotated weight, of which no column can be taken")
    # What stands for a tensor, in a graph that is made, has no values.
    if type(dims) is Tensor and not dims.is_meta and len(dims) and not torch.compiler.is_compiling():
        check_outlier_dims(dims, k)


def check_group(group: int | None) -> None:
    """Check how many dimensions of x share a scale. Raises ValueError: it is neither one of `Group` nor None."""
    if group is not None and group not in get_args(Group):
        raise ValueError(f"group is {group}, expected one of {get_args(Group)}, or None for the whole row")


def check_rotation(rotation: int | None) -> None:
    """Check in which blocks a weight is rotated. Raises ValueError: it is neither one of `Rotation` nor None."""
    if rotation is not None and rotation not in get_args(Rotation):
        raise ValueError(f"rotation is {rotation}, expected one of {get_args(Rotation)}, or None")


def check_outlier_dims(outlier_dims: Tensor, in_features: int) -> None:
    """Check the values of outlier dims, integer [k]. Raises ValueError: they do not increase, or are not below K."""
    if outlier_dims.ndim == 1:
        # Compared and not subtracted, as differences may overflow.
        rising = (outlier_dims[1:] > outlier_dims[:-1]).all()
        inside = ((outlier_dims >= 0) & (outlier_dims < in_features)).all()
    if outlier_dims.ndim != 1 or not bool(rising & inside):
        text = repr(outlier_dims.tolist())
        found = text if len(text) <= 80 else text[:80] + " ..."
        last = in_features - 1
        raise ValueError(f"outlier_dims is {found}, expected strictly increasing numbers from 0 to {last}")


def check_input(x: Tensor, in_features: int, device: torch.device) -> None:
    """Check what a layer is called with, x [..., K].

    Raises:
        ValueError: x is of another width, of a dtype that is not floating point, or on another device.

    """
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}, expected one of {_names(FLOATS)}; cast it to the model's dtype")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {in_features}]")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, the weight on {device}; move one of them")


def check_operands(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    group: Group | None,
    outlier_dims: Tensor | None = None,
    columns: Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    """Check the arguments of an operator; see `operators.py`.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than it should have.

    """
    device = weight.device
    check_tensor("weight", weight, (torch.int8,), (None, None), device, contiguous=True)
    n, k = weight.shape
    check_rows(x, k, device)
    check_tensor("scale", scale, (torch.float32,), (n,), device, contiguous=True)
    check_group(group)
    check_rotation(rotation)
    count, _ = groups(k, group)
    check_tensor("row_sum", row_sum, (row_sum_dtype(count),), (n, count), device, contiguous=True)
    if bias is not None:
        check_tensor("bias", bias, COLUMNS, (n,), device, contiguous=True)
    if outlier_dims is not None and columns is not None:
        check_tensor("outlier_dims", outlier_dims, (torch.int32,), (None,), device, contiguous=True)
        padded = padded_outliers(outlier_dims.shape[0])
        check_tensor("columns", columns, COLUMNS, (n, padded), device, contiguous=True)


def check_rows(x: Tensor, in_features: int, device: torch.device) -> None:
    """Check x [M, K] for a weight of an operator, as `check_operands` does."""
    if not (x.ndim == 2 and x.shape[1] == in_features and x.dtype in FLOATS and x.device == device):
        check_tensor("x", x, FLOATS, (None, in_features), device)


def is_watched(x: Tensor) -> bool:
    """Tell whether x stands for other numbers than its own, or somebody transforms or records what is called."""
    return (
        type(x) is not Tensor
        or x.is_neg()
        or x._is_zerotensor()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def padded_outliers(count: int) -> int:
    """Return the columns that `count` outliers take in the product on a GPU: 0, 16, or a multiple of 32.

    Few kernels do for layers whose counts all differ.
    """
    return 16 if 0 < count <= 16 else -(-count // 32) * 32


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
    contiguous: bool = False,
) -> None:
    """Compare a tensor with what is expected of it; None in `shape` is any size."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {_names(dtypes)}")
    if tensor.ndim != len(shape) or any(e is not None and e != f for e, f in zip(shape, tensor.shape, strict=True)):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected [{', '.join(str(e or 'any') for e in shape)}]"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
