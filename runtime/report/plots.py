"""The pictures of `llmint8 report`, as matplotlib figures. Nothing here knows a file or the page they end up on.

Those of one panel for each kind of input are in `multiples.py`.

Colours are from palettes that colour-blind readers can tell apart (magma; Okabe and Ito), and shape or place says the
same as colour wherever two things are compared.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmint8.converter.outliers.criterion import OUTLIER_MAGNITUDE
from llmint8.formats import Checkpoint

from .axes import BLUE, GREEN, GREY, ORANGE, STYLE, block_label, number_blocks, plain, plain_log
from .findings import Sizes, column_precision
from .labels import block_of, layer_kinds
from .multiples import MAX_OTHERS, blocks_of, panels
from .statistics import LayerInput, occurs

_UNKNOWN = "#f1f1f1"


def heat_map(hidden: Sequence[LayerInput], dims: Sequence[int]) -> Figure:
    """Draw max |x| of dimensions (rows) in the blocks (columns), a panel for each kind of hidden-state input."""
    parts, blocks = panels(hidden), blocks_of(hidden)
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
            (blocks.index(block), dims.index(dim))
            for one in parts[kinds]
            for block in one.blocks
            for index, dim in enumerate(one.dims)
            if dim in dims and occurs(one, index)
        ]
        if places:
            axis.scatter(*zip(*places, strict=True), s=11, c="white", edgecolors="black", linewidths=0.7)
        axis.set_title(titles[kinds], fontsize=9)
        number_blocks(axis, blocks)
        axis.tick_params(labelsize=8)
    figure.supxlabel(block_label(blocks), **STYLE)
    axes[0].set_yticks(range(len(dims)), [str(dim) for dim in dims], fontsize=7)
    axes[0].set_ylabel("feature dimension (its number)", **STYLE)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.015, aspect=30)
    plain_log(bar.ax.yaxis)
    bar.ax.axhline(OUTLIER_MAGNITUDE, color="white", linewidth=2)
    bar.set_label(f"largest |x| (white line: {OUTLIER_MAGNITUDE:g}, the paper's limit)", **STYLE)
    return figure


def kept_columns(checkpoint: Checkpoint) -> Figure:
    """Draw how many columns each layer keeps unquantized: kinds of layers (rows) by blocks (columns), others below."""
    counts = checkpoint.quantization.outliers  # in the model's order; the tensors in the files are not
    kind_of = layer_kinds(counts)
    others = [name for name in counts if not block_of(name)]
    kinds = list(dict.fromkeys(kind_of[name] for name in counts if block_of(name)))
    blocks = list(dict.fromkeys(block_of(name) for name in counts if block_of(name)))
    cells: dict[tuple[int, int], list[int]] = {}
    for name, count in counts.items():
        if block := block_of(name):
            cells.setdefault((kinds.index(kind_of[name]), blocks.index(block)), []).append(count)
    table = np.full((len(kinds), len(blocks)), np.nan)
    for cell, found in cells.items():
        table[cell] = fmean(found)
    shown = others[:MAX_OTHERS]
    rows = [size for size in (len(kinds), len(shown)) if size]
    width = max(6.0, min(15.0, 2.6 + 0.34 * len(blocks)))
    figure = Figure(figsize=(width, 0.7 + 0.6 * len(rows) + 0.34 * sum(rows)), layout="constrained")
    axes = list(figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0])
    norm = PowerNorm(0.4, 0, max([1.0, *counts.values()]))
    if kinds:
        image = _squares(axes[0], table, kinds, norm)
        number_blocks(axes[0], blocks)
        axes[0].tick_params(axis="x", labelsize=8)
        axes[0].set_xlabel(block_label(blocks), **STYLE)
    if shown:
        # As wide as a block is.
        single = np.full((len(shown), max(1, len(blocks))), np.nan)
        single[:, 0] = [counts[name] for name in shown]
        image = _squares(axes[-1], single, shown, norm)
        axes[-1].set_facecolor("white")
        axes[-1].spines[:].set_visible(False)
        axes[-1].set_xticks([])
        rest = f" ({len(shown)} of {len(others)})" if len(shown) < len(others) else ""
        axes[-1].set_xlabel(f"layers outside of the blocks{rest}", loc="left", **STYLE)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.set_label(f"columns in {column_precision(checkpoint)}", **STYLE)
    return figure


def _squares(axis: Any, table: Any, names: Sequence[str], norm: Any) -> Any:
    """Draw a table, float [names, columns], with its numbers where they have room; NaN is no square."""
    axis.set_facecolor(_UNKNOWN)
    image = axis.imshow(table, norm=norm, cmap="Blues", aspect="auto", interpolation="nearest")
    if table.shape[1] <= 48 and table.shape[0] <= 24:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if norm(value) > 0.6 else "#222222"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    return image


def size_bars(sizes: Sizes) -> Figure:
    """Draw two stacked bars, before and after."""
    colours = {
        "layers in the source": "#56B4E9",
        "int8 weights": BLUE,
        "outlier columns": ORANGE,
        "scales": GREEN,
        "everything else": GREY,
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
    axis.set_yticks([0, 1], ["source (estimated)", "int8 (this checkpoint)"], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.14 * total / unit)
    axis.set_xlabel(name, **STYLE)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _hidden_titles(parts: dict[str, list[LayerInput]]) -> dict[str, str]:
    """Name the inputs; where every block has two of them, the first is the attention's and the second the FFN's."""
    blocks = [[one.block for one in ones] for ones in parts.values()]
    two = len(blocks) == 2 and blocks[0] == blocks[1]
    roles = ("attention: ", "feed-forward network: ") if two else ("",) * len(parts)
    return {kinds: f"{role}input of {plain(kinds)}" for role, kinds in zip(roles, parts, strict=True)}


def _table(ones: Sequence[LayerInput], dims: Sequence[int], blocks: Sequence[str]) -> Any:
    """Return max |x|, float [dims, blocks], NaN where a dim is not recorded."""
    table = np.full((len(dims), len(blocks)), np.nan)
    for one in ones:
        columns = [blocks.index(block) for block in one.blocks]
        for dim, value in zip(one.dims, one.absmax, strict=True):
            if dim in dims:
                row = dims.index(dim)
                table[row, columns] = np.fmax(table[row, columns], max(value, 1e-6))
    return table
