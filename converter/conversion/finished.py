"""A conversion that was finished before: the same command finds nothing to do, and another one does not touch it."""

import hashlib
from collections.abc import Mapping
from typing import Any

from llmint8.formats import Checkpoint, CheckpointError, Manifest, OutputError, open_checkpoint, read_manifest
from llmint8.formats.disk.names import CARD_NAME, CONFIG_NAME

from ..planning.plan import ConversionPlan, is_finished
from .provenance import identify


def finished(plan: ConversionPlan) -> tuple[Checkpoint, Manifest] | None:
    """Return what OUT holds where this plan has been carried out, None where nothing has come to its end.

    The structure is checked, no value is: that is for `llmint8 verify`.

    Raises:
        OutputError: OUT holds a finished conversion of something else, or one that is damaged.

    """
    if not is_finished(plan.out):
        return None
    try:
        checkpoint, manifest = open_checkpoint(plan.out), read_manifest(plan.out)
    except CheckpointError as error:
        raise OutputError(f"{plan.out}: holds a damaged conversion: {error}; remove it to convert again") from None
    beside = _small_files(plan)
    now = _in_words({**identify(plan), "files beside": beside})
    then = _in_words({**manifest.source, "files beside": {name: manifest.files.get(name) for name in beside}})
    changes = [
        f"{key} was {then.get(key, 'not recorded')} and is {now.get(key, 'not there')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    changes += [f"the source's {name} was modified since" for name in _newer(plan)]
    if changes:
        raise OutputError(
            f"{plan.out}: holds a finished conversion of something else: {'; '.join(changes)}. "
            "Name another directory, or remove what is in this one"
        )
    return checkpoint, manifest


def _small_files(plan: ConversionPlan) -> dict[str, str]:
    """Return what lies beside the source's weights and is copied, by its name -> the SHA-256 of its content."""
    files = {file.relative_to(plan.source.path).as_posix(): file for file in plan.source.small_files}
    files.pop(CARD_NAME, None)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _newer(plan: ConversionPlan) -> list[str]:
    """Return the source's weight files that are newer than the result; of a commit they are always the same."""
    if plan.origin.commit is not None:
        return []
    end = (plan.out / CONFIG_NAME).stat().st_mtime
    return [file.path.name for file in plan.source.files if file.path.stat().st_mtime > end]


def _in_words(source: Mapping[str, Any]) -> dict[str, str]:
    """Return what a manifest says of the source and of the options, in one table."""
    found: dict[str, Any] = {}
    for key, value in source.items():
        table = value if isinstance(value, dict) else {key: value}
        found |= table if key == "options" else {f"the source's {name}": item for name, item in table.items()}
    return {key: str(value) for key, value in found.items()}
