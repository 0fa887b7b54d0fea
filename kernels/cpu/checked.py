"""The weights that an operator was called with before: their tensors are checked once, and not in every call.

Compiled code calls the operator of a layer with the same tensors for each token. They are recognised by who they are;
to remember a weight keeps none of its tensors, and it is forgotten with the first of them that goes. Code may put other
data under a tensor, so addresses are looked at each time, as in every call of a layer (`native.py`). A tensor that gets
another shape or dtype in place is not found out, there and here.
"""

import weakref
from typing import Any, Protocol

from torch import Tensor

from .native import Layout

_Operands = tuple[Any, ...]  # six tensors, of which the last may be None, and what is no tensor


class Native(Protocol):
    """A weight laid out for the library.

    Attributes:
        operands: what the library is given.
        layout: where these tensors lie.

    """

    operands: Any
    layout: Layout


# The references are here for what they do when their tensor goes.
_KNOWN: dict[tuple[Any, ...], tuple[Layout, list[weakref.ref[Tensor]]]] = {}


def layout_of(operands: _Operands) -> Layout | None:
    """Return where a weight lies, or None if it has not been remembered."""
    known = _KNOWN.get(_key(operands))
    return known[0] if known else None


def remember(operands: _Operands, native: Native) -> None:
    """Remember a weight whose tensors were checked, if the library takes them as they are."""
    if any(given is not taken for given, taken in zip(operands, native.operands, strict=True)):
        return
    key = _key(operands)

    def forget(_: weakref.ref[Tensor]) -> None:
        _KNOWN.pop(key, None)

    _KNOWN[key] = native.layout, [weakref.ref(tensor, forget) for tensor in operands[:6] if isinstance(tensor, Tensor)]


def _key(operands: _Operands) -> tuple[Any, ...]:
    return *map(id, operands[:6]), *operands[6:]
