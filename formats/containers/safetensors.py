"""The safetensors container (https://github.com/huggingface/safetensors).

A file is `header length (u64, little-endian) | header (JSON) | data`. The header maps each tensor name to its
dtype, shape and byte range in the data.

The safetensors library is stricter than it needs to be for writing (it wants all tensors at once) and laxer than
we want for reading (duplicate keys), so the container is read and written here; the tests hold both against it.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..disk.reading import check_is_no_pointer, open_regular
from ..disk.strict_json import parse_json
from ..errors import CorruptFileError
from .tensors import DTYPES, TensorInfo, TensorSpec, is_shape, is_sizes, is_tensor_name

MAX_HEADER_BYTES = 100_000_000
# transformers asks for it.
METADATA = {"format": "pt"}


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
    beginning = _read_up_to(file, 8)
    length = int.from_bytes(beginning, "little")
    if size < 1024 and length > size:
        check_is_no_pointer(path, beginning + _read_up_to(file, size - len(beginning)))
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
    if not is_sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{path}: {name}: data_offsets {str(offsets)[:80]!r} are not two byte positions")
    info = TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise CorruptFileError(
            f"{path}: {name}: {dtype} {list(shape)} takes {info.nbytes} bytes, its data_offsets {offsets} say otherwise"
        )
    return info


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


def _read_up_to(file: Any, count: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < count and (chunk := file.read(count - len(chunks))):
        chunks += chunk
    return bytes(chunks)
