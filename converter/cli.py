"""The command line of the converter: it parses, translates and prints; the work is done elsewhere.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from llmint8.formats.errors import LLMInt8Error

from .terminal import harmless_record, without_commands

_LONGEST_LINE = 4000


class Command(click.Command):
    """A command whose errors are one line and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. With --verbose the traceback of an error is logged as well."""
        # Batch systems end jobs this way; what was written is removed as after Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            with _echoed_notes():
                return super().invoke(ctx)
        except (LLMInt8Error, OSError, ValueError) as error:
            logging.getLogger("llmint8").debug("traceback", exc_info=True)
            raise click.ClickException(printable(str(error))) from None
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:  # a defect of ours, or of the model's code
            logging.getLogger("llmint8").debug("traceback", exc_info=True)
            what = printable(f"{type(error).__name__}: {error}")[:300]
            raise click.ClickException(f"unexpected: {what} (llmint8-convert --verbose shows where)") from None


@contextmanager
def _echoed_notes() -> Iterator[None]:
    """Print what was noted on an error or a signal on its way here: what became of the work so far."""
    try:
        yield
    except BaseException as error:
        for note in getattr(error, "__notes__", []):
            click.echo(f"Note: {printable(note)}", err=True)
        raise


def printable(text: str) -> str:
    """Return text from a file in one line of bounded length, without what a terminal would obey."""
    return without_commands(text.strip()[:_LONGEST_LINE]).replace("\n", " ")


def set_up_logging(verbose: bool) -> None:
    """Send our own log to standard error: warnings, or everything. All logs become safe to print."""
    logging.setLogRecordFactory(harmless_record)
    logging.captureWarnings(True)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llmint8").setLevel(logging.DEBUG if verbose else logging.WARNING)


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


@click.command("convert", cls=Command)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when SOURCE is a Hub repo.")
@click.option(
    "--outliers",
    metavar="CRITERION",
    default="top-k=16",
    show_default=True,
    help="Which input columns stay in 16 bit: top-k=N on average, threshold=X, systematic or none.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to calibrate with: .txt, or .jsonl with a text field. A text in the package otherwise.",
)
@click.option(
    "--calibration-tokens",
    metavar="N",
    type=click.IntRange(1, 65536),
    default=512,
    show_default=True,
    help="How much of it.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the calibration runs, such as cuda.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    help="Cast what is not quantized; it keeps its dtype otherwise.",
)
@click.option("--skip", metavar="REGEX", multiple=True, help="Leave matching layers in 16 bit; repeatable.")
@click.option("--only", metavar="REGEX", multiple=True, help="Quantize matching layers only; repeatable.")
@click.option("--quantize-head", is_flag=True, help="Quantize the output head too; an embedding it shares stays.")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Largest size of a weight file.",
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(["error", "keep"]),
    default="error",
    show_default=True,
    help="When a weight holds NaN or infinity: stop, or leave it in 16 bit.",
)
@click.option("--jobs", metavar="N", type=click.IntRange(1), help="Tensors converted at a time; one per core, up to 8.")
@click.option("--force", is_flag=True, help="Start over where OUT holds an unfinished conversion.")
@click.option(
    "--low-disk", is_flag=True, help="Of a Hub repo, have two shards on the disk at most: each goes when converted."
)
@click.option("--trust-remote-code", is_flag=True, help="Run the model code in SOURCE, if its config.json names any.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--push-to-hub", metavar="REPO", help="Publish OUT on the Hub then, as `llmint8 push` does.")
@click.option("--private", is_flag=True, help="Make that repo private, where it is a new one.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--verbose", is_flag=True, help="Name every layer that stays in 16 bit; log details.")
@click.version_option(package_name="llmint8")
def convert_command(
    source: str,
    out: Path,
    revision: str | None,
    force: bool,
    low_disk: bool,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Convert the 16-bit checkpoint SOURCE into an int8 checkpoint OUT.

    SOURCE is a directory or a Hub repo id, with safetensors or pytorch_model.bin files. OUT is a new directory. After
    an interruption the same command goes on where the last one stopped.
    """
    set_up_logging(verbose)
    if private and push_to_hub is None:
        raise ValueError("--private says how to publish; add --push-to-hub REPO")
    from . import Options, execute, make_plan, resolve

    plan = make_plan(resolve(source, revision, "source", low_disk), out, Options(**options))
    if dry_run:
        _echo_notices(plan.selection.notices)
        click.echo(_plan_text(plan, verbose))
        return
    if push_to_hub is not None:
        from .push import check_licence, writer

        # Before the hours of a conversion, and not after them.
        check_licence(plan.source.path, plan.origin.repo)
        writer(push_to_hub)
    with progress_bar(plan.bytes_before, "Converting", quiet) as progress:
        report = execute(plan, force, progress)
    if not quiet:
        _echo_report(report, plan.config is not None, verbose)
    if push_to_hub is not None:
        from .push import prepare
        from .push_command import publish

        publish(prepare(out, push_to_hub, private=private), "Upload int8 checkpoint", quiet)


def _echo_report(report: Any, known: bool, verbose: bool) -> None:
    _echo_notices(report.notices)
    if report.uncalibrated:
        where = Counter(".".join(name.split(".")[:2]) for name in report.uncalibrated)
        parts = ", ".join(f"{count} in {part}" for part, count in where.most_common(5))
        more = "" if verbose else "; --verbose names them"
        _echo_notices(
            [f"{len(report.uncalibrated)} layers are not calibrated and have no outlier columns: {parts}{more}"]
        )
    if verbose:
        click.echo(_kept_text(report.kept))
        for name in report.uncalibrated:
            click.echo(f"Uncalibrated {printable(name)}")
    click.echo(
        f"{report.layers} linear layers in int8 with {report.outlier_share:.1%} of their columns in 16 bit, "
        f"{len(report.kept)} layer{'s' if len(report.kept) != 1 else ''} left in 16 bit. "
        f"{gigabytes(report.bytes_before)} -> {gigabytes(report.bytes_after)} "
        f"({report.bytes_after / report.bytes_before:.0%}) in {report.seconds:.1f} s."
    )
    click.echo(
        f"Written to {report.out}. " + (f"Load it with: llmint8.runtime.load({str(report.out)!r})" if known else "")
    )


def _echo_notices(notices: list[str]) -> None:
    for notice in notices:
        click.echo(f"Note: {printable(notice)}", err=True)


def _plan_text(plan: Any, verbose: bool) -> str:
    selection = plan.selection
    lines = [
        f"Source       {plan.origin.name}: {len(plan.source.tensors)} tensors, {gigabytes(plan.bytes_before)}",
        f"Layers       {len(selection.layers)} linear layers to int8, {len(selection.kept)} left in 16 bit",
        f"Outliers     {plan.criterion}",
        f"Result       {gigabytes(plan.bytes_after)}, {plan.bytes_after / plan.bytes_before:.0%} of the source",
        f"Peak memory  about {gigabytes(plan.peak_memory)} beside Python and torch",
        f"Disk space   {gigabytes(plan.disk_needed)} needed, {gigabytes(plan.disk_free)} free",
    ]
    if plan.disk_needed > plan.disk_free:
        lines.append("This does not fit on the disk.")
    return "\n".join(lines + ([_kept_text(selection.kept)] if verbose else []))


def _kept_text(kept: dict[str, str]) -> str:
    return "\n".join(f"In 16 bit    {printable(name)}: {reason}" for name, reason in sorted(kept.items()))


def gigabytes(nbytes: int) -> str:
    """Write a size with its unit."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
