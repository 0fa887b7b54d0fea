"""The tokens that a conversion shows to the model, to see which input dimensions are large.

512 tokens do as well as thousands. They come from a file the user names, or from `text.txt` in the package:
prose, code, dialogue and data in several languages, written for this and arranged so that its beginning has something
of all.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import SourceError

from ..model.config import is_trusted
from ..model.tokenizer import load_tokenizer

_RANDOM_SEED = 0
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Calibration:
    """A batch of token ids [rows, length], and what to record about it in the checkpoint."""

    tokens: Tensor
    provenance: dict[str, Any]
    notice: str | None = None


def load_calibration(source: Path, config: Any, text: Path | None, count: int) -> Calibration:
    """Tokenize the text with the source's tokenizer and cut it into rows that the model can take.

    Without a tokenizer the tokens are random ids, drawn the same way every time; that is somewhat worse.

    Args:
        source: the source checkpoint's directory.
        config: its PreTrainedConfig.
        text: a `.jsonl` file with a `text` field in each line, or any text file; None for the packaged text.
        count: so many tokens, or fewer when the text is shorter.

    Raises:
        SourceError: the text cannot be read, or is empty.
        ValueError: `count` is not positive.

    """
    if count < 1:
        raise ValueError(f"calibration tokens {count}, expected at least 1")
    name, content = ("packaged", _packaged_text()) if text is None else (text.name, read_text(text))
    text_config = config.get_text_config()
    if not hasattr(text_config, "vocab_size"):
        raise SourceError(f"{source}: a {config.model_type} model does not take text; convert it with --outliers none")
    limit = min([count] + [n for key in _LENGTH_KEYS if (n := getattr(text_config, key, None)) and n > 0])
    tokenizer, why = load_tokenizer(source, is_trusted(config))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(_RANDOM_SEED)
        ids = torch.randint(text_config.vocab_size, (count,), generator=generator).tolist()
        name, content = "random ids", ""
    else:
        ids = tokenizer(content, verbose=False)["input_ids"][:count]
    if not ids:
        raise SourceError(f"{text}: holds no text to calibrate with")
    if max(ids) >= text_config.vocab_size:
        raise SourceError(
            f"{source}: its tokenizer gives id {max(ids)}, its config has {text_config.vocab_size} of them"
        )
    length = min(limit, len(ids))
    tokens = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    provenance = {
        "text": name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest() if content else None,
        "tokens": tokens.numel(),
    }
    notice = None if content else f"{why}: calibrated with random token ids, which is worse"
    return Calibration(tokens, provenance, notice)


def read_text(path: Path) -> str:
    """Return the text of a file; of a `.jsonl` file the `text` fields, joined by empty lines. Raises SourceError."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return content
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not UTF-8 text, or a line is not a JSON object with `text`: {error}") from None


def _packaged_text() -> str:
    return files("llmint8.converter.calibration").joinpath("text.txt").read_text(encoding="utf-8")
