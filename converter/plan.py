"""What a conversion will do, before it does it: layers, sizes, memory and disk space."""

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmint8.formats import (
    DTYPES,
    FLOAT_DTYPES,
    OutputError,
    Source,
    TensorInfo,
    TensorSpec,
    int8_specs,
    open_source,
    outlier_specs,
)

from .hub import Resolved
from .limits import bounded_modules
from .models import load_config, meta_model
from .outliers import Criterion, max_candidates, parse_criterion
from .select import Selection, select_layers

_CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)
# What a conversion holds beside its largest tensor: the interpreter's own growth, headers, blocks being quantized.
_BASE_MEMORY = 64 << 20
CALIBRATION_TOKENS = 512
_ACTIVATION_COPIES = 8


@dataclass(frozen=True)
class ConversionPlan:
    """The plan of one conversion; see `make_plan`."""

    source: Source
    origin: Resolved
    out: Path
    config: Any | None  # transformers' config, None for a model it does not know
    selection: Selection
    criterion: Criterion
    dtype: str | None  # safetensors' name of the dtype that unquantized tensors are cast to
    max_shard_bytes: int
    groups: list[list[TensorSpec]]  # the tensors to write, in the order of the source; without outliers not yet chosen

    @property
    def bytes_before(self) -> int:
        """Bytes of all source tensors."""
        return sum(info.nbytes for info in self.source.tensors.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors to be written; outlier columns are estimated as the budget, where there is one."""
        columns = (self.criterion.value or 0) if self.criterion.kind == "top-k" else 0
        rows = sum(
            layer.out_features * DTYPES[output_dtype(layer.weight.dtype, self.dtype)].itemsize
            for layer in self.selection.layers.values()
        )
        return sum(spec.nbytes for group in self.groups for spec in group) + int(columns * rows)

    @property
    def disk_needed(self) -> int:
        """Bytes on disk, headers, small files and the columns put aside during calibration included."""
        small = sum(file.stat().st_size for file in self.source.small_files)
        spool = 0
        if self.criterion.kind != "none":
            layers = self.selection.layers.values()
            spool = sum(
                layer.weight.nbytes * max_candidates(layer.in_features) // layer.in_features for layer in layers
            )
        return self.bytes_after + small + spool + 1024 * sum(len(group) for group in self.groups)

    @property
    def disk_free(self) -> int:
        """Bytes free where OUT is or will be."""
        existing = next(path for path in (self.out.absolute(), *self.out.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    @property
    def peak_memory(self) -> int:
        """An estimate in bytes, the Python process and its libraries not counted."""
        largest, layer_of = 0, self.selection.layer_of
        for info in self.source.tensors.values():
            largest = max(largest, int(info.nbytes * (1.5 if info.name in layer_of or not self.dtype else 2)))
        if self.criterion.kind != "none":
            layers = self.selection.layers.values()
            # The weight in use, its int8 copy, the one that is read ahead; and the batch's activations in float32.
            largest = max([largest, *(int(2.5 * layer.weight.nbytes) for layer in layers)])
            largest += _ACTIVATION_COPIES * CALIBRATION_TOKENS * 4 * max(layer.in_features for layer in layers)
        return largest + _BASE_MEMORY


def make_plan(
    origin: Resolved,
    out: Path,
    outliers: str = "top-k=16",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False,
) -> ConversionPlan:
    """Open the source, choose the layers and lay out the result. Writes nothing and reads no weight.

    Raises:
        SourceError, CorruptFileError: the source cannot be converted.
        OutputError: OUT is or lies inside the source, or is not an empty directory.
        ValueError: an option's value is not valid.

    """
    criterion = parse_criterion(outliers)
    if dtype is not None and dtype not in _CAST_DTYPES:
        raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(_CAST_DTYPES)}")
    max_shard_bytes = _parse_size(max_shard_size)
    _check_out(origin.path, out)
    source = open_source(origin.path)
    config = load_config(origin.path, trust_remote_code)
    with bounded_modules(len(source.tensors)):
        model = None if config is None else meta_model(config)
    selection = select_layers(source, model, skip, only)
    if model is None and criterion.kind != "none":
        criterion = Criterion("none", None)
        selection.notices.append("without the model there is no calibration: no outlier columns are stored")
    plan = ConversionPlan(
        source, origin, out, config, selection, criterion, _CAST_DTYPES.get(dtype or ""), max_shard_bytes, []
    )
    return with_selection(plan, selection)


def with_selection(plan: ConversionPlan, selection: Selection) -> ConversionPlan:
    """Return the plan for other layers."""
    source, dtype, layer_of = plan.source, plan.dtype, selection.layer_of
    groups = []
    for info in in_file_order(source):
        layer = layer_of.get(info.name)
        if layer is not None:
            outlier_dtype = output_dtype(info.dtype, dtype)
            specs = int8_specs(layer.name, layer.out_features, layer.in_features)
            if plan.criterion.kind == "none":
                specs += outlier_specs(layer.name, layer.out_features, 0, outlier_dtype)
            groups.append(specs)
        else:
            groups.append([TensorSpec(info.name, output_dtype(info.dtype, dtype), info.shape)])
    return dataclasses.replace(plan, selection=selection, groups=groups)


def in_file_order(source: Source) -> list[TensorInfo]:
    """Return the source's tensors as they lie on the disk, so that it is read from front to back."""
    return sorted(source.tensors.values(), key=lambda info: (info.file, info.offset))


def output_dtype(dtype: str, cast: str | None) -> str:
    """Return the dtype in which an unquantized tensor is stored; only floats of 16 and 32 bits are ever cast."""
    return cast if cast and dtype in FLOAT_DTYPES else dtype


def _check_out(source: Path, out: Path) -> None:
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source:
        raise OutputError(f"{out}: is the source itself; name another directory for the result")
    if real_source in real_out.parents:
        raise OutputError(f"{out}: lies inside the source {source}; name a directory outside of it")
    if out.is_dir() and any(entry.name.endswith(".partial") for entry in os.scandir(out)):
        raise OutputError(f"{out}: holds what a killed conversion left; remove it and start again")
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
