"""Files that are whole or not there: written under another name, flushed to the disk, then renamed."""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import OutputError

# Without O_NONBLOCK a device may block when it is opened.
_FLAGS = os.O_RDWR | os.O_CREAT
_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# What file systems answer that cannot flush a directory (CIFS, some of FUSE): its names are as durable as they get.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or path}: cannot be written: {error.strerror}") from None


def temporary_name(path: Path) -> Path:
    """Return the name that a file has until it is whole; no file of a checkpoint has such a one."""
    return path.with_name(path.name + ".new.partial")


def open_output(path: Path) -> FileIO:
    """Open a file for unbuffered reading and writing, a new one where there is none: all that is written goes here.

    What a link leads to is not ours to write, nor a file that has a second name, nor a FIFO or a device.

    Raises:
        OSError: it is one of these, or cannot be opened.

    """
    try:
        descriptor = os.open(path, _FLAGS, 0o666)
    except OSError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link; remove it", str(path)) from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        what = "it has another name too (a hard link)" if stat.S_ISREG(status.st_mode) else "it is not a regular file"
        raise OSError(errno.EINVAL, f"{what}; remove it", str(path))
    return os.fdopen(descriptor, "r+b", buffering=0)


def write_all(file: FileIO, data: bytes | memoryview) -> int:
    """Write to an unbuffered file, which may take less than it is given; return the number of bytes."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += file.write(view[done:])
    return done


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file under a temporary name, flush it to the disk, and give it its name."""
    temporary = temporary_name(path)
    with open_output(temporary) as file:
        file.truncate(0)
        write_all(file, data)
        os.fsync(file.fileno())
    temporary.replace(path)


def begin_writeback(file: FileIO, offset: int, nbytes: int) -> None:
    """Have the system write to the disk now what it may hold back: the flush at the end then waits for little."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice only, and not every file system takes any
            os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Make the names in a directory as durable as the files, where the file system can and we may."""
    with suppress(PermissionError):  # one that may be written to but not listed cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FLUSH:
                raise
        finally:
            os.close(descriptor)


def sync_with_parents(path: Path) -> None:
    """Make a directory durable, and its own name: whichever of its parents a run before this one has made."""
    device = path.stat().st_dev
    for folder in (path.resolve(), *path.resolve().parents):
        if folder.stat().st_dev != device:  # where this file system is mounted; what is above was there before
            break
        sync_directory(folder)


def encode_json(value: dict[str, Any]) -> bytes:
    """Encode as the Hub's own files are: indented, keys in the order given; lists of numbers in one line each."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # No string holds a raw newline, so this touches none.
    text = re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    return (text + "\n").encode()
