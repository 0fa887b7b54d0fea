"""A 16-bit checkpoint as somebody else wrote it: names, shapes and lazily read tensors.

Understood are the layouts of the Hugging Face Hub: `model.safetensors` or `pytorch_model.bin`, whole or in shards
with an index. Every other layout (metaseq, GGUF, ...) becomes a `Source` here too, with tensor names as in
transformers; nothing outside this folder asks what the files were.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..containers.tensors import TensorInfo
from ..disk.names import CONFIG_NAME, LEGACY_QUANTIZATION_NAME
from ..disk.reading import read_json
from ..disk.small_files import small_files
from ..errors import SourceError
from .weight_files import LocalFolder, TensorFile, WeightFolder, weight_files


def _keep(name: str) -> None:
    pass


@dataclass(frozen=True)
class Source:
    """A source checkpoint, opened and checked; no tensor has been read yet.

    `release` takes the name of a tensor that has been converted. Where weights are fetched as they are needed, files of
    which all tensors have been released are deleted.
    """

    path: Path
    config: dict[str, Any]
    files: list[TensorFile]
    tensors: dict[str, TensorInfo]
    small_files: list[Path]
    release: Callable[[str], None] = _keep

    def read(self, name: str) -> Tensor:
        """Return one tensor, contiguous on the CPU."""
        return self._file_of[self.tensors[name].file].read(name)

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor in blocks of its rows, contiguous on the CPU."""
        return self._file_of[self.tensors[name].file].read_rows(name)

    @cached_property
    def _file_of(self) -> dict[str, TensorFile]:
        return {file.path.name: file for file in self.files}


def open_source(path: Path, folder: WeightFolder | None = None) -> Source:
    """Open a checkpoint directory.

    Args:
        path: the directory.
        folder: where its weight files are; in the directory by default.

    Raises:
        SourceError: no such directory, no weights, a missing shard, an already quantized model.
        CorruptFileError: a broken file, an index that names files outside of the directory.

    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory")
    config = _read_config(path)
    folder = folder or LocalFolder(path)
    names, index, weight_map = weight_files(path, folder.has)
    files = folder.open(names)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in tensors:
                raise SourceError(f"{file.path}: {name} is also in {tensors[name].file}; remove one of the two")
            tensors[name] = info
    for name, holder in weight_map.items():
        if name not in tensors or tensors[name].file != holder:
            raise SourceError(f"{path / holder}: {name} is missing, but {index} says that it is here")
    return Source(path, config, files, tensors, small_files(path))


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).exists():
        raise SourceError(f"{path / CONFIG_NAME}: missing; a checkpoint directory in Hugging Face layout has one")
    config = read_json(path / CONFIG_NAME)
    quantization = config.get("quantization_config")
    if quantization is None and (path / LEGACY_QUANTIZATION_NAME).exists():
        quantization = read_json(path / LEGACY_QUANTIZATION_NAME)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise SourceError(
            f"{path / CONFIG_NAME}: this model is already quantized ({method or 'quantization_config is set'}); "
            "convert the original 16-bit checkpoint instead"
        )
    return config
