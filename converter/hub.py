"""A checkpoint named by a local directory or a Hub repo id, as a directory.

From the Hub, config.json comes first: with it the revision is resolved to a commit, of which everything else is taken.
A repo that is not what the caller needs is refused before its weights are fetched. Of these come only the files that
will be read. All of it lies in huggingface_hub's cache, and is taken from there when the Hub cannot be reached, or with
HF_HUB_OFFLINE=1. The token is HF_TOKEN, or that of `hf auth login`.
"""

import glob
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmint8.formats import CheckpointError, Quantization, SourceError, read_json
from llmint8.formats.files import (
    CONFIG_NAME,
    LEGACY_QUANTIZATION_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    read_weight_map,
)
from llmint8.formats.source import TORCH_INDEX_NAME, TORCH_NAME

Kind = Literal["source", "int8"]

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
_TRANSIENT = (429, 500, 502, 503, 504)
_WAITS = (1.0, 4.0)
_LONGEST_WAIT = 300.0
_SIGN_IN = "set HF_TOKEN or run `hf auth login`"
_Result = TypeVar("_Result")
log = logging.getLogger("llmint8")


@dataclass(frozen=True)
class Resolved:
    """A checkpoint's directory, and the repo and commit it is a snapshot of when it came from the Hub.

    With `remote` the weights are not in the directory yet; `low_disk.py` fetches them as they are read.
    """

    path: Path
    repo: str | None = None
    commit: str | None = None
    remote: bool = False

    @property
    def name(self) -> str:
        """What to call it: the repo id, or the directory's name."""
        return self.repo or self.path.resolve().name


def resolve(
    path_or_repo: str | Path, revision: str | None = None, kind: Kind | None = None, low_disk: bool = False
) -> Resolved:
    """Return the local directory, or fetch what is needed of a Hub repo.

    Args:
        path_or_repo: a directory, or a repo id.
        revision: branch, tag or commit of the repo.
        kind: what a repo has to hold, a 16-bit `source` or an `int8` checkpoint; None takes either.
        low_disk: fetch all but the weights, which must be in safetensors files.

    Raises:
        SourceError: neither a directory nor a repo that can be fetched; or no source, where one is wanted; or
            `low_disk` for a directory.
        CheckpointError: no int8 checkpoint, where one is wanted.

    """
    path = Path(path_or_repo).expanduser()
    if path.exists():
        if not path.is_dir():
            raise SourceError(f"{path}: not a directory; name the checkpoint's directory")
        if revision is not None:
            raise SourceError(f"{path}: is a local directory, which has no revision {revision!r}")
        if low_disk:
            raise SourceError(f"{path}: is a local directory; --low-disk is for a repo on the Hub, leave it out")
        return Resolved(path)
    repo = str(path_or_repo)
    with _explained(repo, revision):
        config = Path(patiently(lambda: hf_hub_download(repo, CONFIG_NAME, revision=revision)))
        snapshot = _fetch(repo, config.parent.name, _SMALL_FILES, "*/*")
        _check_kind(repo, snapshot, kind)
        if low_disk:
            _require_safetensors(repo, snapshot)
            _fetch(repo, snapshot.name, _ALWAYS)
        else:
            _fetch_weights(repo, snapshot, kind)
    return Resolved(snapshot, repo, snapshot.name, remote=low_disk)


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


def patiently(call: Callable[[], _Result], transient: tuple[int, ...] = _TRANSIENT) -> _Result:
    """Call, and again after a while when the Hub is busy; huggingface_hub itself retries only some calls."""
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in transient:
                raise
            asked = str(error.response.headers.get("Retry-After", ""))
            wait = min(float(asked), _LONGEST_WAIT) if asked.isdigit() else wait
            log.warning("The Hub answers %d; trying again in %.0f s", error.response.status_code, wait)
            time.sleep(wait)
    return call()


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise SourceError(f"{repo}: no such directory, and not a Hub repo id either") from None
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise SourceError(f"{repo}: no such directory here, and {explain(error, revision)}") from None


def explain(error: BaseException, revision: str | None = None) -> str:
    """Say in a few words why the Hub gave no answer, or not the one that was hoped for."""
    if isinstance(error, GatedRepoError):
        return f"the repo on the Hub is gated: ask for access on its page, then {_SIGN_IN}"
    if isinstance(error, RepositoryNotFoundError):
        token = "this token may not read it" if get_token() else f"{_SIGN_IN}"
        return f"no such repo on the Hub, or it is private: {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repo on the Hub has no revision {revision!r}"
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "not, or not completely, in the cache; HF_HUB_OFFLINE is set, so the Hub is not asked"
        cause = error.__cause__
        reason = explain(cause) if cause is not None else "the Hub cannot be reached"
        return f"{reason}; nor is it complete in the cache"
    if isinstance(error, EntryNotFoundError):
        return f"the repo on the Hub has no {CONFIG_NAME}, so no checkpoint in Hugging Face layout"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error)
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached: no network to {constants.ENDPOINT}"
    return _one_line(error)


def _explain_status(error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not know this token (401): {_SIGN_IN}"
    if status == 403:
        return f"the Hub gives no access (403): {error.server_message or 'this token may not do that'}"
    if status == 429:
        return "the Hub has had too many requests (429); try again in some minutes"
    if status >= 500:
        return f"the Hub is out of order ({status}); try again later"
    return f"the Hub refuses ({status}): {error.server_message or _one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
