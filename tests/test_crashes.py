"""Power failures: a file system that loses what was not flushed, and what is left of a checkpoint being written.

One run is recorded. After every write (half of it done, and all), flush, new name, removal and new folder the machine
may stop; what then comes back is put together in six ways, of names and data as they were last flushed or as they are
now. None of these directories has lost anything: it has a config.json and all that goes with it, or the same command
goes on to the same bytes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmint8.formats import BITSANDBYTES, CheckpointWriter, Quantization, TensorSpec, check_values, open_checkpoint
from llmint8.formats.disk import durable
from llmint8.formats.writing import journal as journal_module
from llmint8.formats.writing import shards as shards_module

State = dict[str, bytes | None]  # path -> content, None for a folder
DATA = {"k.weight": torch.tensor([[1, 127], [-127, 3]], dtype=torch.int8), "k.SCB": torch.tensor([1.0, 2.0])} | {
    "k.weight_format": torch.zeros((), dtype=torch.uint8),
    "k.outlier_dims": torch.tensor([1], dtype=torch.int32),
    "k.outlier_weight": torch.tensor([[1.0], [0.047]]).half(),
}
OTHER = {"norm.weight": torch.ones(3)}
SMALL_FILES = {"tokenizer.json": b'{"a": 1}', "additional_chat_templates/tool.jinja": b"{{ x }}"}


def write(out: Path) -> None:
    """Write a checkpoint of two shards as a conversion does: what is whole already is not written again."""
    with CheckpointWriter(out, 20, {"source": "s"}) as writer:
        writer.plan([BITSANDBYTES.record_specs("k", 2, 2, 1, "F16"), [TensorSpec("norm.weight", "F32", (3,))]])
        for name, tensor in {**DATA, **OTHER}.items():
            if not writer.has(name):
                writer.write(name, tensor)
        source = {"name": "s", "repo": None, "commit": None}
        quantization = Quantization(["lm_head"], {"k": 1}, criterion="by hand", producer="test 1", source=source)
        identity = {**source, "config_sha256": "0" * 64, "files": {}}
        writer.commit({"model_type": "test"}, quantization, identity, {"k": {}}, SMALL_FILES)


def contents(path: Path) -> State:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


class Disk:
    """Records what becomes of a directory, and what of it would be there after a power failure."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        """Begin with what is there; all of that is on the disk."""
        self.root, self.states = root, dict[tuple[tuple[str, bytes | None], ...], str]()
        self.events = 0
        self._open: dict[int, int] = {}  # so that no inode gets a second file
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._look()
        self._flushed, self._flushed_names = dict(self._data), {key: dict(names) for key, names in self._names.items()}
        for module in (shards_module, journal_module, durable):
            patch.setattr(module, "write_all", self._halved(durable.write_all))
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, self._after(getattr(Path, name), name))
        patch.setattr(os, "fsync", self._fsync)

    def _look(self) -> None:
        """Take the names and data as they are now."""
        for folder, _, files in os.walk(self.root):
            paths = [Path(folder), *(Path(folder, file) for file in files)]
            for path in paths:
                inode = path.stat().st_ino
                if inode not in self._open:
                    self._open[inode] = os.open(path, os.O_RDONLY)
                if path.is_file():
                    self._data[inode] = path.read_bytes()
            self._names[paths[0].stat().st_ino] = {path.name: path.stat().st_ino for path in paths[0].iterdir()}

    def _fsync(self, descriptor: int) -> None:
        self._look()
        inode = os.fstat(descriptor).st_ino
        if inode in self._data:
            self._flushed[inode] = self._data[inode]
        elif inode in self._names:  # not one above all this
            self._flushed_names[inode] = dict(self._names[inode])
        self._event("fsync")

    def _halved(self, write: Callable[..., int]) -> Callable[..., int]:
        def halved(file: Any, data: Any) -> int:
            half = len(data) // 2
            done = write(file, memoryview(data)[:half])
            self._event("half a write")
            done += write(file, memoryview(data)[half:])
            self._event("write")
            return done

        return halved

    def _after(self, action: Callable[..., Any], name: str) -> Callable[..., Any]:
        def after(*arguments: Any, **named: Any) -> Any:
            result = action(*arguments, **named)
            self._event(f"{name} {arguments[0].name}")
            return result

        return after

    def _event(self, what: str) -> None:
        self._look()
        self.events += 1
        for kind in ("as they are", "flushed"):
            names = self._names if kind == "as they are" else self._flushed_names
            for data in ("as it is", "flushed", "zeros"):
                tree = self._tree(names, data, self.root.stat().st_ino, "")
                self.states.setdefault(tuple(sorted(tree.items())), f"{what}: names {kind}, data {data}")

    def _tree(self, names: dict[int, dict[str, int]], data: str, folder: int, prefix: str) -> State:
        tree: State = {}
        for name, inode in names.get(folder, {}).items():
            if inode in self._names:
                tree |= {f"{prefix}{name}": None, **self._tree(names, data, inode, f"{prefix}{name}/")}
                continue
            now, flushed = self._data[inode], self._flushed.get(inode, b"")
            same = next((n for n, pair in enumerate(zip(now, flushed, strict=False)) if pair[0] != pair[1]), None)
            kept = now[: min(len(now), len(flushed)) if same is None else same]
            lost = flushed if data == "flushed" else kept + bytes(len(now) - len(kept))
            tree[f"{prefix}{name}"] = now if data == "as it is" else lost
        return tree

    def last(self) -> State:
        """Return what is there for certain: names and data as they were last flushed."""
        return self._tree(self._flushed_names, "flushed", self.root.stat().st_ino, "")

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[State], Disk]]:
    """Runs the writer on a disk with something on it, and returns what was recorded."""
    disks: list[Disk] = []

    def record(state: State) -> Disk:
        root = tmp_path / f"disk-{len(disks)}"
        put(root, state)
        with monkeypatch.context() as patch:
            disks.append(Disk(root, patch))
            write(root / "folder" / "out")
        return disks[-1]

    yield record
    for disk in disks:
        disk.close()


def put(root: Path, state: State) -> None:
    root.mkdir()
    for name, data in sorted(state.items()):
        (root / name).mkdir() if data is None else (root / name).write_bytes(data)


def check(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: State) -> None:
    """Hold every state against the promise: complete where there is a config.json, and in any case the same command
    ends with the same bytes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for number, (state, when) in enumerate(disk.states.items()):
        root = tmp_path / f"{disk.root.name}-after-{number}"
        put(root, dict(state))
        out = root / "folder" / "out"
        if (out / "config.json").exists():
            assert whole.items() <= contents(out).items(), when
            assert check_values(open_checkpoint(out)) == [], when
        if not (out / "config.json").exists() or (out / "conversion.partial").exists():
            write(out)
        assert contents(out) == whole, when


@pytest.mark.skipif(os.name != "posix", reason="directories are flushed on POSIX only")
def test_a_power_failure_leaves_what_was_there_or_goes_on_or_is_complete(tmp_path, monkeypatch, recorded):
    disk = recorded({})
    whole = contents(disk.root / "folder" / "out")
    check(disk, tmp_path, monkeypatch, whole)
    # When it has returned all is on the disk, but the removal of the journal: should that come back, it commits again.
    certain = {name: data for name, data in disk.last().items() if not name.endswith("conversion.partial")}
    assert certain == contents(disk.root)
    assert disk.events > 60
    print(f"{disk.events} moments, {len(disk.states)} directories")


@pytest.mark.skipif(os.name != "posix", reason="directories are flushed on POSIX only")
@pytest.mark.parametrize("moment", ["replace model-00002.safetensors.partial", "replace config.json.new.partial"])
def test_a_second_power_failure_while_the_commit_is_taken_back(tmp_path, monkeypatch, recorded, moment):
    first = recorded({})
    whole = contents(first.root / "folder" / "out")
    state = next(state for state, when in first.states.items() if when.startswith(moment))
    check(recorded(dict(state)), tmp_path, monkeypatch, whole)
