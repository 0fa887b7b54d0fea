"""`--target-size`: how many bits each layer gets, by the error that they leave in its output.

A calibrated pass measures for every layer, as for outlier columns, what error weights of 3 to 8 bits would leave in its
output. All begin with 3, and the bytes that are left go where the error falls most for a byte. The experts of a module
have the same; what the pass does not reach gets as many as all layers could have alike.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmint8.formats import LAYOUTS, SourceError
from llmint8.formats.int8.schemes import KBit
from llmint8.formats.writing.journal import Journal

from ..coding import Grid, round_to_nearest
from ..outliers.choosing import spend
from ..outliers.criterion import Criterion
from ..outliers.measuring import column_norms, error_curve
from ..planning.options import scheme_with
from ..planning.plan import ConversionPlan, with_schemes
from ..planning.selected import SelectedLayer
from ..words import size
from .calibrator import Calibrator
from .gptq import Round
from .streaming import blockwise_linear
from .text import Calibration


class Sizes(NamedTuple):
    """What was found: the bits of each layer, what the model was shown, and how many layers were measured."""

    bits: dict[str, int]
    shown: dict[str, int]
    measured: int


def choose_bits(
    plan: ConversionPlan, batch: Calibration | None, device: torch.device, read: Callable[[str], Tensor]
) -> Sizes:
    """Return how many bits the weight of each layer is to have for OUT to take `target_size` bytes at most.

    Raises:
        SourceError: it takes more with 3 bits in all layers.

    """
    candidates = plan.options.candidates
    alike = [with_schemes(plan, dict.fromkeys(plan.selection.layers, kbit)).bytes_after for kbit in candidates]
    fitting = [place for place, nbytes in enumerate(alike) if nbytes <= plan.options.target_bytes]
    if not fitting:
        raise SourceError(
            f"{plan.origin.name}: with 3 bits in all layers OUT takes {size(alike[0])}, and --target-size is "
            f"{size(plan.options.target_bytes)}; --quantize-embeddings or --dtype may make the rest smaller"
        )
    errors, shown = _Errors(candidates), {}
    if batch is not None:
        measured = replace(plan, criterion=Criterion("none", None))
        calibrator = Calibrator(measured, batch, device, _NoJournal(), errors)
        calibrator.run(read, errors.quantize, lambda layer: False)
        shown = calibrator.shown
    groups: dict[str, list[SelectedLayer]] = defaultdict(list)
    for name, layer in plan.selection.layers.items():
        if name in errors.found:
            matrix = plan.selection.experts.get(name)
            groups[matrix.experts if matrix else name].append(layer)
    same = dict.fromkeys(plan.selection.layers, candidates[fitting[-1]])
    chosen = same | {layer.name: candidates[0] for layers in groups.values() for layer in layers}
    left = plan.options.target_bytes - with_schemes(plan, chosen).bytes_after
    sizes = {key: [sum(_nbytes(one, kbit) for one in layers) for kbit in candidates] for key, layers in groups.items()}
    found = {key: [errors.found[one.name] for one in layers] for key, layers in groups.items()}
    sums = {key: [sum(errors) for errors in zip(*of_layers, strict=True)] for key, of_layers in found.items()}
    for key, place in spend(sizes, sums, left).items():
        chosen |= {layer.name: candidates[place] for layer in groups[key]}
    return Sizes({name: kbit.bits for name, kbit in chosen.items()}, shown, len(errors.found))


def _nbytes(layer: SelectedLayer, kbit: KBit) -> int:
    specs = LAYOUTS[2].weight_specs(layer.name, layer.out_features, layer.in_features, scheme_with(kbit, layer.lookup))
    return sum(spec.nbytes for spec in specs)


class _NoJournal(Journal):
    """Keeps nothing: what is measured here is small, and what is chosen is remembered."""

    def __init__(self) -> None:
        """Open no file."""

    def get(self, kind: str, name: str) -> None:
        """Return nothing."""

    def put(self, kind: str, name: str, value: Any = None, tensors: Sequence[Tensor] = ()) -> None:
        """Do nothing."""

    def remember(self, kind: str, name: str, compute: Callable[[], Any]) -> Any:
        """Return what is computed."""
        return compute()


class _Errors:
    """Measures the layers that a pass reaches, in the place of what rounds them."""

    def __init__(self, candidates: Sequence[KBit]) -> None:
        self._candidates = candidates
        self.found: dict[str, list[float]] = {}
        self.wide: Mapping[str, int] = {}
        self.notice = ""

    def of(self, name: str, x: Tensor, rows: Tensor) -> Round:
        """Return what measures a layer's weight for its input, float32 [T, K]; of several calls the first counts."""

        def measure(weight: Tensor, grid: Grid) -> Tensor:
            energy = blockwise_linear(rows, weight).square().sum(1)
            nothing, found = torch.empty(0, dtype=torch.int64), []
            for kbit in self._candidates:
                norms = column_norms(weight, *round_to_nearest(weight, scheme_with(kbit)))
                found += error_curve(rows, [norms], [energy], nothing, scheme_with(kbit))[1]
            self.found.setdefault(name, found)
            return round_to_nearest(weight, scheme_with(self._candidates[0]))[0]

        return measure

    def quantize(self, layer: SelectedLayer, weight: Tensor, rounding: Round | None) -> tuple[Tensor, Grid]:
        """Measure a weight; nothing is written."""
        codes, grid = round_to_nearest(weight, scheme_with(self._candidates[0]))
        return (codes if rounding is None else rounding(weight, grid)), grid
