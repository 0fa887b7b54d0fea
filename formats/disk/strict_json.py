"""JSON from strangers: UTF-8, of bounded size in memory, without what two readers could take in two ways."""

import json
import re
from typing import Any

# A short text may hold many objects. So many values take about 1.5 GB; a manifest of 300,000 tensors has 3 million.
MAX_VALUES = 10_000_000
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """Return the value that `raw` spells. Raises ValueError."""
    # Counted in strings too, which is simpler, and never too few.
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > MAX_VALUES:
        raise ValueError(f"{count} values, at most {MAX_VALUES} are allowed")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
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
