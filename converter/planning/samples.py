"""The images and sounds of a directory, which a conversion shows to a model in place of made-up ones."""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmint8.formats import SourceError

from ..model.inputs import rows_of_one, senses, takes_text
from ..words import count, written

_SUFFIXES = {
    "image": (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "sound": (".flac", ".mp3", ".ogg", ".opus", ".wav"),
}
# Rows of activations that all of a kind may give a layer together: the pass holds them in float32.
_MOST_ROWS = 8192
_LEFT_OUT = "leave --calibration out"


@dataclass(frozen=True)
class Samples:
    """What is shown of a directory: images and sounds by kind, in the order of their names; and what to tell of it."""

    directory: Path
    files: dict[str, list[Path]]
    rows: int  # of activations that they give a layer, about
    notices: list[str]

    @property
    def name(self) -> str:
        """The directory's own name, without where it lies, or what a link to it leads to."""
        return written(Path(os.path.abspath(self.directory)).name)

    @property
    def all_files(self) -> list[Path]:
        """The files of all kinds."""
        return [file for files in self.files.values() for file in files]

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the SHA-256, in hexadecimal, of the content of each file, read once."""
        digests = []
        for path in self.all_files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def choose_samples(calibration: str | Path | None, config: Any | None) -> Samples | None:
    """Return what is shown of a directory, or None where `calibration` is a text or nothing.

    Of more files than the pass can hold, as many are taken as it can, from the beginning of the names to their end.

    Args:
        calibration: a text file or a directory.
        config: of the model that is shown something; None where none is, and then only the files are looked at.

    Raises:
        SourceError: the directory holds something else, or nothing, or what the model does not take; or it is a text,
            and the model takes none.

    """
    if calibration is None:
        return None
    calibration, taken = Path(calibration), senses(config) if config is not None else {}
    if not calibration.is_dir():
        if config is not None and not takes_text(config):
            kinds = " or ".join(f"{kind}s" for kind in taken)
            instead = f"name a directory of {kinds} with --calibration, or leave it out" if kinds else _LEFT_OUT
            raise SourceError(f"{calibration}: a {config.model_type} model does not take text; {instead}")
        return None
    found = _files(calibration)
    if config is None:
        return Samples(calibration, found, 0, [])
    for kind, files in found.items():
        if kind not in taken:
            instead = " and ".join(f"{kind}s" for kind in taken)
            instead = (
                f"name a directory of {instead}" if instead else "name a text" if takes_text(config) else _LEFT_OUT
            )
            raise SourceError(f"{files[0]}: a {config.model_type} model does not take {kind}s; {instead}")
    rows = rows_of_one(config)
    chosen = {kind: _evenly(files, max(2, _MOST_ROWS // rows)) for kind, files in found.items()}
    notices = [
        f"{len(chosen[kind])} of the {count(len(files), kind)} in {calibration} are shown to the model: they give each "
        f"layer about {_MOST_ROWS} rows of activations, and no more are held"
        for kind, files in found.items()
        if len(chosen[kind]) < len(files)
    ]
    return Samples(calibration, chosen, rows * max(map(len, chosen.values())), notices)


def _files(directory: Path) -> dict[str, list[Path]]:
    """Return the images and sounds in a directory, hidden files left out."""
    found: dict[str, list[Path]] = {}
    try:
        files = sorted(file for file in directory.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read: {error.strerror}") from None
    for file in files:
        kind = next((kind for kind, suffixes in _SUFFIXES.items() if file.suffix.lower() in suffixes), None)
        if kind is not None and not file.is_file():
            raise SourceError(f"{file}: is not a file; name a directory of files alone with --calibration")
        if kind is None:
            raise SourceError(
                f"{file}: is neither an image ({_said('image')}) nor a sound ({_said('sound')}); name a directory of "
                "those alone with --calibration"
            )
        found.setdefault(kind, []).append(file)
    if not found:
        raise SourceError(f"{directory}: is empty; name a directory of images or sounds with --calibration")
    return found


def _said(kind: str) -> str:
    return ", ".join(_SUFFIXES[kind])


def _evenly(files: list[Path], most: int) -> list[Path]:
    return [files[i * len(files) // most] for i in range(most)] if len(files) > most else files
