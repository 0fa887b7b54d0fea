"""Which of many names end like another, without a look at each."""

from bisect import bisect_left
from collections.abc import Iterable


class Endings:
    """Many names, to ask how many of them end like another."""

    def __init__(self, names: Iterable[str]) -> None:
        """Sort the names from behind: those with the same ending lie side by side."""
        self._backwards = sorted(name[::-1] for name in names)

    def count(self, ending: str) -> int:
        """Return how many names end so, whatever stands before it."""
        backwards = ending[::-1]
        last = bisect_left(self._backwards, True, key=lambda name: name[: len(backwards)] > backwards)
        return last - bisect_left(self._backwards, backwards)
