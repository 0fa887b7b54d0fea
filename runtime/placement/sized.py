"""A model of which everything is known but its numbers: what its tensors take, in the order in which it has them.

What becomes int8 is asked of the converter, by the same call that decides it in a conversion. Experts that only format
2 has in int8 are counted so, and a notice says it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from llmint8.converter.model.build import meta_model
from llmint8.converter.model.experts import expert_matrices
from llmint8.converter.model.limits import bounded_modules
from llmint8.converter.model.names import module_names
from llmint8.converter.outliers.criterion import parse_criterion
from llmint8.converter.planning.options import Options
from llmint8.converter.planning.selected import Selection
from llmint8.converter.planning.selection import select_layers
from llmint8.converter.words import size
from llmint8.formats import BITSANDBYTES, NATIVE, Checkpoint, Layout, Source, TensorInfo

from .blocks import block_of, natural, unit_of
from .cache import Cache, cache_of
from .parts import HALF, Kind, Part, half_bytes, kbit_bytes, kind_of, layer_bytes, table_bytes

_CONVERTED = Options()


@dataclass(frozen=True)
class Sized:
    """A model of which everything is known but its numbers.

    Attributes:
        name: of SOURCE.
        origin: what SOURCE is, in words.
        model: transformers' model on the meta device, or None where it knows none.
        parts: what the model is made of, in its order.
        outliers: columns of a layer that stay in 16 bit, on average.
        layout: of the int8 checkpoint.
        notices: what to tell the user.
        coded: what the quantized layers are, in words.

    """

    name: str
    origin: str
    model: Any | None
    parts: list[Part]
    outliers: float
    layout: Layout
    notices: list[str] = field(default_factory=list)
    coded: str = "int8"

    @cached_property
    def cache(self) -> Cache | None:
        """What keys and values take; None where it is not known."""
        return cache_of(self.model)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(part.half for part in self.parts) // HALF

    @property
    def blocks(self) -> list[str]:
        """The blocks, in order."""
        return list(dict.fromkeys(block for part in self.parts if (block := block_of(part.place))))


def sized_source(name: str, origin: str, source: Source, config: Any | None) -> Sized:
    """Return what a source takes, and will take when it is converted with the defaults.

    Args:
        name, origin: see `Sized`.
        source: opened.
        config: transformers' config with the class that the tensors fill, or None.

    Raises:
        SourceError: it cannot be converted.

    """
    with bounded_modules(len(source.tensors)):
        model = None if config is None else meta_model(config)
    selection = select_layers(source, model, (), (), experts=True)
    outliers = parse_criterion(_CONVERTED.outliers).amount
    layout, group = NATIVE if selection.experts else BITSANDBYTES, _CONVERTED.scheme.activation_group
    of_tensor = defaultdict(list)
    for layer in selection.layers.values():
        expert = selection.experts.get(layer.name)
        shape = layer.out_features, layer.in_features
        int8 = layer_bytes(*shape, int(outliers), layout, group, expert is not None)
        place = f"{selection.module_of[layer.name]}.weight"
        width = sum(shape) * (_experts_per_token(config) if expert else 1)
        part = Part(layer.name, place, "linear", HALF * int8.values, 0, int8, width)
        of_tensor[expert.tensor if expert else layer.weight.name].append(part)
    heads = {selection.module_of[name] for name, reason in selection.kept.items() if reason == "output head"}
    parts = _all_parts(source.tensors, of_tensor, model, heads, in_half=True)
    left = [part for part in parts if part.int8 is None]
    notices = [*selection.notices, *_of_experts(selection), *_of_float32(source, left)]
    return Sized(name, origin, model, parts, outliers, layout, notices + _in_high_precision(model, left))


def sized_checkpoint(name: str, origin: str, checkpoint: Checkpoint, config: Any | None) -> Sized:
    """Return what an int8 checkpoint takes, and what its source took in 16 bit; arguments as of `sized_source`."""
    tensors = checkpoint.tensors
    with bounded_modules(len(tensors)):
        model = None if config is None else meta_model(config)
    head = None if model is None else model.get_output_embeddings()
    heads = set() if head is None else {name for name, module in model.named_modules() if module is head}  # type: ignore[union-attr]
    mapped = {} if model is None else module_names(model, tensors)
    experts = set() if model is None else {matrix.name for matrix in expert_matrices(model, tensors)}
    of_tensor: dict[str, list[Part]] = {}
    for record in checkpoint.records.values():
        layer, shape = record.name, (record.out_features, record.in_features)
        stacked = layer in experts and checkpoint.layout == NATIVE
        columns, group = record.outlier_count or 0, record.scheme.activation_group
        kbit = record.scheme.kbit
        int8 = (
            layer_bytes(*shape, columns, checkpoint.layout, group, stacked)
            if kbit is None
            else kbit_bytes(*shape, columns, kbit)
        )
        place = mapped.get(f"{layer}.weight", f"{layer}.weight")
        kind: Kind = "head" if place.removesuffix(".weight") in heads else "linear"
        if record.scheme.lookup is not None:
            kind = "embedding"
            int8 = table_bytes(int8, record.scheme.lookup)
        suffixes = {*checkpoint.layout.reserved_suffixes, *checkpoint.layout.weight_suffixes(record.scheme)}
        of_tensor |= {f"{layer}.{suffix}": [] for suffix in suffixes}
        width = sum(shape) * (_experts_per_token(config) if stacked else 1)
        of_tensor[f"{layer}.weight"] = [Part(layer, place, kind, HALF * shape[0] * shape[1], 0, int8, width)]
    parts = _all_parts(tensors, of_tensor, model, heads, in_half=False)
    layers = [record for record in checkpoint.records.values() if record.scheme.lookup != "only"]
    outliers = sum(record.outlier_count or 0 for record in layers) / max(1, len(layers))
    bits = sorted({record.scheme.kbit.bits for record in checkpoint.records.values() if record.scheme.kbit})
    coded = f"{' and '.join(map(str, bits))} bits" if bits else "int8"
    return Sized(name, f"{origin}, {coded}", model, parts, outliers, checkpoint.layout, coded=coded)


def _experts_per_token(config: Any) -> int:
    return int(getattr(config.get_text_config(), "num_experts_per_tok", 1))


def _all_parts(
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[str, list[Part]],
    model: Any | None,
    heads: set[str],
    in_half: bool,
) -> list[Part]:
    """Return all parts of a model in its order.

    Args:
        tensors: those of the checkpoint.
        layers: tensor -> the int8 layers that it is or will be; none for what belongs to one already.
        model, heads: as for `kind_of`.
        in_half: whether what is not int8 will be in 16 bit, whatever it is in now.

    """
    mapped, tied = ({}, {}) if model is None else (module_names(model, tensors), model.all_tied_weights_keys)
    int8 = {part.place.removesuffix(".weight"): part.kind for found in layers.values() for part in found}
    parts = []
    for name, info in tensors.items():
        if name in layers:
            parts += layers[name]
            continue
        place = mapped.get(name, name)
        kind = int8.get(place.removesuffix(".bias")) or kind_of(model, place, heads)
        kind = "kept" if kind == "rest" and len(info.shape) > 1 else kind
        half = half_bytes(info)
        stored = half if in_half else info.nbytes
        if tied.get(place) in mapped.values():  # it is in the file once more, and will be in memory only once
            parts.append(Part(name, place, kind, 0, 0, twice=stored))
        else:
            parts.append(Part(name, place, kind, half, stored))
    return sorted(parts, key=partial(_rank, {} if model is None else _ranks(model)))


def _ranks(model: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in model.state_dict():
        found.setdefault(unit_of(name), len(found))
    return found


def _rank(ranks: Mapping[str, int], part: Part) -> tuple[int, list[tuple[bool, int, str]]]:
    """Return a key by which parts come as in the model; without one embeddings first, and the blocks then."""
    unit = unit_of(part.place)
    if ranks:
        return ranks.get(unit, len(ranks)), []
    return 0 if part.kind == "embedding" else 1 if block_of(part.place) else 2, natural(unit)


def _of_experts(selection: Selection) -> list[str]:
    """Say what takes format 2."""
    layers = [selection.layers[name] for name in selection.experts]
    more = sum(layer.out_features * layer.in_features for layer in layers)
    what = "its experts are counted in int8, which takes llmint8-convert --format 2"
    return [f"{what}; in format 1 they stay in 16 bit, {size(more)} more"] if layers else []


def _of_float32(source: Source, left: list[Part]) -> list[str]:
    """Say that what is not int8 has to be cast to take what is said here."""
    cast = any(source.tensors[part.name].dtype == "F32" for part in left)
    what = "the source is in float32, and all that is not int8 is counted in 16 bit"
    return [f"{what}: llmint8-convert --dtype bfloat16 makes it so"] if cast else []


def _in_high_precision(model: Any | None, left: list[Part]) -> list[str]:
    """Say what transformers puts into float32 where the rest is float16, as T5 wants it for the second half of MLPs."""
    names = () if model is None else model._keep_in_fp32_modules or ()
    of = [part.half for part in left if any(name in part.place.split(".") for name in names)]
    if not sum(of):
        return []
    what = f"{type(model).__name__} keeps {', '.join(sorted(names))} in float32 where all else is float16"
    return [f"{what}: {size(sum(of))} more than here, and none in bfloat16"]
