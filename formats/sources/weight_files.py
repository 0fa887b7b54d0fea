"""The weight files of a source: where they are, and each opened without reading a tensor."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..containers.index import read_weight_map
from ..containers.pytorch.file import TorchFile
from ..containers.safetensors import read_header
from ..containers.tensors import TensorInfo, read_tensor
from ..disk.names import SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME, TORCH_INDEX_NAME, TORCH_NAME
from ..disk.reading import require_inside
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
        self._path = path

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return (self._path / name).exists()

    def open(self, names: Sequence[str]) -> list[TensorFile]:
        """Open files without reading a tensor. Raises SourceError and CorruptFileError."""
        return [_open_file(self._path, name) for name in names]


class SafetensorsFile:
    """A safetensors file; only its header is held."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises CorruptFileError."""
        self.path = path
        self.tensors = read_header(path)
        self.size = path.stat().st_size

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(self.path, self.tensors[name])

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        return (read_tensor(self.path, block) for block in self.tensors[name].blocks())


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


def _open_file(path: Path, name: str) -> TensorFile:
    if not (path / name).exists():
        raise SourceError(f"{path / name}: missing, but the index names it; is the download complete?")
    require_inside(path / name, path)
    return TorchFile(path / name) if name.endswith(".bin") else SafetensorsFile(path / name)
