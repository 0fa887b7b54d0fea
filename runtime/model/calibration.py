"""What the conversion saw of each layer's input, as far as it matters when the model runs: from the manifest."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmint8.formats import Checkpoint, LLMInt8Error, Manifest
from llmint8.formats.disk.names import MANIFEST_NAME

from ..layers.linear import QuantizedLinear


@dataclass(frozen=True)
class Calibration:
    """What is known of the layers of a checkpoint, by their names in it; nothing without a manifest.

    Attributes:
        limits: the largest magnitude in a layer's input outside of its outlier dimensions.
        largest: the largest magnitude in all of it, rounded to four digits; infinite where it was beyond float32.
        missed: layers that should have been calibrated and were not, because the calibration did not reach them.

    """

    limits: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    missed: frozenset[str] = frozenset()

    def limit(self, name: str, layer: QuantizedLinear) -> float | None:
        """Return the limit of a layer, by its name in the checkpoint; None where nothing depends on it."""
        return self.limits.get(name) if layer.outliers == "static" and layer.kbit is None else None

    def overflow(self, names: Iterable[str]) -> str | None:
        """Say which of these layers, which run in float16, had inputs that it cannot hold, if any."""
        most = torch.finfo(torch.float16).max
        seen = {name: self.largest[name] for name in names if self.largest.get(name, 0) > most}
        if not seen:
            return None
        first = min(seen, key=lambda name: (-seen[name], name))
        more = f", and so did those of {len(seen) - 1} more" if len(seen) > 1 else ""
        return (
            f"{first}: its input reached {seen[first]:g} in the calibration{more}; float16 ends at {most:g}, so expect "
            "NaN: load with dtype='bfloat16'"
        )


def read_calibration(checkpoint: Checkpoint, manifest: Manifest | None) -> Calibration:
    """Take from the manifest what it says of the layers. Raises LLMInt8Error: a statistic is malformed."""
    if manifest is None:
        return Calibration()
    missed = missed_layers(checkpoint, manifest)
    try:
        return calibration_of(checkpoint.records, manifest.modules, missed)
    except ValueError as error:
        file = checkpoint.path / MANIFEST_NAME
        raise LLMInt8Error(f"{file}: {error}; convert the source again") from None


def calibration_of(
    layers: Iterable[str], modules: Mapping[str, Mapping[str, Any]], missed: frozenset[str]
) -> Calibration:
    """Take from statistics what they say of layers. Raises ValueError: one is malformed."""
    sharing: dict[str, list[str]] = defaultdict(list)
    limits: dict[str, float] = {}
    largest: dict[str, float] = {}
    for name in layers:
        try:
            statistics = modules.get(name, {})
            sharing[statistics.get("shares_input_with", name)].append(name)
            if "kept_absmax" in statistics:
                limits[name] = _magnitude(statistics["kept_absmax"])
            if found := _numbers(statistics.get("absmax")):
                largest[name] = max(found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: malformed statistics ({error})") from None
    return Calibration(_of_all(limits, sharing), _of_all(largest, sharing), missed)


def missed_layers(checkpoint: Checkpoint, manifest: Manifest) -> frozenset[str]:
    """Return the layers of which there are no statistics, though the conversion was asked to look for outliers."""
    without = checkpoint.quantization.criterion.startswith(("none", "proxy"))  # which need no calibration
    asked_for = checkpoint.quantization.llmint8 and not without
    return frozenset(checkpoint.records.keys() - manifest.modules.keys() if asked_for else ())


def _of_all(values: dict[str, float], sharing: dict[str, list[str]]) -> dict[str, float]:
    """Give what is known of a layer to all that share its input."""
    return {name: value for first, value in values.items() for name in sharing[first]}


def _magnitude(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f"kept_absmax is {repr(value)[:80]}, expected a magnitude in float32")
    return float(value)


def _numbers(values: Any) -> list[float]:
    """Return a list of numbers, null for what overflowed; none where somebody else has something else there."""
    found = [math.inf if value is None else value for value in values] if isinstance(values, list) else []
    return found if all(type(value) in (int, float) for value in found) else []
