"""The command `llmint8 export`."""

from pathlib import Path
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.progress import pass_bar, progress_bar
from llmint8.converter.commands.terminal import printable
from llmint8.converter.words import count, size


@click.command("export", cls=Command)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["bitsandbytes", "compressed-tensors", "float16", "gguf"]),
    required=True,
    help="The form: int8 without outlier columns, for bitsandbytes or for vLLM and SGLang, or 16 bit, or Q8_0.",
)
@click.option(
    "--keep-outlier-layers",
    metavar="SHARE",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Restore this share of the layers to 16 bit: those that lose most without their outlier columns.",
)
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Split the weights into files of at most this.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure on this text what the form has cost, where transformers runs it.",
)
@click.option("--tokens", type=click.IntRange(2), default=2048, help="How much of the text to use.")
@click.option("--window", type=click.IntRange(2), default=512, help="Tokens in a forward pass.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def export_command(
    checkpoint: Path,
    dest: Path,
    to: str,
    keep_outlier_layers: float,
    max_shard_size: str,
    text: Path | None,
    tokens: int,
    window: int,
    quiet: bool,
) -> None:
    """Write an int8 checkpoint in the form of another program, in the new directory DEST. The source is not needed."""
    set_up_logging(False)
    from llmint8.converter.export.export import export
    from llmint8.formats import open_checkpoint

    nbytes = sum(info.nbytes for info in open_checkpoint(checkpoint).tensors.values())
    measuring = None if text is None else _measuring(checkpoint, to, text, tokens, window)
    with progress_bar(nbytes, "Exporting", quiet) as progress:
        report = export(
            checkpoint,
            dest,
            to,
            keep_outlier_layers=keep_outlier_layers,
            max_shard_size=max_shard_size,
            progress=progress,
        )
    if not quiet:
        for notice in report.notices:
            click.echo(f"Note: {printable(notice)}", err=True)
        layers = f"{count(report.int8, 'layer')} in int8, {count(report.restored, 'layer')} restored to 16 bit"
        click.echo(f"{dest}: {layers}, {size(report.nbytes)}, read again and whole.")
    if measuring is not None:
        click.echo(_loss(measuring, dest, quiet))


def _measuring(checkpoint: Path, to: str, text: Path, tokens: int, window: int) -> Any:
    from ..accuracy.exported import Measuring

    return Measuring(checkpoint, to, text, tokens, window)


def _loss(measuring: Any, dest: Path, quiet: bool) -> str:
    if measuring.why_not is not None:
        return f"The loss is not measured: {measuring.why_not}."
    with pass_bar("Measuring", quiet) as progress:
        found = measuring.run(dest, progress)
    (row,) = found.measurements
    return (
        f"To the int8 checkpoint, on {count(found.positions, 'position')}: KL {row.kl_mean:.3g} (median "
        f"{row.kl_median:.3g}, 99 % {row.kl_p99:.3g}), same top token {row.top1_agreement:.2%}, perplexity "
        f"{found.reference_perplexity:.3f} -> {row.perplexity:.3f}."
    )
