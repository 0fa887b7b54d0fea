"""Names, dtypes and shapes of tensors, their places in a file, and their bytes.

Reading never maps the file: a tensor is read into memory of its own, so a file that is cut short is an error and not a
crash, and memory stays what the caller holds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..disk.reading import open_regular
from ..errors import CorruptFileError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32"})

MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64

# How much of a tensor is in memory at a time where its rows can be handled one after the other.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it has a place: its name, dtype in safetensors' spelling, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor in a file; `offset` counts from the start of the file."""

    file: str
    offset: int

    def rows(self, start: int, stop: int) -> "TensorInfo":
        """Return the place of some of the rows of a tensor that has dimensions."""
        rest = self.shape[1:]
        row_bytes = math.prod(rest) * DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *rest), offset=self.offset + start * row_bytes)

    def blocks(self) -> "list[TensorInfo]":
        """Return the places of blocks of rows, of a few MiB where a row is not larger, that make up the tensor."""
        if not self.shape:
            return [self]
        count, step = self.shape[0], self.rows_per_block
        return [self.rows(start, min(count, start + step)) for start in range(0, count, step)]

    @property
    def rows_per_block(self) -> int:
        """How many rows of a tensor with dimensions to handle at a time."""
        return max(1, BLOCK_BYTES * self.shape[0] // max(1, self.nbytes))


def is_tensor_name(name: Any) -> bool:
    """Tell whether a name may be one: a string that is not empty, not too long, and safe to print to a terminal."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def is_shape(value: Any) -> bool:
    """Tell whether a value from JSON is a shape within the limits of spec.md."""
    # Sizes beside a 0 are bounded too: strides are computed from them.
    return is_sizes(value) and len(value) <= MAX_DIMENSIONS and math.prod(size or 1 for size in value) < 2**63


def is_sizes(value: Any) -> bool:
    """Tell whether a value from JSON is a list of numbers that may be sizes or positions."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own. Raises CorruptFileError where the file ends too early."""
    with open_regular(path) as file:
        return read_from(file, path, info)


def read_from(file: FileIO, path: Path, info: TensorInfo) -> Tensor:
    """Read a tensor as `read_tensor` does from a file that is open for unbuffered reading; `path` is for its errors."""
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    read_into(file, path, info.name, info.offset, as_bytes(tensor))
    return tensor


def read_into(file: FileIO, path: Path, name: str, offset: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a tensor from `offset` on; path and name are for errors."""
    try:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CorruptFileError(f"{path}: {name}: the file ends {len(view) - done} bytes too early")
            done += count
    except OSError as error:
        raise CorruptFileError(f"{path}: {name}: cannot be read: {error.strerror}") from None


def read_blocks(file: FileIO, path: Path, info: TensorInfo) -> Iterator[Tensor]:
    """Yield a tensor in blocks of its rows, each as `read_from` returns it; a scalar as it is."""
    return (read_from(file, path, block) for block in info.blocks())


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without copying: its data in memory order, little-endian."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
