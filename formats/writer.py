"""Write an int8 checkpoint, one tensor at a time, in any order.

`plan` lays the tensors out in shards: each file gets its header at once and is filled as the tensors come. It may
be called again for tensors whose sizes are known only later. Files carry the suffix `.partial` until `commit` has
flushed them all; then they get their names, and config.json comes last, so that a directory that has a config.json
is complete.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .errors import OutputError
from .files import (
    CONFIG_NAME,
    MANIFEST_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    encode_json,
    sync_directory,
    write_durably,
)
from .manifest import Manifest, ManifestEntry, tensor_sha256
from .quantization import Quantization
from .tensors import DTYPE_NAMES, DTYPES, TensorSpec, as_bytes, encode_header


@dataclass
class _Shard:
    path: Path
    file: BinaryIO
    nbytes: int


@dataclass(frozen=True)
class _Place:
    spec: TensorSpec
    shard: _Shard
    offset: int


class CheckpointWriter:
    """A checkpoint being written. As a context manager it removes what it wrote when it is left by an error."""

    def __init__(self, out: Path, max_shard_bytes: int) -> None:
        """Create the directory `out` when it is not there. Raises OutputError when it is not empty."""
        self._out = out
        self._max_shard_bytes = max_shard_bytes
        self._created = not out.exists()
        self._shards: list[_Shard] = []
        self._places: dict[str, _Place] = {}
        self._hashes: dict[str, str] = {}
        self._small_files: list[Path] = []
        try:
            out.mkdir(parents=True, exist_ok=True)
            if any(entry.name != "source.partial" for entry in out.iterdir()):
                raise OutputError(f"{out}: is not empty; name a new directory or remove what is in it")
        except OSError as error:
            raise OutputError(f"{out}: cannot be used as a directory: {error.strerror}") from None

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the files; after an error, also remove them."""
        for shard in self._shards:
            shard.file.close()
        if kind is None:
            return
        for path in [shard.path for shard in self._shards] + self._small_files:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".partial").unlink(missing_ok=True)
            if path.parent != self._out and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        if self._created and not any(self._out.iterdir()):
            self._out.rmdir()

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
            parts = [group] if whole <= self._max_shard_bytes else [[spec] for spec in group]
            for part in parts:
                part_size = sum(spec.nbytes for spec in part)
                if shard and size + part_size > self._max_shard_bytes:
                    self._create_shard(shard)
                    shard, size = [], 0
                shard.extend(part)
                size += part_size
        if shard:
            self._create_shard(shard)

    def _create_shard(self, specs: list[TensorSpec]) -> None:
        # Wide dtypes first: every tensor is then aligned to its own item size, which memory mapping needs.
        specs = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
        header, offsets = encode_header(specs)
        path = self._out / f"model-{len(self._shards) + 1:05d}.safetensors.partial"
        with _named_errors(path):
            shard = _Shard(path, path.open("xb", buffering=0), sum(spec.nbytes for spec in specs))
            self._shards.append(shard)
            _write_all(shard.file, memoryview(header))
            shard.file.truncate(len(header) + shard.nbytes)
        for spec, offset in zip(specs, offsets, strict=True):
            if spec.name in self._places:
                raise ValueError(f"{spec.name} is planned twice")
            self._places[spec.name] = _Place(spec, shard, offset)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a planned tensor into its place. Any device, any strides; dtype and shape as planned."""
        place = self._places[name]
        if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (place.spec.dtype, place.spec.shape):
            raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, planned was {place.spec}")
        tensor = tensor.detach().cpu().contiguous()
        self._hashes[name] = tensor_sha256(tensor)
        with _named_errors(place.shard.path):
            place.shard.file.seek(place.offset)
            _write_all(place.shard.file, as_bytes(tensor))

    def commit(
        self,
        config: dict[str, Any],
        quantization: Quantization,
        source: dict[str, Any],
        modules: dict[str, dict[str, Any]],
        small_files: dict[str, bytes],
    ) -> Manifest:
        """Flush everything and give it its final name: shards, small files, manifest, index and last config.json.

        Args:
            config: the source's config.json.
            quantization: becomes its `quantization_config`.
            source: what was converted, for the manifest.
            modules: statistics per quantized layer, for the manifest.
            small_files: relative name -> content of tokenizer, licence and the like.

        """
        if missing := self._places.keys() - self._hashes.keys():
            raise ValueError(f"{len(missing)} planned tensors were never written, {min(missing)} among them")
        for shard in self._shards:
            with _named_errors(shard.path):
                os.fsync(shard.file.fileno())
        count = len(self._shards)
        for number, shard in enumerate(self._shards, start=1):
            name = SAFETENSORS_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            with _named_errors(shard.path):
                shard.path = shard.path.replace(self._out / name)
        for name, data in small_files.items():
            self._write_small(name, data)
        entries = {
            name: ManifestEntry(place.shard.path.name, place.spec.dtype, place.spec.shape, self._hashes[name])
            for name, place in self._places.items()
        }
        manifest = Manifest(quantization.producer, source, entries, modules)
        self._write_small(MANIFEST_NAME, encode_json(manifest.to_dict()))
        if count > 1:
            index = {
                "metadata": {"total_size": self.nbytes},
                "weight_map": {name: entry.file for name, entry in sorted(entries.items())},
            }
            self._write_small(SAFETENSORS_INDEX_NAME, encode_json(index))
        with _named_errors(self._out):
            sync_directory(self._out)
        config = {**config, "quantization_config": quantization.to_dict()}
        self._write_small(CONFIG_NAME, encode_json(config))
        with _named_errors(self._out):
            sync_directory(self._out)
        return manifest

    def _write_small(self, name: str, data: bytes) -> None:
        path = self._out / name
        self._small_files.append(path)
        with _named_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_durably(path, data)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
