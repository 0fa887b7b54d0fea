"""What a calibrated checkpoint's manifest says about outliers, read and checked, and the paper's outlier features.

The paper (LLM.int8(), section 4.1) calls a feature dimension an outlier feature when its magnitude is at least 6.0, in
at least 25 % of the layers and in at least 6 % of the sequence positions, at the inputs of the attention projections
and of the first FFN layer. Here a layer is a block of the model, and what is counted is taken from what was measured,
not from names:

- Hidden-state inputs are those of the commonest width. Within a block some layers read the hidden state and some write
  it back. An input of a single layer that gives this width again, after an input that was read and before the next, is
  the one to write (the attention output), and is left out; so is every input of another width (the second FFN layer).
- A dimension occurs in a block when |x| >= 6.0 in >= 6 % of the positions of one of these inputs. It is an outlier
  feature when it occurs in >= 25 % of the blocks.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from llmint8.converter.outliers.criterion import OUTLIER_MAGNITUDE, OUTLIER_POSITIONS
from llmint8.formats import Checkpoint, LLMInt8Error, Manifest

from .labels import block_of, joined, layer_kinds

# The third number of the paper's definition.
OUTLIER_LAYERS = 0.25
_LISTS = {"dims": int, "absmax": float, "positions": float, "ks": int, "errors": float}


@dataclass(frozen=True)
class LayerInput:
    """An input that one or more layers share, and what the calibration measured on it.

    `kinds` tells the layers apart, such as `q_proj, k_proj, v_proj`; see `labels.py`. `dims` are the recorded ones by
    falling `absmax`; `positions` the share of positions in which each reaches 6.0, `quartiles` those of its values.
    `errors[i]` is the squared relative output error, summed over the layers, with the first `ks[i]` of the dims in 16
    bit; `kept` is how many the checkpoint keeps.
    """

    layers: tuple[str, ...]
    kinds: str
    block: str
    in_features: int
    kept: int
    absmax_median: float
    outlier_features: int
    dims: list[int]
    absmax: list[float]
    positions: list[float]
    quartiles: list[tuple[float, float, float]]
    ks: list[int]
    errors: list[float]

    @property
    def blocks(self) -> list[str]:
        """Every block that reads it: one, or all of a decoder where it is what an encoder gave."""
        return list(dict.fromkeys(block_of(name) for name in self.layers))

    def relative_error(self, kept: int) -> float:
        """Return the error of an output relative to it, root mean square; at the next smaller k that was measured."""
        index = max(i for i, k in enumerate(self.ks) if k <= kept)
        return math.sqrt(self.errors[index] / len(self.layers))


def read_inputs(checkpoint: Checkpoint, manifest: Manifest, where: Path) -> list[LayerInput]:
    """Return the inputs that were measured, in the order in which the model reaches them.

    Args:
        checkpoint: the checkpoint.
        manifest: its manifest.
        where: the manifest's file, for messages.

    Raises:
        LLMInt8Error: there are no statistics, or they are malformed.

    """
    sharing: dict[str, list[str]] = defaultdict(list)
    modules: dict[str, Any] = manifest.modules
    for name, raw in modules.items():
        first = raw.get("shares_input_with", name)
        if name in checkpoint.records and isinstance(first, str):
            sharing[first].append(name)
    kinds = layer_kinds(checkpoint.records)
    inputs = []
    for first, layers in sharing.items():
        raw = modules.get(first)
        if first not in checkpoint.records or raw is None or "dims" not in raw:
            continue  # a layer that the calibration did not reach
        try:
            inputs.append(_layer_input(checkpoint, first, tuple(layers), kinds, raw))
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last: an integer no float holds
            raise LLMInt8Error(
                f"{where}: {first}: malformed statistics ({type(error).__name__}: {error}); convert the source again"
            ) from None
    if not inputs:
        criterion = checkpoint.quantization.criterion
        raise LLMInt8Error(
            f"{where}: holds no statistics, because the model was converted without calibration (outliers {criterion});"
            " convert the source again with --outliers top-k=16"
        )
    return inputs


def _layer_input(
    checkpoint: Checkpoint, first: str, layers: tuple[str, ...], kinds: dict[str, str], raw: dict[str, Any]
) -> LayerInput:
    record = checkpoint.records[first]
    lists = {key: [_number(kind, value) for value in raw[key]] for key, kind in _LISTS.items()}
    quartiles = [tuple(_number(float, value) for value in row) for row in raw["quartiles"]]
    lengths = {len(lists["dims"]), len(lists["absmax"]), len(lists["positions"]), len(quartiles)}
    if len(lengths) != 1 or {len(row) for row in quartiles} != {3}:  # of none there is no row
        raise ValueError("dims, absmax, positions and quartiles are not of one length")
    if not all(0 <= dim < record.in_features for dim in lists["dims"]):
        raise ValueError(f"a dim is not in 0 to {record.in_features - 1}")
    if len(lists["ks"]) != len(lists["errors"]) or lists["ks"][:1] != [0] or min(lists["errors"]) < 0:
        raise ValueError("ks do not begin with 0, or errors are not one for each")
    return LayerInput(
        layers,
        joined(kinds[name] for name in layers),
        block_of(first),
        record.in_features,
        record.outlier_count or 0,
        _number(float, raw["absmax_median"]),
        _number(int, raw["outlier_features"]),
        quartiles=quartiles,
        **lists,
    )


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return kind(value)


def hidden_inputs(inputs: Sequence[LayerInput], checkpoint: Checkpoint) -> list[LayerInput]:
    """Return the inputs that read the hidden state; the rule is in the module's docstring."""
    width = Counter(found.in_features for found in inputs).most_common(1)[0][0]
    read: set[str] = set()  # blocks that have read and not yet written
    hidden = []
    # An int8 output head reads the hidden state too, but is no block.
    for found in [found for found in inputs if found.block] or inputs:
        gives = {checkpoint.records[name].out_features for name in found.layers}
        writes = found.block in read and len(found.layers) == 1 and gives == {width}
        if found.in_features != width or writes:
            read.discard(found.block)
            continue
        read.add(found.block)
        hidden.append(found)
    return hidden


@dataclass(frozen=True)
class Feature:
    """A feature dimension over the blocks of the model. Shares are 0 to 1."""

    dim: int
    blocks: list[str]  # those in which it occurs: |x| >= 6 in >= 6 % of the positions of an input
    layer_share: float
    position_share: float  # mean over the blocks in which it occurs
    absmax: float
    quartiles: tuple[float, float, float]  # of its values; medians over the inputs at which it occurs


@dataclass(frozen=True)
class Table4:
    """The row of the paper's Table 4 for a model. `strongest` are all dims recorded, those that occur most first."""

    features: list[Feature]
    strongest: list[Feature]
    blocks: int
    layer_share: float  # blocks in which at least one of the features occurs
    position_share: float  # mean over the features
    complete: bool  # False where an input has outliers beyond the dims recorded


def table4(hidden: Sequence[LayerInput]) -> Table4:
    """Count the outlier features among hidden-state inputs."""
    blocks = list(dict.fromkeys(found.block for found in hidden))
    where: dict[int, list[tuple[LayerInput, int]]] = defaultdict(list)
    for found in hidden:
        for index, dim in enumerate(found.dims):
            where[dim].append((found, index))
    strength = {dim: _strength(places, hidden) for dim, places in where.items()}
    order = sorted(where, key=lambda dim: (strength[dim], -dim), reverse=True)
    strongest = [_feature(dim, where[dim], len(blocks)) for dim in order]
    features = [feature for feature in strongest if feature.layer_share >= OUTLIER_LAYERS]
    affected = {block for feature in features for block in feature.blocks}
    return Table4(
        features,
        strongest,
        len(blocks),
        len(affected) / len(blocks),
        fmean(feature.position_share for feature in features) if features else 0.0,
        all(sum(share >= OUTLIER_POSITIONS for share in found.positions) >= found.outlier_features for found in hidden),
    )


def occurs(found: LayerInput, index: int) -> bool:
    """Tell whether a recorded dim is systematic at an input: large enough, in enough positions."""
    return found.absmax[index] >= OUTLIER_MAGNITUDE and found.positions[index] >= OUTLIER_POSITIONS


def _strength(places: list[tuple[LayerInput, int]], hidden: Sequence[LayerInput]) -> tuple[int, int, float]:
    """Order dims by the blocks in which they occur, then by those in which they reach 6 at all, then by magnitude."""
    systematic = {found.block for found, index in places if occurs(found, index)}
    reached = {found.block for found, index in places if found.absmax[index] >= OUTLIER_MAGNITUDE}
    # Where a dim is not recorded it is at most as large as the smallest that is.
    seen = {id(found): found.absmax[index] for found, index in places}
    size = sum(math.log(max(seen.get(id(found), found.absmax[-1]), 1e-9)) for found in hidden)
    return len(systematic), len(reached), size


def _feature(dim: int, places: list[tuple[LayerInput, int]], blocks: int) -> Feature:
    share: dict[str, float] = defaultdict(float)
    quartiles = []
    for found, index in places:
        if occurs(found, index):
            share[found.block] = max(share[found.block], found.positions[index])
            quartiles.append(found.quartiles[index])
    quartiles = quartiles or [found.quartiles[index] for found, index in places]
    first, middle, third = (median(values) for values in zip(*quartiles, strict=True))
    largest = max(found.absmax[index] for found, index in places)
    positions = fmean(share.values()) if share else 0.0
    return Feature(dim, list(share), len(share) / blocks, positions, largest, (first, middle, third))
