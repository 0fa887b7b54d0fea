"""The weight files of a source: where they are, and each opened without reading a tensor."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..containers.index import read_weight_map
from ..containers.pytorch.file import TorchFile
from ..containers.safetensors import read_header
from ..containers.tensors import TensorInfo, read_blocks, read_from
from ..disk.lending import OpenFiles
from ..disk.names import (
    CONFIG_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    TORCH_INDEX_NAME,
    TORCH_NAME,
    WEIGHT_NAMES,
)
from ..disk.reading import open_regular, require_inside
from ..errors import SourceError

_SUFFIX = {SAFETENSORS_INDEX_NAME: ".safetensors", TORCH_INDEX_NAME: ".bin"}


class TensorFile(Protocol):
    """One weight file; or several, of which all hold parts of tensors.

    Attributes:
        path: the file, or a name for all of them.
        stored: the files on the disk, and the bytes of each.
        tensors: what can be read.
        in_blocks: whether `read_rows` never holds more than a block.

    """

    path: Path
    stored: dict[Path, int]
    tensors: dict[str, TensorInfo]
    in_blocks: bool

    @property
    def differences(self) -> Mapping[str, str]:
        """Name of a tensor that is there more than once -> how what has been read of it differs."""
        ...

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

    in_blocks = True
    differences: Mapping[str, str] = {}

    def __init__(self, path: Path, opened: OpenFiles) -> None:
        """Read the header; `opened` lends the file for all that follows. Raises CorruptFileError."""
        self.path, self._opened = path, opened
        self.tensors = read_header(path)
        self.stored = {path: path.stat().st_size}

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with self._opened.lend(self.path) as file:
            return read_from(file, self.path, self.tensors[name])

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        with self._opened.lend(self.path) as file:
            yield from read_blocks(file, self.path, self.tensors[name])


@dataclass(frozen=True)
class WeightFiles:
    """The weight files to read: their names; of shards the index, and what it says; and what lies beside them."""

    names: list[str]
    index: str
    weight_map: dict[str, str]
    left_aside: list[str]


def weight_files(path: Path, has: Callable[[str], bool], named: object = None) -> WeightFiles:
    """Return the weight files that transformers takes: one file before shards, and safetensors before others.

    Args:
        path: the directory, with the index where there is one.
        has: tells whether there is a weight file of a name.
        named: `transformers_weights` of config.json, which names the file or the index to take.

    Raises:
        SourceError: there are none.
        CorruptFileError: a broken index.

    """
    taken = next((name for name in WEIGHT_NAMES if ((path / name).exists() if name in _SUFFIX else has(name))), None)
    if named is not None:
        if not isinstance(named, str) or not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", named):
            raise SourceError(
                f"{path / CONFIG_NAME}: transformers_weights is {str(named)[:80]!r}, expected a file beside it"
            )
        taken = named
    if taken is None:
        raise SourceError(f"{path}: no weights; expected {SAFETENSORS_NAME} or {TORCH_NAME}, or an index of shards")
    # Of a repo nobody asks for more.
    aside = [name for name in WEIGHT_NAMES if name != taken and (path / name).exists()]
    if not taken.endswith(".json"):
        return WeightFiles([taken], "", {}, aside)
    weight_map = read_weight_map(path / taken, _SUFFIX.get(taken, ".safetensors"))
    return WeightFiles(sorted(set(weight_map.values())), taken, weight_map, aside)


def _open_file(path: Path, name: str, opened: OpenFiles) -> TensorFile:
    if not (path / name).exists():
        raise SourceError(f"{path / name}: missing, but the index names it; is the download complete?")
    require_inside(path / name, path)
    return (TorchFile if name.endswith(".bin") else SafetensorsFile)(path / name, opened)
