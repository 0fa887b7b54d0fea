"""Weights that a source stores quantized, read as the float32 weights that they stand for.

Known are int8 by rows as bitsandbytes saves it, int8 and float8 as compressed-tensors does (a scale for a tensor, a row
or a group of a row, with zero points where there are any), and float8 with a scale for each block of 128 x 128, as
DeepSeek publishes it. A weight is its stored value times the scale, in float32. It stays float32 because a rounding to
16 bit would come on top of the one that is there: int8 by rows becomes the same integers again. What GPTQ and AWQ pack
is known too; see `packed.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..containers.tensors import FLOAT_DTYPES, TensorInfo
from ..errors import SourceError
from .packed import PackedWeight, packed_weights
from .tiles import ROWS, TILE_ROWS, has_tiles, layout_name, untiled
from .weight_files import TensorFile

_STORED = ("I8", "F8_E4M3", "F8_E5M2")
# In this order: a format has the first that is there.
_OF_ROWS, _OF_BLOCKS, _BLOCK = "SCB", "weight_scale_inv", 128
_SCALES = (_OF_ROWS, _OF_BLOCKS, "weight_scale")
_ZERO_POINT, _LAYOUT = "weight_zero_point", "weight_format"
# Of the inputs; they are quantized anew.
_LEFT_OUT = ("input_scale", "input_zero_point")
# What else a format may store beside weights in 8 bits, and then means something else.
_OURS = ("outlier_dims", "outlier_weight", "absmax")


@dataclass(frozen=True)
class StoredWeight:
    """A weight in 8 bits: its tensor, that of its scales, each for a block of so many rows and columns, and others.

    `layout` is bitsandbytes' `weight_format`, a tensor or a word (`tiles.py`). `tensors` are the names of all that
    belong to it, with those that are of no use.
    """

    stored: TensorInfo
    scale: TensorInfo
    zero_point: TensorInfo | None
    layout: TensorInfo | str | None
    block: tuple[int, int]
    tensors: tuple[str, ...]

    @property
    def info(self) -> TensorInfo:
        """The weight as it is read, named as it is stored; tiles may have more rows than it."""
        rows = self.scale.shape[0] if self.layout is not None else self.stored.shape[0]
        return replace(self.stored, dtype="F32", shape=(rows, self.stored.shape[1]))


def stored_weights(
    path: Path, tensors: Mapping[str, TensorInfo], quantization: Any, words: Mapping[str, str] | None = None
) -> dict[str, StoredWeight | PackedWeight]:
    """Return the quantized weights by name; none for an int8 checkpoint of ours, which has columns beside them.

    Args:
        path: the source.
        tensors: as they are stored.
        quantization: what its config says.
        words: what is stored beside tensors, by name.

    Raises:
        SourceError: the scales of a weight are of another shape than is known.

    """
    found: dict[str, StoredWeight | PackedWeight] = {**packed_weights(path, tensors, quantization)}
    for name, info in tensors.items():
        base, _, suffix = name.rpartition(".")
        if suffix != "weight" or info.dtype not in _STORED or len(info.shape) != 2:
            continue
        if any(f"{base}.{suffix}" in tensors for suffix in _OURS):
            return {}
        scale = next((tensors[f"{base}.{suffix}"] for suffix in _SCALES if f"{base}.{suffix}" in tensors), None)
        if scale is None:
            continue
        zero_point, said = tensors.get(f"{base}.{_ZERO_POINT}"), f"{base}.{_LAYOUT}"
        layout = tensors.get(said) or (words or {}).get(said) if scale.name == f"{base}.{_OF_ROWS}" else None
        others = (f"{base}.{suffix}" for suffix in (_ZERO_POINT, _LAYOUT, *_LEFT_OUT))
        parts = name, scale.name, *(other for other in others if other in tensors)
        block = _block(path, info, scale, layout is not None)
        found[name] = StoredWeight(info, scale, zero_point, layout, block, parts)
        if zero_point is not None and zero_point.shape != scale.shape:
            raise SourceError(f"{path / info.file}: {zero_point.name} has another shape than {scale.name}")
    return found


def _block(path: Path, weight: TensorInfo, scale: TensorInfo, may_be_tiles: bool) -> tuple[int, int]:
    """Return for how many rows and columns of a weight each scale is."""
    n, k = weight.shape
    count = scale.shape[0] if len(scale.shape) == 1 else 0
    if may_be_tiles and any(has_tiles(weight.shape, count, name) for name in TILE_ROWS):
        n = count
    rows, columns = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1) if len(scale.shape) == 1 else (1, 1)
    if scale.dtype in FLOAT_DTYPES and len(scale.shape) <= 2 and 0 not in (rows, columns, n, k):
        found = _size(scale, n, rows), _size(scale, k, columns)
        if all(found):
            return found
    raise SourceError(
        f"{path / weight.file}: {scale.name} is {scale.dtype} {list(scale.shape)} for a weight {list(weight.shape)}; "
        "known are scales for a tensor, a row, a group of a row, and a block"
    )


def _size(scale: TensorInfo, features: int, blocks: int) -> int:
    """Return the size of the blocks that features are divided into; 0 where there is none."""
    if scale.name.endswith(f".{_OF_BLOCKS}") and blocks > 1 and -(-features // _BLOCK) == blocks:
        return _BLOCK  # the last one may be smaller
    return features // blocks if features % blocks == 0 else 0


def dequantized_files(
    files: Sequence[TensorFile], weights: Mapping[str, StoredWeight | PackedWeight]
) -> list["DequantizedFile"]:
    """Return the weight files of a source, with the quantized weights in the place of their parts."""
    file_of = {file.path.name: file for file in files}
    of_file: dict[str, dict[str, StoredWeight | PackedWeight]] = {name: {} for name in file_of}
    for name, weight in weights.items():
        of_file[weight.info.file][name] = weight
    parts = {name for weight in weights.values() for name in weight.tensors}
    return [DequantizedFile(file, of_file[name], parts, file_of) for name, file in file_of.items()]


class DequantizedFile:
    """A weight file whose quantized weights are read as float32; their scales may lie in others."""

    def __init__(
        self,
        file: TensorFile,
        weights: Mapping[str, StoredWeight | PackedWeight],
        parts: set[str],
        file_of: Mapping[str, TensorFile],
    ) -> None:
        """Take the file, its quantized weights, the names of the parts of all of them, and all files by their names."""
        self._file, self._weights, self._file_of = file, weights, file_of
        self.path, self.stored = file.path, file.stored
        self.in_blocks = file.in_blocks and not any(isinstance(weight, PackedWeight) for weight in weights.values())
        kept = {name: info for name, info in file.tensors.items() if name not in parts}
        self.tensors = kept | {name: weight.info for name, weight in weights.items()}

    @property
    def differences(self) -> Mapping[str, str]:
        """See `TensorFile`."""
        return self._file.differences

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        if name not in self._weights:
            return self._file.read(name)
        return torch.cat(list(self.read_rows(name)))

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of rows."""
        if name not in self._weights:
            yield from self._file.read_rows(name)
            return
        weight = self._weights[name]
        if isinstance(weight, PackedWeight):
            yield weight.read(self._read_part)
            return
        scale, zero_point = _by_rows(self._read_part(weight.scale)), None
        if weight.scale.name.endswith(f".{_OF_ROWS}"):
            scale = scale / 127
        if weight.zero_point is not None:
            zero_point = _by_rows(self._read_part(weight.zero_point))
        start = 0
        for stored in self._rows_of(weight):
            block = stored.float()
            rows, columns = torch.arange(start, start + len(block)), torch.arange(block.shape[1])
            place = (rows // weight.block[0])[:, None], (columns // weight.block[1])[None]
            if zero_point is not None:
                block -= zero_point[place]
            yield block.mul_(scale[place])
            start += len(block)

    def _rows_of(self, weight: StoredWeight) -> Iterator[Tensor]:
        """Yield the stored values in blocks of rows; of tiles, which lie below each other, all in one."""
        layout, rows = weight.layout, weight.info.shape[0]
        named = layout_name(self._read_part(layout)) if isinstance(layout, TensorInfo) else layout or ROWS
        if has_tiles(weight.stored.shape, rows, named):
            yield untiled(self._file.read(weight.stored.name), rows, named)
        elif named == ROWS and rows == weight.stored.shape[0]:
            yield from self._file.read_rows(weight.stored.name)
        else:
            raise SourceError(
                f"{self.path}: {weight.stored.name} is {list(weight.stored.shape)} in layout {named[:40]!r}, with "
                f"{rows} scales; known are {ROWS}, {' and '.join(TILE_ROWS)}"
            )

    def _read_part(self, info: TensorInfo) -> Tensor:
        return self._file_of[info.file].read(info.name)


def _by_rows(scale: Tensor) -> Tensor:
    """Return scales for rows and columns, float32, whatever dimensions they have."""
    return scale.float() if scale.ndim == 2 else scale.float().reshape(-1, 1)
