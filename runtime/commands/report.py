"""The command `llmint8 report`: it parses and prints; `report/report.py` does the work."""

from pathlib import Path

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.progress import pass_bar
from llmint8.converter.commands.terminal import printable


@click.command("report", cls=Command)
@click.argument("out")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where report.html and the pictures go; <name of OUT>-report otherwise.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Text to run the model on: .txt, or .jsonl with a text field. A text in the package otherwise.",
)
@click.option("--no-run", is_flag=True, help="Do not run the model: leave out the effect of removing outliers.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def report_command(out: str, output: Path | None, text: Path | None, no_run: bool, quiet: bool) -> None:
    """Show in pictures what the conversion found in the int8 checkpoint OUT: one HTML page, and PNG files.

    Outliers by layer, the columns kept in 16 bit, the error of each layer before and after, sizes, and what the model
    is worth without its outliers. OUT is a directory or a Hub id, converted with calibration.
    """
    set_up_logging(False)
    try:
        from ..report.report import write_report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        from llmint8.formats import LLMInt8Error

        raise LLMInt8Error("the pictures need matplotlib: pip install 'llmint8[report]'") from None

    with pass_bar("Running", quiet) as advance:
        path, findings = write_report(
            out, output, text=text, run=not no_run, progress=lambda done, total: advance("", total)
        )
    if quiet:
        return
    table, removal = findings.table, findings.removal
    click.echo(
        f"Outlier features: {len(table.features)}, in {table.layer_share:.0%} of the layers and "
        f"{table.position_share:.0%} of the positions."
    )
    if removal is None:
        click.echo(f"The effect of removing them was not measured: {printable(findings.not_run or '')}.")
    else:
        click.echo(f"Perplexity {removal.intact.perplexity:.4g}, without them {removal.without.perplexity:.4g}.")
    click.echo(f"Report: {printable(str(path))}")
