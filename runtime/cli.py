"""The command `llmint8`: everything one does with an int8 checkpoint, and `convert`, which makes one."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from llmint8.converter.cli import Command, convert_command, printable, progress_bar, set_up_logging
from llmint8.converter.push_command import push_command
from llmint8.formats.errors import SourceError

from .bench_command import bench_command
from .eval_command import eval_command
from .report_command import report_command


@click.group()
@click.version_option(package_name="llmint8")
def main() -> None:
    """Make, look at, check and run int8 checkpoints of language models."""


main.add_command(convert_command)
main.add_command(eval_command)
main.add_command(report_command)
main.add_command(push_command)
main.add_command(bench_command)


@main.command(cls=Command)
@click.argument("checkpoint")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when CHECKPOINT is a Hub repo.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(checkpoint: str, revision: str | None, as_json: bool) -> None:
    """Show what is in an int8 checkpoint: layers, shapes, outliers, sizes, where it came from."""
    set_up_logging(False)
    from llmint8.converter.hub import resolve
    from llmint8.formats import open_checkpoint

    facts = _facts(open_checkpoint(resolve(checkpoint, revision, "int8").path))
    click.echo(json.dumps(facts, indent=2) if as_json else _facts_text(facts))


def _facts(opened: Any) -> dict[str, Any]:
    quantization = opened.quantization
    sizes: Counter[str] = Counter()
    for name, info in opened.tensors.items():
        sizes[name.rpartition(".")[0]] += info.nbytes
    layers = [
        {
            "name": record.name,
            "out_features": record.out_features,
            "in_features": record.in_features,
            "outliers": record.outlier_count,
            "bias": record.has_bias,
            "bytes": sizes[record.name],
        }
        for record in opened.records.values()
    ]
    int8 = sum(layer["bytes"] for layer in layers)
    others: dict[str, int] = {}
    for name, info in opened.tensors.items():
        if name.rpartition(".")[0] not in opened.records:
            others[info.dtype] = others.get(info.dtype, 0) + info.nbytes
    return {
        "path": str(opened.path),
        "architectures": opened.config.get("architectures"),
        "format": f"llmint8 {quantization.format_version}" if quantization.llmint8 else "bitsandbytes",
        "producer": quantization.producer,
        "source": quantization.source,
        "criterion": quantization.criterion if quantization.llmint8 else None,
        "activation": quantization.activation,
        "threshold": quantization.threshold,
        "files": opened.files,
        "bytes": sizes.total(),
        "int8_layers_bytes": int8,
        "other_bytes_by_dtype": others,
        "not_quantized": quantization.skip_modules,
        "int8_head": quantization.int8_head,
        "layers": layers,
    }


def _facts_text(facts: dict[str, Any]) -> str:
    width = max([5, *(len(layer["name"]) for layer in facts["layers"])])
    rows = [f"{'layer':{width}}  {'out':>7}  {'in':>7}  {'16-bit columns':>14}  {'MB':>9}"]
    for layer in facts["layers"]:
        outliers = "-" if layer["outliers"] is None else layer["outliers"]
        rows.append(
            f"{layer['name']:{width}}  {layer['out_features']:>7}  {layer['in_features']:>7}  {outliers:>14}  "
            f"{layer['bytes'] / 1e6:>9.2f}"
        )
    source = facts["source"]
    origin = (source.get("name") or "unknown") + (f" at commit {source['commit']}" if source.get("commit") else "")
    others = ", ".join(f"{dtype} {size / 1e6:.1f} MB" for dtype, size in facts["other_bytes_by_dtype"].items())
    columns = sum(layer["outliers"] or 0 for layer in facts["layers"])
    share = columns / max(1, sum(layer["in_features"] for layer in facts["layers"]))
    rows += [
        "",
        f"Model         {', '.join(map(str, _as_list(facts['architectures']))) or 'unknown'}, from {origin}",
        f"Format        {facts['format']}, written by {facts['producer']}",
        f"Outliers      criterion {facts['criterion'] or 'none stored'}, {share:.2%} of the columns in 16 bit",
        f"Activations   {facts['activation']}",
        f"Size          {facts['bytes'] / 1e6:.1f} MB in {len(facts['files'])} file(s): "
        f"{len(facts['layers'])} int8 layers {facts['int8_layers_bytes'] / 1e6:.1f} MB, {others}",
        f"Not quantized {', '.join(facts['not_quantized']) or 'no linear layer'}",
    ]
    if facts["int8_head"]:
        rows.append(f"Output head   {facts['int8_head']}, in int8 too")
    return printable_lines(rows)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def printable_lines(lines: list[str]) -> str:
    """Join lines, each made safe for a terminal."""
    return "\n".join(printable(line) if line.strip() else "" for line in lines)


@main.command(cls=Command)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", metavar="DIR", help="Also compare with the source, and print the error of each layer.")
@click.option("--quick", is_flag=True, help="Check the structure and the manifest only; read no tensor.")
@click.option("--quiet", is_flag=True, help="Print what is wrong only.")
def verify(checkpoint: Path, source: str | None, quick: bool, quiet: bool) -> None:
    """Check an int8 checkpoint: every rule of spec.md, every hash in its manifest."""
    set_up_logging(False)
    from llmint8.formats import check_manifest, check_values, open_checkpoint

    if quick and source is not None:
        raise ValueError("--quick reads no tensor, and --source compares them all; give one of the two")
    opened = open_checkpoint(checkpoint)
    size = sum(info.nbytes for info in opened.tensors.values())
    with progress_bar(size, "Verifying", quiet or quick) as progress:
        found = check_manifest(opened)[1] if quick else check_values(opened, progress)
    problems = [str(problem) for problem in found]
    if source is not None:
        problems += _compare(opened, source, quiet)
    for problem in problems:
        click.echo(printable(problem), err=True)
    if problems:
        raise click.ClickException(f"{len(problems)} problem(s) in {checkpoint}")
    if not quiet:
        click.echo(
            f"{checkpoint}: {len(opened.tensors)} tensors, {len(opened.records)} int8 layers: "
            + ("structure and manifest are good; the values were not read." if quick else "all good.")
        )


def _compare(opened: Any, source: str, quiet: bool) -> list[str]:
    from llmint8.converter.hub import resolve
    from llmint8.converter.verify import compare_with_source
    from llmint8.formats import open_source

    original = open_source(resolve(source, kind="source").path)
    size = sum(info.nbytes for info in original.tensors.values())
    with progress_bar(size, "Comparing", quiet) as progress:
        comparison = compare_with_source(opened, original, progress)
    if not quiet:
        for name, error in comparison.errors.items():
            click.echo(f"{printable(name)}  relative error {error:.5f}")
        worst = max(comparison.errors.values(), default=math.nan)
        click.echo(f"Largest relative error of a weight: {worst:.5f}")
    return comparison.problems


@main.command(cls=Command)
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="The text to continue or, with a chat template, to answer.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--no-chat", is_flag=True, help="Continue the prompt even where there is a chat template.")
@click.option("--device", help="Such as cpu or cuda; the default is the CPU.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when CHECKPOINT is a Hub repo.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model code in CHECKPOINT, if it needs any.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the decoding first: pays for long texts.")
@click.option("--stats", is_flag=True, help="Print times, speed and memory.")
@click.option("--quiet", is_flag=True, help="Print the text only.")
def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    no_chat: bool,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    compiled: bool,
    stats: bool,
    quiet: bool,
) -> None:
    """Generate text with an int8 checkpoint, streaming it to the terminal."""
    set_up_logging(False)
    from llmint8.converter.calibration_text import load_tokenizer
    from llmint8.converter.hub import resolve

    from . import load
    from .generate import statistics, stream_chat

    path = resolve(checkpoint, revision, "int8").path
    tokenizer = load_tokenizer(path, trust_remote_code)
    if tokenizer is None:
        raise SourceError(f"{path}: no tokenizer; copy the tokenizer files of the source there")
    model = load(path, device=device, trust_remote_code=trust_remote_code, compile=compiled)
    done = stream_chat(
        model,
        tokenizer,
        prompt,
        lambda text: click.echo(text, nl=False),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat_template=not no_chat,
    )
    click.echo()
    if stats:
        click.echo(printable_lines(statistics(model, done)), err=True)
    elif not quiet:
        click.echo(f"{done.new_tokens} tokens, {done.new_tokens / done.seconds:.1f} per second.", err=True)
