"""The HTML page of `llmint8 report`: one file, its pictures inside, nothing loaded from anywhere.

Names come from files that others wrote, so every piece of text is escaped.
"""

from collections.abc import Mapping

from llmint8.converter.words import inputs_in_words, size

from .document import box, document, image
from .findings import Findings
from .sections import SIZES_TEXT, errors_text, heat_map_text, kept_text, ranges_text, removal_text, table4_text


def page(findings: Findings, pictures: Mapping[str, bytes]) -> str:
    """Return the page. `pictures` holds PNG files by name."""

    def picture(name: str, alt: str) -> str:
        return image(pictures[name], alt)

    sections = [
        _INTRODUCTION,
        _summary(findings),
        "<h2>Where the outliers are</h2>",
        picture("heat-map", "Largest magnitude of the strongest feature dimensions in every block"),
        heat_map_text(findings),
        f"<h2>What stays in {findings.precision}</h2>",
        picture("kept-columns", "Number of columns kept unquantized for every layer"),
        kept_text(findings),
        "<h2>What it does to the error</h2>",
        picture("errors", "Relative error of every layer's output, before and after"),
        errors_text(findings),
        "<h2>How wide the values range</h2>",
        picture("ranges", "Largest value of all dimensions and of the median dimension at every input"),
        ranges_text(findings.inputs),
        "<h2>What takes the space</h2>",
        picture("sizes", "Sizes before and after"),
        SIZES_TEXT,
        "<h2>Outlier features, as the LLM.int8() paper counts them</h2>",
        table4_text(findings),
        "<h2>What the model is worth without them</h2>",
        removal_text(findings),
    ]
    return document(f"{findings.name}: report on the conversion to int8", sections)


_INTRODUCTION = """<p>A language model is a stack of <em>blocks</em>, and most of a block are <em>layers</em> that
multiply a list of numbers, the input, by a matrix of weights. Each place in that list is a <em>dimension</em>. In int8
every number becomes one of 255 evenly spaced steps across the range of its row. A few dimensions hold values many times
larger than the rest: <em>outliers</em>. They stretch the steps, and everything else is rounded coarsely. So the columns
of weights that belong to such dimensions stay as they are, and the steps are made for the rest alone. This page shows
where the outliers of this model are, what was kept for them, and what that is worth.</p>"""


def _summary(findings: Findings) -> str:
    checkpoint, quantization = findings.checkpoint, findings.checkpoint.quantization
    before, after = (sum(parts.values()) for parts in (findings.sizes.before, findings.sizes.after))
    layers = len(checkpoint.records)
    columns = sum(record.in_features for record in checkpoint.records.values())
    kept = sum(quantization.outliers.values())
    measured = sum(len(found.layers) for found in findings.inputs)
    source = quantization.source
    calibration = quantization.calibration or {}
    architectures = checkpoint.config.get("architectures")
    origin = str(source.get("name") or source.get("repo") or "unknown")
    origin += f" at commit {source['commit']}" if source.get("commit") else ""
    text = calibration.get("text", "unknown")
    scheme = quantization.scheme
    rows = {
        "Model": ", ".join(map(str, architectures)) if isinstance(architectures, list) else "unknown",
        "Made from": origin,
        "Size": f"{size(after)}; the source about {size(before)} ({after / max(1, before):.0%} of it)",
        "Layers in int8": f"{layers}, of which {measured} were measured",
        f"Columns in {findings.precision}": f"{kept / max(1, columns):.2%}, {kept / max(1, layers):.1f} in a layer",
        "Chosen by": quantization.criterion,
        "Activations": inputs_in_words(scheme.kbit, scheme.activation, scheme.activation_group),
        "Calibration": f"{calibration['tokens']} tokens, text: {text}" if calibration.get("tokens") else str(text),
    }
    return box(rows)
