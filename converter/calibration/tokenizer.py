"""The tokenizer beside a checkpoint."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmint8.formats.disk.small_files import small_files

from ..model.build import quiet_transformers
from ..words import first_line

log = logging.getLogger("llmint8")

# What holds a vocabulary, by parts of names; without one the other files of a tokenizer are of no use.
_VOCABULARIES = ("tokenizer.", "vocab", "merges", "spiece", "sentencepiece", ".model", ".spm", ".tiktoken", "tekken")
_OF_ANY_CLASS = {"tokenizer.json", "tokenizer.model"}


def load_tokenizer(source: Path, trust_remote_code: bool = False, place: str = "the source") -> tuple[Any | None, str]:
    """Return the tokenizer; or None, and a clause that says why there is none.

    Args:
        source: the checkpoint's directory.
        trust_remote_code: run the tokenizer's code in it, if there is any.
        place: what the clause calls the directory.

    Raises:
        SourceError: a file beside the weights is a link out of the directory.
        CorruptFileError: one is a pointer of git-lfs.

    """
    files = small_files(source)
    try:
        with quiet_transformers(logging.ERROR):  # it warns of what it tries; what came of it is told
            tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizers raise whatever they like when a file is missing
        log.debug("no tokenizer: %s", error)
        reason = _reason(files, error)
        return None, f"the tokenizer beside {place} cannot be loaded ({reason})" if reason else _nothing(place)
    # transformers makes up one for some models, which knows special tokens, and perhaps the space.
    names = {name for name in getattr(tokenizer, "vocab_files_names", {}).values() if isinstance(name, str)}
    made_up = names and not any(file.name in names | _OF_ANY_CLASS for file in files)
    if made_up or len(tokenizer) <= len(tokenizer.all_special_ids):
        return None, _nothing(place)
    return tokenizer, ""


def _nothing(place: str) -> str:
    return f"no tokenizer beside {place}"


def _reason(files: list[Path], error: Exception) -> str:
    """Return what is wrong with the files that make a tokenizer; nothing where there are none."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its own; --trust-remote-code runs it"
    vocabularies = [file for file in files if any(part in file.name for part in _VOCABULARIES)]
    if not vocabularies:
        return ""
    about = {*vocabularies, *(file for file in files if file.name.startswith(("tokenizer", "special_", "added_")))}
    for file in sorted(about):
        if file.suffix == ".json" and (problem := _json_problem(file)):
            return f"{file.name} is not valid JSON: {problem}"
    # Of a file of SentencePiece transformers says that tiktoken is missing, which it tries next.
    for package, suffixes in (("sentencepiece", (".model", ".spm")), ("tiktoken", (".tiktoken", ".model"))):
        needed = any(file.suffix in suffixes for file in vocabularies) and ("tiktoken" in text or package in text)
        if needed and importlib.util.find_spec(package) is None:
            return f"it needs the package {package}: pip install {package}"
    return first_line(error)


def _json_problem(file: Path) -> str:
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""
