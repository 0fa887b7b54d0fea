"""The weight files of a source: where they are, and each opened without reading a tensor."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..containers.index import read_weight_map
from ..containers.pytorch.file import TorchFile
from ..containers.safetensors import read_header
from ..containers.tensors import TensorInfo, read_blocks, read_from
from ..disk.lending import OpenFiles
from ..disk.names import SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME, TORCH_INDEX_NAME, TORCH_NAME
from ..disk.reading import open_regular, require_inside
from ..errors import SourceError


class TensorFile(Protocol):
    """One weight file, of `size` bytes."""

    path: Path
    size: int
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Return the tensor, contiguous on the CPU, in memory that the caller may keep or drop."""
        ...

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor in blocks of its rows, each as `read` returns it; a scalar as it is."""
        ...


class WeightFolder(Protocol):
    """Where the weight files of a source are: on the disk, or elsewhere."""

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        ...

    def open(self, names: Sequence[str]) -> list[TensorFile]:
        """Open files without reading a tensor. Raises SourceError and CorruptFileError."""
        ...


class LocalFolder:
    """A directory with its weights."""

    def __init__(self, path: Path) -> None:
        """Take the directory."""
        self._path, self._opened = path, OpenFiles(open_regular)

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return (self._path / name).exists()

    def open(self, names: Sequence[str]) -> list[TensorFile]:
        """Open files without reading a tensor. Raises SourceError and CorruptFileError."""
        return [_open_file(self._path, name, self._opened) for name in names]


class SafetensorsFile:
    """A safetensors file; only its header is held."""

    def __init__(self, path: Path, opened: OpenFiles) -> None:
        """Read the header; `opened` lends the file for all that follows. Raises CorruptFileError."""
        self.path, self._opened = path, opened
        self.tensors = read_header(path)
        self.size = path.stat().st_size

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with self._opened.lend(self.path) as file:
            return read_from(file, self.path, self.tensors[name])

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        with self._opened.lend(self.path) as file:
            yield from read_blocks(file, self.path, self.tensors[name])


def weight_files(path: Path, has: Callable[[str], bool]) -> tuple[list[str], str, dict[str, str]]:
    """Return the weight files, their index's name and what it says; an index comes first, and safetensors do.

    Args:
        path: the directory, with the index where there is one.
        has: tells whether there is a weight file of a name.

    Raises:
        SourceError: there are none.
        CorruptFileError: a broken index.

    """
    for index, single, suffix in (
        (SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME, ".safetensors"),
        (TORCH_INDEX_NAME, TORCH_NAME, ".bin"),
    ):
        if (path / index).exists():
            weight_map = read_weight_map(path / index, suffix)
            return sorted(set(weight_map.values())), index, weight_map
        if has(single):
            return [single], index, {}
    raise SourceError(f"{path}: no weights; expected {SAFETENSORS_NAME} or {TORCH_NAME}, or an index of shards")


def _open_file(path: Path, name: str, opened: OpenFiles) -> TensorFile:
    if not (path / name).exists():
        raise SourceError(f"{path / name}: missing, but the index names it; is the download complete?")
    require_inside(path / name, path)
    return (TorchFile if name.endswith(".bin") else SafetensorsFile)(path / name, opened)
