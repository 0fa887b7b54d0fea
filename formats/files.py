"""Which files a checkpoint has, and small files read and written safely."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from .errors import CorruptFileError, OutputError, SourceError
from .strict_json import parse_json
from .tensors import is_tensor_name, open_regular

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "llmint8_manifest.json"
CARD_NAME = "README.md"
# Where some checkpoints of 2023 keep what belongs in config.json.
LEGACY_QUANTIZATION_NAME = "quantization_config.json"
MAX_JSON_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 256 MiB. Raises CorruptFileError, and SourceError for a link that leads away."""
    require_inside(path, path.parent)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CorruptFileError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are allowed")
        raw = file.readall()
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def temporary_name(path: Path) -> Path:
    """Return the name that a file has until it is whole; no file of a checkpoint has such a one."""
    return path.with_name(path.name + ".new.partial")


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file under a temporary name, flush it to the disk, and give it its name."""
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def begin_writeback(file: IO[bytes], offset: int, nbytes: int) -> None:
    """Have the system write to the disk now what it may hold back: the flush at the end then waits for little."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory as durable as the files."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def encode_json(value: dict[str, Any]) -> bytes:
    """Encode as the Hub's own files are: indented, keys in the order given; lists of numbers in one line each."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # No string holds a raw newline, so this touches none.
    text = re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    return (text + "\n").encode()


def read_weight_map(index_path: Path, suffix: str) -> dict[str, str]:
    """Return tensor name -> file name from an index. Every file name must be a plain name with this suffix."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index_path}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and PurePosixPath(file).name == file == PureWindowsPath(file).name
        if not is_tensor_name(tensor) or not plain or not file.endswith(suffix) or not file.isprintable():
            raise CorruptFileError(
                f"{index_path}: {tensor[:80]!r} is in {file!r}, expected a printable tensor name and the name of a "
                f"{suffix} file in this directory"
            )
    return weight_map


def require_inside(path: Path, directory: Path) -> None:
    """Refuse a file that a symlink leads out of the checkpoint, except into the Hub cache's own `blobs` folder."""
    target, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise SourceError(f"{path}: a link to {target}, outside of the checkpoint; copy the file itself instead")
