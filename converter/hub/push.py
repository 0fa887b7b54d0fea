"""Publish an int8 checkpoint on the Hub.

Nothing is sent before the checkpoint has been checked as `llmint8 verify` does, hashes and values excepted, its licence
looked at and the token found able to write. Then the weights go up, a commit for every 50 GB, and only the last commit
brings the index, config.json and the rest: nothing loads a repo without config.json. Where there is one already, a
single commit replaces all of it. An upload that was interrupted is continued by starting it again: what has arrived is
not sent twice. To a pull request go the same commits; `revision="refs/pr/N"` continues that.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from llmint8.formats import Checkpoint, CheckpointError, LLMInt8Error, open_checkpoint, read_manifest
from llmint8.formats.disk.durable import write_durably
from llmint8.formats.disk.names import CARD_NAME, CONFIG_NAME, MANIFEST_NAME, SAFETENSORS_INDEX_NAME
from llmint8.formats.disk.small_files import small_files
from llmint8.formats.int8.manifest import differences

from .answers import explain, patiently
from .card import Subject, metadata, read_card, refreshed_card
from .licence import objection

_COMMIT_BYTES = 50_000_000_000
_WEIGHTS = re.compile(r"model[^/]*\.safetensors|model\.safetensors\.index\.json")
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Upload:
    """An upload that may begin: everything has been checked."""

    api: HfApi
    repo: str
    checkpoint: Checkpoint
    files: dict[str, Path]  # by their name in the repo
    private: bool
    revision: str | None
    create_pr: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Published:
    """Where a checkpoint is now."""

    repo: str
    revision: str | None  # None where it is what one gets without naming a revision
    url: str
    changed: bool  # False where the repo held the same files before


def prepare(
    out: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    have_right: bool = False,
) -> Upload:
    """Check that OUT can be published, and bring its card up to date. Sends nothing of it.

    Args:
        out: the checkpoint's directory.
        repo: `user/name`, or a name of the token's owner.
        private: make a new repo private.
        revision: the branch to write to; a new one where there is none of this name.
        create_pr: open a pull request instead.
        token: the one of HF_TOKEN or `hf auth login` by default.
        have_right: publish whatever the licence says.

    Raises:
        CheckpointError: OUT is not, or not completely, an int8 checkpoint.
        LLMInt8Error: the licence, the token or the repo's name is in the way.
        ValueError: both a revision and a pull request are asked for.

    """
    if create_pr and revision is not None:
        raise ValueError(f"a pull request is made against main; leave out --revision {revision} or --create-pr")
    checkpoint = _verified(out)
    if not have_right:
        check_licence(out)
    api, repo = writer(repo, token, create_pr)
    if repo == checkpoint.quantization.source.get("repo") and not create_pr and revision in (None, "main"):
        raise LLMInt8Error(f"{repo}: is the source of this checkpoint; name another repo, --revision or --create-pr")
    card = refreshed_card(Subject.of(checkpoint), read_card(out), repo)
    if card != read_card(out):
        write_durably(out / CARD_NAME, card.encode())
    names = [*checkpoint.files, CONFIG_NAME, SAFETENSORS_INDEX_NAME, MANIFEST_NAME]
    paths = {out / name for name in names if (out / name).exists()} | set(small_files(out))
    files = {path.relative_to(out).as_posix(): path for path in sorted(paths) if path.suffix != ".partial"}
    return Upload(api, repo, checkpoint, files, private, revision, create_pr)


def check_licence(directory: Path, repo: str | None = None) -> None:
    """Raise LLMInt8Error where the licence of what is in a directory, a copy of a repo, forbids to publish it."""
    card = metadata(read_card(directory))
    if reason := objection(card if repo is None else {**card, "base_model": repo}, directory):
        raise LLMInt8Error(
            f"{repo or directory}: not published: {reason}; `llmint8 push --i-have-the-right` if you may"
        )


def writer(repo: str, token: str | None = None, create_pr: bool = False) -> tuple[HfApi, str]:
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


def _verified(out: Path) -> Checkpoint:
    checkpoint = open_checkpoint(out)
    if checkpoint.quantization.llmint8:
        files = {name: info.file for name, info in checkpoint.tensors.items()}
        for difference in differences(read_manifest(out), dict(checkpoint.tensors), files):
            raise CheckpointError("E17", f"{out / MANIFEST_NAME}: {difference}")
    return checkpoint


def send(upload: Upload, message: str = "Upload int8 checkpoint") -> Published:
    """Create the repo where it is missing and send what it lacks. Raises LLMInt8Error; then start it again."""
    api, repo, revision = upload.api, upload.repo, upload.revision
    with _explained(repo):
        patiently(lambda: api.create_repo(repo, private=upload.private or None, exist_ok=True))
        if revision is not None and not revision.startswith("refs/"):
            patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        before = patiently(lambda: api.model_info(repo, revision=revision))
        if upload.private and not before.private:
            raise LLMInt8Error(f"{repo}: exists and is public; --private is for a new repo")
        names = {file.rfilename for file in before.siblings or []}
        stale = [name for name in names if _WEIGHTS.fullmatch(name) and name not in upload.files]
        url, commit = f"{api.endpoint}/{repo}", before.sha
        batches = _batches(upload, CONFIG_NAME in names)
        for number, batch in enumerate(batches, start=1):
            title = message if number == len(batches) else f"{message}: weights, part {number}"
            done = _commit(upload, revision, batch, stale if number == len(batches) else [], title)
            commit = done.oid
            if done.pr_url:
                url, revision = done.pr_url, done.pr_revision
    if revision is not None and revision == upload.revision:
        url = f"{url}/tree/{revision}"
    return Published(repo, revision, url, commit != before.sha)


def _batches(upload: Upload, whole: bool) -> list[list[str]]:
    """Divide the files among commits: weights first, unless that would mix them with a config.json already there."""
    if whole:
        return [list(upload.files)]
    batches: list[list[str]] = []
    size = _COMMIT_BYTES
    for name in upload.checkpoint.files:
        size += upload.files[name].stat().st_size
        if size > _COMMIT_BYTES:
            batches.append([])
            size = upload.files[name].stat().st_size
        batches[-1].append(name)
    return [*batches, [name for name in upload.files if name not in upload.checkpoint.files]]


def _commit(upload: Upload, revision: str | None, names: list[str], stale: list[str], message: str) -> Any:
    create_pr = upload.create_pr and revision is None

    def commit() -> Any:
        # Made anew for every try: they hold what the Hub said in the last one.
        operations = [CommitOperationAdd(name, upload.files[name]) for name in names]
        operations += [CommitOperationDelete(name) for name in stale]
        return upload.api.create_commit(
            upload.repo, operations, commit_message=message, revision=revision, create_pr=create_pr
        )

    # After these two nothing has been done; after a 500 there may be a pull request, and a second one is not wanted.
    return patiently(commit, (429, 503)) if create_pr else patiently(commit)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, ValueError, RuntimeError) as error:
        # huggingface_hub wraps what happens to a weight file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        refused = isinstance(cause, ValueError) or (
            isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 402, 403, 404)
        )
        more = "" if refused else "; what has arrived stays, start again to continue"
        raise LLMInt8Error(f"{repo}: {explain(cause)}{more}") from None
