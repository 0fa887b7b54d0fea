"""Rows of a mixture, sorted by the experts that they belong to."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def by_expert(x: Tensor, expert_of_row: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every expert that has rows: its number, which rows they are, int64 [R], and their inputs [R, K].

    Args:
        x: [T, K].
        expert_of_row: integer [T * r], r rows for every one of x, next to each other.
        experts: how many there are; a row with another number belongs to none.

    """
    repeats = len(expert_of_row) // max(1, len(x))
    expert, order = expert_of_row.long().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts + 1, device=expert.device)).tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            rows = order[start:end]
            yield number, rows, x[rows // repeats]
