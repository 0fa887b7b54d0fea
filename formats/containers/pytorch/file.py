"""A `torch.save` file, read without unpickling it and without mapping it: names, shapes and places of its tensors.

`storages.py` finds the pickle and the storages, `pickles.py` says what the pickle holds. Here each tensor is
held against its storage, so that no size is believed before the bytes are known to be there. It is then read from its
place, like a tensor of a safetensors file.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...disk.lending import OpenFiles
from ...disk.reading import check_is_no_pointer, open_regular
from ...errors import CorruptFileError, LLMInt8Error
from ..tensors import DTYPE_NAMES, DTYPES, TensorInfo, is_shape, is_tensor_name, read_blocks, read_from
from .pickles import Call, Label
from .storages import Place, parse_strictly, read_container, storage_of

_REBUILD = "torch._utils._rebuild_"
_DTYPE_OF_LABEL = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}

log = logging.getLogger("llmint8")


@dataclass(frozen=True)
class View:
    """A tensor in a file; `info.offset` is its first element's place, strides count elements."""

    info: TensorInfo
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        last = sum((size - 1) * stride for size, stride in zip(self.info.shape, self.stride, strict=True))
        return last + 1 if math.prod(self.info.shape) else 0

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class TorchFile:
    """One `torch.save` file. Nothing in it is executed and none of its numbers trusted."""

    in_blocks = False  # what is not contiguous
    differences: Mapping[str, str] = {}

    def __init__(self, path: Path, opened: OpenFiles) -> None:
        """List the tensors; `opened` lends the file for all that follows. Raises CorruptFileError."""
        size = path.stat().st_size
        self.path, self.stored, self._opened = path, {path: size}, opened
        with open_regular(path) as file:
            check_is_no_pointer(path, file.read(64) or b"")
            file.seek(0)
            state, places = read_saved(path, file, size)
        self._views = views(path, state, places)
        # Beside tensors: bitsandbytes wrote the name of a layout.
        self.words = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, str)}
        self.tensors = {name: view.info for name, view in self._views.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor; of one that is not contiguous, what lies between its elements too."""
        view = self._views[name]
        with self._opened.lend(self.path) as file:
            if view.contiguous:
                return read_from(file, self.path, view.info)
            flat = TensorInfo(name, view.info.dtype, (view.span,), view.info.file, view.info.offset)
            return read_from(file, self.path, flat).as_strided(view.info.shape, view.stride).contiguous().clone()

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows; one that is not contiguous, as a whole."""
        view = self._views[name]
        if not view.contiguous:
            yield self.read(name)
            return
        with self._opened.lend(self.path) as file:
            yield from read_blocks(file, self.path, view.info)


def parse_torch_header(path: Path, file: Any, size: int) -> dict[str, TensorInfo]:
    """List the tensors as `TorchFile` does of what reads like a file of `size` bytes; `path` is for its errors."""
    return {name: view.info for name, view in _views_of(path, file, size).items()}


def read_saved(
    path: Path, file: Any, size: int, parse: Callable[[bytes], Any] = parse_strictly
) -> tuple[Any, dict[str, Place]]:
    """Return what was saved, as `read_container` does. Raises CorruptFileError for whatever is wrong with it."""
    try:
        return read_container(file, size, parse)
    except LLMInt8Error:
        raise
    except Exception as error:  # zipfile and pickletools raise what they like for what is broken
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CorruptFileError(f"{path}: cannot be read as a checkpoint of tensors: {reason}") from None


def _views_of(path: Path, file: Any, size: int) -> dict[str, View]:
    return views(path, *read_saved(path, file, size))


def views(path: Path, state: Any, places: dict[str, Place]) -> dict[str, View]:
    """List the tensors of a state dict that `read_saved` returned. Raises CorruptFileError."""
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
    found: dict[str, View] = {}
    for key, value in state.items():
        name = key.decode(errors="replace") if isinstance(key, bytes) else key  # bytes: written by Python 2
        if not is_tensor_name(name):
            raise CorruptFileError(f"{path}: {str(name)[:80]!r} is not a name a tensor may have")
        call = _tensor_call(value)
        if call is None:
            what = value.function.name if isinstance(value, Call) else type(value).__name__
            log.warning("%s: %s is a %s and not a tensor: left out", path, name, what)
            continue
        try:
            found[name] = _view(TensorInfo(name, "", (), path.name, 0), call, places)
        except ValueError as error:
            raise CorruptFileError(f"{path}: {name}: {error}") from None
    return found


def _tensor_call(value: Any) -> Call | None:
    """Return the call that makes a tensor, without what is wrapped around it; None for what is no tensor."""
    while isinstance(value, Call):
        name, arguments = value.function.name, value.arguments
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
            made, _, inner, _ = arguments
            value = Call(made, inner) if isinstance(made, Label) and isinstance(inner, tuple) else None
        elif name in ("torch.nn.parameter.Parameter", f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state"):
            value = arguments[0] if arguments else None
        else:
            return value if name.startswith(_REBUILD) or name == "torch.Tensor" else None
    return None


def _view(named: TensorInfo, call: Call, places: dict[str, Place]) -> View:
    """Hold what a pickle says about a tensor against the file. Raises ValueError."""
    kind, arguments = call.function.name.removeprefix(_REBUILD), call.arguments
    typed = kind == "tensor_v3"  # the dtype is an argument, and not the storage's
    if kind not in ("tensor", "tensor_v2", "tensor_v3") or len(arguments) < (7 if typed else 4):
        raise ValueError(f"unknown dtype or layout: {kind[:80]}")
    if any(arguments[6 + typed :]):
        raise ValueError("it is stored conjugated or negated; save it with .resolve_conj().resolve_neg()")
    storage, (first, shape, stride) = storage_of(arguments[0]), arguments[1:4]
    dtype = storage.dtype
    if typed:
        dtype = _DTYPE_OF_LABEL.get(arguments[6].name, "") if isinstance(arguments[6], Label) else ""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype[:80] or 'of a newer torch'}")
    place = places.get(storage.key)
    if place is None or storage.nbytes > place.nbytes:
        have = 0 if place is None else place.nbytes
        raise ValueError(f"its storage has {storage.nbytes} bytes, the file has {have} of them")
    if not _is_sizes(shape) or not is_shape([*shape]) or not _is_sizes(stride) or len(stride) != len(shape):
        raise ValueError("its shape and strides are not sizes, or are too large")
    if not _is_sizes((first,)):
        raise ValueError("its place in the storage is not a number >= 0")
    start = storage.part + first * DTYPES[dtype].itemsize
    view = View(TensorInfo(named.name, dtype, shape, named.file, place.offset + start), stride)
    end = start + view.span * DTYPES[dtype].itemsize
    if view.span and end > storage.nbytes:
        raise ValueError(f"it ends at byte {end} of a storage of {storage.nbytes} bytes")
    if math.prod(shape) > view.span:
        raise ValueError(f"{math.prod(shape)} elements share the place of {view.span}; save it with .contiguous()")
    return view


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and 0 <= item < 2**63 for item in value)
