"""The weights that an operator was called with before: their tensors are checked once, and not in every call.

Compiled code calls the operator of a layer with the same tensors for each token. They are recognised by who they are;
to remember a weight keeps none of its tensors, and it is forgotten with the first of them that goes. Code may put other
data under a tensor, so addresses are looked at each time, as in every call of a layer (`native.py`). A tensor that gets
another shape or dtype in place is not found out, there and here.
"""

import weakref

import torch
from torch import Tensor

from ..operands import Operands
from .native import Layout

_Key = tuple[int | None, ...]
# The references are here for what they do when their tensor goes.
_KNOWN: dict[_Key, tuple[Layout, list[weakref.ref[Tensor]]]] = {}


def layout_of(operands: Operands) -> Layout | None:
    """Return where a weight lies, or None if it has not been remembered."""
    known = _KNOWN.get(_key(operands))
    return known[0] if known else None


def remember(operands: Operands) -> None:
    """Remember a weight whose tensors were checked, if they can be used as they are."""
    _, _, _, _, columns, bias, *_ = operands
    if columns.dtype == torch.float64 or (bias is not None and bias.dtype == torch.float64):
        return
    key = _key(operands)

    def forget(_: weakref.ref[Tensor]) -> None:
        _KNOWN.pop(key, None)

    _KNOWN[key] = Layout(), [weakref.ref(tensor, forget) for tensor in operands[:6] if isinstance(tensor, Tensor)]


def _key(operands: Operands) -> _Key:
    values, scale, row_sum, dims, columns, bias, _, group, rotation = operands
    return id(values), id(scale), id(row_sum), id(dims), id(columns), id(bias), group, rotation
