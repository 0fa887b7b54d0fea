"""A 16-bit checkpoint as somebody else wrote it: names, shapes and lazily read tensors.

Understood are the layouts of the Hugging Face Hub: `model.safetensors` or `pytorch_model.bin`, whole or in shards
with an index. Every other layout (metaseq, GGUF, ...) becomes a `Source` here too, with tensor names as in
transformers; nothing outside this module asks what the files were.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .errors import SourceError
from .files import (
    CONFIG_NAME,
    LEGACY_QUANTIZATION_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    read_json,
    read_weight_map,
    require_inside,
)
from .tensors import TensorInfo, read_header, read_tensor
from .torch_file import TorchFile

TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
WEIGHT_SUFFIXES = tuple(
    ".partial .safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .ggml .onnx .ot .npz .tflite .pkl .pdparams".split()  # noqa: SIM905
)
MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES_BYTES = 512 << 20  # together; they are in memory together


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
        return self._file(name).read(name)

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor in blocks of its rows, contiguous on the CPU."""
        return self._file(name).read_rows(name)

    def _file(self, name: str) -> TensorFile:
        info = self.tensors[name]
        return next(file for file in self.files if file.path.name == info.file)


def open_source(path: Path, open_remote: Callable[[Path], TensorFile] | None = None) -> Source:
    """Open a checkpoint directory.

    Args:
        path: the directory.
        open_remote: for a directory without its weights, safetensors files: opens one that would be at a path.

    Raises:
        SourceError: no such directory, no weights, a missing shard, an already quantized model.
        CorruptFileError: a broken file, an index that names files outside of the directory.

    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory")
    config = _read_config(path)
    names, index, weight_map = _weight_files(path, open_remote is not None)
    files = [open_remote(path / name) if open_remote else _open_file(path, name) for name in names]
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


def _weight_files(path: Path, remote: bool) -> tuple[list[str], str, dict[str, str]]:
    """Return the weight files, their index's name and what it says; an index comes first, and safetensors do."""
    for index, single, suffix in (
        (SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME, ".safetensors"),
        (TORCH_INDEX_NAME, TORCH_NAME, ".bin"),
    ):
        if (path / index).exists():
            weight_map = read_weight_map(path / index, suffix)
            return sorted(set(weight_map.values())), index, weight_map
        if remote or (path / single).exists():
            return [single], index, {}
    raise SourceError(f"{path}: no weights; expected {SAFETENSORS_NAME} or {TORCH_NAME}, or an index of shards")


def _open_file(path: Path, name: str) -> TensorFile:
    if not (path / name).exists():
        raise SourceError(f"{path / name}: missing, but the index names it; is the download complete?")
    require_inside(path / name, path)
    return TorchFile(path / name) if name.endswith(".bin") else SafetensorsFile(path / name)


def small_files(path: Path) -> list[Path]:
    """Return tokenizer, generation config, chat template, licence and whatever else is small and not weights.

    Raises:
        SourceError: a link out of the directory, a name that cannot be printed, or too much of it.

    """
    folders = [path, path / "additional_chat_templates"]
    candidates = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir())
    found = [file for file in candidates if _is_small_file(file, path)]
    size = sum(file.stat().st_size for file in found)
    if size > MAX_SMALL_FILES_BYTES:
        raise SourceError(f"{path}: {size} bytes beside the weights, at most {MAX_SMALL_FILES_BYTES} are copied")
    return found


def _is_small_file(file: Path, directory: Path) -> bool:
    name = file.name
    not_copied = (CONFIG_NAME, "adapter_config.json")  # adapters stay behind: their weights are not converted
    if name in not_copied or name.endswith(".index.json") or name.startswith((".", "llmint8_")) or not file.is_file():
        return False
    if file.suffix.lower() in WEIGHT_SUFFIXES or file.stat().st_size > MAX_SMALL_FILE_BYTES:
        return False
    if not name.isprintable():
        raise SourceError(f"{directory}: {name[:80]!r} is not a name that can be printed; rename or remove the file")
    require_inside(file, directory)
    return True
