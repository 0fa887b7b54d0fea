"""A GGUF file as a source: each tensor under its name in a checkpoint, and in blocks as the float32 it stands for.

Floats stay what they are. A weight in ggml's blocks is read as a quantized weight of any other kind is: a few rows at a
time, by gguf-py, in float32.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..containers.gguf.header import GgufHeader, GgufTensor
from ..containers.gguf.library import gguf_py
from ..containers.gguf.rows import Rows
from ..containers.tensors import BLOCK_BYTES, DTYPES, TensorInfo, as_bytes, read_into
from ..disk.lending import OpenFiles
from ..disk.reading import open_regular
from ..disk.small_files import small_files
from .source import Source

# What ggml calls the floats that a checkpoint holds as they are.
_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}


class GgufFile:
    """A GGUF file, whose tensors have the names and the rows that they have in a checkpoint."""

    in_blocks = True
    differences: Mapping[str, str] = {}

    def __init__(self, header: GgufHeader, names: Mapping[str, str], rows: Callable[[GgufTensor], Rows]) -> None:
        """Take the header, the name in the file -> in a checkpoint of what is to be read, and how its rows stand."""
        self.path = header.path
        self.stored = {header.path: header.path.stat().st_size}
        self._opened = OpenFiles(open_regular)
        self._places = {name: header.tensors[there] for there, name in names.items()}
        self._rows = {name: rows(place) for name, place in self._places.items()}
        self.tensors = {name: self._info(name) for name in self._places}

    def _info(self, name: str) -> TensorInfo:
        place = self._places[name]
        shape = place.shape[::-1] if self._rows[name].transposed else place.shape
        return TensorInfo(name, _FLOATS.get(place.kind, "F32"), shape, self.path.name, place.offset)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return torch.cat(list(self.read_rows(name)))

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        return self._rows[name].from_gguf(self._blocks(self._places[name]))

    def _blocks(self, place: GgufTensor) -> Iterator[Tensor]:
        """Yield a tensor as the file has it, in blocks of rows of a few MiB."""
        count = place.nbytes // place.row_bytes
        step = max(1, BLOCK_BYTES // (4 * place.shape[-1]))
        for start in range(0, count, step):
            number = min(step, count - start)
            data = torch.empty(number, place.row_bytes, dtype=torch.uint8)
            with self._opened.lend(self.path) as file:
                read_into(file, self.path, place.name, place.offset + start * place.row_bytes, as_bytes(data))
            block = self._unpacked(data, place.kind)
            yield block.reshape(-1) if len(place.shape) == 1 else block

    @staticmethod
    def _unpacked(data: Tensor, kind: int) -> Tensor:
        if kind in _FLOATS:
            return data.view(DTYPES[_FLOATS[kind]])
        gguf = gguf_py()
        with np.errstate(all="ignore"):  # what is not finite is found where every weight is looked at
            return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind)))


def is_packed(tensor: GgufTensor) -> bool:
    """Tell whether a tensor is in ggml's blocks, and no float."""
    return tensor.kind not in _FLOATS


def gguf_source(
    file: GgufFile, config: dict[str, Any], beside: TemporaryDirectory[str], quantized: str, notices: list[str]
) -> Source:
    """Return a file as a source.

    Args:
        file: the file.
        config: what its config.json would hold.
        beside: a directory with that, the tokenizer and what else lies beside weights.
        quantized: how its weights are stored; empty where all of them are floats.
        notices: what was left aside or guessed.

    """
    small = small_files(Path(beside.name))
    tensors = dict(file.tensors)
    return Source(file.path, config, [file], tensors, small, notices=notices, made=beside, quantized=quantized)
