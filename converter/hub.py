"""A checkpoint named by a local directory or a Hub repo id, as a directory."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from llmint8.formats import SourceError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_TORCH_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_SMALL_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.tiktoken",
]


@dataclass(frozen=True)
class Resolved:
    """A checkpoint's directory, and the repo and commit it is a snapshot of when it came from the Hub."""

    path: Path
    repo: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """What to call it: the repo id, or the directory's name."""
        return self.repo or self.path.resolve().name


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Resolved:
    """Return the local directory, or download the snapshot of a Hub repo.

    A revision is resolved to a commit once; files are taken from that commit. Weights in other formats than
    safetensors are fetched only where there are no safetensors.

    Raises:
        SourceError: neither a directory nor a repo that can be fetched.

    """
    path = Path(path_or_repo).expanduser()
    if path.exists():
        if not path.is_dir():
            raise SourceError(f"{path}: not a directory; name the checkpoint's directory")
        if revision is not None:
            raise SourceError(f"{path}: is a local directory, which has no revision {revision!r}")
        return Resolved(path)
    repo = str(path_or_repo)
    if not _REPO_ID.fullmatch(repo):
        raise SourceError(f"{repo}: no such directory, and not a Hub repo id either")
    try:
        info = HfApi().model_info(repo, revision=revision)
        has_safetensors = any(file.rfilename.endswith(".safetensors") for file in info.siblings or [])
        patterns = _SMALL_FILES + (_WEIGHTS if has_safetensors else _TORCH_WEIGHTS)
        snapshot = snapshot_download(repo, revision=info.sha, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise SourceError(f"{repo}: no such directory here, and no such repo on the Hub (or it is private)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{repo}: no such directory here, and the Hub cannot be asked: {reason}") from None
    return Resolved(Path(snapshot), repo, info.sha)
