"""The page of `llmint8 scaling`: one HTML file, its pictures inside, and what to take in numbers.

Names come from files that others wrote, so every piece of text is escaped.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from llmint8.converter.words import count, size

from ..report.document import box, document, image, png
from . import plots
from .comparing import (
    KEYS,
    Choice,
    best_within,
    budgets,
    choice,
    is_family,
    pareto,
    quality,
    value_words,
    winners,
)
from .runs import Run

_TITLES = {
    "data_type": "Which data type",
    "block": "How large the blocks",
    "proxy": "Columns in 16 bit, chosen without calibration",
    "rounding": "How codes are found",
}
_WHAT = {
    "data_type": """A <em>data type</em> says where the levels lie that a weight is rounded to: in equal steps, as
floating point numbers, with a dynamic exponent, or such that as many weights are nearest to each.""",
    "block": """The weights of a <em>block</em> share one scale of 16 bit. Small blocks follow the weights more closely,
and cost 16 bits for each block.""",
    "proxy": """With <em>proxy quantization</em> the columns stay in 16 bit that belong to the hidden units with the
largest standard deviation of their weights in the layer before.""",
    "rounding": """<code>nearest</code> takes the nearest level. <code>gptq</code> makes up for what is lost where one
column is rounded in those after it.""",
}


def page(runs: Sequence[Run]) -> str:
    """Return the page of runs of one model or of a family, all on one text."""
    names = list(dict.fromkeys(run.measured.model for run in runs))
    found = [choice(runs, key) for key in KEYS]
    sections = [
        _introduction(),
        _summary(runs, names),
        f"<p><b>{escape(f'{advice(runs)} {winners_text(runs)}')}</b></p>",
    ]
    sections += ["<h2>Which precision</h2>", image(png(plots.precisions(runs)), "Quality against total model bits")]
    sections += [_precisions_text(runs), _front(runs)]
    for chosen in found:
        if chosen is not None:
            sections += [f"<h2>{_TITLES[chosen.key]}</h2>", _choice(chosen)]
    title = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return document(f"{title}: precision and size", sections)


def advice(runs: Sequence[Run]) -> str:
    """Say in one sentence, in numbers, what to take."""
    measure = quality(runs)
    front = pareto(runs, measure)
    parts = []
    for budget in budgets(front):
        if run := best_within(front, 8 * budget):
            of = f" of {run.measured.model}" if is_family(runs) else ""
            room = size(budget).replace(".00 ", " ").replace(".0 ", " ")
            parts.append(f"for {room}: {run.scheme.label}{of} ({_quality(run, measure)})")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if parts else f"There is one size only: {front[0].label}."


def _quality(run: Run, measure: str) -> str:
    return f"perplexity {run.perplexity:.4g}" if measure == "perplexity" else f"KL {run.kl_mean:.2g}"


def _introduction() -> str:
    return """<p>Of two models that take equally much space, is the larger one with fewer bits for each weight the
better one? Here every weight of a model's linear layers was rounded to <em>k</em> bits, 3 to 8, in many ways, and the
model read a text. Inputs were not rounded, and nothing else was. <em>Total model bits</em> are all that the model then
takes: what is not quantized, such as embeddings and the output head, counts with 16 bits a number. The method is that
of &ldquo;The case for 4-bit precision&rdquo; (arXiv 2212.09720).</p>"""


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    first = runs[0].measured
    one = {run.measured.model: run for run in runs}
    return box(
        {
            "Models": "; ".join(f"{name}: {one[name].weights:,} weights quantized" for name in names),
            "Text": f"{first.text}: {count(first.tokens, 'token')} in windows of {first.window}",
            "Runs": str(len(runs)),
        }
    )


def winners_text(runs: Sequence[Run]) -> str:
    """Say which precision is the best for its bits, where curves of a family can be compared."""
    won = winners(runs)
    if won is None:
        return ""
    shares = sorted(won.shares.items(), key=lambda item: -item[1])
    words = ", ".join(f"{bits} bit at {share:.0%}" for bits, share in shares if share)
    return (
        f"Between {size(won.low / 8)} and {size(won.high / 8)}, where all curves can be compared, the lowest one is "
        f"that of {words} of the sizes (on a logarithmic axis)."
    )


def _precisions_text(runs: Sequence[Run]) -> str:
    if not is_family(runs):
        return """<p>Each point is a run; the dashed line joins those than which none is both smaller and closer to the
16-bit model. With several models of a family in one command there is a curve for each precision, and whether a larger
model with fewer bits is better can be seen.</p>"""
    return """<p>Each point is a model at a precision, with the data type and block size that are best there. Where the
curve of one precision lies below that of another, a larger model with those bits is better than a smaller one with the
other&rsquo;s. The dashed line joins the runs than which none is both smaller and better.</p>"""


def _front(runs: Sequence[Run]) -> str:
    rows = "".join(
        f'<tr><td class="n">{size(run.total_bits / 8)}</td><td>{escape(run.measured.model)}</td>'
        f'<td>{escape(run.scheme.label)}</td><td class="n">{run.bits_per_weight:.2f}</td>'
        f'<td class="n">{_number(run.perplexity)}</td><td class="n">{_number(run.kl_mean)}</td></tr>\n'
        for run in pareto(runs, quality(runs))
    )
    return f"""<table><tr><th class="n">Size</th><th>Model</th><th>Weights</th><th class="n">Bits a weight</th>
<th class="n">Perplexity</th><th class="n">KL</th></tr>{rows}</table>"""


def _choice(chosen: Choice) -> str:
    of = ", the geometric mean over the models" if is_family(chosen.runs) else ""
    found = f"""{image(png(plots.choices(chosen)), _TITLES[chosen.key])}
<p>{_WHAT[chosen.key]} All else is the same: {escape(chosen.held)}. KL from the 16-bit model in nats per token{of}:</p>
{_table(chosen, chosen.values, {bits: _words(row, _number) for bits, row in chosen.table.items()})}"""
    if ratios := {bits: _words(row, _percent) for bits, row in chosen.at_equal_bits.items()}:
        first = escape(value_words(chosen.key, chosen.values[0]))
        found += f"""<p>What that is worth for the same total model bits: perplexity against that of {first}, the mean
over all sizes between the smallest and the largest model. Less is better:</p>
{_table(chosen, chosen.values[1:], ratios)}"""
    return found


def _table(chosen: Choice, values: Sequence[Any], cells: dict[int, dict[Any, str]]) -> str:
    head = "".join(f'<th class="n">{escape(value_words(chosen.key, value))}</th>' for value in values)
    rows = ""
    for bits, row in cells.items():
        words = "".join(f'<td class="n">{row.get(value, "&ndash;")}</td>' for value in values)
        rows += f"<tr><td>{bits} bit</td>{words}</tr>\n"
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _words(row: dict[Any, float], words: Callable[[float], str]) -> dict[Any, str]:
    return {value: words(number) for value, number in row.items()}


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.4g}" if value >= 1 else f"{value:.2g}"
