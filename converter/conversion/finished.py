"""A conversion that was finished before: the same command finds nothing to do, and another one does not touch it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmint8.formats import Checkpoint, CheckpointError, Manifest, OutputError, open_checkpoint, read_manifest
from llmint8.formats.disk.names import CARD_NAME

from ..planning.out import is_finished
from ..planning.plan import ConversionPlan
from ..words import count
from .comparison import compare_with_source
from .provenance import identify
from .transfer import Progress


def finished(plan: ConversionPlan, progress: Progress) -> tuple[Checkpoint, Manifest] | None:
    """Return what OUT holds where this plan has been carried out, None where nothing has come to its end.

    A commit on the Hub says what its weights are. A directory may hold others by now, under the same name and of the
    same sizes, so all of them are compared with what was made of them; `progress` is told.

    Raises:
        OutputError: OUT holds a finished conversion of something else, or one that is damaged.

    """
    if not is_finished(plan.out):
        return None
    try:
        checkpoint, manifest = open_checkpoint(plan.out), read_manifest(plan.out)
    except CheckpointError as error:
        raise OutputError(f"{plan.out}: holds a damaged conversion: {error}; remove it to convert again") from None
    if damaged := sorted(name for name, sha256 in manifest.files.items() if _sha256(plan.out / name) != sha256):
        raise OutputError(
            f"{plan.out}: holds a damaged conversion: {damaged[0]} is missing or another; remove it to convert again"
        )
    beside = _small_files(plan)
    now = _in_words({**identify(plan), "files beside": beside})
    then = _in_words({**manifest.source, "files beside": {name: manifest.files.get(name) for name in beside}})
    changes = [
        f"{key} was {then[key]} and is {now.get(key, 'not there')}" for key in sorted(then) if then[key] != now.get(key)
    ] + _unrecorded(sorted(now.keys() - then.keys()))
    if not changes and plan.origin.commit is None:
        plan.source.join(plan.selection.stacks)  # which the comparison splits itself
        changes = compare_with_source(checkpoint, plan.source, progress).problems[:1]
    if changes:
        raise OutputError(
            f"{plan.out}: holds a finished conversion of something else: {'; '.join(changes)}. "
            "Name another directory, or remove what is in this one"
        )
    return checkpoint, manifest


def _unrecorded(names: list[str]) -> list[str]:
    """Say in one clause what an earlier version did not write down."""
    if not names:
        return []
    more = f" and {count(len(names) - 3, 'thing')} more" if names[3:] else ""
    return [f"{', '.join(names[:3])}{more} {'was' if len(names) == 1 else 'were'} not recorded, as in earlier versions"]


def _small_files(plan: ConversionPlan) -> dict[str, str]:
    """Return what lies beside the source's weights and is copied, by its name -> the SHA-256 of its content."""
    files = {file.relative_to(plan.source.beside).as_posix(): file for file in plan.source.small_files}
    files.pop(CARD_NAME, None)
    return {name: _sha256(file) for name, file in files.items()}


def _sha256(file: Path) -> str:
    """Return the SHA-256 of a small file; nothing of one that is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _in_words(source: Mapping[str, Any]) -> dict[str, str]:
    """Return what a manifest says of the source and of the options, in one table."""
    found: dict[str, Any] = {}
    for key, value in source.items():
        table = value if isinstance(value, dict) else {key: value}
        found |= table if key == "options" else {f"the source's {name}": item for name, item in table.items()}
    return {key: str(value) for key, value in found.items()}
