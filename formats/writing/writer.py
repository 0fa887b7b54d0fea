"""Write an int8 checkpoint, one tensor at a time, in any order, from several threads.

`plan` lays the tensors out in shards; it may be called again for tensors whose sizes are known only later. Files carry
the suffix `.partial` until `commit` has flushed them all; then they get their names, and config.json comes last, so
that a directory that has a config.json is complete.

A journal keeps what is done. Until the commit has ended, a writer with the same fingerprint goes on where the last one
stopped, whatever stopped it: it takes back what a commit had begun, and trusts no tensor whose hash does not match.
Its plan may be another: tensors that are the same in both move to their new places.
"""

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..containers.tensors import TensorInfo, TensorSpec, read_blocks
from ..disk.durable import encode_json, named_errors
from ..disk.names import (
    CARD_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    WORKING_NAME,
    is_unfinished,
)
from ..disk.reading import open_regular
from ..errors import CorruptFileError, OutputError
from ..int8.layouts import BITSANDBYTES, Layout
from ..int8.manifest import Manifest, ManifestEntry, tensor_sha256
from ..int8.quantization import Quantization
from .commit import publish, take_back
from .journal import Journal
from .shards import Shards, partial_shards


class CheckpointWriter:
    """A checkpoint being written: a context manager that leaves a directory which is complete, unfinished or as it was.

    When it is left by an error it keeps what is done, for another writer to go on; when nothing is done yet, it removes
    what it wrote.
    """

    def __init__(
        self, out: Path, max_shard_bytes: int, fingerprint: dict[str, str] | None = None, start_over: bool = False
    ) -> None:
        """Create the directory `out` when it is not there, or go on in one that is unfinished.

        Args:
            out: the directory.
            max_shard_bytes: of tensors in a file.
            fingerprint: what must be the same for a writer to go on.
            start_over: remove what an unfinished conversion left, whatever its fingerprint, and begin anew.

        Raises:
            OutputError: it holds something else, another process writes to it, or the fingerprint is another.

        """
        self._out = out
        self._created = not out.exists()
        self._shards = Shards(out, max_shard_bytes)
        self._hashes: dict[str, str] = {}
        require_writable(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{out}: cannot be used as a directory: {error.strerror}") from None
        if start_over and is_unfinished(out):
            self.journal = Journal(out, None)
            self._remove()
            self.journal.close()
        self.journal = Journal(out, fingerprint or {})
        take_back(self._out, self.journal)

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Close the journal; see the class for what an error leaves. A note on the error says it too."""
        if error is not None and self.journal.empty:
            self._remove()
            if self._created and not any(self._out.iterdir()):
                self._out.rmdir()
        elif error is not None and is_unfinished(self._out):
            error.add_note(f"{self._out} keeps what is done so far; the same command goes on, --force starts over")
        self._shards.close()
        self.journal.close()

    def _remove(self) -> None:
        """Remove what was written, the journal last."""
        take_back(self._out, self.journal)
        with named_errors(self._out):
            shutil.rmtree(self._out / WORKING_NAME, ignore_errors=True)
            for path in partial_shards(self._out):
                path.unlink()
            self.journal.path.unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors planned so far."""
        return self._shards.nbytes

    def plan(self, groups: Iterable[Sequence[TensorSpec]]) -> None:
        """Give every tensor a place. The tensors of a group stay in one shard where the shard size allows it."""
        self._shards.plan(groups)
        for path, tensors in self._shards.earlier():
            for place in tensors.values():
                self._take_over(path, place)
            if tensors.keys() <= self._shards.places.keys():  # nothing in it is of use any more
                with named_errors(path):
                    path.unlink()

    def _take_over(self, path: Path, earlier: TensorInfo) -> None:
        """Copy what an earlier run has written to the place that the tensor has now, where it is the same."""
        record, place = self.journal.get("tensor", earlier.name), self._shards.places.get(earlier.name)
        if record is None or place is None or (place.dtype, place.shape) != (earlier.dtype, earlier.shape):
            return
        with contextlib.suppress(CorruptFileError), open_regular(path) as file:
            if not self.has(earlier.name):
                copied = self._shards.write(earlier.name, read_blocks(file, path, earlier))
                if copied == record.value:
                    self._hashes[earlier.name] = copied

    def has(self, *names: str) -> bool:
        """Tell whether these tensors are in their places, whole; those of an earlier run are read and compared."""
        return all(name in self._hashes or self._is_whole(name) for name in names)

    def _is_whole(self, name: str) -> bool:
        record = self.journal.get("tensor", name)
        if record is None:
            return False
        try:
            found = tensor_sha256(self.read(name))
        except CorruptFileError:
            return False
        if found == record.value:
            self._hashes[name] = found
        return bool(found == record.value)

    def read(self, name: str) -> Tensor:
        """Read a tensor that has been written."""
        return self._shards.read(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a planned tensor into its place. Any device, any strides; dtype and shape as planned."""
        shape = self._shards.places[name].shape
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, planned was {list(shape)}")
        self.write_rows(name, [tensor])

    def write_rows(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Put a planned tensor into its place: blocks of its rows, one after the other, that make up its shape."""
        self._hashes[name] = self._shards.write(name, blocks)
        self.journal.put("tensor", name, self._hashes[name])

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
        finals, files = self._finals(quantization.layout, small_files)
        entries = {
            name: ManifestEntry(finals[place.file], place.dtype, place.shape, self._hashes[name])
            for name, place in self._shards.places.items()
        }
        stored_config = encode_json({**config, "quantization_config": quantization.to_dict()})
        # The card is for its readers to edit.
        hashed = {name: data for name, data in files.items() if name != CARD_NAME} | {CONFIG_NAME: stored_config}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in hashed.items()}
        manifest = Manifest(quantization.format_version, quantization.producer, source, entries, modules, hashes)
        files[MANIFEST_NAME] = encode_json(manifest.to_dict())
        publish(self._out, self.journal, finals, files, stored_config)
        return manifest

    def commit_other(self, config: dict[str, Any], small_files: dict[str, bytes]) -> None:
        """Flush everything and give it its final name, as `commit` does, for a checkpoint that is not one of ours.

        What has been written is read again, and compared with what was to be written.

        Args:
            config: config.json.
            small_files: relative name -> content of tokenizer, licence and the like.

        Raises:
            OutputError: the disk gives back something else.

        """
        finals, files = self._finals(BITSANDBYTES, small_files)
        for name, expected in self._hashes.items():
            if tensor_sha256(self.read(name)) != expected:
                raise OutputError(f"{self._out / self._shards.places[name].file}: {name}: not what was written to it")
        publish(self._out, self.journal, finals, files, encode_json(config))

    def _finals(self, layout: Layout, small_files: dict[str, bytes]) -> tuple[dict[str, str], dict[str, bytes]]:
        """Flush the shards; return the name of each -> its final name, and all small files, the index among them."""
        if missing := self._shards.places.keys() - self._hashes.keys():
            raise ValueError(f"{len(missing)} planned tensors were never written, {min(missing)} among them")
        self._shards.flush()
        finals, files = self._shards.final_names(layout), dict(small_files)
        if len(finals) > 1:
            weight_map = {name: finals[place.file] for name, place in sorted(self._shards.places.items())}
            files[layout.index] = encode_json({"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})
        return finals, files


def require_writable(out: Path) -> None:
    """Refuse what no conversion can be written to. Raises OutputError.

    That is a directory that holds something else than an unfinished conversion, or one with links in it, which would
    lead elsewhere what is written; and any on Windows, where directories can be neither locked nor flushed.
    """
    if sys.platform == "win32":
        raise OutputError(f"{out}: conversions are written on Linux and macOS; on Windows convert in WSL")
    if not out.exists():
        return
    if not is_unfinished(out) and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is not an empty directory; name a new one or remove what is in it")
    for path in out.iterdir():
        if path.is_symlink():
            raise OutputError(f"{path}: is a link, and an unfinished conversion has none; remove it")
