"""The model card of an int8 checkpoint: README.md, written at conversion and brought up to date when it is pushed.

Its front matter is made once and is the user's from then on: what the source's card says about licence, language and
tags, and what the Hub wants to know about a quantized model. Below it stands a generated part between two marker lines.
Only what is between them ever changes; a card without the markers is left as it is. The source's own text is not
copied, for it describes another model; the card links to it. No date goes in: the same input gives the same bytes.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from huggingface_hub import ModelCardData

from llmint8.formats import (
    BITSANDBYTES,
    NATIVE,
    Checkpoint,
    LLMInt8Error,
    Quantization,
    read_json,
    read_manifest,
)
from llmint8.formats.disk.small_files import MODULES_NAME

from ..coding import coded_in, coding_in_words, kbits_of, method_in_words
from ..endings import Endings
from ..words import activations, size
from .front_matter import metadata, strings
from .origin import is_repo_id
from .usage import harmless, named_class, usage

# What `llmint8 eval` leaves in the checkpoint's directory for the card.
EVALUATION_NAME = "llmint8_eval.json"

_BEGIN = "<!-- llmint8: what stands between this line and the next such line is generated -->"
_END = "<!-- llmint8: end of the generated part -->"
_GENERATED = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_NAMES_SHOWN = 8
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    config: Mapping[str, Any]
    quantization: Quantization
    source: Mapping[str, Any]  # as in the manifest
    in_features: Sequence[int]  # of each int8 layer
    nbytes: int  # of all tensors
    evaluation: Mapping[str, Any] | None = None  # what `llmint8 eval` found
    sentences: bool = False  # the encoder of a SentenceTransformer, whose other parts lie beside it
    tensors: Collection[str] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Subject":
        """Describe a checkpoint on the disk."""
        llmint8 = checkpoint.quantization.llmint8
        evaluation = checkpoint.path / EVALUATION_NAME
        return cls(
            checkpoint.config,
            checkpoint.quantization,
            read_manifest(checkpoint.path).source if llmint8 else {},
            [record.in_features for record in checkpoint.records.values()],
            sum(info.nbytes for info in checkpoint.tensors.values()),
            read_json(evaluation) if evaluation.exists() else None,
            (checkpoint.path / MODULES_NAME).exists(),
            checkpoint.tensors.keys(),
        )


def new_card(subject: Subject, source_card: str) -> str:
    """Return the card of a new checkpoint, with what the source's card says about the model."""
    data = _front_matter(subject, metadata(source_card))
    return f"---\n{data.to_yaml()}\n---\n\n{_generated(subject, None)}\n"


def refreshed_card(subject: Subject, card: str, repo: str) -> str:
    """Return the card with its generated part up to date, for the repo where it will be; all else stays."""
    if not card.strip():
        card = new_card(subject, "")
    return _GENERATED.sub(lambda match: _generated(subject, repo), card, count=1)


def _front_matter(subject: Subject, source: Mapping[str, Any]) -> Any:
    carried: dict[str, Any] = {key: _plain(source.get(key)) for key in _CARRIED}
    repo = subject.source.get("repo")
    # The source's own base too: its licence may hold for this copy.
    bases = [base for base in dict.fromkeys([str(repo or ""), *strings(source.get("base_model"))]) if is_repo_id(base)]
    architecture = named_class(subject.config)
    if carried["pipeline_tag"] is None and architecture.endswith(("ForCausalLM", "LMHeadModel")):
        carried["pipeline_tag"] = "text-generation"
    native, bits = subject.quantization.layout == NATIVE, sorted({one.bits for one in kbits_of(subject.quantization)})
    tags = ["llmint8", *([f"{one}-bit" for one in bits] or ["int8", "8-bit"]), *([] if native else ["bitsandbytes"])]
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="quantized" if repo else None,
        library_name="llmint8" if native else "sentence-transformers" if subject.sentences else "transformers",
        tags=list(dict.fromkeys([*strings(source.get("tags")), *tags])),
        **carried,
    )


def _plain(value: Any) -> str | list[str] | None:
    """Take strings and lists of them; in YAML 1.1 the language `no` is False."""
    if isinstance(value, list):
        return [item for item in map(_plain, value) if isinstance(item, str)] or None
    if value is False:
        return "no"
    return value if isinstance(value, str) and value else None


def _generated(subject: Subject, repo: str | None) -> str:
    parts = (
        _introduction(subject),
        _conversion(subject),
        _accuracy(subject.evaluation),
        usage(subject.config, subject.quantization.layout, subject.sentences, repo),
    )
    return "\n".join([_BEGIN, *chain.from_iterable(parts), _END])


def _introduction(subject: Subject) -> list[str]:
    name, repo, commit, quantized = (subject.source.get(key) for key in ("name", "repo", "commit", "quantized"))
    title, (what, how) = harmless(str(name or "This model")), method_in_words(subject.quantization)
    origin = f"`{title}`"
    if repo:
        link = f"https://huggingface.co/{harmless(str(repo))}"
        origin = f"[{title}]({link}), commit [`{harmless(str(commit))}`]({link}/tree/{harmless(str(commit))}),"
    return [
        f"# {title.rpartition('/')[2]}, {coded_in(subject.quantization)}",
        "",
        f"This is {origin} with {what}, made by {harmless(subject.quantization.producer)}",
        f"{how}. What the model is for, how it was trained",
        "and what its limits are, the card of the original says; its licence holds for this copy too.",
        *([f"The original was quantized already: {harmless(str(quantized))}."] if quantized else []),
        "",
    ]


def _conversion(subject: Subject) -> list[str]:
    quantization = subject.quantization
    columns, kept = sum(subject.in_features), sum(quantization.outliers.values())
    head, coded = ", the output head among them" if quantization.int8_head else "", coded_in(quantization)
    rows = {
        "Architecture": harmless(named_class(subject.config) or "unknown"),
        f"In {coded}": f"{len(subject.in_features)} linear layers{head}; {coding_in_words(quantization)}",
        "Not quantized": ", ".join([*_skipped(_own_layers(subject)), "all that is not linear"]),
    }
    if quantization.llmint8:
        counts = sorted(quantization.outliers.values()) or [0]
        rows["Outlier columns"] = (
            f"{kept / max(1, columns):.2%} of the input columns also stored unquantized, {counts[0]} to {counts[-1]} "
            f"in a layer; criterion `{harmless(quantization.criterion)}`"
        )
        rows["Calibration"] = _calibration(quantization.calibration, len(quantization.outliers))
        kind = activations(quantization.scheme.activation, quantization.scheme.activation_group)
        rows["Activations"] = "not quantized" if quantization.scheme.kbit else f"int8 when the model runs ({kind})"
        readers = "which bitsandbytes reads too" if quantization.layout == BITSANDBYTES else "read by llmint8 alone"
        rows["Format"] = f"llmint8 {harmless(quantization.format_version)}, {readers}"
    files = subject.source.get("files")
    before = sum(nbytes for nbytes in files.values() if isinstance(nbytes, int)) if isinstance(files, dict) else 0
    rows["Size"] = size(subject.nbytes) + (f"; the original {size(before)}" if before else "")
    return [
        "## What was quantized",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
    ]


def _own_layers(subject: Subject) -> list[str]:
    """Return the skipped layers that are this model's: some are listed for loaders that take another class."""
    names = subject.quantization.skip_modules
    full, stored = (Endings(f".{name}" for name in found) for found in (names, subject.tensors))
    class_name = named_class(subject.config)
    body = class_name.endswith("Model") and not class_name.endswith("LMHeadModel")
    return [
        name for name in names if full.count(f".{name}") == 1 and not (body and not stored.count(f".{name}.weight"))
    ]


def _skipped(names: Sequence[str]) -> list[str]:
    shown = [f"`{harmless(name)}`" for name in names[:_NAMES_SHOWN]]
    return [*shown, f"{len(names) - _NAMES_SHOWN} layers more"] if names[_NAMES_SHOWN:] else shown


def _calibration(calibration: Mapping[str, Any] | None, layers: int) -> str:
    if not calibration:
        return "none"
    tokens, text = harmless(str(calibration.get("tokens"))), str(calibration.get("text"))
    calibrated = calibration.get("layers", layers)
    reached = "" if calibrated == layers else f"; {harmless(str(calibrated))} of {layers} layers"
    if not calibration.get("tokens"):
        return harmless(text) + reached
    inputs = calibration.get("inputs")
    also = [harmless(str(what)) for what in inputs if what != "text"] if isinstance(inputs, list) else []
    said = f"{tokens} tokens" + (" of llmint8's own text" if text == "packaged" else f": `{harmless(text)}`")
    return ", and ".join([said, *also]) + reached


def _accuracy(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    try:
        reference = f"| the original | | | {_number(evaluation['reference_perplexity'], '.3f')} |"
        rows = [
            f"| {_label(row['name'])} | {_number(row['kl_mean'], '.5f')} | {_number(row['top1_agreement'], '.2%')} "
            f"| {_number(row['perplexity'], '.3f')} |"
            for row in evaluation["methods"]
        ]
        where = f"{int(evaluation['positions'])} positions of `{harmless(evaluation['text'])}`"
        where += f", in windows of {int(evaluation['window'])} tokens"
    except (KeyError, TypeError, ValueError) as error:
        raise LLMInt8Error(f"{EVALUATION_NAME}: malformed: {error}; run `llmint8 eval` again or remove it") from None
    return [
        "## Accuracy",
        "",
        f"Against the original, on {where}. KL is that of the next-token distribution, in nats.",
        "",
        "| | KL | same first choice | perplexity |",
        "|---|---|---|---|",
        reference,
        *rows,
        "",
    ]


def _label(name: str) -> str:
    """Name a row: before a colon, `llmint8 eval` has the directory, which means nothing to others."""
    return harmless(re.sub(r"^.*: ", "in int8: ", name))


def _number(value: float | None, form: str) -> str:
    """Format a number; what was not finite is null in the file."""
    return "-" if value is None else format(value, form)
