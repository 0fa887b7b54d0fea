"""What error is left in a layer's output when some of its input columns stay in 16 bit.

Quantizing a row of activations costs in proportion to its range, and a few dimensions set the range. So the dimensions
of an input are ranked by their largest magnitude, and for a grid of k it is measured what error is left in the layer's
output when the first k of them stay in 16 bit. With the column norms a_j = |W_j|^2 and e_j = |W_j - Wq_j|^2, the error
of token t is, by expectation over independent rounding errors,

    err_t(k) = sum_j a_j (x_tj - xq_tj)^2 + sum_j e_j xq_tj^2      over the dimensions j that are quantized,

which needs neither another product nor the weight itself once a and e are known. Relative to the output it is averaged
in two ways, per token and over all tokens, because single huge tokens must count, but not alone.

Layers that share an input share its ranking, their errors add up, and they get the same dimensions.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmint8.kernels.reference import Activation, quantize_rows

from .criterion import GRID, OUTLIER_MAGNITUDE, OUTLIER_POSITIONS, Criterion, max_candidates

_TINY = 1e-30
_BLOCK_ELEMENTS = 1 << 17


def column_norms(weight: Tensor, values: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return |W_j|^2 and |W_j - Wq_j|^2 for every column, float32 [K], of a weight [N, K] and its quantization."""
    norms = torch.zeros(2, weight.shape[1], device=weight.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        block = weight[rows].float()
        norms[0] += block.square().sum(0)
        norms[1] += (values[rows].float() * (absmax[rows] / 127)[:, None] - block).square_().sum(0)
    return norms[0], norms[1]


@dataclass
class InputGroup:
    """The layers that share an input, and what was measured on it.

    `dims` are the candidates, by falling magnitude; `errors[i]` is the relative output error, summed over the layers,
    when the first `ks[i]` of them stay in 16 bit. What is chosen are the candidates at the first positions of `order`.
    `absmax` is the largest magnitude of each candidate, and then that of all other dimensions, where there are any.
    """

    layers: list[str]
    dims: Tensor  # int64 [C]
    absmax: Tensor  # float32 [C] or [C + 1], on the CPU
    order: Tensor  # int64 [C]
    statistics: dict[str, Any]
    ks: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def kept_absmax(self, count: int) -> float:
        """Return the largest magnitude that was quantized, with `count` candidates in 16 bit; exactly, unrounded."""
        return float(self.absmax.index_fill(0, self.order[:count], 0).max())


Curve = tuple[list[int], list[float]]
Remember = Callable[[str, Callable[[], Curve]], Curve]


def _compute(layer: str, measure: Callable[[], Curve]) -> Curve:
    return measure()


class InputStatistics:
    """Collects what a streamed forward pass shows, layer by layer; holds an input as long as the model does."""

    def __init__(self, criterion: Criterion, activation: Activation, remember: Remember = _compute) -> None:
        """Take the criterion, which bounds the candidates, and the way activations will be quantized.

        `remember` gets the names of a group's layers and a function that measures the error curve, which it returns.
        """
        self._criterion, self._activation, self._remember = criterion, activation, remember
        self._open: list[_OpenGroup] = []
        self.groups: list[InputGroup] = []

    def see(self, layer: str, x: Tensor, rows: Tensor, norms: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Take one layer's input and output, and return the candidate dimensions, int64 [C].

        Args:
            layer: its name.
            x: the input as the model holds it; layers share an input when this is the same object.
            rows: the input, float32 [T, K].
            norms: from `column_norms`.
            out: the layer's output without bias, float32 [T, N].

        """
        group = next((group for group in self._open if group.source() is x), None)
        if group is None:
            self._close([group for group in self._open if group.source() is None])
            group = _OpenGroup(weakref.ref(x), rows, self._describe(rows))
            self._open.append(group)
            self.groups.append(group.result)
        group.result.layers.append(layer)
        group.norms.append(norms)
        group.energies.append(out.square().sum(1))
        return group.result.dims

    def finish(self) -> list[InputGroup]:
        """Measure what is still open and return all groups, in the order in which they were reached."""
        self._close(list(self._open))
        return self.groups

    def _close(self, groups: list["_OpenGroup"]) -> None:
        for group in groups:
            measure = partial(error_curve, group.rows, group.norms, group.energies, group.result.dims, self._activation)
            group.result.ks, group.result.errors = self._remember(" ".join(group.result.layers), measure)
            self._open.remove(group)

    def _describe(self, rows: Tensor) -> InputGroup:
        absmax = rows.abs().amax(0)
        positions = (rows.abs() >= OUTLIER_MAGNITUDE).float().mean(0)
        ranking = absmax.argsort(descending=True, stable=True).cpu()
        count = self._candidates(absmax, positions)
        dims = ranking[:count]
        quartiles = torch.quantile(rows[:, dims], torch.tensor([0.25, 0.5, 0.75], device=rows.device), dim=0)
        statistics = {
            "tokens": rows.shape[0],
            "absmax_median": rounded([float(absmax.median())])[0],
            "outlier_features": int((positions >= OUTLIER_POSITIONS).sum()),
            "dims": dims.tolist(),
            "absmax": rounded(absmax[dims].tolist()),
            "positions": rounded(positions[dims].tolist()),
            "quartiles": [rounded(column) for column in quartiles.t().tolist()],
        }
        return InputGroup([], dims, absmax.cpu()[ranking[: count + 1]], torch.arange(len(dims)), statistics)

    def _candidates(self, absmax: Tensor, positions: Tensor) -> int:
        budget = max_candidates(len(absmax))
        if self._criterion.kind == "threshold":
            return max(budget, int((absmax >= (self._criterion.value or 0)).sum()))
        if self._criterion.kind == "systematic":
            largest = absmax[positions >= OUTLIER_POSITIONS]
            return max(budget, int((absmax >= largest.min()).sum())) if len(largest) else budget
        return budget


@dataclass
class _OpenGroup:
    source: Callable[[], Tensor | None]
    rows: Tensor
    result: InputGroup
    norms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)


def error_curve(
    x: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]],
    energies: Sequence[Tensor],
    dims: Tensor,
    activation: Activation,
) -> Curve:
    """Return the k of the grid and the relative output error at each, summed over the layers of a group.

    Args:
        x: their input, float32 [T, K].
        norms: per layer, from `column_norms`.
        energies: per layer, the squared norm of its output for each token, float32 [T].
        dims: the candidates by falling magnitude, int64 [C].
        activation: how rows will be quantized.

    """
    weight_norms = torch.stack([norm for norm, _ in norms], 1)  # [K, L]
    weight_errors = torch.stack([error for _, error in norms], 1)  # [K, L]
    energy = torch.stack(list(energies), 1)  # [T, L]
    per_token = 1 / (energy + 1e-6 * energy.mean(0) + _TINY) / len(x)
    overall = 1 / energy.sum(0).clamp_min(_TINY)
    largest = min(len(dims), GRID[-1])
    ks, errors = [k for k in GRID if k <= largest], []
    for k in ks:
        kept = x.index_fill(1, dims[:k].to(x.device), 0)
        quantized = quantize_rows(kept, dims[:0], activation).dequantize()  # what is left out is 0 already
        error = (kept - quantized).square_() @ weight_norms + quantized.square() @ weight_errors
        errors.append(float((error * (per_token + overall)).sum() / 2))
    return ks, errors


def rounded(values: Sequence[float]) -> list[float]:
    """Round to four significant digits: the manifest holds hundreds of these per layer."""
    return [float(f"{value:.4g}") for value in values]
