"""The command `llmint8 scaling`: it parses and prints; `scaling/` does the work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.progress import progress_bar
from llmint8.converter.commands.terminal import printable

RUNS_NAME, PAGE_NAME = "runs.jsonl", "scaling.html"


class _List(click.ParamType):  # type: ignore[type-arg]
    """Values with commas between them."""

    name = "list"

    def __init__(self, parse: Callable[[str], Any], what: str) -> None:
        self._parse, self._what = parse, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse each."""
        if not isinstance(value, str):
            return value
        try:
            found = [self._parse(part.strip()) for part in value.split(",") if part.strip()]
        except ValueError:
            found = []
        if not found:
            self.fail(f"{value!r}, expected {self._what}", param, ctx)
        return list(dict.fromkeys(found))


def _block(text: str) -> int | None:
    return None if text == "row" else int(text)


@click.command("scaling", cls=Command)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    required=True,
    help="A .jsonl file with a `text` field in each line, or any text file.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default="scaling",
    show_default=True,
    help="Where the runs and the page go. Runs that are there are not done again.",
)
@click.option(
    "--bits",
    type=_List(int, "numbers such as 3,4"),
    default="3,4,5,6,7,8",
    show_default=True,
    metavar="K,...",
    help="Bits of a weight.",
)
@click.option(
    "--data-type",
    type=_List(str, "names"),
    default="int,float,dynamic,quantile,nf4",
    show_default=True,
    metavar="TYPE,...",
    help="What the levels are.",
)
@click.option(
    "--block-size",
    type=_List(_block, "numbers such as 64,1024, or row"),
    default="64,1024",
    show_default=True,
    metavar="N,...",
    help="Weights of a row that share a scale, 32 to 4096, or `row`.",
)
@click.option(
    "--proxy",
    type=_List(float, "shares such as 0,0.02"),
    default="0",
    show_default=True,
    metavar="SHARE,...",
    help="Share of a layer's columns that stay in 16 bit, chosen from the weights of the layer before.",
)
@click.option(
    "--rounding",
    type=_List(str, "names"),
    default="nearest",
    show_default=True,
    metavar="HOW,...",
    help="How codes are found: `nearest` or `gptq`, calibrated with the text in the package.",
)
@click.option("--tokens", type=click.IntRange(2), default=2048, show_default=True, help="How much of the text to use.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a forward pass.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run, such as cuda.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def scaling_command(sources: Sequence[str], text: Path, output: Path, quiet: bool, **options: Any) -> None:
    """Measure k-bit weights of one 16-bit model, or of several of a family, and show which to take for a size.

    Weights are simulated, one layer in memory at a time; inputs stay in floating point. Every combination of the
    options is a run, a line in DIR/runs.jsonl; interrupted, the same command goes on where it stopped. Then pictures:
    quality against total model bits, a curve for each precision. SOURCE: directories or Hub ids.
    """
    set_up_logging(False)
    from llmint8.formats import LLMInt8Error

    try:
        from ..scaling.page import advice, page, winners_text
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise LLMInt8Error("the pictures need matplotlib: pip install 'llmint8[report]'") from None
    from llmint8.formats.disk.durable import named_errors, write_durably

    from ..scaling.family import left_to_do, measure_family, open_family
    from ..scaling.runs import RunFile
    from ..scaling.schemes import combinations

    ways = (options[name] for name in ("bits", "data_type", "block_size", "proxy", "rounding"))
    schemes = combinations(*ways)
    file = RunFile(output / RUNS_NAME)
    members = open_family(sources, text, options["tokens"], options["window"])
    with named_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    path = output / PAGE_NAME
    work = left_to_do(members, schemes, file)
    with progress_bar(sum(one.nbytes for one in work), "Measuring", quiet) as advance:
        measure_family(work, file, options["device"], advance)
    runs = [run for member in members for run in file.of(member.measured)]
    with named_errors(path):
        write_durably(path, page(runs).encode())
    if not quiet:
        echo_result(printable(advice(runs)))
        if told := winners_text(runs):
            click.echo(told)
        click.echo(f"Page: {printable(str(path))}")
