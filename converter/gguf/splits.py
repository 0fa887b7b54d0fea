"""How tokenizers split text before they merge, in tokenizer.json and by llama.cpp's names; known are a few.

A name stands for code in llama.cpp. With another split the same vocabulary gives other tokens, so a tokenizer that
splits in no way that is known here is not carried, and that is said.
"""

from typing import Any

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REGULAR = {"llama-bpe": _LLAMA_3, "qwen2": _QWEN_2, "tekken": _TEKKEN}
_GPT_2 = "gpt-2"
_SINGLE_DIGITS = "smollm"


def name_of_split(pre_tokenizer: Any) -> str | None:
    """Return llama.cpp's name for `pre_tokenizer` of tokenizer.json; None where none is known."""
    steps = _steps(pre_tokenizer)
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return _GPT_2 if _by_regex(steps[0]) else None
    if [step.get("type") for step in steps] == ["Digits", "ByteLevel"]:
        return _SINGLE_DIGITS if steps[0].get("individual_digits") and _by_regex(steps[1]) else None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or _by_regex(steps[1]):
        return None
    split, pattern = steps[0], steps[0].get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if split.get("behavior") != "Isolated" or split.get("invert") or steps[1].get("add_prefix_space"):
        return None
    return next((name for name, known in _REGULAR.items() if known == regex), None)


def split_of_name(name: str) -> Any | None:
    """Return `pre_tokenizer` of tokenizer.json for llama.cpp's name; None where it is not known here."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if name == _GPT_2:
        return level
    if name == _SINGLE_DIGITS:
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    if name not in _REGULAR:
        return None
    split = {"type": "Split", "pattern": {"Regex": _REGULAR[name]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _by_regex(level: dict[str, Any]) -> bool:
    """Tell whether a step of bytes splits by GPT-2's own expression."""
    return bool(level.get("use_regex", True)) and not level.get("add_prefix_space")
