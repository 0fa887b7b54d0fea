"""What the user may ask for: the criteria, and the numbers that bound them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Where the error is measured, and so what k can be; the largest is what kernels are made for.
GRID = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# No more than this share of a layer's dimensions is worth a budget: past it, 16 bit would be simpler.
_MAX_SHARE = 4
# The paper's definition of an outlier feature (section 4.1): its magnitude, and in how many positions.
OUTLIER_MAGNITUDE = 6.0
OUTLIER_POSITIONS = 0.06


class Criterion(NamedTuple):
    """How outliers are chosen; `value` is the budget of `top-k`, the magnitude of `threshold`, the share of `proxy`.

    `top-k`: so many columns per layer on average, split by measured error. `threshold`: the paper's, every dimension
    that reaches a magnitude. `systematic`: the paper's outlier features, a magnitude of 6 in 6 % of the positions.
    `proxy`: a share of the columns of each layer, by the weights of the layer before (`proxy.py`).
    """

    kind: str
    value: float | None

    @property
    def measured(self) -> bool:
        """Whether the columns are chosen by what a calibrated pass sees."""
        return self.kind not in ("none", "proxy")

    @property
    def amount(self) -> float:
        """`value`, and 0 where there is none."""
        return self.value or 0

    def __str__(self) -> str:
        """Return the criterion as the user writes it."""
        return self.kind if self.value is None else f"{self.kind}={self.value:g}"


def parse_criterion(text: str) -> Criterion:
    """Parse `none`, `systematic`, `top-k=16`, `threshold=6.0` or `proxy=0.02`. Raises ValueError."""
    if text in ("none", "systematic"):
        return Criterion(text, None)
    match = re.fullmatch(r"(top-k|threshold|proxy)=(\d+(?:\.\d+)?)", text)
    if not match or float(match[2]) <= 0:
        ways = "none, systematic, top-k=16, threshold=6.0 or proxy=0.02"
        raise ValueError(f"outliers {text!r}, expected {ways} (any number > 0)")
    if match[1] == "proxy" and float(match[2]) > 1 / _MAX_SHARE:
        raise ValueError(f"outliers {text!r}, expected a share of at most {1 / _MAX_SHARE:g}, such as proxy=0.02")
    return Criterion(match[1], float(match[2]))


def budget_notices(criterion: Criterion, in_features: Iterable[int]) -> list[str]:
    """Say it where layers of these widths cannot keep as many columns as a budget has."""
    most = [max_candidates(width) for width in in_features]
    if criterion.kind != "top-k" or criterion.amount * len(most) <= sum(most):
        return []
    return [
        f"--outliers {criterion} is more than there can be: a layer keeps {GRID[-1]} columns at most, and no more than "
        f"one in {_MAX_SHARE}, which is {sum(most) / len(most):g} on average here"
    ]


def max_candidates(in_features: int) -> int:
    """Return how many of a layer's dimensions may be given a budget."""
    return min(GRID[-1], max(1, in_features // _MAX_SHARE))
