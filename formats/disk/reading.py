"""Files from strangers, opened and read: regular ones inside of the checkpoint, and JSON of bounded size."""

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, SourceError
from .names import CONFIG_NAME, LEGACY_QUANTIZATION_NAME
from .strict_json import parse_json

MAX_JSON_BYTES = 256 << 20
_POINTER = b"version https://git-lfs.github.com/"
# What transformers writes, in Python's dialect of JSON.
_CONFIGS = (CONFIG_NAME, LEGACY_QUANTIZATION_NAME)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 256 MiB. Raises CorruptFileError, and SourceError for a link that leads away."""
    require_inside(path, path.parent)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CorruptFileError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are allowed")
        raw = file.readall()
    check_is_no_pointer(path, raw)
    try:
        value = parse_json(raw, constants=path.name in _CONFIGS)
    except ValueError as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def require_inside(path: Path, directory: Path) -> None:
    """Refuse a file that a symlink leads out of the checkpoint, except into the Hub cache's own `blobs` folder."""
    target, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise SourceError(f"{path}: a link to {target}, outside of the checkpoint; copy the file itself instead")


def is_pointer(beginning: bytes) -> bool:
    """Tell by the beginning of a file whether it is what git-lfs puts in its place."""
    return beginning.startswith(_POINTER)


def check_is_no_pointer(path: Path, beginning: bytes) -> None:
    """Refuse what git-lfs puts in the place of a file that it has not fetched. Raises CorruptFileError."""
    if is_pointer(beginning):
        raise CorruptFileError(
            f"{path}: a pointer of git-lfs in place of the file; `git lfs pull` in {path.parent} fetches the file"
        )


def open_regular(path: Path) -> FileIO:
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
