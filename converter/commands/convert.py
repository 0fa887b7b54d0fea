"""The command `llmint8-convert`: it parses, translates and prints; the work is done elsewhere."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from ..words import count, duration, size
from .command import Command, set_up_logging
from .output import echo_result
from .progress import progress_bar
from .terminal import printable

# Bytes a second, of a SATA SSD: a conversion without calibration is about as fast as its disk.
_DISK_SPEED = 500_000_000


@click.command("convert", cls=Command)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when SOURCE is a Hub repo.")
@click.option(
    "--format",
    metavar="N",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="1, which bitsandbytes loads too, or 2, which it does not: for --bits, --rotate, --rounding and experts.",
)
@click.option("--rotate", is_flag=True, help="Rotate weights and inputs: a third less error. Takes --format 2.")
@click.option("--bits", metavar="K", type=click.IntRange(3, 8), help="Bits of a weight, 3 to 8. Takes --format 2.")
@click.option(
    "--data-type", type=click.Choice(["int", "float", "dynamic", "quantile", "nf4"]), help="What their levels are."
)
@click.option(
    "--block-size",
    type=click.Choice([*(str(2**power) for power in range(5, 13)), "row"]),
    help="How many weights of a row share a scale then: 64 otherwise.",
)
@click.option("--target-size", metavar="SIZE", help="Bits by layer, so that OUT takes so much: by measured error.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "gptq"]),
    default="nearest",
    show_default=True,
    help="How values are found: gptq makes up for each column's error in the next ones. Takes --format 2.",
)
@click.option(
    "--outliers",
    metavar="CRITERION",
    help="Which input columns stay in 16 bit: top-k=N on average, threshold=X, systematic, proxy=SHARE or none. "
    "top-k=16 otherwise, and none with --bits.",
)
@click.option(
    "--calibration",
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="Text to calibrate with: .txt, or .jsonl with a text field; or a directory of images or sounds. "
    "A text in the package otherwise.",
)
@click.option(
    "--calibration-tokens",
    metavar="N",
    type=click.IntRange(1, 65536),
    default=512,
    show_default=True,
    help="How much of the text.",
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
    "--quantize-embeddings",
    is_flag=True,
    help="Look tokens up in int8, with --format 2; a head that is the same tensor becomes int8 with them.",
)
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
@click.option(
    "--quiet", is_flag=True, help="Print errors only, another class than the named one, and layers not calibrated."
)
@click.option("--verbose", is_flag=True, help="Name every tensor, and every layer that stays in 16 bit; log details.")
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

    SOURCE is a directory or a Hub repo id, with safetensors or pytorch_model.bin files; a GGUF file; or a directory
    with OPT as metaseq saves it. OUT is a new directory. After an interruption the same command goes on where the last
    one stopped.
    """
    set_up_logging(verbose)
    if private and push_to_hub is None:
        raise ValueError("--private says how to publish; add --push-to-hub REPO")
    from ..conversion.convert import already_done, execute
    from ..hub.resolve import resolve
    from ..planning.options import Options
    from ..planning.plan import make_plan
    from ..planning.sizes import size_notices

    chosen = Options(**options)
    plan = make_plan(resolve(source, revision, "source", low_disk, weights=False), out, chosen)
    with progress_bar(plan.bytes_before, "Comparing", quiet) as progress:
        done = already_done(plan, progress)
    # Before the hours of a conversion, and not after them.
    to = None if push_to_hub is None else _destination(plan, push_to_hub, private)
    if done and not quiet:
        click.echo(f"{out} is finished: made before, from the same source with the same options. It stays as it is.")
    if dry_run:
        _echo_notices([*plan.selection.notices, *size_notices(plan)])
        echo_result(_plan_text(plan, verbose))
        return
    if not done:
        if to is not None:
            to.create()
        with progress_bar(plan.bytes_before, "Converting", quiet, verbose) as progress:
            report = execute(plan, force, progress)
        # Said even when quiet: config.json and the card would have it, and nobody looks there.
        _echo_notices(plan.class_notices if quiet else [*report.notices, *size_notices(plan)])
        _echo_uncalibrated(report, verbose)
        if not quiet:
            _echo_report(report, verbose, plan.config if chosen.trust_remote_code else None)
    if push_to_hub is not None:
        from ..hub.push import prepare
        from .push import publish

        publish(prepare(out, push_to_hub, private=private), "Upload int8 checkpoint", quiet)


def _destination(plan: Any, repo: str, private: bool) -> Any:
    from ..hub.destination import destination
    from ..hub.push import check_licence

    check_licence(plan.source.beside, plan.origin.repo)
    return destination(repo, plan.origin.repo, private=private)


def _echo_uncalibrated(report: Any, verbose: bool) -> None:
    if not report.uncalibrated:
        return
    where = Counter(".".join(name.split(".")[:2]) for name in report.uncalibrated)
    parts = ", ".join(f"{count} in {part}" for part, count in where.most_common(5))
    more = "" if verbose else "; --verbose names them"
    calibrated = report.layers - len(report.uncalibrated)
    then = ", and search for outliers in every call" if report.searches else ""
    _echo_notices(
        [
            f"{calibrated} of {report.layers} layers are calibrated; the others have no outlier columns{then}: "
            f"{parts}{more}"
        ]
    )


def _echo_report(report: Any, verbose: bool, trusted: Any | None) -> None:
    if verbose:
        click.echo(_kept_text(report.kept, report.precision))
        for name in report.uncalibrated:
            click.echo(f"Uncalibrated {printable(name)}")
    click.echo(
        f"{count(report.layers, 'linear layer')} in {report.coding} with {report.outlier_share:.1%} of their columns "
        f"in {report.precision}, {count(len(report.kept), 'layer')} left in {report.precision}. "
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} "
        f"({report.bytes_after / report.bytes_before:.0%}) in {report.seconds:.1f} s."
    )
    click.echo(f"Written to {report.out}. {_how_to_load(report.out, trusted)}")


def _how_to_load(out: Path, trusted: Any | None) -> str:
    """Say what loads the checkpoint; or that nothing here does. `trusted` is a config whose code has run already."""
    from ..model.build import is_named, model_class
    from ..model.config import load_config

    config = trusted or load_config(out)
    cls = None if config is None else model_class(config)
    # A class of another name is a guess, which the tensors do not fill: it would stand in config.json.
    if config is None or cls is None or not is_named(config, cls):
        named = config.architectures if config is not None else None
        what = f"no class {printable(str(named[0]))}" if named else "no class for it"
        return f"transformers has {what}: it can be verified and read here, and loaded where its code is."
    code = ", trust_remote_code=True" if getattr(config, "auto_map", None) else ""
    return f"Load it with: llmint8.runtime.load({str(out)!r}{code}), a {cls.__name__}"


def _echo_notices(notices: list[str]) -> None:
    for notice in notices:
        click.echo(f"Note: {printable(notice)}", err=True)


def _plan_text(plan: Any, verbose: bool) -> str:
    selection = plan.selection
    lines = [
        f"Source       {plan.origin.name}: {count(len(plan.source.tensors), 'tensor')}, {size(plan.bytes_before)}",
        f"Layers       {count(len(selection.multiplied), 'linear layer')} to {plan.options.coding}, "
        f"{len(selection.kept)} left in {plan.precision}",
        f"Outliers     {plan.criterion}",
        f"Result       {size(plan.bytes_after)}, {plan.bytes_after / plan.bytes_before:.0%} of the source",
        f"Peak memory  about {size(plan.peak_memory)} beside Python and torch",
        f"Disk space   {size(plan.disk_needed)} needed, {size(plan.disk_free)} free",
        f"Disk time    {duration((plan.bytes_to_read + plan.bytes_to_write) / _DISK_SPEED)} at "
        f"{size(_DISK_SPEED)}/s: {size(plan.bytes_to_read)} read, {size(plan.bytes_to_write)} written",
    ]
    if plan.bytes_to_fetch:
        lines.append(f"Download     {size(plan.bytes_to_fetch)} to the Hub's cache, {size(plan.cache_free)} free there")
    if plan.disk_needed > plan.disk_free or plan.bytes_to_fetch > plan.cache_free:
        lines.append("This does not fit on the disk.")
    return "\n".join(lines + ([_kept_text(selection.kept, plan.precision)] if verbose else []))


def _kept_text(kept: dict[str, str], precision: str) -> str:
    return "\n".join(f"{f'In {precision}':12} {printable(name)}: {reason}" for name, reason in sorted(kept.items()))
