"""A checkpoint named by a local directory or a Hub repo id, as a directory.

The Hub's client is loaded for a repo id only: who names a directory does not wait for it.
"""

from pathlib import Path

from llmint8.formats import SourceError

from .origin import Kind, Resolved, Token


def resolve(
    path_or_repo: str | Path,
    revision: str | None = None,
    kind: Kind | None = None,
    low_disk: bool = False,
    weights: bool = True,
    token: Token = None,
) -> Resolved:
    """Return the local directory, or fetch what is needed of a Hub repo.

    Args:
        path_or_repo: a directory, or a repo id; of a source also a GGUF file.
        revision: branch, tag or commit of the repo.
        kind: what a repo has to hold, a 16-bit `source` or an `int8` checkpoint; None takes either.
        low_disk: the weights will be fetched as they are read; they must be in safetensors files.
        weights: fetch them; without, and with `low_disk`, everything else.
        token: for the Hub; that of HF_TOKEN or `hf auth login` by default, and False for none.

    Raises:
        SourceError: neither a directory nor a repo that can be fetched; or no source, where one is wanted; or
            `low_disk` for a directory.
        CheckpointError: no int8 checkpoint, where one is wanted.

    """
    path = Path(path_or_repo).expanduser()
    if path.exists():
        if not path.is_dir() and not (kind == "source" and path.suffix.lower() == ".gguf"):
            raise SourceError(f"{path}: not a directory; name the checkpoint's directory")
        if revision is not None:
            raise SourceError(f"{path}: is a local directory, which has no revision {revision!r}")
        if low_disk:
            raise SourceError(f"{path}: is a local directory; --low-disk is for a repo on the Hub, leave it out")
        return Resolved(path)
    from .download import download

    return download(str(path_or_repo), revision, kind, low_disk, weights, token)
