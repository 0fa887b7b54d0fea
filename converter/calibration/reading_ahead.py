"""The weight that the forward pass will need next, read while it uses another."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

from torch import Tensor

Read = Callable[[str], Tensor]


class ReadAhead:
    """Reads the next tensor of an expected order in a thread while the current one is used."""

    def __init__(self, read: Read, order: list[str]) -> None:
        """Take what reads a tensor, and the names in the order expected."""
        self._read = read
        self._next = dict(pairwise(order))
        self._pending: tuple[str, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "ReadAhead":
        """Begin nothing yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give up what is being read."""
        self._pending = None
        self._thread.shutdown(cancel_futures=True)

    def get(self, name: str) -> Tensor:
        """Return a tensor, and begin to read the one that follows it in the order."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == name:
            tensor = pending[1].result()
        else:
            pending = None
            tensor = self._read(name)
        following = self._next.get(name)
        if following is not None:
            self._pending = following, self._thread.submit(self._read, following)
        return tensor
