"""What follows from runs: the Pareto front, which precision is best for its bits, and what one choice is worth.

Between models of a family the curve of a precision is taken to be straight where size and perplexity are logarithms,
as "The case for 4-bit precision" (arXiv 2212.09720) draws it. Of one model alone perplexity tells less than KL, which
does not depend on what the text happens to like: there KL is the quality.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal, get_args

from llmint8.kernels.kbit.levels import DataType

from .runs import Run
from .schemes import Rounding, block_words

Key = Literal["data_type", "block", "proxy", "rounding"]
KEYS: tuple[Key, ...] = ("data_type", "block", "proxy", "rounding")
_ORDER = {"data_type": get_args(DataType), "rounding": get_args(Rounding)}
_BUDGETS = 400  # at which curves are compared
_SMALLEST_KL = 1e-7  # less is noise of float32

Point = tuple[float, float]


def is_family(runs: Sequence[Run]) -> bool:
    """Tell whether there is more than one model."""
    return len({run.measured.key for run in runs}) > 1


def quality(runs: Sequence[Run]) -> Literal["perplexity", "kl_mean"]:
    """Return which number of a run says how good it is; less is better."""
    return "perplexity" if is_family(runs) else "kl_mean"


def pareto(runs: Iterable[Run], measure: str) -> list[Run]:
    """Return the runs than which no other is both as small and as good, from the smallest on."""
    found: list[Run] = []
    known = [run for run in runs if getattr(run, measure) is not None]
    for run in sorted(known, key=lambda run: (run.total_bits, getattr(run, measure))):
        if not found or getattr(run, measure) < getattr(found[-1], measure):
            found.append(run)
    return found


def best_within(front: Sequence[Run], bits: float) -> Run | None:
    """Return the best run of a front that takes so many bits at most."""
    fitting = [run for run in front if run.total_bits <= bits]
    return fitting[-1] if fitting else None


def by_precision(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """Return for each number of bits the run with the least perplexity of each model, from the smallest model on."""
    found: dict[tuple[int, Any], Run] = {}
    for run in runs:
        key = run.scheme.bits, run.measured.key
        if run.perplexity is not None and (key not in found or run.perplexity < (found[key].perplexity or math.inf)):
            found[key] = run
    curves: dict[int, list[Run]] = defaultdict(list)
    for (bits, _), run in sorted(found.items(), key=lambda item: (item[0][0], item[1].total_bits)):
        curves[bits].append(run)
    return dict(curves)


@dataclass(frozen=True)
class Winners:
    """How often each precision is the best for its bits, of the budgets from `low` to `high` bits, logarithmically."""

    low: float
    high: float
    shares: dict[int, float]


def winners(runs: Sequence[Run]) -> Winners | None:
    """Compare the curves of all precisions where each of them is known; None where there is no such place."""
    curves = {bits: _curve(found) for bits, found in by_precision(runs).items()}
    curves = {bits: points for bits, points in curves.items() if len(points) > 1}
    places = _common(list(curves.values()))
    if not places:
        return None
    wins = dict.fromkeys(curves, 0)
    for place in places:
        wins[min(curves, key=lambda bits: _at(curves[bits], place))] += 1
    low, high = max(points[0][0] for points in curves.values()), min(points[-1][0] for points in curves.values())
    return Winners(math.exp(low), math.exp(high), {bits: count / len(places) for bits, count in wins.items()})


def _curve(runs: Iterable[Run]) -> list[Point]:
    """Return logarithms of size and perplexity, from the smallest size on."""
    return sorted((math.log(run.total_bits), math.log(run.perplexity)) for run in runs if run.perplexity)


def _common(curves: Sequence[Sequence[Point]]) -> list[float]:
    """Return places, evenly spread, at which two curves or more are known; none where there are none."""
    if len(curves) < 2 or min(map(len, curves)) < 2:
        return []
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    return [low + (high - low) * (step + 0.5) / _BUDGETS for step in range(_BUDGETS)] if low < high else []


def _at(points: Sequence[Point], x: float) -> float:
    """Return a curve's value between two of its points, on a straight line."""
    place = min(max(bisect_left(points, (x, -math.inf)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Choice:
    """What one choice is worth, all else being equal."""

    key: Key
    held: str  # what all else is, in words
    runs: list[Run]

    @property
    def values(self) -> list[Any]:
        """What there is to choose from: the plainest first, of blocks the smallest, and the row last."""
        found = {getattr(run.scheme, self.key) for run in self.runs}
        if self.key in _ORDER:
            return [value for value in _ORDER[self.key] if value in found]
        return sorted(found, key=lambda value: (value is None, value))

    @property
    def table(self) -> dict[int, dict[Any, float]]:
        """For each number of bits, the geometric mean over the models of the mean KL with each value."""
        kl: dict[int, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
            if run.kl_mean is not None:
                kl[run.scheme.bits][getattr(run.scheme, self.key)].append(math.log(max(run.kl_mean, _SMALLEST_KL)))
        return {
            bits: {value: math.exp(fmean(found[value])) for value in self.values if value in found}
            for bits, found in sorted(kl.items())
        }

    @property
    def at_equal_bits(self) -> dict[int, dict[Any, float]]:
        """For each number of bits and each value but the first, perplexity over that of the first at equal total bits.

        It is the geometric mean over all sizes for which the curves of both are known, so of a family only.
        """
        curves: dict[int, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
            curves[run.scheme.bits][getattr(run.scheme, self.key)].append(run)
        ratios: dict[int, dict[Any, float]] = defaultdict(dict)
        for bits, found in sorted(curves.items()):
            first = _curve(found[self.values[0]])
            for value in self.values[1:]:
                other = _curve(found[value])
                if places := _common([first, other]):
                    ratios[bits][value] = math.exp(fmean(_at(other, place) - _at(first, place) for place in places))
        return dict(ratios)


def choice(runs: Sequence[Run], key: Key) -> Choice | None:
    """Return what a choice is worth, where all else is what most runs have, and of these the best; None without one.

    Only numbers of bits are taken for which there is a choice.
    """
    alike: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    rest = [other for other in KEYS if other != key]
    for run in runs:
        if run.scheme.data_type is not None and run.kl_mean is not None:
            alike[tuple(getattr(run.scheme, other) for other in rest)].append(run)
    found = {others: _with_a_choice(some, key) for others, some in alike.items()}
    found = {others: some for others, some in found.items() if some}
    if not found:
        return None
    others = min(found, key=lambda others: (-len(found[others]), median(run.kl_mean or 0 for run in found[others])))
    words = ", ".join(value_words(other, value) for other, value in zip(rest, others, strict=True))
    return Choice(key, words, found[others])


def _with_a_choice(runs: Sequence[Run], key: Key) -> list[Run]:
    values: dict[int, set[Any]] = defaultdict(set)
    for run in runs:
        values[run.scheme.bits].add(getattr(run.scheme, key))
    return [run for run in runs if len(values[run.scheme.bits]) > 1]


def value_words(key: Key, value: Any) -> str:
    """Name a value of a scheme."""
    if key == "block":
        return block_words(value)
    if key == "proxy":
        return f"proxy {100 * value:g} %" if value else "no proxy"
    return f"rounding {value}" if key == "rounding" else str(value)


def budgets(front: Sequence[Run], most: int = 5) -> list[int]:
    """Return round sizes in bytes, a few of those that lie between the smallest and the largest of a front."""
    low, high = front[0].total_bits / 8, front[-1].total_bits / 8
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        found = [round(step * 10**power) for power in powers for step in steps if low <= step * 10**power <= high]
        if len(found) > 1:
            break
    apart = max(1, -(-len(found) // most))
    return found[apart // 2 :: apart]
