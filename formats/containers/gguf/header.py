"""The header of a GGUF file: what it says of the model, and where its tensors are.

A file is a count of tensors and of facts, the facts (a name and a typed value each), the tensors' names, shapes, types
and places, and then their data. gguf-py maps a file and loops over any count that it names; here each count is compared
with the bytes that are left first. Read are versions 2 and 3, little-endian, whose types gguf-py knows.
"""

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, cast

from ...disk.reading import check_is_no_pointer, open_regular
from ...errors import CorruptFileError
from ..tensors import is_tensor_name
from .library import gguf_py

MAGIC = b"GGUF"
ARCHITECTURE = "general.architecture"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# The numbers of a fact, by the number of their type.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file: its shape as torch has it, and its type in ggml, whose blocks lie along the last dimension.

    `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    block: int
    block_bytes: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) // self.block * self.block_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of a tensor with one dimension, of all of it."""
        return self.shape[-1] // self.block * self.block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """The facts of a file by their names, and its tensors."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture of the model."""
        return str(self.facts[ARCHITECTURE])


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a file.

    Raises:
        CorruptFileError: it is none, ends too early, or says what cannot be.
        LLMInt8Error: gguf-py is not installed.

    """
    with open_regular(path) as raw:
        reader = _Reader(path, raw)
        check_is_no_pointer(path, reader.beginning)
        if reader.take(4) != MAGIC:
            raise reader.broken("does not begin as a GGUF file does")
        version, tensors, facts = reader.numbers("<IQQ")
        if version not in _VERSIONS:
            raise reader.broken(f"is version {version}, read are {' and '.join(map(str, _VERSIONS))}, little-endian")
        reader.at_most(facts, 13, "facts")
        found = dict(reader.fact() for _ in range(facts))
        reader.at_most(tensors, 24, "tensors")
        places = [reader.tensor() for _ in range(tensors)]
        return GgufHeader(path, found, _placed(reader, found, places))


def _placed(reader: "_Reader", facts: dict[str, Any], places: list[tuple[str, tuple[int, ...], int, int]]) -> Any:
    """Return the tensors with their places in the file. Raises CorruptFileError."""
    if not isinstance(facts.get(ARCHITECTURE), str):
        raise reader.broken(f"names no {ARCHITECTURE}")
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.broken(f"general.alignment is {str(alignment)[:20]}, expected a power of two")
    start, sizes = -(-reader.position // alignment) * alignment, gguf_py().GGML_QUANT_SIZES
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in places:
        if not is_tensor_name(name) or name in found:
            raise reader.broken(f"{name[:80]!r} is no name of a tensor, or of two")
        if kind not in sizes:
            raise reader.broken(f"{name} is of type {kind}, which gguf-py does not know")
        tensor = GgufTensor(name, shape, kind, block=sizes[kind][0], block_bytes=sizes[kind][1], offset=start + offset)
        if not shape or shape[-1] % tensor.block or 0 in shape or len(shape) > _MOST_DIMENSIONS:
            raise reader.broken(f"{name} is {list(shape)} in blocks of {tensor.block}")
        if tensor.offset + tensor.nbytes > reader.size:
            raise reader.broken(f"{name} ends at {tensor.offset + tensor.nbytes}, the file at {reader.size}")
        found[name] = tensor
    return found


class _Reader:
    """A file read from its beginning; nothing is taken that is not there."""

    def __init__(self, path: Path, raw: FileIO) -> None:
        self._path, self._file = path, BufferedReader(cast(Any, raw), 1 << 20)
        self.size, self.position = os.fstat(raw.fileno()).st_size, 0
        self.beginning = self._file.peek(64)[:64]

    def broken(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"{self._path}: {what}")

    def at_most(self, count: int, least: int, what: str) -> int:
        """Return a count of things of so many bytes at least, for which there is room."""
        if count * least > self.size - self.position:
            raise self.broken(f"names {count} {what} where {self.size - self.position} bytes are left")
        return count

    def take(self, count: int) -> bytes:
        self.at_most(count, 1, "bytes")
        self.position += count
        data = self._file.read(count)
        if len(data) < count:
            raise self.broken(f"ends {count - len(data)} bytes too early")
        return data

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.numbers("<Q")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"holds at {self.position - length} what is no UTF-8") from None

    def fact(self) -> tuple[str, Any]:
        name = self.string()
        return name, self._value(name, *self.numbers("<I"))

    def _value(self, name: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise self.broken(f"{name[:80]!r} is of type {kind}")
        of, count = self.numbers("<IQ")
        if of == _STRING:
            return [self.string() for _ in range(self.at_most(count, 8, "strings"))]
        if of not in _NUMBERS:
            raise self.broken(f"{name[:80]!r} is a list of type {of}")
        one = _NUMBERS[of]
        self.at_most(count, struct.calcsize(one), "numbers")
        return list(self.numbers(f"<{count}{one[1]}"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (count,) = self.numbers("<I")
        self.at_most(count, 8, "dimensions")
        sizes = self.numbers(f"<{count}Q")
        kind, offset = self.numbers("<IQ")
        return name, tuple(reversed(sizes)), kind, offset
