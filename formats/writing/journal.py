"""What an unfinished conversion has done: an append-only file beside its shards, from which it goes on.

The first line holds a fingerprint: what the conversion is made of. Every record is a line of JSON and then the bytes of
its tensors. Nothing here waits for the disk; after a power failure a record may be cut short, or damaged, or vouch for
data that was lost. So everything comes with a SHA-256, a line with its own before it and the hash of its tensors in it,
and what does not match is done again. Behind a damaged line nothing is believed: it says where the next one begins.

The file is locked while it is open, where the file system has locks: two conversions cannot write to one directory. It
is opened once and read through what holds the lock: on some systems that shuts out whoever opens the file again.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..containers.tensors import DTYPE_NAMES, DTYPES, TensorInfo, as_bytes, is_shape, read_from
from ..disk.durable import named_errors, open_output, write_all
from ..disk.names import JOURNAL_NAME
from ..errors import CorruptFileError, OutputError

_MAX_LINE_BYTES = 64 << 20
# A lock that somebody else has; CIFS and some kinds of NFS say EACCES.
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

log = logging.getLogger("llmint8")


@dataclass(frozen=True)
class Record:
    """A value from JSON, and the places of the tensors that go with it."""

    value: Any
    tensors: tuple[TensorInfo, ...]
    sha256: str


class Journal:
    """The journal of one conversion; see the module. Appending is safe from several threads."""

    def __init__(self, out: Path, fingerprint: dict[str, str] | None) -> None:
        """Open or begin the journal in the directory `out`; None takes one of any fingerprint.

        Raises:
            OutputError: another process has it open, or it belongs to a conversion with another fingerprint.

        """
        self.path = out / JOURNAL_NAME
        self._records: dict[tuple[str, str], Record] = {}
        self._unchecked: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._file = _open_locked(self.path)
        try:
            self._end = self._read(fingerprint)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file and give up the lock; another conversion may then go on."""
        self._file.close()

    @property
    def empty(self) -> bool:
        """Whether nothing has been done yet."""
        return not self._records

    def put(self, kind: str, name: str, value: Any = None, tensors: Sequence[Tensor] = ()) -> None:
        """Append a record; it takes the place of an earlier one of that kind and name. Tensors are contiguous."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(as_bytes(tensor))
        specs = [(DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for tensor in tensors]
        entry = {"kind": kind, "name": name, "value": value, "tensors": specs, "sha256": digest.hexdigest()}
        with self._lock:
            # After a failed write the next one begins where that one did.
            self._file.seek(self._end)
            start = self._end + self._write(_line(entry))
            end = start + sum(self._write(as_bytes(tensor)) for tensor in tensors)
            self._end = end
            self._records[kind, name] = self._record(entry, start)
            self._unchecked.discard((kind, name))

    def get(self, kind: str, name: str) -> Record | None:
        """Return a record whose tensors are whole, or None."""
        record = self._records.get((kind, name))
        if record is not None and (kind, name) in self._unchecked:
            digest = hashlib.sha256()
            with contextlib.suppress(CorruptFileError):
                for info in record.tensors:
                    digest.update(as_bytes(self.load(info)))
            if digest.hexdigest() != record.sha256:
                return None
            self._unchecked.discard((kind, name))
        return record

    def remember(self, kind: str, name: str, compute: Callable[[], Any]) -> Any:
        """Return the value of a record; where there is none, of a new one with what `compute` returns."""
        record = self.get(kind, name)
        if record is not None:
            return record.value
        value = compute()
        self.put(kind, name, value)
        return value

    def load(self, info: TensorInfo) -> Tensor:
        """Read a record's tensor, or some of its rows."""
        with self._lock:
            return read_from(self._file, self.path, info)

    def sync(self) -> None:
        """Flush the file to the disk. Raises OSError."""
        os.fsync(self._file.fileno())

    def _write(self, data: bytes | memoryview) -> int:
        with named_errors(self.path):
            return write_all(self._file, data)

    def _read(self, fingerprint: dict[str, str] | None) -> int:
        """Read all records; return where the whole ones end, which is where the next one goes."""
        size = os.fstat(self._file.fileno()).st_size
        buffered = io.BufferedReader(self._file)
        first = _parse(buffered)
        begun = first.get("fingerprint") if first else None
        if not isinstance(begun, dict):
            if any(path.suffix != ".partial" for path in self.path.parent.iterdir()):
                raise OutputError(f"{self.path}: not the journal of a conversion; remove it")
            buffered.seek(0)
            if fingerprint is not None and buffered.readline(_MAX_LINE_BYTES).endswith(b"\n"):
                raise OutputError(
                    f"{self.path}: its beginning is damaged, or of another version of llmint8; --force starts over"
                )
            buffered.detach()
            self._file.truncate(0)
            self._file.seek(0)
            return self._write(_line({"fingerprint": fingerprint or {}}))
        if fingerprint is not None:
            _compare(self.path.parent, begun, fingerprint)
        end = buffered.tell()
        while (entry := _parse(buffered)) is not None and _is_record(entry):
            record = self._record(entry, buffered.tell())
            following = buffered.tell() + sum(info.nbytes for info in record.tensors)
            if following > size:
                break
            self._records[entry["kind"], entry["name"]] = record
            self._unchecked.add((entry["kind"], entry["name"]))
            end = following
            buffered.seek(end)
        buffered.detach()
        if end < size:
            log.warning("%s: %d of %d bytes are cut short or damaged; that is done again", self.path, size - end, size)
        self._file.truncate(end)
        return end

    def _record(self, entry: dict[str, Any], offset: int) -> Record:
        infos = []
        for dtype, shape in entry["tensors"]:
            infos.append(TensorInfo(entry["name"], dtype, tuple(shape), self.path.name, offset))
            offset += infos[-1].nbytes
        return Record(entry["value"], tuple(infos), entry["sha256"])


def _open_locked(path: Path) -> io.FileIO:
    with named_errors(path):
        file = open_output(path)
    try:
        _lock(file, path)
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: io.FileIO, path: Path) -> None:
    import fcntl  # Windows has none, and no conversions

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log.warning("%s: no locks there (%s): begin no second conversion into it", path.parent, error.strerror)
            return
        if error.errno not in _TAKEN:
            raise OutputError(f"{path}: cannot be locked: {error.strerror}") from None
    else:
        # Whoever held the lock until now may have finished, and removed the file with it.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return
    raise OutputError(f"{path.parent}: another conversion is writing to it; wait for its end")


def _line(entry: dict[str, Any]) -> bytes:
    raw = json.dumps(entry, separators=(",", ":")).encode()
    return f"{hashlib.sha256(raw).hexdigest()} ".encode() + raw + b"\n"


def _parse(file: BinaryIO) -> dict[str, Any] | None:
    """Return the next line's object; None at the end, or where a line is cut short or damaged."""
    line = file.readline(_MAX_LINE_BYTES)
    digest, _, raw = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or digest != hashlib.sha256(raw).hexdigest().encode():
        return None
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_record(entry: dict[str, Any]) -> bool:
    if entry.keys() != {"kind", "name", "value", "tensors", "sha256"} or not isinstance(entry["tensors"], list):
        return False
    specs = [spec for spec in entry["tensors"] if isinstance(spec, list) and len(spec) == 2]
    whole = len(specs) == len(entry["tensors"]) and all(is_shape(shape) for _, shape in specs)
    words = [entry["kind"], entry["name"], entry["sha256"], *(dtype for dtype, _ in specs)]
    return whole and all(isinstance(word, str) for word in words) and all(dtype in DTYPES for dtype, _ in specs)


def _compare(out: Path, begun: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to go on with something else than what was begun."""
    changes = [
        f"{key} was {begun.get(key, 'not there')} and is {now.get(key, 'not there')}"
        for key in begun.keys() | now.keys()
        if begun.get(key) != now.get(key)
    ]
    if changes:
        raise OutputError(
            f"{out}: holds an unfinished conversion of something else: {'; '.join(sorted(changes))}. "
            "Repeat the command it was begun with, or start over with --force"
        )
