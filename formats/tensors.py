"""Names, dtypes and places of tensors, and the safetensors container (https://github.com/huggingface/safetensors).

A file is `header length (u64, little-endian) | header (JSON) | data`. The header maps each tensor name to its
dtype, shape and byte range in the data. Reading never maps the file: a tensor is read into memory of its own, so
a file that is cut short is an error and not a crash, and memory stays what the caller holds.

The safetensors library is stricter than it needs to be for writing (it wants all tensors at once) and laxer than
we want for reading (duplicate keys), so the container is read and written here; the tests hold both against it.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CorruptFileError
from .strict_json import parse_json

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

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64
# transformers asks for it.
METADATA = {"format": "pt"}

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


def read_header(path: Path, metadata: dict[str, str] | None = None) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
        metadata: the only thing that `__metadata__` may say; None where it may say anything.

    Raises:
        CorruptFileError: naming the file, the tensor where there is one, and what is wrong with it.

    """
    with open_regular(path) as file:
        return parse_header(path, file, os.fstat(file.fileno()).st_size, metadata)


def parse_header(path: Path, file: Any, size: int, metadata: dict[str, str] | None = None) -> dict[str, TensorInfo]:
    """Read the header as `read_header` does from what begins like a file of `size` bytes; `path` is for its errors."""
    length = int.from_bytes(_read_up_to(file, 8), "little")
    if size < 8 or length > size - 8:
        raise CorruptFileError(f"{path}: cut short: {size} bytes, its header alone says {8 + length}")
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    raw = _read_up_to(file, length)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise CorruptFileError(f"{path}: header is not valid JSON: {error}") from None
    if not raw.startswith(b"{") or not isinstance(header, dict):
        raise CorruptFileError(f"{path}: header is not a JSON object; is this a safetensors file?")
    said = header.pop("__metadata__", metadata)
    if metadata is not None and said != metadata:
        raise CorruptFileError(f"{path}: __metadata__ is {str(said)[:80]!r}, expected {metadata}")
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise CorruptFileError(f"{path}: {info.name}: starts at byte {info.offset}, expected {end}")
        end += info.nbytes
    if end != size:
        what = "cut short" if end > size else "bytes left over"
        raise CorruptFileError(f"{path}: {what}: {size} bytes, its header describes {end}")
    return {info.name: info for info in infos}


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Check one entry of a header, whatever it holds."""
    if not is_tensor_name(name):
        raise CorruptFileError(f"{path}: tensor name {name[:80]!r} is empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{path}: {name}: its header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptFileError(f"{path}: {name}: unknown dtype {dtype!r}, known are {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise CorruptFileError(f"{path}: {name}: shape {str(shape)[:80]} is not a list of sizes, or is too large")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{path}: {name}: data_offsets {str(offsets)[:80]!r} are not two byte positions")
    info = TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise CorruptFileError(
            f"{path}: {name}: {dtype} {list(shape)} takes {info.nbytes} bytes, its data_offsets {offsets} say otherwise"
        )
    return info


def is_tensor_name(name: Any) -> bool:
    """Tell whether a name may be one: a string that is not empty, not too long, and safe to print to a terminal."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def is_shape(value: Any) -> bool:
    """Tell whether a value from JSON is a shape within the limits of spec.md."""
    # Sizes beside a 0 are bounded too: strides are computed from them.
    return _is_sizes(value) and len(value) <= MAX_DIMENSIONS and math.prod(size or 1 for size in value) < 2**63


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own. Raises CorruptFileError where the file ends too early."""
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    view = as_bytes(tensor)
    with open_regular(path) as file:
        try:
            file.seek(info.offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CorruptFileError(f"{path}: {info.name}: the file ends {len(view) - done} bytes too early")
                done += count
        except OSError as error:
            raise CorruptFileError(f"{path}: {info.name}: cannot be read: {error.strerror}") from None
    return tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without copying: its data in memory order, little-endian."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def encode_header(specs: Iterable[TensorSpec]) -> tuple[bytes, list[int]]:
    """Return the header for tensors laid out in this order, its length included, and their offsets in the file.

    The data starts at a multiple of 64 bytes: the header is padded with spaces, which safetensors allows.
    """
    entries: dict[str, Any] = {"__metadata__": METADATA}
    starts, end = [], 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        starts.append(end)
        end += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    data_start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, [data_start + start for start in starts]


def open_regular(path: Path) -> Any:
    """Open a regular file for unbuffered reading. FIFOs and devices, which could block or never end, are refused."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptFileError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _read_up_to(file: Any, count: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < count and (chunk := file.read(count - len(chunks))):
        chunks += chunk
    return bytes(chunks)
