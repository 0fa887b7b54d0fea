"""What model code gets that asks an int8 layer for its `weight`: a float tensor that does not exist until it is used.

Some models take the weight of a linear layer in hand instead of calling the layer: they cast their input to its dtype,
or multiply by it themselves, as PyTorch's own attention does. The int8 values would be taken for the weight. So
`Int8Linear.weight` is a `FloatWeight`: shape, dtype and device are those of the float weight and cost nothing; an
operator that is given it gets the dequantized weight, stored outlier columns exact, made anew in each call. A warning
names the layer once, as that is slow, and `--skip` keeps it in 16 bit. What would write into it is refused, as the
result would be thrown away. But who writes into `weight.data`, or assigns to it, as PEFT does to merge an adapter,
means it: the layer quantizes what comes of it (`Int8Linear.overwrite`). A slice of it is a tensor of its own: what is
written into that is lost, and nobody says so.

The int8 values stay the module's parameter, so `parameters()`, `state_dict()`, `.to()` and those who move tensors by
name see them. It answers below the operators (`__torch_dispatch__`) and not above them (`__torch_function__`): PyTorch
takes the fused path of its attention only without the latter. Two rules are for accelerate, which moves
what it gets by this attribute: on another device it is still a `FloatWeight`, and on the meta device, where there are
no numbers, it is the int8 tensor itself. Compilers see plain operators, and drop them where only the dtype is used.
"""

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmint8.formats import LLMInt8Error
from llmint8.kernels.prepared import StoredWeight

log = logging.getLogger("llmint8")
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def dequantized(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight in floating point, [N, K]; its outlier columns are exact, but for a cast to `dtype`."""
    return weight.dequantize().to(dtype)


class FloatWeight(Tensor):
    """A float weight [N, K] that is dequantized where it is used.

    Attributes:
        read: returns what it is dequantized from; called in each use.
        layer: its name, for people.
        overwrite: takes what is written into its `data`, or None where it is no layer's.
        is_data: whether it is the `data` of another.

    """

    read: Callable[[], StoredWeight]
    layer: str
    overwrite: Callable[[Tensor], None] | None = None
    is_data = False
    _is_param = True  # `isinstance(layer.weight, nn.Parameter)` holds, as of any layer

    @staticmethod
    def __new__(
        cls,
        read: Callable[[], StoredWeight],
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Stand for what `read` returns, in `dtype` on `device`, where that is."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.read, made.layer = read, name
        return made

    @property
    def data(self) -> Tensor:
        """What stands for the same weight, and may be written into, or replaced by another float tensor [N, K]."""
        found = self._like(self.read, self.device)
        found.overwrite, found.is_data = self.overwrite, self.overwrite is not None
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, FloatWeight) and value.is_data and value.overwrite == self.overwrite:
            return  # `weight.data += change` has written by now
        if self.overwrite is None:
            raise self._refused("an assignment to the data")
        self.overwrite(value)

    def data_ptr(self) -> int:
        """Return where the int8 values are: accelerate tells tied weights by it."""
        return self.read().values.data_ptr()

    def tolist(self) -> list[list[float]]:
        """Return the numbers of the float weight."""
        return dequantized(self.read(), self.dtype).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the float weight as an array."""
        return dequantized(self.read(), self.dtype).numpy(force=force)

    def share_memory_(self) -> Any:
        """Refuse: the numbers are in no memory."""
        raise self._refused("share_memory_")

    def untyped_storage(self) -> Any:
        """Refuse: the numbers are in no memory."""
        raise self._refused("untyped_storage")

    def __dlpack__(self, **how: Any) -> Any:
        """Hand over the float weight, a copy."""
        return dequantized(self.read(), self.dtype).__dlpack__(**how)

    def _refused(self, what: str) -> LLMInt8Error:
        return LLMInt8Error(
            f"{self.layer}: {what} of its weight, which is int8 and dequantized where it is used; "
            "layer.dequantize() returns a float tensor, and --skip at conversion keeps the layer in 16 bit"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a float tensor: a copy belongs to no layer."""
        return dequantized(self.read(), self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a float tensor."""
        return dequantized(self.read(), self.dtype).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it is."""
        return f"FloatWeight({self.layer!r}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator with the dequantized weight in its place."""
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0]._like(args[0].read, args[0].device)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]._moved(kwargs.get("device"))
        for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(given, cls):
                if given.is_data:
                    return given._written(func, args, kwargs)
                what = f"{given.layer}: {func} would write into its weight, which is int8 and frozen"
                raise LLMInt8Error(f"{what}; --skip at conversion keeps the layer in 16 bit")
        args, kwargs = tree_map_only(cls, _used, (args, kwargs))
        return func(*args, **kwargs)

    def _written(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run an operator that writes into it."""
        assert self.overwrite is not None  # it is the data of a layer's
        result = dequantized(self.read(), torch.float32)
        args, kwargs = tree_map_only(FloatWeight, lambda one: result if one is self else _used(one), (args, kwargs))
        func(*args, **kwargs)
        self.overwrite(result)
        return self

    def _like(self, read: Callable[[], StoredWeight], device: torch.device) -> "FloatWeight":
        n, k = self.shape
        return FloatWeight(read, self.layer, (n, k), self.dtype, device)

    def _moved(self, device: torch.device | None) -> Tensor:
        weight = self.read()
        if device is None or device == self.device:
            return dequantized(weight, self.dtype)
        if device.type == "meta":
            return weight.values.to(device)
        parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
        moved = replace(weight, **{name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)})
        return self._like(lambda: moved, moved.values.device)


def _used(weight: FloatWeight) -> Tensor:
    if not weight.is_data:
        _tell_once(re.sub(r"\d+", "*", weight.layer))
    return dequantized(weight.read(), weight.dtype)


@functools.cache
def _tell_once(names: str) -> None:
    log.warning(
        "%s: the model's code, or an adapter, uses the weight itself, which is dequantized for it in every call; "
        "--skip at conversion keeps the layer in 16 bit",
        names,
    )
