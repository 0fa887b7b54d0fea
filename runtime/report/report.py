"""`llmint8 report`: pictures and tables of one checkpoint, on a page that needs nothing else.

The statistics come from the manifest; the model runs only for the effect of removing its outlier features. Where it
cannot, the page says why and has all the rest.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from llmint8.converter.calibration.text import read_text
from llmint8.converter.hub.resolve import resolve
from llmint8.formats import Checkpoint, LLMInt8Error, open_checkpoint, read_manifest
from llmint8.formats.disk.durable import write_durably
from llmint8.formats.disk.names import MANIFEST_NAME

from . import multiples, plots
from .document import png
from .findings import Findings, sizes
from .page import page
from .removal import CannotRunError, measure_removal
from .statistics import hidden_inputs, read_inputs, table4

log = logging.getLogger("llmint8")

# So many dims in the heat map; and the paper's largest number of outlier features, where there are none to remove.
_HEAT_MAP_DIMS = 32
_STRONGEST = 7


def write_report(
    checkpoint: str | Path,
    output: Path | None = None,
    *,
    text: Path | None = None,
    run: bool = True,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, Findings]:
    """Write `report.html` and its pictures as PNG files into a directory.

    Args:
        checkpoint: a directory, or a repository id on the Hub.
        output: the directory; `<name>-report` in the working directory by default. Files of these names are replaced.
        text: what to run the model on; the packaged calibration text by default.
        run: False leaves the effect of removal out.
        revision: branch, tag or commit on the Hub.
        progress: called after each forward pass with how many are done, of how many.

    Returns:
        The page's path, and what it shows.

    Raises:
        LLMInt8Error: the checkpoint breaks a rule of spec.md or has no statistics, or the text cannot be read.

    """
    resolved = resolve(checkpoint, revision, "int8")
    findings = _find(open_checkpoint(resolved.path), resolved.name, text, run, progress)
    directory = output or Path(f"{resolved.name.rpartition('/')[2]}-report")
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {name: png(figure) for name, figure in _figures(findings).items()}
    for name, data in pictures.items():
        write_durably(directory / f"{name}.png", data)
    path = directory / "report.html"
    write_durably(path, page(findings, pictures).encode())
    return path, findings


def _find(
    opened: Checkpoint, name: str, text: Path | None, run: bool, progress: Callable[[int, int], None]
) -> Findings:
    if not opened.quantization.llmint8:
        raise LLMInt8Error(
            f"{opened.path}: written by bitsandbytes, which records no statistics; "
            "convert the 16-bit model with llmint8-convert"
        )
    inputs = read_inputs(opened, read_manifest(opened.path), opened.path / MANIFEST_NAME)
    hidden = hidden_inputs(inputs, opened)
    table = table4(hidden)
    removal, not_run = None, "it was left out with --no-run"
    if text is not None:
        read_text(text)  # before anything is written
    if run:
        dims = [feature.dim for feature in table.features or table.strongest[:_STRONGEST]]
        layers = [layer for found in hidden for layer in found.layers]
        try:
            removal = measure_removal(opened.path, layers, dims, hidden[0].in_features, text, progress)
        except CannotRunError as error:
            log.debug("effect of removal", exc_info=True)
            not_run = str(error)
    return Findings(name, opened, inputs, hidden, table, sizes(opened), removal, None if removal else not_run)


def _figures(findings: Findings) -> dict[str, Figure]:
    dims = [feature.dim for feature in findings.table.strongest[:_HEAT_MAP_DIMS]]
    return {
        "heat-map": plots.heat_map(findings.hidden, dims),
        "kept-columns": plots.kept_columns(findings.checkpoint),
        "errors": multiples.errors(findings.inputs),
        "ranges": multiples.ranges(findings.inputs),
        "sizes": plots.size_bars(findings.sizes),
    }
