"""The shards of a checkpoint being written: each gets its header at once, and is filled as its tensors come.

A file with another layout, of an earlier run with other options, makes way: what it holds can be taken from there.
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..containers.safetensors import encode_header, read_header
from ..containers.tensors import DTYPE_NAMES, DTYPES, TensorInfo, TensorSpec, as_bytes, read_from
from ..disk.durable import begin_writeback, named_errors, open_output, write_all
from ..disk.lending import OpenFiles
from ..errors import CorruptFileError
from ..int8.layouts import Layout

_NAME = "model-{:05d}.safetensors.partial"
_EARLIER_NAME = "earlier-{:05d}.safetensors.partial"
_PATTERN = re.compile(r"(model|earlier)-\d{5,}\.safetensors\.partial")


@dataclass
class _Shard:
    path: Path
    nbytes: int


class Shards:
    """The files of a directory that hold, or will hold, the tensors planned so far."""

    def __init__(self, out: Path, max_bytes: int) -> None:
        """Take the directory, and how many bytes of tensors a file may hold."""
        self._out, self._max_bytes = out, max_bytes
        self._shards: list[_Shard] = []
        self._files = OpenFiles(open_output)
        self.places: dict[str, TensorInfo] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors planned so far."""
        return sum(shard.nbytes for shard in self._shards)

    def plan(self, groups: Iterable[Sequence[TensorSpec]]) -> None:
        """Give every tensor a place. The tensors of a group stay in one shard where the shard size allows it."""
        shard: list[TensorSpec] = []
        size = 0
        for group in groups:
            whole = sum(spec.nbytes for spec in group)
            parts = [group] if whole <= self._max_bytes else [[spec] for spec in group]
            for part in parts:
                part_size = sum(spec.nbytes for spec in part)
                if shard and size + part_size > self._max_bytes:
                    self._create(shard)
                    shard, size = [], 0
                shard.extend(part)
                size += part_size
        if shard:
            self._create(shard)

    def _create(self, specs: list[TensorSpec]) -> None:
        # Wide dtypes first: every tensor is then aligned to its own item size, which memory mapping needs.
        specs = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
        header, offsets = encode_header(specs)
        shard = _Shard(self._out / _NAME.format(len(self._shards) + 1), sum(spec.nbytes for spec in specs))
        self._shards.append(shard)
        for spec, offset in zip(specs, offsets, strict=True):
            if spec.name in self.places:
                raise ValueError(f"{spec.name} is planned twice")
            self.places[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, shard.path.name, offset)
        with named_errors(shard.path):
            self._make_way(shard.path, {spec.name: self.places[spec.name] for spec in specs})
        # A file that is there already keeps its data: what of it is whole, the journal knows.
        with named_errors(shard.path), self._files.lend(shard.path) as file:
            file.seek(0)
            write_all(file, header)
            file.truncate(len(header) + shard.nbytes)

    def _make_way(self, path: Path, places: dict[str, TensorInfo]) -> None:
        with contextlib.suppress(CorruptFileError):  # there is none, or its header is damaged and written anew
            if read_header(path) != places:
                names = (self._out / _EARLIER_NAME.format(number) for number in itertools.count(1))
                path.replace(next(name for name in names if not name.exists()))

    def read(self, name: str) -> Tensor:
        """Read a tensor from its place, whatever is there. Raises CorruptFileError where the file ends too early."""
        place = self.places[name]
        path = self._out / place.file
        with named_errors(path), self._files.lend(path) as file:
            return read_from(file, path, place)

    def write(self, name: str, blocks: Iterable[Tensor]) -> str:
        """Put a tensor into its place: blocks of its rows, one after the other. Return the SHA-256 of its data.

        Raises:
            OutputError: it cannot be written.
            ValueError: the blocks are not of the dtype and shape that were planned.

        """
        place = self.places[name]
        path = self._out / place.file
        digest, rest = hashlib.sha256(), place.nbytes
        with named_errors(path), self._files.lend(path) as file:
            file.seek(place.offset)
            for block in blocks:
                data = as_bytes(block.detach().cpu().contiguous())
                rest -= len(data)
                if DTYPE_NAMES[block.dtype] != place.dtype or block.shape[1:] != place.shape[1:] or rest < 0:
                    raise ValueError(f"{name}: rows {block.dtype} {list(block.shape)}, planned was {place}")
                digest.update(data)
                write_all(file, data)
            begin_writeback(file, place.offset, place.nbytes)
        if rest:
            raise ValueError(f"{name}: {rest} bytes less than planned in {place}")
        return digest.hexdigest()

    def earlier(self) -> Iterator[tuple[Path, dict[str, TensorInfo]]]:
        """Yield the shards in the directory that are not in the plan, and the places of what they hold."""
        for path in sorted({*partial_shards(self._out)} - {shard.path for shard in self._shards}):
            with contextlib.suppress(CorruptFileError):
                yield path, read_header(path)

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def flush(self) -> None:
        """Flush all files to the disk. Raises OutputError."""
        for shard in self._shards:
            with named_errors(shard.path), self._files.lend(shard.path) as file:
                os.fsync(file.fileno())

    def final_names(self, layout: Layout) -> dict[str, str]:
        """Return the name of each file now -> in the finished checkpoint."""
        names = layout.shard_names(len(self._shards))
        return dict(zip((shard.path.name for shard in self._shards), names, strict=True))


def partial_shards(out: Path) -> Iterator[Path]:
    """Yield the shards in a directory that have not got their final names, whoever wrote them."""
    return (path for path in out.iterdir() if _PATTERN.fullmatch(path.name))
