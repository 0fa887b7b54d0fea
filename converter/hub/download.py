"""What is needed of a repo on the Hub, fetched.

The config.json comes first: with it the revision is resolved to a commit, of which everything else is taken.
A repo that is not what the caller needs is refused before its weights are fetched. Of these come only the files that
will be read. All of it lies in huggingface_hub's cache, and is taken from there when the Hub cannot be reached, or with
HF_HUB_OFFLINE=1. The token is HF_TOKEN, or that of `hf auth login`.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

from llmint8.formats import CheckpointError, Quantization, SourceError, read_json
from llmint8.formats.containers.index import read_weight_map
from llmint8.formats.disk.names import (
    CONFIG_NAME,
    LEGACY_QUANTIZATION_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    TORCH_INDEX_NAME,
    TORCH_NAME,
)

from .answers import explain, patiently
from .origin import Kind

_SMALL_FILES = [
    "*.py",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]
# One name that is there, for a pattern without any match is logged as a warning.
_ALWAYS = [CONFIG_NAME, "additional_chat_templates/*.jinja"]


def download(repo: str, revision: str | None, kind: Kind | None, low_disk: bool) -> Path:
    """Fetch what is needed of a repo; return its snapshot in the cache, a folder named by the commit. See `resolve`.

    Raises:
        SourceError: no repo that can be fetched; or no source, where one is wanted.
        CheckpointError: no int8 checkpoint, where one is wanted.

    """
    with _explained(repo, revision):
        config = Path(patiently(lambda: hf_hub_download(repo, CONFIG_NAME, revision=revision)))
        snapshot = _fetch(repo, config.parent.name, _SMALL_FILES, "*/*")
        _check_kind(repo, snapshot, kind)
        if low_disk:
            _require_safetensors(repo, snapshot)
            _fetch(repo, snapshot.name, _ALWAYS)
        else:
            _fetch_weights(repo, snapshot, kind)
    return snapshot


def _fetch(repo: str, commit: str, patterns: list[str], without: str | None = None) -> Path:
    return Path(
        patiently(lambda: snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=without))
    )


def _check_kind(repo: str, snapshot: Path, kind: Kind | None) -> None:
    quantization = read_json(snapshot / CONFIG_NAME).get("quantization_config")
    if quantization is None and (snapshot / LEGACY_QUANTIZATION_NAME).exists():
        quantization = read_json(snapshot / LEGACY_QUANTIZATION_NAME)
    if kind == "source" and quantization is not None:
        raise SourceError(f"{repo}: this model is already quantized; convert the original 16-bit checkpoint instead")
    if kind == "int8":
        if not isinstance(quantization, dict):
            raise CheckpointError("E02", f"{repo}: not an int8 checkpoint; make one with: llmint8-convert {repo} OUT")
        try:
            Quantization.from_dict(quantization)
        except ValueError as error:
            raise CheckpointError("E02", f"{repo}: not an int8 checkpoint: {error}") from None


def _fetch_weights(repo: str, snapshot: Path, kind: Kind | None) -> None:
    """Fetch safetensors, or where there are none and they may be, PyTorch files; whole or as their index has them."""
    layouts = [(SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME, ".safetensors"), (TORCH_INDEX_NAME, TORCH_NAME, ".bin")]
    for index, single, suffix in layouts[:1] if kind == "int8" else layouts:
        indexed = (snapshot / index).exists()
        names = set(read_weight_map(snapshot / index, suffix).values()) if indexed else {single}
        patterns = [*_ALWAYS, *map(glob.escape, sorted(names))]
        _fetch(repo, snapshot.name, patterns)
        if indexed or (snapshot / single).exists():
            return


def _require_safetensors(repo: str, snapshot: Path) -> None:
    if not (snapshot / SAFETENSORS_INDEX_NAME).exists():
        try:
            patiently(lambda: get_hf_file_metadata(hf_hub_url(repo, SAFETENSORS_NAME, revision=snapshot.name)))
        except EntryNotFoundError:
            raise SourceError(
                f"{repo}: has no safetensors files, and --low-disk cannot do with others; leave it out"
            ) from None


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise SourceError(f"{repo}: no such directory, and not a Hub repo id either") from None
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise SourceError(f"{repo}: no such directory here, and {explain(error, revision)}") from None
