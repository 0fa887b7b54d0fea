"""Weight files of a repo on the Hub whose headers are read where they are, by small range requests."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from llmint8.formats import SourceError, TensorInfo
from llmint8.formats.containers.pytorch.file import parse_torch_header
from llmint8.formats.containers.safetensors import parse_header

from .answers import explain, patiently
from .origin import Resolved, Token

# Nearly every header is smaller, and a second request takes longer than these bytes.
_FIRST_REQUEST = 1 << 17
_TIMEOUT_SECONDS = 30.0


def has_file(origin: Resolved, name: str) -> bool:
    """Tell whether a repo has a file. Without a network the cache has the answer, if there are any weights in it."""
    if (origin.path / name).exists():
        return True
    url = hf_hub_url(str(origin.repo), name, revision=origin.commit)
    try:
        patiently(lambda: get_hf_file_metadata(url, token=origin.token))
    except EntryNotFoundError:
        return False
    except (HTTPError, OSError):
        if any(path.suffix in (".safetensors", ".bin") for path in origin.path.iterdir()):
            return False
        raise
    return True


def read_remote_header(origin: Resolved, name: str) -> tuple[int, dict[str, TensorInfo]]:
    """Return a weight file's size and its tensors. Raises SourceError, CorruptFileError."""
    file, path = _RemoteFile(origin, name), origin.path / name
    parse = parse_torch_header if name.endswith(".bin") else parse_header
    return file.size, parse(path, file, file.size)


@contextmanager
def explained(origin: Resolved, name: str) -> Iterator[None]:
    """Turn what goes wrong with a file of the repo into a SourceError that names it."""
    where = f"{origin.repo}: {name}"
    try:
        yield
    except (HTTPError, EntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise SourceError(f"{where}: the repo has no such file at commit {origin.commit}") from None
        raise SourceError(f"{where}: {explain(error, token=origin.token)}") from None


class _RemoteFile(io.RawIOBase):
    """A file on the Hub. Its beginning comes with the first request; every other read is one. Raises SourceError."""

    def __init__(self, origin: Resolved, name: str) -> None:
        self._origin, self._name, self._position = origin, name, 0
        self._beginning, self.size = self._request(0, _FIRST_REQUEST)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if self._position < 0:
            raise OSError("a place before the beginning of the file")
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self.size)
        data = self._beginning[start:end]
        if start + len(data) < end:
            data += self._request(start + len(data), end)[0]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _request(self, start: int, end: int) -> tuple[bytes, int]:
        origin = self._origin
        with explained(origin, self._name):
            url = hf_hub_url(str(origin.repo), self._name, revision=origin.commit)
            return _bytes_of(url, start, end, origin.token)


def _bytes_of(url: str, start: int, end: int, token: Token) -> tuple[bytes, int]:
    """Return bytes `start` to `end` of a file, or to its end where that comes first, and the size of the file."""

    def request() -> tuple[bytes, int]:
        headers = build_hf_headers(token=token) | {"Range": f"bytes={start}-{end - 1}"}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
            hf_raise_for_status(response)
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code != 206 or not size.isdigit():
                raise OSError("the server gives no parts of files, so nothing can be planned before `hf download`")
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > end - start:
                    raise OSError(f"the server gives more than the {end - start} bytes it was asked for")
        return bytes(data), int(size)

    return patiently(request)
