"""The tokens that a conversion shows to the model, to see which input dimensions are large.

512 tokens do as well as thousands. They come from a file the user names, or from `text.txt` in the package:
prose, code, dialogue and data in several languages, written for this and arranged so that its beginning has something
of all.
"""

import hashlib
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import SourceError

from ..model.build import meta_model
from ..model.config import is_trusted
from ..model.inputs import Given, special_ids, takes_text
from ..model.limits import longest_text
from ..words import written
from .tokenizer import load_tokenizer

_RANDOM_SEED = 0
# Of models that hash code points instead of having a vocabulary.
_CODE_POINTS = 0x250
# With more of its tokens unknown, a text shows little of what the model sees in use.
_MOST_UNKNOWN = 0.1


@dataclass(frozen=True)
class Calibration:
    """A batch of token ids [rows, length], and what to record about it in the checkpoint.

    Beside them may be images and sounds that were given, by the name of the model's argument for them.
    """

    tokens: Tensor
    provenance: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    given: dict[str, Given] = field(default_factory=dict)


def load_calibration(source: Path, config: Any, text: Path | None, count: int) -> Calibration:
    """Tokenize the text with the source's tokenizer and cut it into rows that the model can take.

    Without a tokenizer the tokens are random ids, drawn the same way every time; that is somewhat worse.

    Args:
        source: the source checkpoint's directory.
        config: its PreTrainedConfig.
        text: a `.jsonl` file with a `text` field in each line, or any text file; None for the packaged text.
        count: so many tokens, or fewer when the text is shorter.

    Raises:
        SourceError: the text cannot be read, or is empty; or the model takes none.
        ValueError: `count` is not positive.

    """
    if count < 1:
        raise ValueError(f"calibration tokens {count}, expected at least 1")
    name, content = ("packaged", _packaged_text()) if text is None else (written(text.name), read_text(text))
    if not takes_text(config):
        raise SourceError(f"{source}: a {config.model_type} model does not take text")
    vocabulary = getattr(config.get_text_config(), "vocab_size", _CODE_POINTS)
    tokenizer, why = load_tokenizer(source, is_trusted(config))
    notices = []
    if tokenizer is None:
        ids, name, content = _random_ids(config, vocabulary, count), "random ids", ""
        notices.append(f"{why}: calibrated with random token ids, which is worse")
        if text is not None:
            notices[0] += f"; {written(text.name)} was not used"
    else:
        ids = tokenizer(content, verbose=False)["input_ids"][:count]
        notices += _unknown_notice(ids, tokenizer, name)
    if not ids:
        raise SourceError(f"{text}: holds no text to calibrate with")
    if max(ids) >= vocabulary and hasattr(config.get_text_config(), "vocab_size"):
        raise SourceError(f"{source}: its tokenizer gives id {max(ids)}, its config has {vocabulary} of them")
    length = min(longest_text(config, meta_model(config)) or len(ids), len(ids))
    tokens = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    provenance = {
        "text": name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest() if content else None,
        "tokens": tokens.numel(),
    }
    return Calibration(tokens, provenance, notices)


def without_text() -> Calibration:
    """Return what stands for a text where none is shown: two rows of images or sounds are made up then."""
    return Calibration(torch.zeros(2, 1, dtype=torch.int64), {"text": None, "text_sha256": None, "tokens": 0})


def _random_ids(config: Any, vocabulary: int, count: int) -> list[int]:
    """Return random token ids, none of which stands for padding, an image, or a beginning or end."""
    special = special_ids(config)
    allowed = torch.tensor([number for number in range(vocabulary) if number not in special] or [0])
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    ids: list[int] = allowed[torch.randint(len(allowed), (count,), generator=generator)].tolist()
    return ids


def _unknown_notice(ids: list[int], tokenizer: Any, name: str) -> list[str]:
    """Say it where the tokenizer does not know much of the text."""
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown <= _MOST_UNKNOWN * len(ids):
        return []
    text = "the text in the package" if name == "packaged" else name
    return [
        f"{unknown} of {len(ids)} tokens of {text} are unknown to the tokenizer ({unknown / len(ids):.0%}): the model "
        "was calibrated on little; name a text of what it is made for with --calibration"
    ]


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
