"""Progress bars, which appear on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress_bar(total: int, title: str, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield a callback `(tensor name, bytes done)` that moves a bar; no bar when quiet or not on a terminal."""
    bar: Any = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=title,
        disable=quiet or not sys.stderr.isatty(),
        leave=False,
    )
    with bar:

        def advance(name: str, nbytes: int) -> None:
            bar.set_postfix_str(name[-48:], refresh=False)
            bar.update(nbytes)

        yield advance


@contextmanager
def pass_bar(title: str, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield a callback `(what ran, passes in all)` that moves a bar by one forward pass, as `progress_bar` does."""
    bar: Any = tqdm(unit="pass", desc=title, disable=quiet or not sys.stderr.isatty(), leave=False)
    with bar:

        def advance(name: str, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name[-48:], refresh=False)
            bar.update(1)

        yield advance
