"""Pieces of tensors: bytes that follow one another, wherever they lie."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from ...containers.tensors import DTYPES, read_into
from ...disk.lending import OpenFiles


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Elements in row-major order, one after the other in the extents."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((extent.nbytes for extent in self.extents), initial=0))

    def part(self, start: int, shape: tuple[int, ...]) -> "Piece":
        """Return what begins `start` elements behind the beginning, and has a shape of its own."""
        found = replace(self, shape=shape, extents=())
        first = start * DTYPES[self.dtype].itemsize
        last = first + found.nbytes
        extents = []
        for extent, begin in zip(self.extents, self._starts, strict=False):
            low, high = max(first, begin), min(last, begin + extent.nbytes)
            if low < high:
                extents.append(Extent(extent.path, extent.offset + low - begin, high - low))
        return replace(found, extents=tuple(extents))

    def rows(self, start: int, stop: int) -> "Piece":
        """Return some of the rows of a piece that has dimensions."""
        rest = self.shape[1:]
        return self.part(start * math.prod(rest), (stop - start, *rest))

    def read(self, opened: OpenFiles, name: str, view: memoryview) -> None:
        """Read the elements into `view`, of as many bytes; `name` is for errors. Raises CorruptFileError."""
        done = 0
        for extent in self.extents:
            with opened.lend(extent.path) as file:
                read_into(file, extent.path, name, extent.offset, view[done : done + extent.nbytes])
            done += extent.nbytes


def joined(dtype: str, extents: Iterable[Extent]) -> Piece:
    """Return extents one after the other as one row of elements."""
    extents = tuple(extent for extent in extents if extent.nbytes)
    count = sum(extent.nbytes for extent in extents) // DTYPES[dtype].itemsize
    return Piece(dtype, (count,), extents)
