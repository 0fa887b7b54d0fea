"""The end of a conversion: everything written under a temporary name gets its own, and config.json comes last.

What is about to be done stands in the journal first, so that after a kill in the midst of it all can be taken back, and
done again. The journal itself goes when config.json is there.
"""

from pathlib import Path

from ..disk.durable import named_errors, sync_directory, sync_with_parents, temporary_name, write_durably
from ..disk.names import CONFIG_NAME
from ..errors import OutputError
from .journal import Journal
from .shards import partial_shards


def publish(out: Path, journal: Journal, shards: dict[str, str], files: dict[str, bytes], config: bytes) -> None:
    """Complete the checkpoint in the directory `out`.

    Args:
        out: the directory.
        journal: of the conversion.
        shards: temporary name -> name; their data is on the disk.
        files: relative name -> content, of all that is small.
        config: the content of config.json.

    Raises:
        OutputError: something cannot be written.

    """
    journal.put("commit", "", {"shards": shards, "files": [*files, CONFIG_NAME]})
    with named_errors(out):
        journal.sync()
        for partial, final in shards.items():
            (out / partial).replace(out / final)
        for stale in partial_shards(out):  # an earlier run needed more of them, or others
            stale.unlink()
        for name, data in files.items():
            _write_small(out / name, data)
        for folder in sorted({folder for name in files for folder in (out / name).parents if out in folder.parents}):
            sync_directory(folder)
        sync_with_parents(out)
        _write_small(out / CONFIG_NAME, config)
        sync_directory(out)
        journal.path.unlink()  # should a power failure bring it back, the commit is made once more


def take_back(out: Path, journal: Journal) -> None:
    """Undo what a commit has done that did not come to its end. Raises OutputError."""
    record = journal.get("commit", "")
    if record is None:
        return
    with named_errors(out):
        names = [*record.value["files"], *record.value["shards"], *record.value["shards"].values()]
        if not all((out / name).resolve().is_relative_to(out.resolve()) for name in names):
            raise OutputError(f"{journal.path}: names files outside of {out}; it is not of a conversion, remove it")
        for name in reversed(record.value["files"]):
            path = out / name
            path.unlink(missing_ok=True)
            temporary_name(path).unlink(missing_ok=True)
            for folder in path.parents:
                if out not in folder.parents or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()
        for partial, final in record.value["shards"].items():
            if (out / final).exists():
                (out / final).replace(out / partial)


def _write_small(path: Path, data: bytes) -> None:
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, data)
