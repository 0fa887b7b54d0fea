"""Which files in a directory are a checkpoint of metaseq.

Model-parallel part P and shard S of it are `STEM-model_part-P-shardS.pt`. Resharded there is one file for each part,
and of the smallest models one file for all of it.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ...disk.names import WEIGHT_NAMES
from ...errors import SourceError

_FILE = re.compile(
    r"(?P<stem>[\w.-]+?)(?P<part>-model_part-(?P<p>\d{1,4}))?(?P<shard>-shard(?P<s>\d{1,5}))?\.pt", re.ASCII
)
# Without a number: what metaseq's own scripts write, and not any file with weights.
_WHOLE = re.compile(r"reshard|restored|checkpoint[\w.-]*|[\w.-]+_consolidated", re.ASCII)
_MOST_NAMED = 3


@dataclass(frozen=True)
class FileNames:
    """The files of one checkpoint in a directory: for each model-parallel part its shards; and a name for all."""

    pattern: str
    parts: list[list[str]]


def metaseq_files(directory: Path) -> FileNames | None:
    """Return the files of the checkpoint in a directory; None where there is none.

    Where there is a weight file that transformers takes, others do not matter.

    Raises:
        SourceError: files are missing, there twice, or of more than one checkpoint.

    """
    if any((directory / name).exists() for name in WEIGHT_NAMES):
        return None
    found: dict[str, dict[tuple[int, int], list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(directory.iterdir()):
        match = _FILE.fullmatch(file.name)
        if match and (match["part"] or match["shard"] or _WHOLE.fullmatch(match["stem"])):
            pattern = match["stem"] + ("-model_part-*" if match["part"] else "") + ("-shard*" if match["shard"] else "")
            found[f"{pattern}.pt"][int(match["p"] or 0), int(match["s"] or 0)].append(file.name)
    if not found:
        return None
    if len(found) > 1:
        each = "; ".join(f"{pattern} ({len(places)})" for pattern, places in found.items())
        raise SourceError(f"{directory}: holds files of several checkpoints: {each}; leave those of one in it")
    pattern, places = next(iter(found.items()))
    twice = next((names for names in places.values() if len(names) > 1), None)
    if twice:
        raise SourceError(f"{directory}: {twice[0]} and {twice[1]} are the same part; remove one of them")
    parts, shards = (1 + max(numbers) for numbers in zip(*places, strict=True))
    missing = [(p, s) for p in range(parts) for s in range(shards) if (p, s) not in places]
    if missing:
        raise SourceError(
            f"{directory}: {_named(pattern, missing)} missing: {len(places)} of {parts * shards} are there"
        )
    return FileNames(pattern, [[places[p, s][0] for s in range(shards)] for p in range(parts)])


def _named(pattern: str, numbers: list[tuple[int, int]]) -> str:
    names = [pattern.replace("model_part-*", f"model_part-{p}").replace("shard*", f"shard{s}") for p, s in numbers][
        :_MOST_NAMED
    ]
    more = len(numbers) - len(names)
    return ", ".join(names) + (f" and {more} more are" if more else " is" if len(names) == 1 else " are")
