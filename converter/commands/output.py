"""Standard output and standard error such that printing decides neither what a command does nor its exit code.

A character that the encoding lacks is written by its number, `\\u4e2d`. Who closed a pipe has seen enough: the rest is
dropped, and the work goes on. What cannot be written for another reason, such as a full disk, is dropped as well, and
that is told. Where what is printed is the result, as of `llmint8 inspect`, the command ends there: with an error, or
without one if nobody reads any more.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import click


class _Stream:
    """A text stream whose `write` and `flush` do not fail. It has no `buffer`, so that nobody writes past it."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.unread = False
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # by this click tells text streams from others
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        encoding = self._stream.encoding or "utf-8"
        known = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self._stream.write(known))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.unread or self.failure is not None:
            return
        try:
            action()
        except BrokenPipeError:
            self.unread = True
        except OSError as error:
            self.failure = OSError(f"{self._name}: {error.strerror}")
        else:
            return
        # Python tries what is left in the buffer once more when it ends, and would exit with 120.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Have everything printed through streams that do not fail; to nowhere where there are none (`>&-`)."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out = _Stream(before[0] or nowhere, "standard output")
        err = _Stream(before[1] or nowhere, "standard error")
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield
        finally:
            out.flush()
            if out.failure is not None:
                click.echo(f"Note: {out.failure}; what was printed is not complete", err=True)
            err.flush()
            sys.stdout, sys.stderr = before


def echo_result(text: str, nl: bool = True) -> None:
    """Print what the command was run for.

    Raises:
        OSError: it cannot be written.
        click.exceptions.Exit: nobody reads it any more, which is no error.

    """
    click.echo(text, nl=nl)
    out = sys.stdout
    if not isinstance(out, _Stream):
        return
    if out.unread:
        raise click.exceptions.Exit(0)
    if out.failure is not None:
        failure, out.failure, out.unread = out.failure, None, True
        raise failure
