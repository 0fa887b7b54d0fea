"""A tokenizer.json as llama.cpp takes it: BPE of bytes, and BPE of characters as SentencePiece makes it.

Carried are the tokens, the merges or the scores that stand for them, the tokens that have a meaning of their own, the
chat template, and how text is split first, where llama.cpp has a name for it (`splits.py`). What is not carried is
said: a file without a tokenizer runs on token ids alone.
"""

from pathlib import Path
from typing import Any

from llmint8.formats import LLMInt8Error, read_json
from llmint8.formats.containers.gguf.library import gguf_py

from .splits import name_of_split

TOKENIZER_NAME = "tokenizer.json"
_SPACE = "▁"


def add_tokenizer(writer: Any, folder: Path, size: int) -> list[str]:
    """Add the tokenizer of a directory to a GGUFWriter of gguf-py, or that there is none; return what is left out.

    Args:
        writer: the GGUFWriter.
        folder: with tokenizer.json, tokenizer_config.json and the chat template.
        size: of the model's vocabulary; what it has beyond the tokenizer's tokens is called unused.

    """
    kind, split, notices = "none", None, [f"no {TOKENIZER_NAME}: the file has no tokenizer"]
    tokenizer: dict[str, Any] = {}
    if (folder / TOKENIZER_NAME).exists():
        tokenizer = read_json(folder / TOKENIZER_NAME)
        kind, split, notices = _kind(tokenizer)
    writer.add_tokenizer_model(kind)
    if kind == "none":
        return notices
    tokens, types = _tokens(tokenizer, size, folder / TOKENIZER_NAME)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf_py().SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=size)
    special.add_special_token.setdefault("bos", False)
    if kind == "gpt2":
        writer.add_tokenizer_pre(split)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokenizer["model"], tokens))
        writer.add_add_space_prefix(split == _SPACE)
    special.add_to_gguf(writer, quiet=True)
    return notices


def _kind(tokenizer: dict[str, Any]) -> tuple[str, str | None, list[str]]:
    """Return llama.cpp's kind of a tokenizer, how it splits, and what is said of it."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not model.get("merges"):
        return "none", None, [f"the tokenizer is {model.get('type')} and not BPE: the file has none"]
    normalizer = tokenizer.get("normalizer") or {}
    if not model.get("byte_fallback"):
        split = name_of_split(tokenizer.get("pre_tokenizer"))
        if split is None:
            return "none", None, ["the tokenizer splits text in a way that has no known name: the file has none"]
        said = [f"the tokenizer's normalizer, {normalizer['type']}, stays behind"] if normalizer.get("type") else []
        return "gpt2", split, said
    if not _any_way(model):
        return "none", None, ["the tokenizer's merges are not those that its vocabulary implies: the file has none"]
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    metaspace = tokenizer.get("pre_tokenizer") or {}
    prepends |= metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme", "always") != "never"
    return "llama", _SPACE if prepends else "", []


def _any_way(model: dict[str, Any]) -> bool:
    """Tell whether a token may be merged of any two that it is made of, as SentencePiece does."""
    vocabulary, merges = model["vocab"], {tuple(pair) for pair in _pairs(model)}
    ways = 0
    for token in vocabulary:
        for place in range(1, len(token)):
            pair = token[:place], token[place:]
            if pair[0] in vocabulary and pair[1] in vocabulary:
                ways += pair in merges
                if pair not in merges and not (token.startswith("<") and token.endswith(">")):
                    return False
    return ways > 0


def _pairs(model: dict[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return the scores by which the merges have their order: what is merged earlier has more."""
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(_pairs(model)):
        rank.setdefault(left + right, place)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _tokens(tokenizer: dict[str, Any], size: int, file: Path) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their numbers, and the kind of each."""
    kinds, model = gguf_py().TokenType, tokenizer["model"]
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(kinds.UNUSED)] * size
    added = {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    numbered = {**model["vocab"], **{content: token["id"] for content, token in added.items()}}
    for token, number in numbered.items():
        if not 0 <= number < size:
            raise LLMInt8Error(f"{file}: {token[:40]!r} has number {number}, the model {size} tokens")
        kind = kinds.NORMAL
        if token in added:
            kind = kinds.CONTROL if added[token].get("special") else kinds.USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = kinds.BYTE
        if token == model.get("unk_token") and model.get("byte_fallback"):
            kind = kinds.UNKNOWN
        tokens[number], types[number] = token, int(kind)
    return tokens, types
