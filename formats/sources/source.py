"""A 16-bit checkpoint as somebody else wrote it: names, shapes and lazily read tensors.

Understood are the layouts of the Hugging Face Hub: `model.safetensors` or `pytorch_model.bin`, whole or in shards
with an index; and OPT as metaseq saves it. Every layout becomes a `Source` here, with tensor names as in transformers;
nothing outside this folder asks what the files were.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..containers.tensors import TensorInfo, as_bytes
from ..disk.names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from ..disk.reading import read_json
from ..disk.small_files import small_files
from ..errors import SourceError
from .dequantized import dequantized_files, stored_weights
from .metaseq.beside import describe
from .metaseq.model import MetaseqModel
from .metaseq.names import metaseq_files
from .quantized import already_quantized, check_quantization, method_of, stored_quantization
from .weight_files import LocalFolder, TensorFile, WeightFiles, WeightFolder, weight_files

# The name of the file that tensors in memory have, see `memory.py`.
IN_MEMORY = "memory"
# Of tensors that are there twice; more are not read only to be compared.
_MAX_COMPARED_BYTES = 256 << 20


def _keep(name: str) -> None:
    pass


@dataclass(frozen=True)
class Source:
    """A source checkpoint, opened and checked; no tensor has been read yet.

    `release` takes the name of a tensor that has been converted. Where weights are fetched as they are needed, files of
    which all tensors have been released are deleted. `notices` say what was left aside, and why. `made` is a directory
    with what transformers wants beside the weights, where that is not in `path` and was made of what is. `quantized`
    says how the weights are stored, where they are quantized; they are read as float32 then, each of the tensors that
    `parts_of` names.
    """

    path: Path
    config: dict[str, Any]
    files: Sequence[TensorFile]
    tensors: dict[str, TensorInfo]
    small_files: list[Path]
    release: Callable[[str], None] = _keep
    notices: list[str] = field(default_factory=list)
    made: TemporaryDirectory[str] | None = None
    quantized: str = ""
    parts_of: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def beside(self) -> Path:
        """The directory with config.json, the tokenizer and all other small files."""
        return Path(self.made.name) if self.made else self.path

    @cached_property
    def stored(self) -> dict[Path, int]:
        """The weight files, and the bytes of each."""
        return {path: size for file in self.files for path, size in file.stored.items()}

    @property
    def differences(self) -> list[str]:
        """What was found while tensors were read: of some that are there more than once, not all are the same."""
        return [said for file in self.files for said in file.differences.values()]

    def in_blocks(self, name: str) -> bool:
        """Tell whether `read_rows` holds no more of a tensor than a block of its rows."""
        return self._file_of[self.tensors[name].file].in_blocks

    def read(self, name: str) -> Tensor:
        """Return one tensor, contiguous on the CPU."""
        return self._file_of[self.tensors[name].file].read(name)

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor in blocks of its rows, contiguous on the CPU."""
        return self._file_of[self.tensors[name].file].read_rows(name)

    def parts(self, name: str) -> list[TensorInfo]:
        """Return the places of the matrices of a stack [E, ...], each named as the stack with a number behind it.

        There are none of a file of PyTorch, which cannot be read in parts.
        """
        info = self.tensors[name]
        if not info.file.endswith((".safetensors", IN_MEMORY)):
            return []
        rows = (info.rows(number, number + 1) for number in range(info.shape[0]))
        return [replace(one, name=f"{name}.{number}", shape=one.shape[1:]) for number, one in enumerate(rows)]

    def split(self, names: Iterable[str]) -> None:
        """Have the matrices of stacks in their place; see `parts`."""
        for name in names:
            self._exchange([self.tensors[name]], self.parts(name))

    def join(self, names: Iterable[str]) -> None:
        """Undo `split`."""
        for name in names:
            parts: list[TensorInfo] = []
            first = self.tensors[f"{name}.0"]
            while (part := self.tensors.get(f"{name}.{len(parts)}")) is not None:
                parts.append(part)
            self._exchange(parts, [replace(first, name=name, shape=(len(parts), *first.shape))])

    def _exchange(self, old: list[TensorInfo], new: list[TensorInfo]) -> None:
        for holder in (self.tensors, self._file_of[old[0].file].tensors):
            for info in old:
                del holder[info.name]
            holder.update({info.name: info for info in new})

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
    local = folder is None
    if local and (names := metaseq_files(path)):
        return _of_metaseq(path, MetaseqModel(path, names))
    config = _read_config(path)
    quantization = stored_quantization(path, config)
    folder = folder or LocalFolder(path)
    try:
        found = weight_files(path, folder.has, config.get("transformers_weights"))
    except SourceError as error:
        if quantization is not None:
            raise already_quantized(path / CONFIG_NAME, quantization) from None
        raise (adapter_alone(path) or error) from None
    files: Sequence[TensorFile] = folder.open(found.names)
    tensors: dict[str, TensorInfo] = {}
    twice: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in tensors:
                twice[name] = (tensors[name], info)
            if name not in tensors or found.weight_map.get(name) == info.file:
                tensors[name] = info
    for name, holder in found.weight_map.items():
        if name not in tensors or tensors[name].file != holder:
            raise SourceError(f"{path / holder}: {name} is missing, but {found.index} says that it is here")
    words = {name: word for file in files for name, word in getattr(file, "words", {}).items()}
    weights = stored_weights(path, tensors, quantization, words)
    if weights:
        files = dequantized_files(files, weights)
        parts = {part for weight in weights.values() for part in weight.tensors}
        tensors = {name: info for name, info in tensors.items() if name not in parts}
        tensors |= {name: weight.info for name, weight in weights.items()}
    said = check_quantization(path, quantization, tensors, len(weights))
    if said:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    source = Source(path, config, files, tensors, small_files(path))
    if weights:
        parts_of = {name: weight.tensors for name, weight in weights.items()}
        source = replace(source, quantized=method_of(quantization), parts_of=parts_of)
    source.notices.extend([*_left_aside(found), *_twice_notices(source, twice, local), *said, *_adapter_notice(path)])
    return source


def _of_metaseq(path: Path, model: MetaseqModel) -> Source:
    made, notices = describe(path, model)
    beside = Path(made.name)
    config = read_json(beside / CONFIG_NAME)
    return Source(path, config, [model], model.tensors, small_files(beside), notices=notices, made=made)


def _left_aside(found: WeightFiles) -> list[str]:
    taken = found.index or found.names[0]
    left = ", ".join(found.left_aside)
    return [f"{left}: left aside, for transformers takes {taken} where both are there"] if left else []


def _twice_notices(source: Source, twice: Mapping[str, tuple[TensorInfo, TensorInfo]], local: bool) -> list[str]:
    """Name a tensor that two files hold, unless they were compared and are the same."""
    few = sum(info.nbytes for info, _ in twice.values()) <= _MAX_COMPARED_BYTES
    differ = [name for name, infos in twice.items() if not (local and few and _same(source, *infos))]
    if not differ:
        return []
    more = f" and {len(differ) - 1} more" if differ[1:] else ""
    files = " and ".join(info.file for info in twice[differ[0]])
    how = "with other values" if local and few else "perhaps with other values"
    taken = source.tensors[differ[0]].file
    return [f"{differ[0]}{more}: in {files}, {how}; taken from {taken}, as the index says"]


def _same(source: Source, one: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors are the same to the last bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    file_of = {file.path.name: file for file in source.files}
    return as_bytes(file_of[one.file].read(one.name)) == as_bytes(file_of[other.file].read(other.name))


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).exists():
        missing = SourceError(f"{path / CONFIG_NAME}: missing; a checkpoint directory in Hugging Face layout has one")
        raise adapter_alone(path) or missing
    return read_json(path / CONFIG_NAME)


def adapter_alone(path: Path) -> SourceError | None:
    """Return the error for a directory that holds an adapter in place of a model; None where it holds none."""
    file = path / ADAPTER_CONFIG_NAME
    if not file.exists():
        return None
    base = str(read_json(file).get("base_model_name_or_path"))[:80]
    return SourceError(
        f"{file}: an adapter and no model; merge it into its base, {base!r}, and convert the result (with PEFT: "
        "merge_and_unload, then save_pretrained)"
    )


def _adapter_notice(path: Path) -> list[str]:
    found = sorted(
        file.name for file in path.iterdir() if re.fullmatch(r"adapter_model\b.*|adapter_config\.json", file.name)
    )
    if not found:
        return []
    return [f"{', '.join(found)}: an adapter, which stays behind; only the model beside it is converted"]
