"""A GGUF file being written: beside its place, read again, flushed, and then given its name."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...disk.durable import begin_writeback, named_errors, open_output, sync_directory, temporary_name, write_all
from ...errors import OutputError
from ..tensors import as_bytes
from .header import read_gguf
from .library import gguf_py

_ALIGNMENT = 32
_COMPARED = 4 << 20
Q8_0 = "Q8_0"


@dataclass(frozen=True)
class GgufOutput:
    """A tensor to write: its name and shape [N, K] or [N], the name of its type in ggml, and its rows in blocks."""

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: Iterable[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        block, block_bytes = gguf_py().GGML_QUANT_SIZES[gguf_py().GGMLQuantizationType[self.kind]]
        return int(torch.Size(self.shape).numel()) // int(block) * int(block_bytes)


def packs(shape: Sequence[int]) -> bool:
    """Tell whether a shape can be Q8_0: matrices whose rows are whole blocks."""
    return len(shape) == 2 and shape[1] % 32 == 0


def write_gguf(path: Path, header: bytes, outputs: Sequence[GgufOutput]) -> None:
    """Write a file whose header is made; what it will hold is read again before it has its name.

    Raises:
        OutputError: it cannot be written, or the disk gives back something else.
        ValueError: the blocks of a tensor are not what its shape says.

    """
    temporary = temporary_name(path)
    try:
        with named_errors(temporary), open_output(temporary) as file:
            file.truncate(0)
            write_all(file, header)
            hashes = [_written(file, output) for output in outputs]
            write_all(file, bytes(-file.tell() % _ALIGNMENT))
            os.fsync(file.fileno())
            _compare(temporary, file, outputs, hashes)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with named_errors(path):
        temporary.replace(path)
        sync_directory(path.parent)


def _written(file: FileIO, output: GgufOutput) -> bytes:
    """Write a tensor where the file ends, and return the hash of its data."""
    write_all(file, bytes(-file.tell() % _ALIGNMENT))
    start, digest = file.tell(), hashlib.sha256()
    for block in output.blocks:
        data = _packed(block, output.kind)
        digest.update(data)
        write_all(file, data)
    if file.tell() - start != output.nbytes:
        raise ValueError(f"{output.name}: {file.tell() - start} bytes, planned were {output.nbytes}")
    begin_writeback(file, start, output.nbytes)
    return digest.digest()


def _packed(block: Tensor, kind: str) -> memoryview | bytes:
    if kind != Q8_0:
        return as_bytes(
            block.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).contiguous()
        )
    gguf = gguf_py()
    packed: Any = gguf.quantize(block.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    return bytes(packed.tobytes())


def _compare(path: Path, file: FileIO, outputs: Sequence[GgufOutput], hashes: Sequence[bytes]) -> None:
    """Read all of a file, by its own header. Raises OutputError."""
    found = read_gguf(path).tensors
    for output, expected in zip(outputs, hashes, strict=True):
        place, digest = found.get(output.name), hashlib.sha256()
        if place is not None and place.shape == output.shape and place.nbytes == output.nbytes:
            file.seek(place.offset)
            for start in range(0, place.nbytes, _COMPARED):
                digest.update(file.read(min(_COMPARED, place.nbytes - start)))
        if digest.digest() != expected:
            raise OutputError(f"{path}: {output.name}: not what was written to it")
