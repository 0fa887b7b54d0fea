"""What the page of `llmint8 report` says about each picture, and its tables: what one sees, what it means, what to do.

The reader is not expected to know the paper. Names come from files that others wrote, so every one is escaped.
"""

from collections.abc import Sequence
from html import escape
from statistics import median

from llmint8.converter.outliers.criterion import OUTLIER_MAGNITUDE, OUTLIER_POSITIONS

from .findings import Findings
from .multiples import panels
from .removal import Quality, Removal
from .statistics import OUTLIER_LAYERS, LayerInput, Table4

# Table 4 of LLM.int8() (arXiv 2208.07339): model, outlier features, % of layers, % of positions, quartiles.
_PAPER = [
    ("GPT-2 117M", 1, 25, 6, ()),
    ("GPT-2 345M", 2, 29, 18, ()),
    ("GPT-2 762M", 2, 31, 16, ()),
    ("GPT-2 1.5B", 2, 41, 35, ()),
    ("GPT-J 6B", 6, 62, 28, ()),
    ("FSEQ 6.7B", 6, 100, 75, (-44, -40, -35)),
    ("FSEQ 13B", 7, 100, 73, (-63, -58, -45)),
]
# So many dims are listed where none is an outlier feature.
_CLOSEST = 7

SIZES_TEXT = """<p>The upper bar is an estimate: the shapes of the layers times the bytes of their type. An int8 weight
takes one byte instead of two or four; a scale for every row and the outlier columns come on top. &ldquo;Everything
else&rdquo; is not converted: embeddings, norms, biases, mostly the output head. Its share is large in small models and
small in large ones. <b>What to do:</b> if the orange part is large, a smaller budget (<code>--outliers</code>) saves
space.</p>"""


def heat_map_text(findings: Findings) -> str:
    """Return the paragraph below the heat map."""
    recorded = min(len(found.dims) for found in findings.hidden)
    strongest = findings.table.strongest[0]
    return f"""<p>The hidden state is the list of numbers that runs through the whole model: every block reads it and
adds to it. Each row of the picture is one of its dimensions, each column a block, and the colour is the largest
magnitude seen there, on a logarithmic scale: pale is small, dark is large. A white dot marks {OUTLIER_MAGNITUDE:g} and
more in at least {OUTLIER_POSITIONS:.0%} of the positions of the text. Light grey: the dimension is not among the
{recorded} largest of that input, and nothing was recorded. A dark <em>row</em> is a dimension that is an outlier in
block after block, which is what the LLM.int8() paper found. Here dimension {strongest.dim} stands out most; its
largest magnitude is {number(strongest.absmax)}. <b>What to do:</b> nothing. Rows like these are why a few columns
that are not quantized are enough.</p>"""


def kept_text(findings: Findings) -> str:
    """Return the paragraph below the columns that are kept."""
    precision = findings.precision
    return f"""<p>Each square is one layer, and its number is how many columns of its weights stay in {precision} (the
mean of all experts of a block). Layers that belong to no block stand below. Layers that read the same input keep the
same columns. Dark squares are layers where these columns lower the error most: large values come in many of their
dimensions. A zero is a layer that does well without. <b>What to do:</b> nothing, if the errors below are small. For
less error convert with a larger budget (<code>--outliers top-k=32</code>), for a smaller file with a smaller
one.</p>"""


def errors_text(findings: Findings) -> str:
    """Return the paragraph below the errors."""
    inputs = findings.inputs
    # The other criteria keep the largest dims, and those are what the errors were measured with.
    systematic = findings.checkpoint.quantization.criterion == "systematic"
    caution = ", as if the columns kept were those of the largest dimensions" if systematic else ""
    before = median(one.relative_error(0) for one in inputs)
    after = median(one.relative_error(one.kept) for one in inputs)
    worst = max(inputs, key=lambda one: one.relative_error(one.kept))
    kinds, shown = len({one.kinds for one in inputs if one.block}), len(panels([one for one in inputs if one.block]))
    some = f" Of {kinds} kinds of inputs the {shown} that most blocks have are shown." if shown < kinds else ""
    return f"""<p>How far the output of the layers is off because of int8, as a share of that output: 1% is a hundredth
of its size (root mean square, estimated on the calibration text{caution}). Hollow: with every column in int8. Filled:
with the columns that were kept unquantized. The line between the two is what these columns are worth.{some} In the
median over all inputs the error falls from {before:.2%} to {after:.2%}. The largest that is left is
{worst.relative_error(worst.kept):.2%}, at <code>{escape(worst.layers[0])}</code>. <b>What to do:</b> a layer that
stands out by far can be left as it is with <code>--skip</code>.</p>"""


def ranges_text(inputs: Sequence[LayerInput]) -> str:
    """Return the paragraph below the ranges."""
    widest = max(inputs, key=lambda one: one.absmax[0] / max(one.absmax_median, 1e-6))
    return f"""<p>For every input the largest magnitude in any dimension (triangles), and that of the median dimension
(dots), which stands for the ordinary ones. The wider the grey band between the two, the more of the 255 steps would be
spent on a few outliers. It is widest at <code>{escape(widest.layers[0])}</code>: {number(widest.absmax[0])} against
{number(widest.absmax_median)}. <b>What to do:</b> a wide band is harmless where the error above is small: the outliers
are then in the columns that are kept.</p>"""


def table4_text(findings: Findings) -> str:
    """Return the row of Table 4, the paper's rows, the features and the definition."""
    table = findings.table
    own = _table4_row(
        findings.name,
        len(table.features),
        round(100 * table.layer_share),
        round(100 * table.position_share),
        table.features[0].quartiles if table.features else (),
        ' class="own"',
    )
    rows = own + "".join(_table4_row(*row) for row in _PAPER)
    counted = escape(", ".join(dict.fromkeys(one.kinds for one in findings.hidden)))
    hidden = set(map(id, findings.hidden))
    others = dict.fromkeys(one.kinds for one in findings.inputs if id(one) not in hidden)
    left_out = f"; left out are those of {escape(', '.join(others))}" if others else ""
    caution = (
        "" if table.complete else " Some inputs have more outliers than were recorded: the count is a lower bound."
    )
    return f"""<p>The paper calls a dimension of the hidden state an <em>outlier feature</em> when its magnitude is at
least {OUTLIER_MAGNITUDE:g}, in at least {OUTLIER_LAYERS:.0%} of the layers, and in at least {OUTLIER_POSITIONS:.0%} of
the positions of the text. Larger models have more of them, and in the paper's models from 6.7 billion parameters on
they are in every layer. <b>What to do:</b> nothing. The table says how much this model is like those on which int8
without such columns fails.</p>
<table><tr><th>Model</th><th class="n">Outlier features</th><th class="n">% of layers</th>
<th class="n">% of positions</th><th>Quartiles of the values</th></tr>{rows}</table>
{_features(table)}
<p class="note">Precisely: a layer is one of the {table.blocks} blocks. Counted are the inputs, each
{findings.hidden[0].in_features} wide, of the layers that read the hidden state ({counted}){left_out}. A dimension
occurs in a block when it reaches {OUTLIER_MAGNITUDE:g} in {OUTLIER_POSITIONS:.0%} of the positions at one of these
inputs. &ldquo;% of layers&rdquo;: the blocks in which an outlier feature occurs. &ldquo;% of positions&rdquo;: the
positions in which a feature reaches {OUTLIER_MAGNITUDE:g} where it occurs, mean over blocks and features. Quartiles:
of all values of the strongest feature where it occurs, median over the inputs.{caution} The other rows are from Table
4 of the paper, arXiv 2208.07339; a dash is a number not quoted here.</p>"""


def _table4_row(
    name: str, count: int, layers: int, positions: int, quartiles: Sequence[float], attribute: str = ""
) -> str:
    values = "".join(f'<td class="n">{value}</td>' for value in (count, layers, positions))
    return f"<tr{attribute}><td>{escape(name)}</td>{values}<td>{_quartiles(quartiles)}</td></tr>\n"


def _features(table: Table4) -> str:
    rows = "".join(
        f'<tr><td class="n">{one.dim}</td><td class="n">{len(one.blocks)} of {table.blocks}</td>'
        f'<td class="n">{one.position_share:.0%}</td><td class="n">{number(one.absmax)}</td>'
        f"<td>{_quartiles(one.quartiles)}</td></tr>\n"
        for one in table.features or table.strongest[:_CLOSEST]
    )
    heading = (
        "The outlier features of this model:"
        if table.features
        else "This model has no outlier feature by this definition. These dimensions come closest:"
    )
    return f"""<p>{heading}</p>
<table><tr><th class="n">Dimension</th><th class="n">Occurs in blocks</th><th class="n">% of positions there</th>
<th class="n">Largest |x|</th><th>Quartiles of its values</th></tr>{rows}</table>"""


def removal_text(findings: Findings) -> str:
    """Return what removing the outliers does, or why it was not measured."""
    removal = findings.removal
    if removal is None:
        return f"<p>Not measured: {escape(findings.not_run or '')}.</p>"
    several = len(removal.dims) > 1
    what = "the outlier features" if several else "the outlier feature"
    if not findings.table.features:
        what = f"the {len(removal.dims)} strongest dimensions" if several else "the strongest dimension"
    dims = ", ".join(map(str, removal.dims))
    rows = _quality_row("as it is", removal.intact, removal)
    rows += _quality_row(f"without {what}: {dims}", removal.without, removal)
    if removal.random is not None:
        many = "as many random dimensions" if several else "a random dimension instead"
        rows += _quality_row(f"without {many}, mean of {removal.draws} draws", removal.random, removal)
    none = "" if findings.table.features else " There is no outlier feature by the definition, so these stand in."
    text = "the text in the package" if removal.text == "packaged" else removal.text
    return f"""<p>The int8 model reads {removal.tokens} tokens of {escape(text)}: as it is, with {what} set to zero
wherever a layer reads the hidden state, and with as many other dimensions set to zero.{none} The <em>top-1
probability</em> is how sure the model is of the next token it thinks likeliest; the <em>perplexity</em> is roughly how
many tokens it hesitates between, so lower is better. Without {what} the perplexity is
{number(removal.without.perplexity / removal.intact.perplexity)} times what it was. In the paper, removing up to 7
outlier features lowers the top-1 probability by more than 20% and makes the perplexity 7 to 11 times as large; random
dimensions cost 0.02% to 0.3%, and 0.1%. <b>What to do:</b> where the second row is much worse than the third, the
model depends on these dimensions. That is why they have to stay exact.</p>
<table><tr><th>The model</th><th class="n">Top-1 probability</th><th class="n">relative change</th>
<th class="n">Perplexity</th><th class="n">times</th></tr>{rows}</table>"""


def _quality_row(name: str, quality: Quality, removal: Removal) -> str:
    change = quality.top1_probability / removal.intact.top1_probability - 1
    ratio = quality.perplexity / removal.intact.perplexity
    return (
        f'<tr><td>{escape(name)}</td><td class="n">{quality.top1_probability:.2%}</td><td class="n">{change:+.2%}</td>'
        f'<td class="n">{number(quality.perplexity)}</td><td class="n">{ratio:.4g}</td></tr>\n'
    )


def _quartiles(values: Sequence[float]) -> str:
    return f"({', '.join(number(value) for value in values)})" if values else "&ndash;"


def number(value: float) -> str:
    """Return three digits, or all of a larger whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
