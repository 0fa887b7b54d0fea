"""The pictures of `llmint8 report`, as matplotlib figures. Nothing here knows a file or the page they end up on.

Colours are from palettes that colour-blind readers can tell apart (magma; Okabe and Ito), and shape or place says the
same as colour wherever two things are compared.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llmint8.converter.outliers.criterion import OUTLIER_MAGNITUDE
from llmint8.formats import Checkpoint

from .findings import Sizes
from .statistics import LayerInput, block_of, layer_kind, occurs

_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9a9a9a"
_UNKNOWN = "#f1f1f1"
_MAX_PANELS = 6
_STYLE: dict[str, Any] = {"fontsize": 9, "color": "#333333"}
_BLOCK_LABEL = "block, in the order in which they run"


def panels(inputs: Sequence[LayerInput]) -> dict[str, list[LayerInput]]:
    """Sort inputs by the kinds of layers that share them, the commonest first, at most six kinds."""
    found: dict[str, list[LayerInput]] = {}
    for one in inputs:
        found.setdefault(one.kinds, []).append(one)
    ranked = sorted(found.items(), key=lambda item: -len({one.block for one in item[1]}))
    chosen = {kinds for kinds, _ in ranked[:_MAX_PANELS]}
    return {kinds: ones for kinds, ones in found.items() if kinds in chosen}


def heat_map(hidden: Sequence[LayerInput], dims: Sequence[int]) -> Figure:
    """Draw max |x| of dimensions (rows) in the blocks (columns), a panel for each kind of hidden-state input."""
    parts, blocks = panels(hidden), _blocks(hidden)
    tables = {kinds: _table(ones, dims, blocks) for kinds, ones in parts.items()}
    titles = _hidden_titles(parts)
    known = np.concatenate([table[np.isfinite(table)] for table in tables.values()])
    low, high = max(float(known.min()), 0.05), max(float(known.max()), 2 * OUTLIER_MAGNITUDE)
    norm = LogNorm(min(low, OUTLIER_MAGNITUDE / 2), high)
    width = 3.0 + len(parts) * max(3.2, min(7.0, 0.135 * len(blocks)))
    figure = Figure(figsize=(width, 1.7 + 0.165 * len(dims)), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (kinds, table) in zip(axes, tables.items(), strict=True):
        axis.set_facecolor(_UNKNOWN)
        image = axis.imshow(table, norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest")
        places = [
            (blocks.index(one.block), dims.index(dim))
            for one in parts[kinds]
            for index, dim in enumerate(one.dims)
            if dim in dims and occurs(one, index)
        ]
        if places:
            axis.scatter(*zip(*places, strict=True), s=11, c="white", edgecolors="black", linewidths=0.7)
        axis.set_title(titles[kinds], fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(_BLOCK_LABEL, **_STYLE)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(dims)), [str(dim) for dim in dims], fontsize=7)
    axes[0].set_ylabel("feature dimension (its number)", **_STYLE)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.015, aspect=30)
    _plain_log(bar.ax.yaxis)
    bar.ax.axhline(OUTLIER_MAGNITUDE, color="white", linewidth=2)
    bar.set_label(f"largest |x| (white line: {OUTLIER_MAGNITUDE:g}, the paper's limit)", **_STYLE)
    return figure


def kept_columns(checkpoint: Checkpoint) -> Figure:
    """Draw how many columns each layer keeps in 16 bit: kinds of layers (rows) by blocks (columns)."""
    names = list(checkpoint.quantization.outliers)  # in the model's order; the tensors in the files are not
    kinds = list(dict.fromkeys(layer_kind(name) for name in names))
    blocks = list(dict.fromkeys(block_of(name) for name in names))
    cells: dict[tuple[int, int], list[int]] = {}
    for name, count in checkpoint.quantization.outliers.items():
        cells.setdefault((kinds.index(layer_kind(name)), blocks.index(block_of(name))), []).append(count)
    table = np.full((len(kinds), len(blocks)), np.nan)
    for cell, counts in cells.items():
        table[cell] = fmean(counts)
    figure = Figure(figsize=(max(6.0, min(15.0, 2.2 + 0.34 * len(blocks))), 1.3 + 0.34 * len(kinds)))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    axis.set_facecolor(_UNKNOWN)
    high = max(1.0, float(np.nanmax(table)))
    image = axis.imshow(table, norm=PowerNorm(0.4, 0, high), cmap="Blues", aspect="auto", interpolation="nearest")
    if len(blocks) <= 48 and len(kinds) <= 24:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if (value / high) ** 0.4 > 0.6 else "#222222"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds], fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(_BLOCK_LABEL, **_STYLE)
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01).set_label("columns in 16 bit", **_STYLE)
    return figure


def errors(inputs: Sequence[LayerInput]) -> Figure:
    """Draw the relative output error of the layers, all in int8 and with the columns that are kept."""

    def draw(axis: Any, x: list[int], ones: list[LayerInput]) -> None:
        before = [100 * one.relative_error(0) for one in ones]
        after = [100 * one.relative_error(one.kept) for one in ones]
        axis.vlines(x, after, before, colors="#bbbbbb", linewidths=1)
        axis.plot(x, before, "o", color=_ORANGE, markerfacecolor="white", markersize=4, label="every column in int8")
        axis.plot(x, after, "o", color=_BLUE, markersize=4, label="with the 16-bit columns that are kept")

    return _small_multiples(inputs, draw, "error of the output, %", "output of")


def ranges(inputs: Sequence[LayerInput]) -> Figure:
    """Draw the largest value that reaches the layers beside the largest of an ordinary dimension."""

    def draw(axis: Any, x: list[int], ones: list[LayerInput]) -> None:
        largest = [one.absmax[0] for one in ones]
        typical = [max(one.absmax_median, 1e-6) for one in ones]
        axis.fill_between(x, typical, largest, color=_GREY, alpha=0.15, linewidth=0)
        axis.plot(x, largest, "-^", color=_ORANGE, markersize=3.5, linewidth=1.2, label="largest of all dimensions")
        axis.plot(x, typical, "-o", color=_BLUE, markersize=3, linewidth=1.2, label="largest of the median dimension")

    return _small_multiples(inputs, draw, "largest |x|", "input of")


def size_bars(sizes: Sizes) -> Figure:
    """Draw two stacked bars, before and after."""
    colours = {
        "16-bit layers": "#56B4E9",
        "int8 weights": _BLUE,
        "16-bit columns": _ORANGE,
        "scales": _GREEN,
        "everything else": _GREY,
    }
    figure = Figure(figsize=(8.5, 2.4), layout="constrained")
    axis = figure.subplots()
    total = max(sum(sizes.before.values()), sum(sizes.after.values()))
    unit, name = (1e9, "GB") if total >= 2e9 else (1e6, "MB")
    for row, parts in enumerate((sizes.before, sizes.after)):
        left = 0.0
        for kind, colour in colours.items():
            if size := parts.get(kind, 0) / unit:
                label = f"{kind} {size:.3g}"
                known = label in axis.get_legend_handles_labels()[1]
                axis.barh(
                    row, size, left=left, color=colour, edgecolor="white", linewidth=0.8, label=None if known else label
                )
                left += size
        axis.text(left + 0.01 * total / unit, row, f"{left:.1f} {name}", va="center", fontsize=9)
    axis.set_yticks([0, 1], ["16 bit (before)", "int8 (this checkpoint)"], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.14 * total / unit)
    axis.set_xlabel(name, **_STYLE)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _small_multiples(inputs: Sequence[LayerInput], draw: Callable[..., None], label: str, title: str) -> Figure:
    """One panel for each kind of input, with blocks along x and a common logarithmic y."""
    parts, blocks = panels(inputs), _blocks(inputs)
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(4.7 * columns, 0.9 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis, (kinds, ones) in zip(axes.flat, parts.items(), strict=False):
        axis.set_yscale("log")
        draw(axis, [blocks.index(one.block) for one in ones], ones)
        _plain_log(axis.yaxis)
        axis.set_title(f"{title} {_plain(kinds)}", fontsize=9)
        axis.grid(True, axis="y", color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_BLOCK_LABEL, fontsize=9, color="#333333")
    figure.supylabel(label, fontsize=9, color="#333333")
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9, frameon=False
    )
    return figure


def _plain_log(axis: Any) -> None:
    """Label a logarithmic axis with ordinary numbers; with 2 and 5 as well where it spans little."""
    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if high / max(low, 1e-12) > 200 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _hidden_titles(parts: dict[str, list[LayerInput]]) -> dict[str, str]:
    """Name the inputs; where every block has two of them, the first is the attention's and the second the FFN's."""
    blocks = [[one.block for one in ones] for ones in parts.values()]
    two = len(blocks) == 2 and blocks[0] == blocks[1]
    roles = ("attention: ", "feed-forward network: ") if two else ("",) * len(parts)
    return {kinds: f"{role}input of {_plain(kinds)}" for role, kinds in zip(roles, parts, strict=True)}


def _blocks(inputs: Sequence[LayerInput]) -> list[str]:
    return list(dict.fromkeys(one.block for one in inputs))


def _table(ones: Sequence[LayerInput], dims: Sequence[int], blocks: Sequence[str]) -> Any:
    """Return max |x|, float [dims, blocks], NaN where a dim is not recorded."""
    table = np.full((len(dims), len(blocks)), np.nan)
    for one in ones:
        column = blocks.index(one.block)
        for dim, value in zip(one.dims, one.absmax, strict=True):
            if dim in dims:
                row = dims.index(dim)
                table[row, column] = np.fmax(table[row, column], max(value, 1e-6))
    return table


def _plain(text: str) -> str:
    """Return text that matplotlib can show and takes for nothing else; a long one is cut."""
    shown = "".join(char if char.isascii() and char.isprintable() else "?" for char in text).replace("$", r"\$")
    return shown if len(shown) <= 48 else shown[:47] + "..."
