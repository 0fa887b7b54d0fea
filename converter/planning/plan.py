"""What a conversion will do, before it does it: layers, sizes, memory and disk space."""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmint8.formats import (
    DTYPES,
    FLOAT_DTYPES,
    NATIVE,
    Scheme,
    Source,
    SourceError,
    TensorInfo,
    TensorSpec,
    outlier_specs,
)
from llmint8.formats.disk.names import WORKING_NAME
from llmint8.formats.disk.small_files import left_behind
from llmint8.formats.int8.schemes import KBit

from ..gguf.source import open_local
from ..hub.low_disk import MOST_SHARDS, open_remote
from ..hub.origin import Resolved
from ..model.architecture import settle_class
from ..model.build import meta_model
from ..model.config import load_config
from ..model.inputs import rows_of_one
from ..model.limits import bounded_modules
from ..outliers.criterion import Criterion, budget_notices, max_candidates, parse_criterion
from ..outliers.proxy import proxy_count
from ..words import parse_size, precision
from .before import weights_before
from .head import Head, embedding_of, own_head
from .memory import peak_memory
from .options import Options, scheme_with
from .out import check_out, disk_free, existing
from .samples import Samples, choose_samples
from .selected import SelectedLayer, Selection, kept_output_bytes
from .selection import select_layers

_CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_DEFAULTS = Options()


@dataclass(frozen=True)
class ConversionPlan:
    """The plan of one conversion; see `make_plan`."""

    source: Source
    origin: Resolved
    out: Path
    config: Any | None  # transformers' config, with the head untied to quantize it; None for a model it does not know
    head: Head | None  # the output head, where it is to be quantized
    selection: Selection
    criterion: Criterion
    options: Options
    dtype: str | None  # safetensors' name of the dtype that unquantized tensors are cast to
    max_shard_bytes: int
    groups: list[list[TensorSpec]]  # the tensors to write, in the order of the source; without outliers not yet chosen
    class_notices: list[str]  # what `settle_class` has to tell, also among the others
    samples: Samples | None  # the images and sounds of a directory that the pass is to show
    before: Mapping[str, SelectedLayer]  # the layer before a layer, for proxy quantization
    kbits: Mapping[str, KBit] = field(default_factory=dict)  # how weights are coded, where each layer has its own way

    def scheme_of(self, layer: SelectedLayer) -> Scheme:
        """Return how a layer will be coded."""
        kbit = self.kbits.get(layer.name)
        return self.options.scheme_of(layer.lookup) if kbit is None else scheme_with(kbit, layer.lookup)

    @property
    def calibrated(self) -> bool:
        """Whether there is a calibrated pass."""
        return self.criterion.measured or self.options.rounding == "gptq"

    def columns_of(self, layer: SelectedLayer) -> int | None:
        """Return how many columns of a layer will stay in 16 bit, where that is known beforehand."""
        known = proxy_count(layer.in_features, self.criterion.amount) if layer.name in self.before else 0
        return None if self.criterion.measured else known

    @property
    def untied(self) -> bool:
        """Whether the head becomes int8 and the source has it tied to the embedding."""
        apart = [name for name, layer in self.selection.layers.items() if layer.lookup is None]
        modules = {self.selection.module_of[name] for name in apart}
        return self.head is not None and self.head.tied_to is not None and self.head.module in modules

    @property
    def precision(self) -> str:
        """What the layers are in where they are not quantized: `16 bit`, or `float32`."""
        return precision(output_dtype(layer.weight.dtype, self.dtype) for layer in self.selection.layers.values())

    @property
    def bytes_before(self) -> int:
        """Bytes of all source tensors."""
        return sum(info.nbytes for info in self.source.tensors.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors to be written; outlier columns are estimated as the budget, where there is one."""
        columns = self.criterion.amount if self.criterion.kind == "top-k" else 0
        layers = self.selection.multiplied.values()
        each = sum(4 + one.out_features * DTYPES[output_dtype(one.weight.dtype, self.dtype)].itemsize for one in layers)
        nbytes = sum(spec.nbytes for group in self.groups for spec in group) + int(columns * each)
        return self.options.target_bytes if self.options.target_size and not self.kbits else nbytes

    @property
    def bytes_to_read(self) -> int:
        """Bytes of weights that are read from the disk: each once, and again where NaN, levels, bits or columns are."""
        levels = bool(self.options.kbit and self.options.kbit.has_codebook) and not self.calibrated
        more = (self.options.on_nonfinite == "keep") + levels + bool(self.options.target_size)
        return sum(self.source.stored.values()) * (1 + more + (2 if self.before else 0))

    @property
    def bytes_to_write(self) -> int:
        """Bytes that are written where OUT is: tensors, headers, small files, and what the pass puts aside."""
        small = sum(file.stat().st_size for file in self.source.small_files)
        aside = 0
        for layer in self.selection.multiplied.values() if self.calibrated else ():
            columns = max_candidates(layer.in_features) if self.criterion.measured else 1
            aside += layer.weight.nbytes * columns // layer.in_features + 8 * layer.in_features  # and norms, float32
            aside += max(kept_output_bytes(layer, rows) for rows in self._rows)
        return self.bytes_after + small + aside + 1024 * sum(len(group) for group in self.groups)

    @property
    def disk_needed(self) -> int:
        """Bytes that there have to be for what is written, for what `--low-disk` fetches, and a cache on that disk."""
        shards = sorted(self.source.stored.values())[-MOST_SHARDS:] if self.origin.low_disk else []
        fetched = self.bytes_to_fetch if self.origin.path.stat().st_dev == existing(self.out).stat().st_dev else 0
        return self.bytes_to_write + sum(shards) + fetched

    @property
    def _rows(self) -> tuple[int, int]:
        """Rows of activations that the calibrated pass gives a layer: of text, and of images or sounds."""
        made_up = 0 if self.config is None else 2 * rows_of_one(self.config)
        return self.options.calibration_tokens, max(made_up, self.samples.rows if self.samples else 0)

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes of weights that the conversion fetches into the Hub's cache before it begins."""
        whole = self.origin.remote and not self.origin.low_disk
        return sum(size for path, size in self.source.stored.items() if not path.exists()) if whole else 0

    @property
    def cache_free(self) -> int:
        """Bytes free where the source is: for a repo, the Hub's cache."""
        return shutil.disk_usage(self.origin.path).free

    @property
    def disk_free(self) -> int:
        """Bytes free where OUT is or will be, with those that an unfinished conversion already takes there."""
        return disk_free(self.out)

    @property
    def peak_memory(self) -> int:
        """An estimate in bytes, the Python process and its libraries not counted."""
        rows = max(self._rows) if self.calibrated and self.config is not None else 0
        return peak_memory(self.source, self.selection, self.options.threads, rows, self.head is not None)


def make_plan(origin: Resolved, out: Path, options: Options = _DEFAULTS) -> ConversionPlan:
    """Open the source, choose the layers and lay out the result. Writes nothing and reads no weight.

    Raises:
        SourceError, CorruptFileError: the source cannot be converted, or not be calibrated with what the options name.
        OutputError: OUT is or lies inside the source, or holds something that is not a conversion.
        ValueError: an option's value is not valid.

    """
    parse_criterion(options.outliers)
    if options.dtype is not None and options.dtype not in _CAST_DTYPES:
        raise ValueError(f"dtype {options.dtype!r}, expected one of {', '.join(_CAST_DTYPES)}")
    parse_size(options.max_shard_size)
    check_out(origin.path, out)
    if not origin.name.isprintable():  # it is written into config.json
        raise SourceError(f"{origin.path}: has a name that cannot be printed; rename the directory")
    source = open_remote(origin, out / WORKING_NAME) if origin.remote else open_local(origin.path)
    return plan_source(source, origin, out, options)


def plan_source(source: Source, origin: Resolved, out: Path, options: Options) -> ConversionPlan:
    """Choose the layers of a source that is open, and lay out the result. Raises what `make_plan` does, but of OUT."""
    criterion, max_shard_bytes = parse_criterion(options.outliers), parse_size(options.max_shard_size)
    config, head = load_config(source.beside, options.trust_remote_code), None
    config, notices = (None, []) if config is None else settle_class(config, source)
    calibrated = criterion.measured or options.rounding == "gptq" or options.target_size is not None
    samples = choose_samples(options.calibration, config if calibrated else None)
    with bounded_modules(len(source.tensors)):
        model = None if config is None else meta_model(config)
        embedding = None
        if options.quantize_embeddings:
            config, model, head, embedding = embedding_of(config, model)
        if options.quantize_head and head is None:
            config, model, head = own_head(config, model)
    chosen = options.skip, options.only, head, options.layout == NATIVE, embedding
    selection = select_layers(source, model, *chosen)
    source.split(selection.stacks)
    selection.notices[:0] = [*source.notices, *notices, *(samples.notices if samples else [])]
    if model is None and calibrated:
        then = ", and layers search for their outliers in every call" if options.layout.searches else ""
        selection.notices.append(f"without the model there is no calibration: no outlier columns are stored{then}")
    if options.outliers != options.default_outliers:  # of what nobody asked for, as much as there can be
        selection.notices.extend(
            budget_notices(criterion, [layer.in_features for layer in selection.multiplied.values()])
        )
    if origin.path.is_dir():
        selection.notices.extend(left_behind(origin.path))
    before = weights_before(source, model, selection) if criterion.kind == "proxy" else {}
    if criterion.kind == "proxy" and origin.low_disk:
        raise ValueError(f"--outliers {criterion} reads weights several times; leave --low-disk out")
    how = criterion, options, _CAST_DTYPES.get(options.dtype or ""), max_shard_bytes
    plan = ConversionPlan(source, origin, out, config, head, selection, *how, [], notices, samples, before)
    return with_selection(plan, selection)


def with_selection(plan: ConversionPlan, selection: Selection) -> ConversionPlan:
    """Return the plan for other layers."""
    source, dtype, layer_of = plan.source, plan.dtype, selection.layer_of
    groups = []
    for info in in_file_order(source):
        layer = layer_of.get(info.name)
        if layer is None or layer.tied:
            groups.append([TensorSpec(info.name, output_dtype(info.dtype, dtype), info.shape)])
        if layer is not None:
            outlier_dtype = output_dtype(info.dtype, dtype)
            specs = plan.options.layout.weight_specs(
                layer.name, layer.out_features, layer.in_features, plan.scheme_of(layer)
            )
            if (columns := plan.columns_of(layer)) is not None:
                specs += outlier_specs(layer.name, layer.out_features, columns, outlier_dtype)
            groups.append(specs)
    return dataclasses.replace(plan, selection=selection, groups=groups)


def with_schemes(plan: ConversionPlan, kbits: Mapping[str, KBit]) -> ConversionPlan:
    """Return the plan for layers each of which is coded in its own way."""
    return with_selection(dataclasses.replace(plan, kbits=kbits), plan.selection)


def in_file_order(source: Source) -> list[TensorInfo]:
    """Return the source's tensors as they lie on the disk, so that it is read from front to back."""
    return sorted(source.tensors.values(), key=lambda info: (info.file, info.offset))


def output_dtype(dtype: str, cast: str | None) -> str:
    """Return the dtype in which an unquantized tensor is stored; only floats of 16 and 32 bits are ever cast."""
    return cast if cast and dtype in FLOAT_DTYPES else dtype
