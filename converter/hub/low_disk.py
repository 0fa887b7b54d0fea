"""A repo on the Hub as a source of which no more than two shards are ever on the disk: `--low-disk`.

Names and shapes come from the headers of the shards, which small range requests fetch. A shard is downloaded when the
first of its tensors is read, into a folder in OUT, and deleted when all of its tensors have been released. A layer may
straddle two shards; before a third is downloaded, the one that has not been read for longest goes, and is fetched again
should it be needed after all. So is one that was deleted, when the pass shows a model something else: it stays until a
third is needed. Reads and downloads take turns, whatever threads they come from.

A download that is cut goes on where it stopped; one that was killed starts again with that shard, for huggingface_hub
keeps no half of a file. Whole shards that an earlier process has left are used.
"""

import dataclasses
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_download
from torch import Tensor

from llmint8.formats import CorruptFileError, Source, SourceError, TensorInfo, open_source
from llmint8.formats.containers.safetensors import read_header
from llmint8.formats.containers.tensors import read_tensor
from llmint8.formats.sources.weight_files import TensorFile

from .answers import patiently
from .origin import Resolved
from .remote import explained, has_file, read_remote_header

MOST_SHARDS = 2
_HEADERS_AT_A_TIME = 8


def open_remote(origin: Resolved, folder: Path) -> Source:
    """Open a repo whose weights have not been fetched. `folder` will hold them; it is made by the first read.

    PyTorch files can be planned with, and not be read.

    Raises:
        SourceError, CorruptFileError: as `open_source`; or the Hub does not give the headers.

    """
    shelf = _Shelf(origin, folder)
    source = open_source(origin.path, shelf)

    def release(name: str) -> None:
        for part in source.parts_of.get(name, [name]):
            shelf.release(part)

    return dataclasses.replace(source, release=release)


class HubFile:
    """A weight file on the Hub."""

    differences: Mapping[str, str] = {}

    def __init__(self, path: Path, size: int, tensors: dict[str, TensorInfo], shelf: "_Shelf") -> None:
        """Take where the file would be in a snapshot of the repo, and what its header says."""
        self.path, self.size, self.tensors, self._shelf = path, size, tensors, shelf
        self.stored = {path: size}
        self.in_blocks = path.suffix == ".safetensors"  # others are planned with, and read when they are on the disk
        self.announced = dict(tensors)  # the others may be split

    def read(self, name: str) -> Tensor:
        """Read one tensor, and download the file before if it is not on the disk."""
        return self._shelf.read(self.tensors[name])

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows. Other threads may have the file deleted in between: it is fetched anew."""
        return (self._shelf.read(block) for block in self.tensors[name].blocks())


class _Shelf:
    """The shards on the disk."""

    def __init__(self, origin: Resolved, folder: Path) -> None:
        self._origin, self._folder = origin, folder
        self._lock = threading.Lock()
        self._files: dict[str, HubFile] = {}
        self._waiting: dict[str, set[str]] = {}  # file -> its tensors that have not been released, once there was one
        self._present: list[str] | None = None  # files on the disk, the one read last at the end; None: not looked yet

    def has(self, name: str) -> bool:
        with explained(self._origin, name):
            return has_file(self._origin, name)

    def open(self, names: Sequence[str]) -> list[TensorFile]:
        """Fetch the headers of shards."""
        with ThreadPoolExecutor(_HEADERS_AT_A_TIME) as pool:
            for name, (size, tensors) in zip(names, pool.map(self._header, names), strict=True):
                self._files[name] = HubFile(self._origin.path / name, size, tensors, self)
        return list(self._files.values())

    def _header(self, name: str) -> tuple[int, dict[str, TensorInfo]]:
        return read_remote_header(self._origin, name)

    def read(self, info: TensorInfo) -> Tensor:
        with self._lock:
            self._put_up(info.file)
            return read_tensor(self._folder / info.file, info)

    def release(self, name: str) -> None:
        """Take note that a tensor has been converted."""
        with self._lock:
            if not self._waiting:
                self._waiting = {file: set(held.tensors) for file, held in self._files.items()}
            for file in [file for file, waiting in self._waiting.items() if name in waiting]:  # perhaps in two
                self._waiting[file].discard(name)
                self._tidy(file)

    def _put_up(self, name: str) -> None:
        if self._present is None:
            self._present = self._left_behind()
        if name in self._present:
            self._present.remove(name)
        else:
            while len(self._present) >= MOST_SHARDS:
                self._take_down(self._present[0])
            self._download(name)
        self._present.append(name)

    def _left_behind(self) -> list[str]:
        """Return the shards that an earlier process has left. Of one it was killed in nothing can be used."""
        shutil.rmtree(self._folder / ".cache", ignore_errors=True)
        for name, file in self._files.items():
            if not _is_whole(self._folder / name, file):
                (self._folder / name).unlink(missing_ok=True)
        return [name for name in self._files if (self._folder / name).exists()]

    def _download(self, name: str) -> None:
        repo = str(self._origin.repo)
        which = {"revision": self._origin.commit, "token": self._origin.token}
        with explained(self._origin, name):
            self._folder.mkdir(parents=True, exist_ok=True)
            patiently(lambda: hf_hub_download(repo, name, local_dir=self._folder, **which))
        if not _is_whole(self._folder / name, self._files[name]):
            raise SourceError(f"{repo}: {name}: what was downloaded is not what its header announced")

    def _tidy(self, name: str) -> None:
        if not self._waiting[name]:
            self._take_down(name)
        if not any(self._waiting.values()):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._present = []

    def _take_down(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
        if self._present and name in self._present:
            self._present.remove(name)


def _is_whole(path: Path, file: HubFile) -> bool:
    try:
        return path.stat().st_size == file.size and read_header(path) == file.announced
    except (CorruptFileError, OSError):
        return False
