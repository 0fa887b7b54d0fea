"""The repo that a checkpoint is published in, and everything that can be in the way there, known before it is sent.

Nothing here writes, but for `create`: a conversion that ends with a push asks first, and begins when all is well.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from llmint8.formats import LAYOUTS, LLMInt8Error, Quantization, read_json
from llmint8.formats.disk.names import CONFIG_NAME

from .answers import explain, patiently

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_NO_ACCESS = (401, 403)
_WEIGHTS = re.compile(r"(pytorch_)?model[^/]*\.(safetensors|bin)")


@dataclass(frozen=True)
class Destination:
    """A repo, `user/name`, and a client whose token may write to it: to main, a branch, or a pull request."""

    api: HfApi
    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def create(self) -> None:
        """Create the repo where it is missing. Raises LLMInt8Error."""
        with explained(self.repo):
            patiently(lambda: self.api.create_repo(self.repo, private=self.private or None, exist_ok=True))


def destination(
    repo: str,
    source: str | None,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    replace_weights: bool = False,
) -> Destination:
    """Check that a checkpoint made from the repo `source` may be published in a repo; see `push.prepare`.

    Raises:
        LLMInt8Error: the token or what is in the repo is in the way.
        ValueError: both a revision and a pull request are asked for.

    """
    if create_pr and revision is not None:
        raise ValueError(f"a pull request is made against main; leave out --revision {revision} or --create-pr")
    api, repo = _writer(repo, token, create_pr)
    found = Destination(api, repo, private, revision, create_pr)
    in_pull_request = create_pr or (revision or "").startswith("refs/pr/")
    if repo == source and not create_pr and revision in (None, "main"):
        raise LLMInt8Error(f"{repo}: is the source of this checkpoint; name another repo, --revision or --create-pr")
    with explained(repo):
        try:
            main = patiently(lambda: api.model_info(repo))
        except RepositoryNotFoundError:
            return found
        if private and not main.private:
            raise LLMInt8Error(f"{repo}: exists and is public; --private is for a new repo")
        if not in_pull_request:
            patiently(lambda: _try_to_write(api, repo))
        if not in_pull_request and not replace_weights:
            _keep_other_weights(found, main)
    return found


def _writer(repo: str, token: str | None, create_pr: bool) -> tuple[HfApi, str]:
    """Return a client whose token may write, and the repo's full name. Raises LLMInt8Error."""
    api = HfApi(token=token, library_name="llmint8")
    try:
        user = patiently(api.whoami)
    except LocalTokenNotFoundError:
        raise LLMInt8Error(
            f"{repo}: nothing to sign in with: run `hf auth login`, set HF_TOKEN or give --token; the token has to be "
            f"one that may write, from {_TOKENS_PAGE}"
        ) from None
    except HTTPError as error:
        raise LLMInt8Error(f"{repo}: {explain(error)}") from None
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read" or (access.get("role") == "fineGrained" and not _may_write(access, create_pr)):
        raise LLMInt8Error(
            f"{repo}: this token of {user['name']} may only read; get one that may write: {_TOKENS_PAGE}"
        )
    return api, repo if "/" in repo else f"{user['name']}/{repo}"


def _may_write(access: Any, create_pr: bool) -> bool:
    """Tell whether a fine-grained token may write to anything at all; to what, the Hub knows."""
    granted = access.get("fineGrained", {})
    permissions = {
        *granted.get("global", []),
        *(name for scope in granted.get("scoped", []) for name in scope["permissions"]),
    }
    return "repo.write" in permissions or (create_pr and "discussion.write" in permissions)


def _try_to_write(api: HfApi, repo: str) -> None:
    """Ask whether the token may write to this repo. A Hub that does not know the question says so in the upload."""
    answer = get_session().get(
        f"{api.endpoint}/api/models/{repo}/auth-check/write", headers=build_hf_headers(token=api.token)
    )
    if answer.status_code in _NO_ACCESS:
        hf_raise_for_status(answer)


def _keep_other_weights(found: Destination, main: Any) -> None:
    """Refuse to replace weights that are no int8 checkpoint. A branch that is as main is loses nothing."""
    api, repo, revision, there = found.api, found.repo, found.revision, main
    if revision not in (None, "main"):
        try:
            there = patiently(lambda: api.model_info(repo, revision=revision))
        except RevisionNotFoundError:
            return
        if there.sha == main.sha:
            return
    names = [file.rfilename for file in there.siblings or []]
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if weights and not _is_int8(api, repo, there.sha, CONFIG_NAME in names, weights):
        raise LLMInt8Error(
            f"{repo}: holds weights that are no int8 checkpoint, {weights[0]} among them, and a push would replace "
            "them; name another repo or --revision, or repeat `llmint8 push` with --replace-weights"
        )


def _is_int8(api: HfApi, repo: str, commit: str, whole: bool, weights: list[str]) -> bool:
    """Tell whether a repo holds an int8 checkpoint, or the shards of one that has not arrived completely."""
    try:
        if whole:
            config = patiently(lambda: api.hf_hub_download(repo, CONFIG_NAME, revision=commit))
            Quantization.from_dict(read_json(Path(config)).get("quantization_config") or {})
            return True
        parts = [name for name in weights if name.endswith(".safetensors")]
        headers = (api.parse_safetensors_file_metadata(repo, name, revision=commit) for name in parts)
        ours = tuple(f".{layout.absmax}" for layout in LAYOUTS.values())
        return any(tensor.endswith(ours) for header in headers for tensor in header.tensors)
    except (LLMInt8Error, SafetensorsParsingError, AttributeError, TypeError, ValueError):  # broken, or of another form
        return False


@contextmanager
def explained(repo: str, remedy: str = "") -> Iterator[None]:
    """Turn what the Hub refuses into an LLMInt8Error that names the repo; where it did not refuse, with the remedy."""
    try:
        yield
    except (HTTPError, ValueError, RuntimeError) as error:
        # huggingface_hub wraps what happens to a weight file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        refused = isinstance(cause, ValueError) or (
            isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 402, 403, 404)
        )
        raise LLMInt8Error(f"{repo}: {explain(cause)}{'' if refused else remedy}") from None
