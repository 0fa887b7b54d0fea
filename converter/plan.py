"""What a conversion will do, before it does it: layers, sizes, memory and disk space."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmint8.formats import OutputError, Source, TensorInfo, TensorSpec, open_source, record_specs

from .hub import Resolved
from .models import load_config, meta_model
from .select import Selection, select_layers

_CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)
# What a conversion holds beside its largest tensor: the interpreter's own growth, headers, blocks being quantized.
_BASE_MEMORY = 64 << 20


@dataclass(frozen=True)
class ConversionPlan:
    """The plan of one conversion; see `make_plan`."""

    source: Source
    origin: Resolved
    out: Path
    selection: Selection
    dtype: str | None  # safetensors' name of the dtype that unquantized tensors are cast to
    max_shard_bytes: int
    groups: list[list[TensorSpec]]  # the tensors to write, in the order of the source

    @property
    def bytes_before(self) -> int:
        """Bytes of all source tensors."""
        return sum(info.nbytes for info in self.source.tensors.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(spec.nbytes for group in self.groups for spec in group)

    @property
    def disk_needed(self) -> int:
        """Bytes on disk, headers and small files included."""
        small = sum(file.stat().st_size for file in self.source.small_files)
        return self.bytes_after + small + 1024 * sum(len(group) for group in self.groups)

    @property
    def disk_free(self) -> int:
        """Bytes free where OUT is or will be."""
        existing = next(path for path in (self.out.absolute(), *self.out.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    @property
    def peak_memory(self) -> int:
        """An estimate in bytes, the Python process and its libraries not counted."""
        largest = 0
        for info in self.source.tensors.values():
            quantized = info.name.removesuffix(".weight") in self.selection.layers
            largest = max(largest, int(info.nbytes * (1.5 if quantized or not self.dtype else 2)))
        return largest + _BASE_MEMORY


def make_plan(
    origin: Resolved,
    out: Path,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    max_shard_size: str | int = "5GB",
) -> ConversionPlan:
    """Open the source, choose the layers and lay out the result. Writes nothing and reads no weight.

    Raises:
        SourceError, CorruptFileError: the source cannot be converted.
        OutputError: OUT is or lies inside the source, or is not an empty directory.
        ValueError: an option's value is not valid.

    """
    _check_out(origin.path, out)
    source = open_source(origin.path)
    config = load_config(origin.path)
    selection = select_layers(source, None if config is None else meta_model(config), skip, only)
    if dtype is not None and dtype not in _CAST_DTYPES:
        raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(_CAST_DTYPES)}")
    return lay_out(source, origin, out, selection, _CAST_DTYPES.get(dtype or ""), _parse_size(max_shard_size))


def lay_out(
    source: Source, origin: Resolved, out: Path, selection: Selection, dtype: str | None, max_shard_bytes: int
) -> ConversionPlan:
    """Return the plan for layers already chosen."""
    groups = []
    for info in in_file_order(source):
        layer = selection.layers.get(info.name.removesuffix(".weight")) if info.name.endswith(".weight") else None
        if layer is not None:
            outlier_dtype = output_dtype(info.dtype, dtype)
            groups.append(record_specs(layer.name, layer.out_features, layer.in_features, 0, outlier_dtype))
        else:
            groups.append([TensorSpec(info.name, output_dtype(info.dtype, dtype), info.shape)])
    return ConversionPlan(source, origin, out, selection, dtype, max_shard_bytes, groups)


def in_file_order(source: Source) -> list[TensorInfo]:
    """Return the source's tensors as they lie on the disk, so that it is read from front to back."""
    return sorted(source.tensors.values(), key=lambda info: (info.file, info.offset))


def output_dtype(dtype: str, cast: str | None) -> str:
    """Return the dtype in which an unquantized tensor is stored; only floats of 16 and 32 bits are ever cast."""
    return cast if cast and dtype in ("F16", "BF16", "F32") else dtype


def _check_out(source: Path, out: Path) -> None:
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source:
        raise OutputError(f"{out}: is the source itself; name another directory for the result")
    if real_source in real_out.parents:
        raise OutputError(f"{out}: lies inside the source {source}; name a directory outside of it")
    if out.exists() and (not out.is_dir() or any(os.scandir(out))):
        raise OutputError(f"{out}: is not an empty directory; name a new one or remove what is in it")


def _parse_size(size: str | int) -> int:
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"size {size!r}, expected a number and a unit such as 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
