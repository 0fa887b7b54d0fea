"""The command `llmint8 verify`."""

import math
from pathlib import Path
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.progress import progress_bar
from llmint8.converter.commands.terminal import printable
from llmint8.converter.words import count


@click.command("verify", cls=Command)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", metavar="DIR", help="Also compare with the source, and print the error of each layer.")
@click.option("--quick", is_flag=True, help="Check the structure and the manifest only; read no tensor.")
@click.option("--quiet", is_flag=True, help="Print what is wrong only.")
def verify_command(checkpoint: Path, source: str | None, quick: bool, quiet: bool) -> None:
    """Check an int8 checkpoint: every rule of spec.md, every hash in its manifest, all parameters of its model."""
    set_up_logging(False)
    if quick and source is not None:
        raise ValueError("--quick reads no tensor, and --source compares them all; give one of the two")
    from llmint8.formats import check_manifest, check_values, open_checkpoint

    opened = open_checkpoint(checkpoint)
    nbytes = sum(info.nbytes for info in opened.tensors.values())
    with progress_bar(nbytes, "Verifying", quiet or quick) as progress:
        found = check_manifest(opened)[1] if quick else check_values(opened, progress)
    problems = [str(problem) for problem in found]
    if not quick and not problems:  # of a damaged config.json it would tell much that is not so
        problems += _missing(opened, quiet)
    if source is not None:
        problems += _compare(opened, source, quiet)
    for problem in problems:
        click.echo(printable(problem), err=True)
    if problems:
        raise click.ClickException(f"{count(len(problems), 'problem')} in {checkpoint}")
    if not quiet:
        click.echo(
            f"{checkpoint}: {count(len(opened.tensors), 'tensor')}, {count(len(opened.records), 'int8 layer')}: "
            + ("structure and manifest are good; the values were not read." if quick else "all good.")
        )


def _missing(opened: Any, quiet: bool) -> list[str]:
    from llmint8.runtime.model.pretrained import missing_parameters

    missing = missing_parameters(opened)
    if missing is None and not quiet:
        named = opened.config.get("architectures") or opened.config.get("model_type")
        click.echo(printable(f"Not checked whether its model has all parameters: transformers does not know {named}."))
    return missing or []


def _compare(opened: Any, source: str, quiet: bool) -> list[str]:
    from llmint8.converter.conversion.comparison import compare_with_source
    from llmint8.converter.gguf.source import open_local
    from llmint8.converter.hub.resolve import resolve

    original = open_local(resolve(source, kind="source").path)
    nbytes = sum(info.nbytes for info in original.tensors.values())
    with progress_bar(nbytes, "Comparing", quiet) as progress:
        comparison = compare_with_source(opened, original, progress)
    if not quiet:
        for name, error in comparison.errors.items():
            click.echo(f"{printable(name)}  relative error {error:.5f}")
        worst = max(comparison.errors.values(), default=math.nan)
        click.echo(f"Largest relative error of a weight: {worst:.5f}")
    return comparison.problems
