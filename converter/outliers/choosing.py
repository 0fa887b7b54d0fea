"""How many columns each layer keeps in 16 bit: the budget, split over the layers.

It goes to where the measured error falls most per column: a greedy walk down the convex hulls of the curves. No layer's
name, kind or depth has a say. docs/accuracy.md has what this was compared with.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .criterion import OUTLIER_MAGNITUDE, OUTLIER_POSITIONS, Criterion, max_candidates
from .measuring import InputGroup


def select(groups: Sequence[InputGroup], criterion: Criterion) -> list[int]:
    """Return how many of its candidates each group keeps in 16 bit: the first so many of its `order`."""
    if not criterion.measured:
        return [0] * len(groups)
    if criterion.kind == "top-k":
        return _split(groups, criterion.amount)
    if criterion.kind == "threshold":
        return [int((group.absmax[: len(group.dims)] >= criterion.amount).sum()) for group in groups]
    counts = []
    for group in groups:
        # `positions` does not fall with the magnitude: what is not systematic is passed over.
        chosen = group.positions >= OUTLIER_POSITIONS
        group.order = chosen.logical_not().int().argsort(stable=True)
        counts.append(int(chosen.sum()))
    return counts


def likely_outliers(rows: Tensor, criterion: Criterion, by_square: bool = False) -> Tensor:
    """Return the dimensions of an input [T, K] that will stay in 16 bit if its layer is like the average, int64 [k].

    `by_square` ranks them by mean square, see `measuring.py`.
    """
    absmax = rows.abs().amax(0)
    if criterion.kind == "none":
        return absmax.new_empty(0, dtype=torch.int64)
    if criterion.kind == "top-k":
        ranked_by = rows.square().sum(0) if by_square else absmax
        return ranked_by.topk(min(int(criterion.amount), max_candidates(len(absmax)))).indices
    return (absmax >= (criterion.amount or OUTLIER_MAGNITUDE)).nonzero().flatten()


def _split(groups: Sequence[InputGroup], budget: float) -> list[int]:
    """Spend `budget` columns per layer, on the steepest steps of the hulls first."""
    left = int(budget * sum(len(group.layers) for group in groups))
    steps = []
    for index, group in enumerate(groups):
        steps += [(-fall / len(group.layers), index, low, high) for fall, low, high in _hull(group.ks, group.errors)]
    counts = [0] * len(groups)
    closed = set()
    for _, index, low, high in sorted(steps):
        cost = (high - low) * len(groups[index].layers)
        if index in closed or cost > left:
            closed.add(index)
            continue
        counts[index] = high
        left -= cost
    return counts


def spend(sizes: Mapping[str, Sequence[int]], errors: Mapping[str, Sequence[float]], left: int) -> dict[str, int]:
    """Return which of its candidates each thing gets, when all begin with the first and so many bytes are left.

    Args:
        sizes: of the candidates of each thing, rising.
        errors: that these leave.
        left: bytes beside the first candidates of all.

    """
    steps = []
    for name, of_thing in sizes.items():
        steps += [(-fall, name, low, high) for fall, low, high in _hull(of_thing, errors[name])]
    chosen, closed = dict.fromkeys(sizes, 0), set()
    for _, name, low, high in sorted(steps):
        if name in closed or high - low > left:
            closed.add(name)
            continue
        chosen[name] = sizes[name].index(high)
        left -= high - low
    # What is left is less than a step that was wanted: whatever fits it, where the error falls most.
    rest = {
        (errors[name][chosen[name]] - error, name, place)
        for name in sizes
        for place, error in enumerate(errors[name])
        if error < errors[name][chosen[name]]
    }
    for _, name, place in sorted(rest, reverse=True):
        cost = sizes[name][place] - sizes[name][chosen[name]]
        if cost <= left and errors[name][place] < errors[name][chosen[name]]:
            chosen[name] = place
            left -= cost
    return chosen


def _hull(ks: Sequence[int], errors: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return the steps of the lower convex hull as (fall per column or byte, from k, to k), steepest first."""
    points: list[tuple[int, float]] = []
    for k, error in zip(ks, errors, strict=True):
        if points and error >= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (k, error)):
            points.pop()
        points.append((k, error))
    return [(-_slope(low, high), low[0], high[0]) for low, high in pairwise(points)]


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
