"""The command `llmint8 eval`: it parses and prints; `accuracy/` does the work."""

import json
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.progress import pass_bar
from llmint8.converter.commands.terminal import printable

from .tables import embeddings_table, tasks_table, text_table

# Options that belong to one of the two ways to measure.
_OF_TEXT = ("tokens", "window", "methods", "no_save")
_OF_TASKS = ("include_path", "num_fewshot", "limit", "batch_size")


@click.command("eval", cls=Command)
@click.argument("out")
@click.option("--reference", metavar="SOURCE", required=True, help="The 16-bit checkpoint OUT was made from.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A .jsonl file with a `text` field in each line, or any text file.",
)
@click.option("--tokens", type=click.IntRange(2), default=8192, show_default=True, help="How much of the text to use.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a forward pass.")
@click.option(
    "--methods",
    is_flag=True,
    help="Compare with the methods of the LLM.int8() paper, simulated, and with OUT run in other ways.",
)
@click.option(
    "--tasks",
    metavar="NAME,...",
    help="Instead of a text: tasks of lm-evaluation-harness, or YAML files of some; `paper` for those of LLM.int8().",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A directory of YAML files of more tasks.",
)
@click.option("--num-fewshot", type=click.IntRange(0), metavar="N", help="Examples before each question.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only so many questions of each task.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Questions at a time."
)
@click.option("--device", default="cpu", show_default=True, help="Where both models run, such as cuda.")
@click.option(
    "--no-save", is_flag=True, help="Do not leave the result in OUT, where `llmint8 push` finds it for the card."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def eval_command(out: str, text: Path | None, tasks: str | None, as_json: bool, **options: Any) -> None:
    """Measure how close the int8 checkpoint OUT is to its 16-bit source: on a text, or on tasks.

    On a text both run in float32. KL is that of the next-token distribution in nats: the mean over all positions, the
    median and the 99th percentile. Without --methods it is told, too, how many of the inputs are larger than those of
    the calibration. Of an encoder of sentences the embeddings of the text's lines are compared. On tasks each runs
    as it is stored. OUT and SOURCE are directories or Hub ids.
    """
    _check_options(text, tasks)
    set_up_logging(False)
    from llmint8.formats.disk.strict_json import finite

    if text is None:
        facts, table = _on_tasks(out, str(tasks), **options), tasks_table
    else:
        from ..accuracy.embeddings import is_encoder

        measure, table = (_embeddings, embeddings_table) if is_encoder(out) else (_on_text, text_table)
        facts = measure(out, text, **options)
    echo_result(json.dumps(finite(facts), indent=2) if as_json else table(facts))


def _check_options(text: Path | None, tasks: str | None) -> None:
    if (text is None) == (tasks is None):
        raise click.UsageError("Give either --text FILE or --tasks NAME,...")
    way, others = ("--text", _OF_TEXT) if text is None else ("--tasks", _OF_TASKS)
    context = click.get_current_context()
    for name in others:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with {way}.")


def _on_text(out: str, text: Path, reference: str, quiet: bool, no_save: bool, **options: Any) -> dict[str, Any]:
    from llmint8.formats.disk.strict_json import finite

    from ..accuracy.compare import compare

    with pass_bar("Evaluating", quiet) as progress:
        found = compare(out, reference, text, progress=progress, **_given(options, "tokens window methods device"))
    expected = found.evaluation.reference_perplexity
    facts = {
        "checkpoint": out,
        "reference": reference,
        "text": str(text),
        "windows": found.windows,
        "window": options["window"],
        "positions": found.evaluation.positions,
        "layers": found.layers,
        "stored_columns": found.stored_columns,
        "head_kl": found.head_kl,
        "beyond_calibration": found.beyond_calibration and found.beyond_calibration._asdict(),
        "reference_perplexity": expected,
        "methods": [
            asdict(row) | {"perplexity_difference": row.perplexity - expected} for row in found.evaluation.measurements
        ],
    }
    if not no_save:
        _save(finite(facts), Path(out))
    return facts


def _embeddings(out: str, text: Path, reference: str, quiet: bool, **options: Any) -> dict[str, Any]:
    from ..accuracy.embeddings import compare_embeddings

    with pass_bar("Evaluating", quiet) as progress:
        given = _given(options, "tokens window methods device")
        found = compare_embeddings(out, reference, text, progress=progress, **given)
    return {
        "checkpoint": out,
        "reference": reference,
        "text": str(text),
        "texts": found.texts,
        "tokens": found.tokens,
        "pooling": found.pooling.ways,
        "left_out": found.pooling.left_out,
        "layers": found.layers,
        "stored_columns": found.stored_columns,
        "beyond_calibration": found.beyond_calibration and found.beyond_calibration._asdict(),
        "embeddings": [asdict(row) for row in found.measurements],
    }


def _on_tasks(out: str, tasks: str, reference: str, quiet: bool, **options: Any) -> dict[str, Any]:
    try:
        from ..accuracy.tasks import compare_on_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        from llmint8.formats import LLMInt8Error

        raise LLMInt8Error("--tasks needs lm-evaluation-harness: pip install 'llmint8[tasks]'") from None

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    # The harness draws bars of its own.
    bars = nullcontext() if sys.stderr.isatty() and not quiet else redirect_stderr(StringIO())
    with pass_bar("Evaluating", quiet) as progress, bars:
        found = compare_on_tasks(
            out,
            reference,
            names,
            include=options["include_path"],
            shots=options["num_fewshot"],
            batch=options["batch_size"],
            progress=progress,
            **_given(options, "limit device"),
        )
    scores = [asdict(score) for score in found.scores]
    return {
        "checkpoint": out,
        "reference": reference,
        "lm_eval": found.harness,
        "limit": options["limit"],
        "tasks": scores,
    }


def _given(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


def _save(facts: dict[str, Any], out: Path) -> None:
    """Leave the result for the model card, where OUT is a directory one may write to. Of paths only the names."""
    if not out.is_dir():
        return
    from llmint8.converter.hub.card import EVALUATION_NAME
    from llmint8.formats.disk.durable import encode_json, write_durably

    named = facts | {key: Path(facts[key]).name for key in ("checkpoint", "reference", "text")}
    try:
        write_durably(out / EVALUATION_NAME, encode_json(named))
    except OSError as error:
        click.echo(f"Note: not saved in {printable(str(out))}: {error.strerror}", err=True)
