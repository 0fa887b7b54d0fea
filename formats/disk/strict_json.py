"""JSON from strangers: UTF-8, of bounded size in memory, without what two readers could take in two ways.

`NaN`, `Infinity` and `-Infinity` are no JSON, but transformers writes them into a config.json (Mamba 2) and needs them
there. They are read where the caller says so, and refused everywhere else.
"""

import codecs
import json
import math
import re
from typing import Any

# A short text may hold many objects. So many values take about 1.5 GB; a manifest of 300,000 tensors has 3 million.
MAX_VALUES = 10_000_000
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {str: "a string", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
_MISSING = object()


def parse_json(raw: bytes, constants: bool = False) -> Any:
    """Return the value that `raw` spells, `NaN` and the infinities only with `constants`. Raises ValueError."""
    if raw.startswith(codecs.BOM_UTF8):  # transformers does not read it either
        raise ValueError("begins with a byte-order mark; save it as UTF-8 without one")
    # Counted in strings too, which is simpler, and never too few.
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > MAX_VALUES:
        raise ValueError(f"{count} values, at most {MAX_VALUES} are allowed")
    try:
        refused = None if constants else _refuse_constant
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _HALF_A_PAIR.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # it could not be written again, nor printed
            raise ValueError("half of a surrogate pair, which is no character") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number in JSON")


def finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def member(value: Any, path: str, *kinds: type) -> Any:
    """Return what an object from JSON has under a key, or `key.key`: exactly one of these types. Raises ValueError."""
    for key in path.split("."):
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
    if type(value) not in kinds:
        what = "missing" if value is _MISSING else repr(str(value)[:80])
        raise ValueError(f"{path} is {what}, expected {' or '.join(_KINDS[kind] for kind in kinds)}")
    return value
