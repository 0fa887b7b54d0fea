"""What a model card says about its model before its text begins. It is of another's making: nothing has to be right."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from llmint8.formats.disk.names import CARD_NAME

_MAX_CARD_BYTES = 4 << 20


def read_card(directory: Path) -> str:
    """Return the text of the card in a directory, nothing where there is none that can be read."""
    try:
        data = (directory / CARD_NAME).read_bytes()
    except FileNotFoundError:
        return ""
    return data.decode(errors="replace") if len(data) <= _MAX_CARD_BYTES else ""


def metadata(text: str) -> dict[str, Any]:
    """Return a card's front matter, nothing where it has none or it is broken."""
    if not re.match(r"\s*---\s*\n.*?\n---", text, re.DOTALL):
        return {}
    try:
        found = ModelCard(text, ignore_metadata_errors=True).data.__dict__
    except Exception:  # PyYAML's own errors, and whatever else a document of another's making provokes
        return {}
    return {key: value for key, value in found.items() if value is not None}


def strings(value: Any) -> list[str]:
    """Return the strings in a field of a card, which is one or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
