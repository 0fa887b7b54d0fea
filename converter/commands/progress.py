"""Progress: a bar on a terminal, and a line a minute elsewhere, in logs and pipes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from ..words import size
from .terminal import printable

# Where there is no terminal, nothing is printed of what takes less.
_LINE_SECONDS = 60.0
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}{postfix}, about {remaining} left"


class _Lines:
    """Takes what tqdm would draw over and over in one place, and writes it line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def _bar(quiet: bool, **options: Any) -> Any:
    if not sys.stderr.isatty():
        seconds = {"mininterval": _LINE_SECONDS, "maxinterval": _LINE_SECONDS, "delay": _LINE_SECONDS}
        options |= {"file": _Lines(sys.stderr), "bar_format": _LINE, **seconds}
    return tqdm(disable=quiet, leave=False, **options)


@contextmanager
def progress_bar(total: int, title: str, quiet: bool, verbose: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Yield a callback `(tensor name, bytes done)` that moves a bar; with 0 bytes it says what is being done.

    Args:
        total: bytes in all.
        title: what is done to them.
        quiet: show nothing.
        verbose: a line for each tensor, too.

    """
    done = 0
    with _bar(quiet, total=total, unit="B", unit_scale=True, desc=title) as bar:

        def advance(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes > 0
            bar.set_postfix_str(f"{done} tensors, {printable(name)[-48:]}", refresh=False)
            bar.update(nbytes)
            if nbytes == 0 and sys.stderr.isatty():
                bar.refresh()
            elif nbytes and verbose and not quiet:
                bar.write(f"{printable(name)}: {size(nbytes)}", file=sys.stderr)

        yield advance


@contextmanager
def pass_bar(title: str, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield a callback `(what ran, passes in all)` that moves a bar by one forward pass, as `progress_bar` does."""
    with _bar(quiet, unit="pass", desc=title) as bar:

        def advance(name: str, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(printable(name)[-48:], refresh=False)
            bar.update(1)

        yield advance
