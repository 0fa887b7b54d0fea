"""Where the benchmarks of a GPU keep their rows, and how new ones join those of earlier runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def result_file(benchmark: str, device: str) -> Path:
    """Return the file for the rows of a benchmark on a device of this name."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return Path(__file__).parent / "results" / f"{benchmark}-{slug}.json"


def merge(file: Path, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Write rows into the file, in place of those with the same values of `keys`; return all that it then holds."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    merged = list({tuple(row[key] for key in keys): row for row in [*before, *rows]}.values())
    file.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in merged)
    # Whoever kills a benchmark between two rows finds those before.
    whole = file.with_suffix(".new")
    whole.write_text(f"[\n  {lines}\n]\n", encoding="utf-8")
    whole.replace(file)
    return merged
