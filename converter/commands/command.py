"""What every command does: its errors are one line and an exit code, its log is safe to print.

Nothing here or in the other modules of commands imports torch, transformers or huggingface_hub before a command runs:
`--help` and a usage error are answered at once.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .output import forgiving_output
from .terminal import harmless_record, printable


class Group(click.Group):
    """A group of commands that print as `Command` does."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        """Run a command; see `forgiving_output`."""
        with forgiving_output():
            return super().main(*arguments, **named)


class Command(click.Command):
    """A command whose errors are one line and an exit code, never a traceback, and which printing does not stop."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        """Run the command by itself; see `forgiving_output`."""
        with forgiving_output():
            return super().main(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. With --verbose the traceback of an error is logged as well."""
        # Batch systems end jobs this way; what was written is removed as after Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            without_torchao = _without_torchao(bool(ctx.params.get("trust_remote_code")))
            with without_torchao, _echoed_notes(), _hub_without_bars(bool(ctx.params.get("quiet"))):
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            logging.getLogger("llmint8").debug("traceback", exc_info=True)
            raise click.ClickException(_message(error, "verbose" in ctx.params)) from None


@contextmanager
def _hub_without_bars(quiet: bool) -> Iterator[None]:
    """Keep huggingface_hub from drawing bars, if wanted; it asks the environment when it is imported."""
    if not quiet:
        yield
        return
    if "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _message(error: Exception, verbose: bool) -> str:
    """Return one line: what an error says that a user can cause or meet; of any other its type, and where it was."""
    if isinstance(error, OSError | ValueError) or _is_ours(error):
        return printable(str(error))
    # A defect of ours, or of the model's code.
    what = printable(f"{type(error).__name__}: {error}")[:300]
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = "--verbose shows where" if verbose else printable(f"{Path(where.filename).name}, line {where.lineno}")
    return f"unexpected: {what} ({place})"


def _is_ours(error: Exception) -> bool:
    # Imported here it would bring torch, which may be what is broken; whatever raises one has imported it.
    errors = sys.modules.get("llmint8.formats.errors")
    return errors is not None and isinstance(error, errors.LLMInt8Error)


@contextmanager
def _without_torchao(needed: bool) -> Iterator[None]:
    """Have transformers not find torchao, which it imports with its first model where it is installed.

    It takes seconds, and prints warnings of its own. Nothing of ours needs it; a checkpoint's own code may.
    """
    hidden = not needed and "torchao" not in sys.modules
    if hidden:
        sys.modules["torchao"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            sys.modules.pop("torchao", None)


@contextmanager
def _echoed_notes() -> Iterator[None]:
    """Print what was noted on an error or a signal on its way here: what became of the work so far."""
    try:
        yield
    except BaseException as error:
        for note in getattr(error, "__notes__", []):
            click.echo(f"Note: {printable(note)}", err=True)
        raise


def set_up_logging(verbose: bool) -> None:
    """Send our own log to standard error: warnings, or everything. All logs become safe to print."""
    logging.setLogRecordFactory(harmless_record)
    logging.captureWarnings(True)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llmint8").setLevel(logging.DEBUG if verbose else logging.WARNING)
