"""What the Hub answers: waited for when it is busy, and told in a few words when it is no."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmint8.formats.disk.names import CONFIG_NAME

from .origin import Token

log = logging.getLogger("llmint8")

_TRANSIENT = (429, 500, 502, 503, 504)
_WAITS = (1.0, 4.0)
_LONGEST_WAIT = 300.0
_SIGN_IN = "set HF_TOKEN or run `hf auth login`"
_Result = TypeVar("_Result")


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


def explain(error: BaseException, revision: str | None = None, token: Token = None) -> str:
    """Say in a few words why the Hub gave no answer, or not the one that was hoped for, to whom has this token."""
    if isinstance(error, GatedRepoError):
        return f"the repo on the Hub is gated: ask for access on its page, then {_SIGN_IN}"
    if isinstance(error, RepositoryNotFoundError):
        signed_in = token if isinstance(token, str) else get_token() if token is not False else None
        why = "this token may not read it" if signed_in else _SIGN_IN
        return f"no such repo on the Hub, or it is private: {why}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repo on the Hub has no revision {revision!r}"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return "not, or not completely, in the cache; HF_HUB_OFFLINE is set, so the Hub is not asked"
        cause = error.__cause__
        reason = explain(cause, revision, token) if cause is not None else "the Hub cannot be reached"
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
