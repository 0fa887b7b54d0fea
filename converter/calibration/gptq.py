"""Rounding that makes up for itself: what is lost where one column is rounded is made up for in those after it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323), on any grid that is fixed before: the scales and levels are those of the
weight as it was. Columns are rounded one after the other, those of the largest inputs first; after each, the columns to
come are moved so that the layer's output for the calibration tokens changes least. How far follows from the inverse of
`H = x^T x`, in float32, of which the rows of the Cholesky factor are what is needed (their section 3.3).

H has K x K numbers, and three of that size are in memory for a moment. Layers with more than `MAX_DIMENSIONS` inputs
are done in blocks of so many, as if the blocks had nothing to do with each other: 3 GB at most. What is found depends
on how a machine adds up, so it is not the same to the bit everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmint8.formats import Scheme
from llmint8.kernels.weights import rotate

from ..coding import Grid
from ..outliers.choosing import likely_outliers
from ..outliers.criterion import Criterion

Round = Callable[[Tensor, Grid], Tensor]

MAX_DIMENSIONS = 16384
# Of the mean of its diagonal, added to H: 512 tokens tell little of thousands of dimensions. With the 0.01 of the
# paper, rounding to nearest is better for int8 (docs/accuracy.md). What k bits lose is more, and so is what would be
# made up for by chance (docs/kbit.md).
DAMPING, DAMPING_OF_K_BITS = 0.1, 0.3
_BLOCK = 128


class Rounding(Protocol):
    """What finds the codes of the weights that a pass reaches; `wide` and `notice` are as those of `Gptq`."""

    wide: Mapping[str, int]

    @property
    def notice(self) -> str:
        """Say what the user should know."""

    def of(self, name: str, x: Tensor, rows: Tensor) -> Round:
        """Return what rounds a layer; see `Gptq.of`."""


class Gptq:
    """Rounds the weights of the layers that a pass reaches; those that share an input share what is computed."""

    def __init__(self, criterion: Criterion, scheme: Scheme, known: Callable[[str], Tensor] | None = None) -> None:
        """Take how outlier dimensions will be chosen, and how layers are coded.

        `known` returns the dimensions of a layer where they are known already.
        """
        self._criterion, self._rotation, self._known = criterion, scheme.rotation, known
        self._by_square, self._damping = scheme.kbit is not None, DAMPING_OF_K_BITS if scheme.kbit else DAMPING
        self._last: tuple[Tensor, Round] | None = None
        self.wide: Mapping[str, int] = {}  # layers that are done in blocks, and their numbers of inputs

    @property
    def notice(self) -> str:
        """Say which layers were done in blocks."""
        name, inputs = next(iter(self.wide.items()))
        more = f" and {len(self.wide) - 1} more" if len(self.wide) > 1 else ""
        return (
            f"GPTQ takes the {inputs} inputs of {name}{more} in blocks of {MAX_DIMENSIONS}, as if they had nothing to "
            "do with each other: all at once would take too much memory"
        )

    def of(self, name: str, x: Tensor, rows: Tensor) -> Round:
        """Return what turns a weight [N, K] and its grid to codes [N, K], for a layer with this input.

        Which dimensions stay in 16 bit may not be known yet. Taken for it are as many as there are on average: one of
        them that does not stay after all is rounded to nearest.

        Args:
            name: of the layer.
            x: the input as the model holds it; layers share an input when this is the same object.
            rows: the input, float32 [T, K], finite.

        """
        if rows.shape[1] > MAX_DIMENSIONS:
            self.wide = {**self.wide, name: rows.shape[1]}
        if self._last is None or self._last[0] is not x:
            self._last = None  # what is in it is large
            dims = self._known(name) if self._known else likely_outliers(rows, self._criterion, self._by_square)
            kept = rows.index_fill(1, dims.to(rows.device), 0)
            correlations = Correlations(rotate(kept, self._rotation), self._damping)

            def rounded(weight: Tensor, grid: Grid) -> Tensor:
                return correlations.round(rotate(weight, self._rotation), grid)

            self._last = x, rounded
        return self._last[1]


class Correlations:
    """What the inputs x [T, K] of some layers say about each other: the Cholesky factors of the blocks of H^-1."""

    def __init__(self, x: Tensor, damping: float = DAMPING) -> None:
        """Take the inputs, float32, as they will be multiplied: rotated, and 0 where they are multiplied in 16 bit.

        `damping` is a share of the mean of H's diagonal, and is added to that.
        """
        self._blocks = [_factor(block, damping) for block in torch.split(x, MAX_DIMENSIONS, 1)]

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """Round a weight, float32 [N, K], rotated as x is, to the codes of a grid, [N, K]."""
        units, first, codes = grid.units(), 0, []
        for part, block in zip(torch.split(weight, MAX_DIMENSIONS, 1), self._blocks, strict=True):
            codes.append(_round(part, grid, units, first, *block))
            first += part.shape[1]
        return torch.cat(codes, 1)


def _factor(x: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the order of the dimensions, int64 [K], and the upper Cholesky factor of H^-1 in it, float32 [K, K]."""
    hessian = x.t() @ x
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    # A dimension that is always 0 says nothing: it is rounded to nearest, and nothing is made up for in it.
    added = damping * float(diagonal.mean()) or 1.0
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(added)
    return order, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def _round(weight: Tensor, grid: Grid, units: Tensor, first: int, order: Tensor, factor: Tensor) -> Tensor:
    """Round some columns of a weight, the first of which is at dimension `first`."""
    left = (weight / units[:, None]).t()[order].contiguous()  # a dimension a row
    codes = torch.empty(left.shape, dtype=grid.dtype, device=left.device)
    dims = (order + first).tolist()
    for start in range(0, len(left), _BLOCK):
        block, rows = left[start : start + _BLOCK], factor[start : start + _BLOCK]
        stop = start + len(block)
        errors = torch.empty_like(block)
        for place, here in enumerate(range(start, stop)):
            codes[here], rounded = grid.nearest(block[place], dims[here])
            torch.sub(block[place], rounded, out=errors[place]).div_(rows[place, here])
            block[place:].addr_(rows[place, here:stop], errors[place], alpha=-1)
        left[stop:].addmm_(rows[:, stop:].t(), errors, alpha=-1)
    found = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    found[:, order] = codes.t()
    return found
