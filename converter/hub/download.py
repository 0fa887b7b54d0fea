"""What is needed of a repo on the Hub, fetched.

The config.json comes first: with it the revision is resolved to a commit, of which everything else is taken.
A repo that is not what the caller needs is refused before its weights are fetched, and a conversion is planned from
their headers. Of the weights come only the files that will be read. All of it lies in huggingface_hub's cache, and is
taken from there when the Hub cannot be reached, or with HF_HUB_OFFLINE=1. Where no token is given it is HF_TOKEN, or
that of `hf auth login`.
"""

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

from llmint8.formats import BITSANDBYTES, LAYOUTS, NATIVE, CheckpointError, Quantization, SourceError, read_json
from llmint8.formats.disk.names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from llmint8.formats.disk.small_files import module_folders
from llmint8.formats.sources.quantized import already_quantized, stored_quantization
from llmint8.formats.sources.source import adapter_alone
from llmint8.formats.sources.weight_files import weight_files

from .answers import explain, patiently
from .licence import LICENCE_FILES, NOTICE_FILES, POLICY_FILES
from .origin import Kind, Resolved, Token
from .remote import has_file

_SMALL_FILES = ["*.py", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken"]
_SMALL_FILES += [*LICENCE_FILES, *NOTICE_FILES, *POLICY_FILES]
# In the folders that `modules.json` of a sentence encoder names.
_MODULE_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]
# One name that is there, for a pattern without any match is logged as a warning.
_ALWAYS = [CONFIG_NAME, "additional_chat_templates/*.jinja"]


def download(
    repo: str, revision: str | None, kind: Kind | None, low_disk: bool, weights: bool, token: Token = None
) -> Resolved:
    """Fetch what is needed of a repo into the cache, to a folder named by the commit. See `resolve`.

    Raises:
        SourceError: no repo that can be fetched; or no source, where one is wanted.
        CheckpointError: no int8 checkpoint, where one is wanted.

    """
    with _explained(repo, revision, token):
        config = _fetch_config(repo, revision, token)
        snapshot = config.parent
        origin = Resolved(snapshot, repo, snapshot.name, low_disk=low_disk, token=token)
        _fetch(origin, _SMALL_FILES, "*/*")
        if folders := module_folders(snapshot, there=False):
            _fetch(origin, [f"{glob.escape(folder)}/{file}" for folder in folders for file in _MODULE_FILES])
        content = read_json(config)
        quantization = stored_quantization(snapshot, content)
        _check_kind(repo, quantization, kind)
        # The reader of int8 checkpoints says which files it misses.
        int8 = kind == "int8" or (kind is None and _is_native(quantization))
        named = _int8_weights(snapshot, quantization) if int8 else content.get("transformers_weights")
        has = partial(has_file, origin)
        try:
            names = weight_files(snapshot, has, named).names
        except SourceError:
            if quantization is not None:
                raise already_quantized(repo, quantization) from None
            raise
        if low_disk and not names[0].endswith(".safetensors"):
            raise SourceError(f"{repo}: has no safetensors files, and --low-disk cannot do with others; leave it out")
        if low_disk or not weights:
            _fetch(origin, _ALWAYS)
            return dataclasses.replace(origin, remote=low_disk or not all((snapshot / name).exists() for name in names))
        _fetch_weights(origin, names)
    return origin


def _is_native(quantization: Any) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == NATIVE.method


def _int8_weights(snapshot: Path, quantization: Any) -> str:
    """Return the name of the index of an int8 checkpoint, or of its only weight file."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    layout = next((layout for layout in LAYOUTS.values() if layout.method == method), BITSANDBYTES)
    return layout.index if (snapshot / layout.index).exists() else layout.single


def fetch_weights(origin: Resolved, names: Sequence[str]) -> None:
    """Fetch weight files into the snapshot of their repo. Raises SourceError."""
    try:
        _fetch_weights(origin, names)
    except (HTTPError, OSError) as error:
        raise SourceError(f"{origin.repo}: {explain(error, token=origin.token)}") from None


def _fetch_weights(origin: Resolved, names: Sequence[str]) -> None:
    _fetch(origin, [*_ALWAYS, *map(glob.escape, names)])


def _fetch(origin: Resolved, patterns: list[str], without: str | None = None) -> None:
    which = {"revision": origin.commit, "allow_patterns": patterns, "ignore_patterns": without, "token": origin.token}
    patiently(lambda: snapshot_download(str(origin.repo), **which))


def _fetch_config(repo: str, revision: str | None, token: Token) -> Path:
    def fetch(name: str) -> Path:
        return Path(patiently(lambda: hf_hub_download(repo, name, revision=revision, token=token)))

    try:
        return fetch(CONFIG_NAME)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            if error := adapter_alone(fetch(ADAPTER_CONFIG_NAME).parent):
                raise error from None
        raise


def _check_kind(repo: str, quantization: Any, kind: Kind | None) -> None:
    # That of others may be stale: the headers of the weights will tell.
    if kind == "source" and isinstance(quantization, dict) and "llmint8" in quantization:
        raise already_quantized(repo, quantization)
    if kind == "int8":
        if not isinstance(quantization, dict):
            raise CheckpointError("E02", f"{repo}: not an int8 checkpoint; make one with: llmint8-convert {repo} OUT")
        try:
            Quantization.from_dict(quantization)
        except ValueError as error:
            raise CheckpointError("E02", f"{repo}: not an int8 checkpoint: {error}") from None


@contextmanager
def _explained(repo: str, revision: str | None, token: Token) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise SourceError(f"{repo}: no such directory, and not a Hub repo id either") from None
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise SourceError(f"{repo}: no such directory here, and {explain(error, revision, token)}") from None
