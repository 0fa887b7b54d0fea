"""A checkpoint of metaseq as one file of tensors."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...containers.tensors import DTYPES, TensorInfo, as_bytes
from ...disk.lending import OpenFiles
from ...disk.reading import open_regular
from ...errors import SourceError
from .merged import Merged, merge
from .names import FileNames
from .parts import Part, PartReader, read_part


class MetaseqModel:
    """All files of a checkpoint as one: what is read of it is put together from all of them.

    Attributes:
        path: a name for all files, in their directory.
        stored: the files, and the size of each.
        tensors: under the names of transformers; `offset` counts in the order of these, and is no place in a file.
        facts: what a config in the files says about the model; see `parts.FACTS`.
        differences: name of a tensor -> the notice that model-parallel parts hold different ones, once it was read.

    """

    in_blocks = True

    def __init__(self, directory: Path, names: FileNames) -> None:
        """Read what all files say about the tensors, and none of these.

        Raises:
            SourceError, CorruptFileError: a broken file, files that are no checkpoint of OPT, or not of the same one.

        """
        self.path, self._opened = directory / names.pattern, OpenFiles(open_regular)
        reader = PartReader()
        parts = [read_part(directory, shards, reader) for shards in names.parts]
        _check_updates(names, parts)
        self.stored = {path: size for part in parts for path, size in part.sizes.items()}
        self.facts: dict[str, Any] = parts[0].facts
        self._merged = merge(self.path, [part.pieces for part in parts])
        self.tensors: dict[str, TensorInfo] = {}
        end = 0
        for name, merged in self._merged.items():
            self.tensors[name] = TensorInfo(name, merged.dtype, merged.shape, self.path.name, end)
            end += self.tensors[name].nbytes
        self.differences: dict[str, str] = {}
        self._largest: dict[str, float] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._checked(name, self._merged[name])

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        info, merged = self.tensors[name], self._merged[name]
        count, step = info.shape[0], info.rows_per_block
        return (self._checked(name, merged.rows(start, min(count, start + step))) for start in range(0, count, step))

    def _checked(self, name: str, merged: Merged) -> Tensor:
        """Read a tensor, or rows of it, and hold copies against it."""
        tensor = self._read(name, merged)
        for number, copy in enumerate(merged.copies, 1):
            other = self._read(name, copy)
            if as_bytes(other) != as_bytes(tensor):
                self._differ(name, merged, number, float((other.double() - tensor.double()).abs().max()))
        return tensor

    def _read(self, name: str, merged: Merged) -> Tensor:
        tensor = torch.empty(merged.shape, dtype=DTYPES[merged.dtype])
        begin = 0
        for piece in merged.pieces:
            end = begin + piece.shape[merged.dim]
            if merged.dim:
                part = torch.empty(piece.shape, dtype=tensor.dtype)
                piece.read(self._opened, name, as_bytes(part))
                tensor[:, begin:end] = part
            else:
                piece.read(self._opened, name, as_bytes(tensor[begin:end]))
            begin = end
        return tensor

    def _differ(self, name: str, merged: Merged, number: int, by: float) -> None:
        if merged.tied:
            raise SourceError(
                f"{self.path}: decoder.output_projection.weight differs from {name} by up to {by:.3g}; OPT has one "
                "tensor for both"
            )
        with self._lock:
            self._largest[name] = max(by, self._largest.get(name, 0.0))
            self.differences[name] = (
                f"{name}: model part {number} holds another than part 0, which was taken; by up to "
                f"{self._largest[name]:.3g}"
            )


def _check_updates(names: FileNames, parts: Sequence[Part]) -> None:
    for shards, part in zip(names.parts, parts, strict=True):
        if part.updates != parts[0].updates:
            raise SourceError(
                f"{next(iter(part.sizes))}: after {part.updates} updates, {names.parts[0][0]} after "
                f"{parts[0].updates}: {shards[0]} is of another run"
            )
