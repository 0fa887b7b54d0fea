"""OUT: whether a conversion may be written there, and whether one is finished there."""

import shutil
from pathlib import Path

from llmint8.formats import OutputError, is_unfinished, require_writable
from llmint8.formats.disk.names import CONFIG_NAME, MANIFEST_NAME


def is_finished(out: Path) -> bool:
    """Tell whether a directory holds a conversion that came to its end."""
    return not is_unfinished(out) and all((out / name).exists() for name in (CONFIG_NAME, MANIFEST_NAME))


def require_apart(source: Path, out: Path, what: str) -> None:
    """Refuse a directory that is, or lies inside, what is read; `what` calls that. Raises OutputError."""
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source:
        raise OutputError(f"{out}: is the {what} itself; name another directory for the result")
    if real_source in real_out.parents:
        raise OutputError(f"{out}: lies inside the {what} {source}; name a directory outside of it")


def check_out(source: Path, out: Path) -> None:
    """Refuse a directory that nothing can be written to. Raises OutputError."""
    require_apart(source, out, "source")
    # Whether it is a conversion of this source is known later; nothing is written to a finished one in any case.
    if not is_finished(out):
        require_writable(out)


def existing(out: Path) -> Path:
    """Return the directory, or the first of those above it that is there."""
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())


def disk_free(out: Path) -> int:
    """Return the bytes free where OUT is or will be, with those that an unfinished conversion already takes there."""
    taken = [path.stat() for path in out.rglob("*") if path.is_file()] if is_unfinished(out) else []
    return shutil.disk_usage(existing(out)).free + sum(512 * getattr(status, "st_blocks", 0) for status in taken)
