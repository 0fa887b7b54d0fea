"""Publish an int8 checkpoint on the Hub.

Nothing is sent before the checkpoint has been checked as `llmint8 verify` does, hashes and values excepted, its licence
looked at, the token found able to write, and the repo found to hold nothing else. Then the weights go up, a commit for
every 50 GB, and only the last commit brings the index, config.json and the rest: nothing loads a repo without
config.json. Where there is one already, a single commit replaces all of it. An upload that was interrupted is continued
by starting it again: what has arrived is not sent twice. To a pull request go the same commits;
`revision="refs/pr/N"` continues that.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from llmint8.formats import Checkpoint, CheckpointError, LLMInt8Error, open_checkpoint, read_manifest
from llmint8.formats.disk.durable import write_durably
from llmint8.formats.disk.names import CARD_NAME, CONFIG_NAME, MANIFEST_NAME
from llmint8.formats.disk.small_files import small_files
from llmint8.formats.int8.manifest import differences

from .answers import patiently
from .card import Subject, refreshed_card
from .destination import Destination, destination, explained
from .front_matter import metadata, read_card, strings
from .licence import objection

_COMMIT_BYTES = 50_000_000_000
_WEIGHTS = re.compile(r"model[^/]*\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Upload:
    """An upload that may begin: everything has been checked."""

    to: Destination
    checkpoint: Checkpoint
    files: dict[str, Path]  # by their name in the repo

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
    replace_weights: bool = False,
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
        replace_weights: publish over weights that are no int8 checkpoint.

    Raises:
        CheckpointError: OUT is not, or not completely, an int8 checkpoint.
        LLMInt8Error: the licence, the token, or the repo's name or content is in the way.
        ValueError: both a revision and a pull request are asked for.

    """
    checkpoint = _verified(out)
    if not have_right:
        check_licence(out)
    to = destination(
        repo,
        checkpoint.quantization.source.get("repo"),
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        replace_weights=replace_weights,
    )
    card = refreshed_card(Subject.of(checkpoint), read_card(out), to.repo)
    if card != read_card(out):
        write_durably(out / CARD_NAME, card.encode())
    names = [*checkpoint.files, CONFIG_NAME, checkpoint.layout.index, MANIFEST_NAME]
    paths = {out / name for name in names if (out / name).exists()} | set(small_files(out))
    files = {path.relative_to(out).as_posix(): path for path in sorted(paths)}
    return Upload(to, checkpoint, files)


def check_licence(directory: Path, repo: str | None = None) -> None:
    """Raise LLMInt8Error where the licence of what is in a directory, a copy of a repo, forbids to publish it."""
    card = metadata(read_card(directory))
    bases = [*([] if repo is None else [repo]), *strings(card.get("base_model"))]
    if reason := objection({**card, "base_model": bases}, directory):
        raise LLMInt8Error(
            f"{repo or directory}: not published: {reason}; `llmint8 push --i-have-the-right` if you may"
        )


def _verified(out: Path) -> Checkpoint:
    checkpoint = open_checkpoint(out)
    if checkpoint.quantization.llmint8:
        files = {name: info.file for name, info in checkpoint.tensors.items()}
        for difference in differences(read_manifest(out), dict(checkpoint.tensors), files):
            raise CheckpointError("E17", f"{out / MANIFEST_NAME}: {difference}")
    return checkpoint


def send(upload: Upload, message: str = "Upload int8 checkpoint") -> Published:
    """Create the repo where it is missing and send what it lacks. Raises LLMInt8Error; then start it again."""
    to = upload.to
    api, repo, revision = to.api, to.repo, to.revision
    to.create()
    with explained(repo, "; what has arrived stays, start again to continue"):
        if revision is not None and not revision.startswith("refs/"):
            patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        before = patiently(lambda: api.model_info(repo, revision=revision))
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
    if revision is not None and revision == to.revision:
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
    create_pr = upload.to.create_pr and revision is None

    def commit() -> Any:
        # Made anew for every try: they hold what the Hub said in the last one.
        operations = [CommitOperationAdd(name, upload.files[name]) for name in names]
        operations += [CommitOperationDelete(name) for name in stale]
        return upload.to.api.create_commit(
            upload.to.repo, operations, commit_message=message, revision=revision, create_pr=create_pr
        )

    # After these two nothing has been done; after a 500 there may be a pull request, and a second one is not wanted.
    return patiently(commit, (429, 503)) if create_pr else patiently(commit)
