"""What error is left in a layer's output when some of its input columns stay in 16 bit.

Quantizing what shares a scale costs in proportion to its range, and a few dimensions set the range. So the dimensions
of an input are ranked by their largest magnitude; of one that is not quantized by their mean square, which tells how
much of a weight's error they pass on. For a grid of k it is measured what error is left in the layer's output when the
first k of them stay in 16 bit. With a_j = |W_j|^2 and e_j = |W_j - Wq_j|^2, the norms of the columns, the error of
token t is, by expectation over independent rounding errors,

    err_t(k) = sum_j a_j (x_tj - xq_tj)^2 + sum_j e_j xq_tj^2      over the dimensions j that are quantized,

which needs neither another product nor the weight itself once a and e are known. Relative to the output it is averaged
in two ways, per token and over all tokens, because single huge tokens must count, but not alone.
Of a rotated layer, j are the dimensions that it is rotated to. An input that is not quantized is xq itself.

Layers that share an input share its ranking, their errors add up, and they get the same dimensions. All calls count.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import Scheme
from llmint8.kernels.reference import Rotation, quantize_rows
from llmint8.kernels.weights import rotate

from ..coding import Grid
from ..words import rounded
from .criterion import GRID, OUTLIER_MAGNITUDE, OUTLIER_POSITIONS, Criterion, max_candidates

_TINY = 1e-30
_BLOCK_ELEMENTS = 1 << 17
Norms = tuple[Tensor, Tensor]


def column_norms(weight: Tensor, codes: Tensor, grid: Grid, rotation: Rotation | None = None) -> Norms:
    """Return |W_j|^2 and |W_j - Wq_j|^2 for every column, float32 [K], of a weight [N, K] and its codes on a grid."""
    norms = torch.zeros(2, weight.shape[1], device=weight.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        block = rotate(weight[rows], rotation)
        norms[0] += block.square().sum(0)
        norms[1] += (grid.dequantize(codes[rows], rows) - block).square_().sum(0)
    return norms[0], norms[1]


@dataclass
class InputGroup:
    """The layers that share an input, and what was measured on it.

    `dims` are the candidates in their order; `errors[i]` is the relative output error, summed over the layers, when the
    first `ks[i]` of them stay in 16 bit. Chosen are the candidates at the first positions of `order`. `absmax`
    is the largest magnitude of each candidate, and then of all other dimensions, if any; `positions` the share of
    tokens in which a candidate reaches the paper's magnitude.
    """

    layers: list[str]
    dims: Tensor  # int64 [C]
    absmax: Tensor  # float32 [C] or [C + 1], on the CPU
    order: Tensor  # int64 [C]
    statistics: dict[str, Any]
    ks: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # float32 [C], on the CPU

    def kept_absmax(self, count: int) -> float:
        """Return the largest magnitude that was quantized, with `count` candidates in 16 bit; exactly, unrounded."""
        return float(self.absmax.index_fill(0, self.order[:count], 0).max())


Curve = tuple[list[int], list[float]]
Remember = Callable[[str, Callable[[], Curve]], Curve]


def _compute(layer: str, measure: Callable[[], Curve]) -> Curve:
    return measure()


class InputStatistics:
    """Collects what a streamed forward pass shows, call by call; holds an input as long as the model does."""

    def __init__(self, criterion: Criterion, scheme: Scheme, remember: Remember = _compute) -> None:
        """Take the criterion, which bounds the candidates, and how layers and their inputs will be coded.

        `remember` gets the names of the layers that share an input, with the number of the call after the first, and a
        function that measures the error curve there, and returns the curve.
        """
        self._criterion, self._scheme, self._remember = criterion, scheme, remember
        self._open: list[_Call] = []
        self._group_of: dict[str, _Group] = {}

    def see(self, layer: str, x: Tensor, rows: Tensor, norms: Norms, out: Tensor) -> Tensor:
        """Take one layer's input and output, and return the candidate dimensions, int64 [C].

        A layer may be seen many times. It stays with the layers that shared its first input, and all that they see
        adds up.

        Args:
            layer: its name.
            x: the input as the model holds it; layers share an input when this is the same object.
            rows: the input, float32 [T, K], T > 0.
            norms: from `column_norms`.
            out: the layer's output without bias, float32 [T, N].

        """
        group = self._group_of.get(layer)
        call = next((call for call in self._open if call.source() is x and group in (None, call.group)), None)
        if call is None:
            self._close([call for call in self._open if call.source() is None])
            by_square = self._scheme.kbit is not None and self._criterion.kind == "top-k"
            call = _Call(weakref.ref(x), rows, group or _Group(self._criterion, rows.shape[1], by_square))
            call.group.add(rows)
            self._open.append(call)
        if group is None:
            self._group_of[layer] = call.group
            call.group.layers.append(layer)
        call.norms.append(norms)
        call.energies.append(torch.linalg.vector_norm(out, dim=1).square())  # makes no copy: logits are large
        return call.group.dims

    def finish(self) -> list[InputGroup]:
        """Measure what is still open and return all groups, in the order in which they were reached."""
        self._close(list(self._open))
        return [group.result() for group in dict.fromkeys(self._group_of.values())]

    def _close(self, calls: list["_Call"]) -> None:
        for call in calls:
            group = call.group
            measure = partial(error_curve, call.rows, call.norms, call.energies, group.dims, self._scheme)
            names, number = " ".join(group.layers), len(group.curves) + 1
            curve = self._remember(names if number == 1 else f"{names}, call {number}", measure)
            group.curves.append((len(call.rows), len(call.norms), curve))
            self._open.remove(call)


class _Group:
    """The layers that share an input, and what all their calls have shown so far."""

    def __init__(self, criterion: Criterion, in_features: int, by_square: bool) -> None:
        self._criterion, self._by_square = criterion, by_square
        self.layers: list[str] = []
        self.curves: list[tuple[int, int, Curve]] = []  # of each call, with its number of tokens and of layers
        self.dims = torch.empty(0, dtype=torch.int64)
        self._quartiles = torch.empty(3, 0)
        self._tokens = 0
        self._absmax = torch.zeros(in_features)
        self._squares = torch.zeros(in_features)
        self._large = torch.zeros(in_features)  # tokens in which a dimension reaches the paper's magnitude

    @property
    def _positions(self) -> Tensor:
        return self._large / self._tokens

    def add(self, rows: Tensor) -> None:
        """Take the input [T, K] of one more call, and rank the dimensions anew."""
        magnitudes = rows.abs()
        self._tokens += len(rows)
        self._absmax = self._absmax.maximum(magnitudes.amax(0).cpu())
        self._squares += rows.square().sum(0).cpu()
        self._large += (magnitudes >= OUTLIER_MAGNITUDE).sum(0).cpu()
        earlier = torch.full((3, rows.shape[1]), torch.nan).index_copy_(1, self.dims, self._quartiles)
        ranked_by = self._squares if self._by_square else self._absmax
        self.dims = ranked_by.argsort(descending=True, stable=True)[: self._candidates()]
        quartiles = torch.quantile(rows[:, self.dims], torch.tensor([0.25, 0.5, 0.75], device=rows.device), dim=0).cpu()
        # All tokens are not kept for it: of several calls the mean is taken, of those in which it was a candidate.
        earlier = earlier[:, self.dims]
        self._quartiles = earlier.lerp(quartiles, len(rows) / self._tokens).where(earlier.isfinite(), quartiles)

    def _candidates(self) -> int:
        absmax, positions = self._absmax, self._positions
        budget = max_candidates(len(absmax)) if self._criterion.measured else 1
        if self._criterion.kind == "threshold":
            return max(budget, int((absmax >= self._criterion.amount).sum()))
        if self._criterion.kind == "systematic":
            largest = absmax[positions >= OUTLIER_POSITIONS]
            return max(budget, int((absmax >= largest.min()).sum())) if len(largest) else budget
        return budget

    def result(self) -> InputGroup:
        """Put together what was measured."""
        absmax, positions = self._absmax[self.dims], self._positions[self.dims]
        statistics = {
            "tokens": self._tokens,
            "absmax_median": rounded([float(self._absmax.median())])[0],
            "outlier_features": int((self._positions >= OUTLIER_POSITIONS).sum()),
            "dims": self.dims.tolist(),
            "absmax": rounded(absmax.tolist()),
            "positions": rounded(positions.tolist()),
            "quartiles": [rounded(column) for column in self._quartiles.t().tolist()],
        }
        if len(self.dims) < len(self._absmax):
            absmax = torch.cat([absmax, self._absmax.index_fill(0, self.dims, 0).amax(0, keepdim=True)])
        order = torch.arange(len(self.dims))
        return InputGroup(self.layers, self.dims, absmax, order, statistics, *self._curve(), positions)

    def _curve(self) -> Curve:
        """Return the mean of a layer's error over the tokens of all calls, each with its ranking, times the layers."""
        ks = min((ks for _, _, (ks, _) in self.curves), key=len)
        seen = sum(tokens * layers for tokens, layers, _ in self.curves)
        sums = [sum(tokens * errors[i] for tokens, _, (_, errors) in self.curves) for i in range(len(ks))]
        return ks, [len(self.layers) * error / seen for error in sums]


@dataclass
class _Call:
    """One input, while the model holds it, and the layers that have seen it."""

    source: Callable[[], Tensor | None]
    rows: Tensor
    group: _Group
    norms: list[Norms] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)


def error_curve(
    x: Tensor,
    norms: Sequence[Norms],
    energies: Sequence[Tensor],
    dims: Tensor,
    scheme: Scheme,
) -> Curve:
    """Return the k of the grid and the relative output error at each, summed over the layers of a group.

    Args:
        x: their input, float32 [T, K].
        norms: per layer, from `column_norms`.
        energies: per layer, the squared norm of its output for each token, float32 [T].
        dims: the candidates in their order, int64 [C].
        scheme: how rows will be quantized.

    """
    weight_norms = torch.stack([norm for norm, _ in norms], 1)  # [K, L]
    weight_errors = torch.stack([error for _, error in norms], 1)  # [K, L]
    energy = torch.stack(list(energies), 1)  # [T, L]
    per_token = 1 / (energy + 1e-6 * energy.mean(0) + _TINY) / len(x)
    overall = 1 / energy.sum(0).clamp_min(_TINY)
    ks, errors = [k for k in GRID if k <= len(dims)], []
    for k in ks:
        kept = rotate(x.index_fill(1, dims[:k].to(x.device), 0), scheme.rotation)
        # What is left out is 0 already.
        how = dims[:0], scheme.activation, scheme.activation_group
        quantized = kept if scheme.kbit else quantize_rows(kept, *how).dequantize()
        error = (kept - quantized).square_() @ weight_norms + quantized.square() @ weight_errors
        errors.append(float((error * (per_token + overall)).sum() / 2))
    return ks, errors
