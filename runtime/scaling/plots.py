"""The pictures of `llmint8 scaling`, as matplotlib figures: quality against the size of the model, both logarithmic.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every curve has a mark of its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..report.axes import BLUE, GREEN, GREY, ORANGE, STYLE, plain, plain_log
from .comparing import Choice, by_precision, is_family, pareto, quality, value_words
from .runs import Run

_COLOURS = ("#CC79A7", ORANGE, BLUE, GREEN, "#56B4E9", "#E69F00", "#333333")
_MARKS = "ovs^DPX"
_QUALITY = {"perplexity": "perplexity", "kl_mean": "KL from 16 bit, nats per token"}
_PANELS = 6
_MEGABYTE = 8e6  # bits


def precisions(runs: Sequence[Run]) -> Figure:
    """Draw quality against size with a curve for each precision, the best run of each model, and the Pareto front."""
    measure = quality(runs)
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axis = figure.subplots()
    drawn = [run for run in runs if getattr(run, measure)]  # KL of the model with itself is 0, and has no place
    curves = by_precision(drawn) if is_family(runs) else _each(drawn)
    for number, (bits, found) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": _COLOURS[number % 7], "marker": _MARKS[number % 7], "markersize": 6}
        style["linestyle"] = "-" if is_family(runs) else "none"
        axis.plot(_sizes(found), [getattr(run, measure) for run in found], label=f"{bits} bit", **style)
    front = [run for run in pareto(runs, measure) if getattr(run, measure)]
    values = [getattr(run, measure) for run in front]
    axis.step(_sizes(front), values, where="post", color=GREY, linewidth=1, linestyle="--", label="the best there is")
    _dress(axis)
    axis.set_ylabel(_QUALITY[measure], **STYLE)
    axis.legend(fontsize=9, frameon=False)
    return figure


def choices(chosen: Choice) -> Figure:
    """Draw KL against size with a curve for each value of a choice: a panel for each precision of a family, or one."""
    panels: dict[str, list[Run]] = defaultdict(list)
    family = is_family(chosen.runs)
    for run in chosen.runs:
        if run.kl_mean:
            panels[f"{run.scheme.bits} bit" if family else plain(run.measured.model)].append(run)
    panels = dict(sorted(panels.items())[:_PANELS])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.5, 3.6 * columns), 1.0 + (3.1 if columns > 1 else 4.0) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, runs) in zip(axes, panels.items(), strict=False):
        for number, value in enumerate(chosen.values):
            found = sorted(
                (run for run in runs if getattr(run.scheme, chosen.key) == value), key=lambda run: run.total_bits
            )
            style: dict[str, Any] = {"color": _COLOURS[number % 7], "marker": _MARKS[number % 7], "markersize": 5}
            words = value_words(chosen.key, value)
            axis.plot(_sizes(found), [run.kl_mean for run in found], "-", linewidth=1.2, label=words, **style)
        axis.set_title(title, fontsize=9)
        _dress(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel(_QUALITY["kl_mean"], **STYLE)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=9, frameon=False)
    return figure


def _each(runs: Sequence[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.scheme.bits, run.total_bits)):
        found[run.scheme.bits].append(run)
    return found


def _sizes(runs: Sequence[Run]) -> list[float]:
    return [run.total_bits / _MEGABYTE for run in runs]


def _dress(axis: Any) -> None:
    for scale, set_scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        set_scale("log")
        plain_log(scale)
    axis.set_xlabel("total model bits, in MB", **STYLE)
    axis.grid(True, color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
