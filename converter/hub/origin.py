"""Where a checkpoint comes from, and what it has to be."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["source", "int8"]
# As huggingface_hub has it: None is that of HF_TOKEN or `hf auth login`, False none at all.
Token = str | bool | None


def is_repo_id(name: str) -> bool:
    """Tell whether a name may be a repo's, and is not the path of a directory on somebody's disk."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


@dataclass(frozen=True)
class Resolved:
    """A checkpoint's directory, and the repo and commit it is a snapshot of when it came from the Hub.

    With `remote` the weights are not in the directory yet: they are fetched before a conversion begins, or with
    `low_disk` while they are read.
    """

    path: Path
    repo: str | None = None
    commit: str | None = None
    remote: bool = False
    low_disk: bool = False
    token: Token = field(default=None, repr=False)  # for what has not been fetched yet

    @property
    def name(self) -> str:
        """What to call it: the repo id, or the directory's name."""
        return self.repo or self.path.resolve().name
