"""The tokenizer of OPT in the files of transformers, from those that Meta hands out with the weights.

That is GPT-2's byte-level BPE with `</s>` in front. `gpt2-vocab.json` of OPT counts as the model does: `<s>`, `<pad>`,
`</s>`, `<unk>`, and then the tokens. GPT-2's own counts otherwise; line N of `dict.txt` then names the token N + 4.
"""

from pathlib import Path
from typing import Any

from ...disk.reading import open_regular, read_json, require_inside
from ...errors import CorruptFileError

VOCABULARY, MERGES, DICTIONARY, UNIFIED = "gpt2-vocab.json", "gpt2-merges.txt", "dict.txt", "gpt2-unified.json"
# What transformers reads, and what stays behind when it is made.
_OF_TRANSFORMERS = ("tokenizer.json", "vocab.json")
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_CONFIG = {
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "errors": "replace",
    "pad_token": "<pad>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "</s>",
}
_MOST_BYTES = 64 << 20


def tokenizer_files(directory: Path) -> tuple[dict[str, Any], set[str], list[str]]:
    """Return files to write: name -> JSON or text; names of those that these are made of; and notices.

    Raises:
        CorruptFileError: a file is not what its name says.

    """
    if any((directory / name).exists() for name in _OF_TRANSFORMERS):
        return {}, set(), []
    if (directory / UNIFIED).exists():
        made: dict[str, Any] = {"tokenizer.json": read_json(directory / UNIFIED), "tokenizer_config.json": _CONFIG}
        return made, {UNIFIED, VOCABULARY, MERGES, DICTIONARY}, []
    missing = [name for name in (VOCABULARY, MERGES) if not (directory / name).exists()]
    if missing:
        return (
            {},
            set(),
            [f"no tokenizer goes along: {' and '.join(missing)} of metaseq's projects/OPT/assets is not there"],
        )
    vocabulary = read_json(directory / VOCABULARY)
    if [token for token, number in vocabulary.items() if number in range(4)] != [*_SPECIAL]:
        if not (directory / DICTIONARY).exists():
            why = f"{VOCABULARY} does not begin with {', '.join(_SPECIAL)}, and there is no {DICTIONARY}"
            return {}, set(), [f"no tokenizer goes along: {why}"]
        vocabulary = _numbered(directory, vocabulary)
    made = {"vocab.json": vocabulary, "merges.txt": _text(directory / MERGES), "tokenizer_config.json": _CONFIG}
    return made, {VOCABULARY, MERGES, DICTIONARY}, []


def _numbered(directory: Path, vocabulary: dict[str, Any]) -> dict[str, int]:
    """Number the tokens of GPT-2 as the dictionary lists them: by their numbers there, or by themselves."""
    token_of = {str(number): token for token, number in vocabulary.items()}
    found = {token: number for number, token in enumerate(_SPECIAL)}
    for number, line in enumerate(_text(directory / DICTIONARY).splitlines(), len(_SPECIAL)):
        symbol = line.rpartition(" ")[0]
        token = token_of.get(symbol, symbol)
        if not symbol or token in found:
            raise CorruptFileError(
                f"{directory / DICTIONARY}: line {number - 3} is {line[:80]!r}, expected a new token"
            )
        found[token] = number
    return found


def _text(path: Path) -> str:
    require_inside(path, path.parent)
    with open_regular(path) as file:
        raw = file.read(_MOST_BYTES + 1) or b""
    try:
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return raw.decode()
    except ValueError as error:
        raise CorruptFileError(f"{path}: not a text file: {error}") from None
