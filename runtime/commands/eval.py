"""The command `llmint8 eval`: it parses and prints; `accuracy/` does the work."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.progress import pass_bar
from llmint8.converter.commands.terminal import printable
from llmint8.converter.words import count


@click.command("eval", cls=Command)
@click.argument("out")
@click.option("--reference", metavar="SOURCE", required=True, help="The 16-bit checkpoint OUT was made from.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    required=True,
    help="A .jsonl file with a `text` field in each line, or any text file.",
)
@click.option("--tokens", type=click.IntRange(2), default=8192, show_default=True, help="How much of the text to use.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a forward pass.")
@click.option(
    "--methods",
    is_flag=True,
    help="Compare with the methods of the LLM.int8() paper, simulated, and with OUT run in other ways.",
)
@click.option("--device", default="cpu", show_default=True, help="Where both models run, such as cuda.")
@click.option(
    "--no-save", is_flag=True, help="Do not leave the result in OUT, where `llmint8 push` finds it for the card."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def eval_command(
    out: str,
    reference: str,
    text: Path,
    tokens: int,
    window: int,
    methods: bool,
    device: str,
    no_save: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how close the int8 checkpoint OUT is to its 16-bit source.

    Both run in float32 on the same windows of the text. KL is that of the next-token distribution in nats: the mean
    over all positions, the median and the 99th percentile. Without --methods it is told, too, how many of the inputs
    are larger than those of the calibration. OUT and SOURCE are directories or Hub ids.
    """
    set_up_logging(False)
    from llmint8.formats.disk.strict_json import finite

    from ..accuracy.compare import compare

    with pass_bar("Evaluating", quiet) as progress:
        found = compare(
            out, reference, text, tokens=tokens, window=window, methods=methods, device=device, progress=progress
        )
    expected = found.evaluation.reference_perplexity
    facts = {
        "checkpoint": out,
        "reference": reference,
        "text": str(text),
        "windows": found.windows,
        "window": window,
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
    echo_result(json.dumps(finite(facts), indent=2) if as_json else _table(facts))


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


def _table(facts: dict[str, Any]) -> str:
    first = "source (reference)"
    names = [printable(row["name"]) for row in facts["methods"]]
    width = max(len(first), *map(len, names))
    rows = [
        f"{'':{width}}  {'KL mean':>8}  {'median':>8}  {'99 %':>8}  {'top-1':>7}  {'perplexity':>10}  {'- ref.':>9}",
        f"{first:{width}}  {'-':>8}  {'-':>8}  {'-':>8}  {'-':>7}  {facts['reference_perplexity']:>10.3f}  {'-':>9}",
    ]
    for name, row in zip(names, facts["methods"], strict=True):
        rows.append(
            f"{name:{width}}  {row['kl_mean']:>8.5f}  {row['kl_median']:>8.5f}  {row['kl_p99']:>8.5f}  "
            f"{row['top1_agreement']:>7.2%}  {row['perplexity']:>10.3f}  {row['perplexity_difference']:>+9.3f}"
        )
    rows += [
        "",
        f"{count(facts['windows'], 'window')} of {count(facts['window'], 'token')}, "
        f"{count(facts['positions'], 'position')}. {count(facts['layers'], 'layer')} in int8, "
        f"{facts['stored_columns']:.2%} of their columns stored unquantized.",
    ]
    if facts["head_kl"] is not None:
        rows.append(f"The int8 output head adds {facts['head_kl']:.5f} to the mean KL.")
    if (beyond := facts["beyond_calibration"]) is not None:
        most = f", {beyond['layer_share']:.2%} at {printable(beyond['layer'])}" if beyond["share"] else ""
        rows.append(f"{beyond['share']:.2%} of the inputs exceed the largest of the calibration{most}.")
    return "\n".join(rows)
