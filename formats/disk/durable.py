"""Files that are whole or not there: written under another name, flushed to the disk, then renamed."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError


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
