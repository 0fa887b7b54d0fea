"""A model in memory as a source: its tensors under the names of a checkpoint, as if they stood in a file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..containers.tensors import DTYPE_NAMES, TensorInfo
from ..disk.small_files import small_files
from ..errors import SourceError
from .source import IN_MEMORY, Source


class MemoryFile:
    """Tensors in memory in the place of a weight file; reading one copies nothing, and it stays on its device."""

    in_blocks = True
    differences: Mapping[str, str] = {}

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors by name. Raises SourceError: one has no numbers, or a dtype that no checkpoint has."""
        self.path, self.stored = Path(IN_MEMORY), dict[Path, int]()
        self.tensors: dict[str, TensorInfo] = {}
        self._held = tensors
        offset = 0
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise SourceError(f"{name}: on the meta device, it has no numbers; load the model without offloading")
            if tensor.dtype not in DTYPE_NAMES:
                raise SourceError(f"{name}: is {tensor.dtype}, which no checkpoint holds")
            info = TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), IN_MEMORY, offset)
            self.tensors[name] = info
            offset += info.nbytes

    def read(self, name: str) -> Tensor:
        """Return the tensor itself, where it is contiguous; not to be written to."""
        tensor = self._held.get(name)
        if tensor is None:  # a matrix of a stack, see `Source.split`
            stack, _, number = name.rpartition(".")
            tensor = self._held[stack][int(number)]
        return tensor.detach().contiguous()

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor in blocks of its rows."""
        tensor = self.read(name)
        whole = not tensor.ndim or not tensor.numel()
        yield from (tensor,) if whole else torch.split(tensor, self.tensors[name].rows_per_block)

    def forget(self, name: str) -> None:
        """Hold a tensor no longer."""
        self._held.pop(name, None)


def source_in_memory(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], beside: TemporaryDirectory[str]
) -> Source:
    """Return a model in memory as a source.

    Args:
        name: what messages call it.
        config: what its config.json holds.
        tensors: by their names in a checkpoint; `release` forgets one.
        beside: a directory with config.json, the tokenizer and what else lies beside weights.

    Raises:
        SourceError: a tensor has no numbers, or a dtype that no checkpoint has.

    """
    file = MemoryFile(tensors)
    small = small_files(Path(beside.name))
    return Source(Path(name), config, [file], dict(file.tensors), small, release=file.forget, made=beside)
