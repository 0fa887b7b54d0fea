"""Where a checkpoint comes from, and what it has to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["source", "int8"]


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
