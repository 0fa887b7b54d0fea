"""The lines of code in a model card with which the model is loaded."""

import re
from collections.abc import Mapping
from typing import Any

from llmint8.formats import BITSANDBYTES, NATIVE, Layout

# transformers' auto classes -> its tables of what they load, the plainest first.
_LOADS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForMaskedLM": "MASKED_LM",
    "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
    "AutoModelForMultipleChoice": "MULTIPLE_CHOICE",
    "AutoModelForImageTextToText": "IMAGE_TEXT_TO_TEXT",
    "AutoModelForSpeechSeq2Seq": "SPEECH_SEQ_2_SEQ",
    "AutoModelForCTC": "CTC",
    "AutoModelForImageClassification": "IMAGE_CLASSIFICATION",
    "AutoModelForPreTraining": "PRETRAINING",
    "AutoModelForTextEncoding": "TEXT_ENCODING",
}
_OWN_CODE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def usage(config: Mapping[str, Any], layout: Layout, sentences: bool, repo: str | None) -> list[str]:
    """Return the lines; `sentences` says that it is the encoder of a SentenceTransformer, whose parts lie beside it."""
    name = repr(repo or "path/to/this/directory").replace("'", '"')
    arguments = name + (", trust_remote_code=True" if config.get("auto_map") else "")
    cls, library, loaded = _loading_class(config), "transformers", f".from_pretrained({arguments})"
    if sentences:
        cls, library, loaded = "SentenceTransformer", "sentence_transformers", f"({arguments})"
    encoder = ": the encoder" if sentences else ""
    who = f", which uses the outlier columns{encoder}" if layout == BITSANDBYTES else f", and nothing else{encoder}"
    lines = [
        "## How to load it",
        "",
        f"With llmint8{who}:",
        "",
        "```python",
        "from llmint8 import runtime",
        f"model = runtime.load({arguments})",
        "```",
    ]
    if layout == NATIVE:
        return lines
    return [
        *lines,
        "",
        f"With {'sentence-transformers' if sentences else 'transformers'} and bitsandbytes, which ignore them:",
        "",
        "```python",
        f"from {library} import {cls}",
        f"model = {cls}{loaded}",
        "```",
    ]


def _loading_class(config: Mapping[str, Any]) -> str:
    """Return the auto class of transformers that loads what `architectures` names; where there is none, that itself."""
    from transformers.models.auto import modeling_auto  # the tables of names only: no model is imported

    if code := config.get("auto_map"):
        return next((auto for auto in _OWN_CODE if auto in code), _OWN_CODE[0])
    name, model_type = named_class(config), str(config.get("model_type"))
    tables = {"AutoModel": "MODEL_MAPPING_NAMES"}
    tables |= {auto: f"MODEL_FOR_{table}_MAPPING_NAMES" for auto, table in _LOADS.items()}
    for auto, table in tables.items():
        classes = getattr(modeling_auto, table).get(model_type)
        if name == (classes[0] if isinstance(classes, tuple | list) else classes):
            return auto
    return harmless(name) if name.isidentifier() else _OWN_CODE[0]


def named_class(config: Mapping[str, Any]) -> str:
    """Return the class that a config names, or nothing."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def harmless(value: str) -> str:
    """Take out what is markup: names come from files of others, and no end marker may be among them."""
    return re.sub(r"[^\w ./:=+,()-]", "?", value)
