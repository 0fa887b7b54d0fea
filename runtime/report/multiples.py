"""Pictures with one panel for each kind of input, blocks along x: the errors of layers, and how wide inputs range."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from .axes import BLUE, GREY, ORANGE, STYLE, block_label, number_blocks, plain, plain_log, stack_of
from .statistics import LayerInput

MAX_PANELS = 6
MAX_OTHERS = 12  # layers outside of the blocks

Draw = Callable[[Any, list[tuple[int, LayerInput]], list[str]], None]  # an axis, inputs by their places, the blocks


def panels(inputs: Sequence[LayerInput]) -> dict[str, list[LayerInput]]:
    """Sort inputs by the kinds of layers that share them, the commonest first, at most six kinds."""
    found: dict[str, list[LayerInput]] = {}
    for one in inputs:
        found.setdefault(one.kinds, []).append(one)
    ranked = sorted(found.items(), key=lambda item: -len({block for one in item[1] for block in one.blocks}))
    chosen = {kinds for kinds, _ in ranked[:MAX_PANELS]}
    return {kinds: ones for kinds, ones in found.items() if kinds in chosen}


def blocks_of(inputs: Sequence[LayerInput]) -> list[str]:
    """Return the blocks in which inputs are read, stack by stack, each in its order."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for block in dict.fromkeys(block for one in inputs for block in one.blocks):
        stacks[stack_of(block)].append(block)
    return [block for blocks in stacks.values() for block in blocks]


def errors(inputs: Sequence[LayerInput]) -> Figure:
    """Draw the relative output error of the layers, all in int8 and with the columns that are kept."""

    def draw(axis: Any, placed: list[tuple[int, LayerInput]], blocks: list[str]) -> None:
        x = [place for place, _ in placed]
        before = [100 * one.relative_error(0) for _, one in placed]
        after = [100 * one.relative_error(one.kept) for _, one in placed]
        axis.vlines(x, after, before, colors="#bbbbbb", linewidths=1)
        axis.plot(x, before, "o", color=ORANGE, markerfacecolor="white", markersize=4, label="every column in int8")
        axis.plot(x, after, "o", color=BLUE, markersize=4, label="with the columns that are kept unquantized")

    return _small_multiples(inputs, draw, "error of the output, %", "output of")


def ranges(inputs: Sequence[LayerInput]) -> Figure:
    """Draw the largest value that reaches the layers beside the largest of an ordinary dimension."""

    def draw(axis: Any, placed: list[tuple[int, LayerInput]], blocks: list[str]) -> None:
        # Of several inputs in a block, such as those of experts: the largest, and the median of the medians.
        found: dict[int, list[LayerInput]] = defaultdict(list)
        for place, one in placed:
            found[place].append(one)
        for x in _runs(sorted(found), blocks):
            largest = [max(one.absmax[0] for one in found[place]) for place in x]
            typical = [max(median(one.absmax_median for one in found[place]), 1e-6) for place in x]
            axis.fill_between(x, typical, largest, color=GREY, alpha=0.15, linewidth=0)
            label = "largest of all dimensions", "largest of the median dimension"
            axis.plot(x, largest, "-^", color=ORANGE, markersize=3.5, linewidth=1.2, label=label[0])
            axis.plot(x, typical, "-o", color=BLUE, markersize=3, linewidth=1.2, label=label[1])

    return _small_multiples(inputs, draw, "largest |x|", "input of")


def _runs(places: Sequence[int], blocks: Sequence[str]) -> Iterator[list[int]]:
    """Part places where a line between them would go over blocks that are not there, or from one stack to another."""
    run: list[int] = []
    for place in places:
        if run and (place != run[-1] + 1 or not blocks or stack_of(blocks[place]) != stack_of(blocks[run[-1]])):
            yield run
            run = []
        run.append(place)
    yield run


def _small_multiples(inputs: Sequence[LayerInput], draw: Draw, label: str, title: str) -> Figure:
    """One panel for each kind of input and one for layers outside of blocks, with a common logarithmic y."""
    inside = [one for one in inputs if one.block]
    parts, blocks = panels(inside), blocks_of(inside)
    others = [one for one in inputs if not one.block][:MAX_OTHERS]
    count = len(parts) + bool(others)
    columns = min(2, count)
    figure = Figure(figsize=(4.7 * columns, 1.0 + 2.2 * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, sharey=True, squeeze=False)
    for axis, (kinds, ones) in zip(axes.flat, parts.items(), strict=False):
        draw(axis, [(blocks.index(block), one) for one in ones for block in one.blocks], blocks)
        axis.set_title(f"{title} {plain(kinds)}", fontsize=9)
        number_blocks(axis, blocks)
    if others:
        axis = axes.flat[count - 1]
        draw(axis, list(enumerate(others)), [])
        axis.set_title(f"{title} layers outside of the blocks", fontsize=9)
        axis.set_xlim(-0.5, len(others) - 0.5)
        several = {"rotation": 20, "ha": "right"} if len(others) > 1 else {}
        axis.set_xticks(range(len(others)), [plain(one.kinds) for one in others], **several)
    for axis in axes.flat[:count]:
        _dress(axis)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    figure.supxlabel(block_label(blocks) if blocks else "", **STYLE)
    figure.supylabel(label, **STYLE)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def _dress(axis: Any) -> None:
    axis.set_yscale("log")
    plain_log(axis.yaxis)
    axis.grid(True, axis="y", color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, labelleft=True)
    axis.spines[["top", "right"]].set_visible(False)
