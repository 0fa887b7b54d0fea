"""Checkpoints that are not finished: gone on with, laid out anew, started over; their journal, and how files open."""

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.formats import BITSANDBYTES, CheckpointWriter, Manifest, OutputError, Quantization, TensorSpec
from llmint8.formats.disk import durable
from llmint8.formats.disk.names import JOURNAL_NAME
from llmint8.formats.writing import journal as journal_module
from llmint8.formats.writing.journal import Journal
from llmint8.formats.writing.shards import Shards

pytestmark = pytest.mark.skipif(os.name != "posix", reason="conversions are written on POSIX only")

SHARDS = ["model-00001.safetensors.partial", "model-00002.safetensors.partial"]
SMALL_FILES = {"a/b/c.txt": b"c", "a/d.txt": b"d", "tokenizer.json": b"{}", "README.md": b"# Card"}
ROWS = {name: torch.arange(4, dtype=torch.int32) + number for number, name in enumerate("wxyz")}


def specs(names: str) -> list[list[TensorSpec]]:
    return [[TensorSpec(name, "I32", (4,))] for name in names]


def begin(out: Path, names: str = "wxyz", limit: int = 32, **named: Any) -> CheckpointWriter:
    """Begin or go on with a checkpoint of these tensors, of 16 bytes each."""
    writer = CheckpointWriter(out, limit, **named)
    writer.plan(specs(names))
    return writer


def commit(writer: CheckpointWriter) -> Manifest:
    source = {"name": "s", "repo": None, "commit": None}
    quantization = Quantization([], {}, producer="test 1", source=source)
    return writer.commit({}, quantization, {**source, "config_sha256": "0" * 64, "files": {}}, {}, SMALL_FILES)


def stop(out: Path, names: str = "wxyz", written: str | None = None, **named: Any) -> None:
    """Leave a checkpoint as a Ctrl-C does, after these tensors were written."""
    with suppress(KeyboardInterrupt), begin(out, names, **named) as writer:
        for name in names if written is None else written:
            writer.write(name, ROWS[name])
        raise KeyboardInterrupt


def damage(path: Path, end: int | None = None) -> None:
    """Change the last byte of a file, or the one before a place."""
    whole = bytearray(path.read_bytes())
    whole[(len(whole) if end is None else end) - 1] ^= 0xFF
    path.write_bytes(whole)


def names_in(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


@contextmanager
def failing_at(patch: pytest.MonkeyPatch, number: int) -> Iterator[list[int]]:
    """Let the flush of a number fail; yields the descriptors that were flushed."""
    flushed: list[int] = []

    def fsync(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield flushed


def commits_that_stopped(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a directory for each flush of a commit, at which that commit failed."""
    with failing_at(patch, -1) as flushed, begin(tmp_path / "whole") as writer:
        for name, tensor in ROWS.items():
            writer.write(name, tensor)
        commit(writer)
    assert len(flushed) > 12
    for number in range(len(flushed)):
        out = tmp_path / str(number)
        with suppress(OutputError), failing_at(patch, number), begin(out) as writer:
            for name, tensor in ROWS.items():
                writer.write(name, tensor)
            commit(writer)
        yield out


def test_a_commit_that_stopped_is_taken_back_to_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No small file and no folder of it stays, and no tensor is written again; what somebody has put there stays."""
    folders = 0
    for number, out in enumerate(commits_that_stopped(tmp_path, monkeypatch)):
        mine = []
        if (out / "a").exists():
            folders += 1
            if number % 2:
                (out / "a" / "mine").touch()
                mine = ["a", "a/mine"]
        with begin(out) as writer:
            assert names_in(out) == sorted([*SHARDS, JOURNAL_NAME, *mine]), number
            assert writer.has(*ROWS)
            commit(writer)
        assert names_in(out) == sorted({*names_in(tmp_path / "whole"), *mine}), number
    assert folders > 4


def test_the_journal_says_what_is_to_come_before_any_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bytes on the disk: after a power failure nothing else tells which files a commit had begun to make."""
    events: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("name"), replace(path, target))[1])
    with begin(tmp_path / "out", "w") as writer:
        writer.write("w", ROWS["w"])
        journal = writer.journal.path.stat().st_ino
        monkeypatch.setattr(os, "fsync", lambda number: events.append(str(os.fstat(number).st_ino == journal)))
        commit(writer)
    assert "True" in events[: events.index("name")]


def test_starting_over_leaves_nothing_of_a_commit_that_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, out in enumerate(commits_that_stopped(tmp_path, monkeypatch)):
        with pytest.raises(OutputError, match="holds an unfinished conversion of something else: source was not there"):
            CheckpointWriter(out, 32, {"source": "another"})
        (out / "source.partial").mkdir()
        (out / "source.partial" / "fetched").touch()
        with suppress(KeyboardInterrupt), CheckpointWriter(out, 32, {"source": "another"}, start_over=True) as writer:
            assert names_in(out) == [JOURNAL_NAME], number
            assert writer.journal.empty
            raise KeyboardInterrupt
        assert names_in(out) == [], number


def test_who_does_not_ask_to_start_over_goes_on(tmp_path: Path) -> None:
    stop(tmp_path / "out", written="wy")
    with begin(tmp_path / "out") as writer:
        assert [name for name in ROWS if writer.has(name)] == ["w", "y"]
        assert not writer.has("w", "x")
        for name in "xz":
            writer.write(name, ROWS[name])
        manifest = commit(writer)
    files = {"config.json", "model.safetensors.index.json", *SMALL_FILES} - {"README.md"}  # the card is to be edited
    assert set(manifest.files) == files
    for name in files - {"model.safetensors.index.json"}:
        assert manifest.files[name] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()


def test_a_tensor_that_was_damaged_is_not_taken_for_written(tmp_path: Path) -> None:
    stop(tmp_path / "out")
    damage(tmp_path / "out" / SHARDS[0])
    os.truncate(tmp_path / "out" / SHARDS[1], 0)
    with begin(tmp_path / "out") as writer:
        assert [name for name in ROWS if writer.has(name)] == ["w"]
    stop(tmp_path / "cut")
    with begin(tmp_path / "cut") as writer:
        os.truncate(tmp_path / "cut" / SHARDS[0], 100)  # while it is being written
        assert [name for name in ROWS if writer.has(name)] == ["y", "z"]


def test_what_was_written_moves_from_plan_to_plan(tmp_path: Path) -> None:
    """A shard of another layout makes way, beside those that did so before, and goes when all it holds has moved."""
    out = tmp_path / "out"
    earlier = "earlier-00001.safetensors.partial", "earlier-00002.safetensors.partial"
    stop(out, "wx")
    stop(out, "yz", written="y")
    assert names_in(out) == sorted([JOURNAL_NAME, earlier[0], SHARDS[0]])
    with begin(out, "zy") as writer:
        assert names_in(out) == sorted([JOURNAL_NAME, earlier[0], SHARDS[0]])
        assert writer.has("y")
        assert not writer.has("z")
        writer.write("z", ROWS["z"])
    with begin(out, "xw", limit=16) as writer:
        assert names_in(out) == sorted([JOURNAL_NAME, earlier[1], *SHARDS])
        assert writer.has("x", "w")
    with begin(out, "zyxw") as writer:
        assert writer.has(*ROWS)
        assert all(torch.equal(writer.read(name), tensor) for name, tensor in ROWS.items())
        commit(writer)
    assert not [name for name in names_in(out) if name.endswith(".partial")]


@pytest.mark.parametrize("change", ["dtype", "shape", "damage", "cut"])
def test_what_is_another_or_damaged_does_not_move(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    stop(out, "wx")
    if change == "damage":
        damage(out / SHARDS[0])
    if change == "cut":
        os.truncate(out / SHARDS[0], 10)
    dtype, shape = {"dtype": ("F32", (4,)), "shape": ("I32", (2, 2))}.get(change, ("I32", (4,)))
    with CheckpointWriter(out, 32) as writer:
        writer.plan([[TensorSpec("x", dtype, shape)], [TensorSpec("w", "I32", (4,))]])
        assert [name for name in "wx" if writer.has(name)] == ([] if change == "cut" else ["w"])


def test_an_error_behind_the_commit_does_not_say_that_something_is_left(tmp_path: Path) -> None:
    error = ZeroDivisionError()
    with suppress(ZeroDivisionError), begin(tmp_path / "out", "w") as writer:
        writer.write("w", ROWS["w"])
        commit(writer)
        raise error
    assert not getattr(error, "__notes__", [])
    assert (tmp_path / "out" / "config.json").exists()


def test_a_checkpoint_for_others_is_read_again_before_it_gets_its_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(out)
    with begin(out) as writer:
        assert writer.has(*ROWS)
        damage(out / SHARDS[1])
        with pytest.raises(OutputError, match=rf"{SHARDS[1]}: z: not what was written to it"):
            writer.commit_other({}, SMALL_FILES)
        assert names_in(out) == sorted([JOURNAL_NAME, *SHARDS])
        writer.write("z", ROWS["z"])
        writer.commit_other({}, SMALL_FILES)
    names = [*SMALL_FILES, "config.json", "model.safetensors.index.json", *BITSANDBYTES.shard_names(2)]
    assert names_in(out) == sorted([*names, "a", "a/b"])


# How tensors are laid out.


@pytest.mark.parametrize(
    ("groups", "limit", "files"),
    [
        ([[4], [4]], 8, [1, 1]),
        ([[4], [4]], 7, [1, 2]),
        ([[4, 4]], 8, [1, 1]),
        ([[4, 4], [1]], 8, [1, 1, 2]),
        ([[4], [4, 4]], 8, [1, 2, 2]),
        ([[4], [4, 4]], 12, [1, 1, 1]),
        ([[4], [8, 4], [4]], 11, [1, 2, 3, 3]),
        ([[4], [4, 8, 3], [5]], 8, [1, 1, 2, 3, 3]),
        ([[2], [2]], 1, [1, 2]),
        ([[0], [3], [0]], 3, [1, 1, 1]),
    ],
)
def test_a_shard_is_filled_to_the_last_byte_and_a_group_stays_together_where_it_fits(
    tmp_path: Path, groups: list[list[int]], limit: int, files: list[int]
) -> None:
    numbers = iter(range(9))
    shards = Shards(tmp_path, limit)
    shards.plan([[TensorSpec(f"t{next(numbers)}", "U8", (size,)) for size in group] for group in groups])
    assert [int(place.file[6:11]) for place in shards.places.values()] == files
    assert shards.nbytes == sum(map(sum, groups))
    for path in tmp_path.iterdir():
        ends = [place.offset + place.nbytes for place in shards.places.values() if place.file == path.name]
        assert path.stat().st_size == max(ends)


def test_the_system_is_told_of_every_tensor_that_it_may_write_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("nothing to advise")
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *what: told.append(what))
    shards = Shards(tmp_path, 100)
    shards.plan(specs("wx"))
    for name in "xw":
        shards.write(name, [ROWS[name]])
    assert told == [(shards.places[name].offset, 16, os.POSIX_FADV_DONTNEED) for name in "xw"]


# The journal.


def test_a_journal_gives_back_what_was_put_last(tmp_path: Path) -> None:
    tensors = [torch.arange(6).reshape(3, 2), torch.tensor([1.5], dtype=torch.float16)]
    journal = Journal(tmp_path, {"a": "1"})
    assert journal.empty
    journal.put("x", "one", [1, None], tensors)
    journal.put("x", "two", 2)
    journal.put("x", "one", {"k": 3}, tensors[::-1])
    assert not journal.empty
    for opened in ("as put", "again", "by anybody"):
        if opened != "as put":
            journal.close()
            journal = Journal(tmp_path, {"a": "1"} if opened == "again" else None)
        assert not journal.empty
        assert journal.get("x", "three") is journal.get("y", "one") is None
        record, other = journal.get("x", "one"), journal.get("x", "two")
        assert record is not None
        assert other is not None
        assert (record.value, other.value, other.tensors) == ({"k": 3}, 2, ())
        assert all(torch.equal(journal.load(i), t) for i, t in zip(record.tensors, tensors[::-1], strict=True))
        assert torch.equal(journal.load(record.tensors[1].rows(1, 3)), tensors[0][1:])
        assert journal.remember("x", "two", lambda: pytest.fail("it is known")) == 2
    assert journal.remember("y", "new", lambda: 5) == 5
    record = journal.get("y", "new")
    assert record is not None
    assert record.value == 5


def test_a_journal_cut_short_anywhere_goes_on_behind_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, {"a": "1"})
    begun = journal.path.stat().st_size
    ends = [begun]
    for name in "wx":
        journal.put("t", name, name, [ROWS[name]])
        ends.append(journal.path.stat().st_size)
    journal.close()
    whole = journal.path.read_bytes()
    for size in sorted({*range(0, len(whole), 9), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}):
        journal.path.write_bytes(whole[:size])
        caplog.clear()
        journal = Journal(tmp_path, {"a": "1"})
        there = sum(end <= size for end in ends[1:])
        assert [journal.get("t", name) is not None for name in "wx"] == [there > 0, there > 1]
        rest = size - ends[there]
        assert (f"{rest} of {size} bytes are cut short" in caplog.text) == (rest > 0)
        journal.put("t", "y", "y", [ROWS["y"]])
        journal.close()
        journal = Journal(tmp_path, {"a": "1"})
        found = [name for name in "wxy" if journal.get("t", name)]
        assert found == [*"wx"[:there], "y"]
        journal.close()


def test_every_byte_of_the_journal_counts(tmp_path: Path) -> None:
    """A record is as it was put, or not there; whatever byte is another."""
    tensors = [torch.arange(3), torch.tensor([1.5], dtype=torch.float16)]
    records: dict[tuple[str, str], Any] = {
        ("layer", "a"): ([3, 1], tensors),
        ("layer", "b"): ([2, 0], tensors[:1]),
        ("curve", "a"): (0.25, []),
    }
    journal = Journal(tmp_path, {"the source": "s"})
    for key, (value, of_it) in records.items():
        journal.put(*key, value, of_it)
    journal.close()
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    found = 0
    for place in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(OutputError, match="its beginning is damaged"):
            Journal(tmp_path, {"the source": "s"})
    for place in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        journal = Journal(tmp_path, {"the source": "s"})
        for key, (value, of_it) in records.items():
            record = journal.get(*key)
            if record is not None:
                found += 1
                assert record.value == value
                assert all(torch.equal(journal.load(info), t) for info, t in zip(record.tensors, of_it, strict=True))
        journal.close()
    assert 0 < found < len(whole) * len(records)


@pytest.mark.parametrize(
    "tensors",
    [
        *('"F32"', "[5]", '["ab"]', '[["F32"]]', '[["F32",[1],1]]', '[["F32",5]]', '[["F32",[-1]]]', '[["F5",[1]]]'),
        *("{}", "[[[],[1]]]", '[],"more":1', '[["F32",[4]],5]'),
    ],
)
def test_a_record_of_another_form_is_damaged(tmp_path: Path, tensors: str) -> None:
    journal = Journal(tmp_path, {})
    journal.put("t", "w", 1)
    journal.close()
    before = journal.path.read_bytes()
    raw = f'{{"kind":"t","name":"x","value":1,"sha256":"","tensors":{tensors}}}'.encode()
    journal.path.write_bytes(before + hashlib.sha256(raw).hexdigest().encode() + b" " + raw + b"\n" + bytes(16))
    journal = Journal(tmp_path, {})
    assert journal.get("t", "w") is not None
    assert journal.get("t", "x") is None
    journal.close()
    assert journal.path.read_bytes() == before


def test_a_record_whose_tensor_is_damaged_is_not_there_and_the_others_are(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.put("t", "w", 1, [ROWS["w"], ROWS["x"]])
    end = journal.path.stat().st_size
    journal.put("t", "y", 2, [ROWS["y"]])
    journal.close()
    damage(journal.path, end)
    journal = Journal(tmp_path, {})
    assert journal.get("t", "w") is None
    assert journal.get("t", "y") is not None
    journal.put("t", "w", 3)
    record = journal.get("t", "w")
    assert record is not None
    assert record.value == 3


def test_after_a_write_that_failed_the_next_record_begins_where_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, data: Any) -> int:
        file.write(memoryview(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal(tmp_path, {})
    journal.put("t", "w", 1, [ROWS["w"]])
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", full)
        with pytest.raises(OutputError, match=rf"{JOURNAL_NAME}: cannot be written: No space left"):
            journal.put("t", "x", 2, [ROWS["x"]])
    assert journal.get("t", "x") is None
    journal.put("t", "y", 3, [ROWS["y"]])
    journal.close()
    journal = Journal(tmp_path, {})
    assert [name for name in "wxy" if journal.get("t", name)] == ["w", "y"]


def test_another_fingerprint_is_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, {"source": "s", "outliers": "none", "gone": "g"}).close()
    with pytest.raises(OutputError) as caught:
        Journal(tmp_path, {"source": "s", "outliers": "all", "new": "n"})
    assert (
        str(caught.value)
        .partition(": holds ")[2]
        .startswith(
            "an unfinished conversion of something else: gone was g and is not there; new was not there and is n; "
            "outliers was none and is all. "
        )
    )


@pytest.mark.parametrize("beginning", [b"", b"half a li", b"0" * 500])
@pytest.mark.parametrize("fingerprint", [{"a": "1"}, None])
def test_a_journal_whose_first_line_was_cut_short_begins_anew(
    tmp_path: Path, beginning: bytes, fingerprint: dict[str, str] | None
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(beginning)
    Journal(tmp_path, fingerprint).close()
    fresh = (tmp_path / JOURNAL_NAME).read_bytes()
    journal = Journal(tmp_path, fingerprint or {})
    assert journal.empty
    journal.close()
    (tmp_path / JOURNAL_NAME).unlink()
    Journal(tmp_path, fingerprint).close()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == fresh
    (tmp_path / JOURNAL_NAME).write_bytes(beginning)
    (tmp_path / "mine").touch()
    with pytest.raises(OutputError, match="not the journal of a conversion; remove it"):
        Journal(tmp_path, fingerprint)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == beginning


@pytest.mark.parametrize("records", [0, 1, 3])
def test_a_journal_whose_first_line_is_whole_and_damaged_is_thrown_away_only_by_who_starts_over(
    tmp_path: Path, records: int
) -> None:
    journal = Journal(tmp_path, {"a": "1"})
    end = journal.path.stat().st_size
    for number in range(records):
        journal.put("t", str(number), number)
    journal.close()
    damage(journal.path, end - 5)
    before = journal.path.read_bytes()
    with pytest.raises(OutputError, match="its beginning is damaged, or of another version of llmint8; --force"):
        Journal(tmp_path, {"a": "1"})
    assert journal.path.read_bytes() == before
    journal = Journal(tmp_path, None)
    assert journal.empty
    journal.put("t", "new", 1)
    journal.close()
    assert Journal(tmp_path, {}).get("t", "new")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with begin(tmp_path / "out"):
        for start_over in (False, True):
            with pytest.raises(OutputError, match="another conversion is writing to it"):
                CheckpointWriter(tmp_path / "out", 32, start_over=start_over)
        assert names_in(tmp_path / "out") == sorted([*SHARDS, JOURNAL_NAME])
    with begin(tmp_path / "out") as writer:
        assert not writer.has("w")


def test_a_journal_that_went_while_its_lock_was_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other conversion finished between our opening and our locking: what we hold is no longer there."""
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *a: ((tmp_path / JOURNAL_NAME).unlink(), flock(*a)))
    with pytest.raises(OutputError, match="another conversion"):
        Journal(tmp_path, {})


# Files and their descriptors.


def a_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def a_dangling_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("nowhere"))


def a_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def a_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, victim: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("plant", "number", "message"),
    [
        (a_link, errno.ELOOP, "it is a link; remove it"),
        (a_dangling_link, errno.ELOOP, "it is a link; remove it"),
        (a_hard_link, errno.EINVAL, "it has another name too (a hard link); remove it"),
        (a_fifo, errno.EINVAL, "it is not a regular file; remove it"),
        (a_folder, errno.EISDIR, os.strerror(errno.EISDIR)),
    ],
)
def test_what_is_not_a_plain_file_is_not_opened(
    tmp_path: Path, plant: Callable[[Path, Path], None], number: int, message: str
) -> None:
    path, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_bytes(b"x")
    plant(path, victim)
    before, names = descriptors(), names_in(tmp_path)
    with pytest.raises(OSError, match="out") as caught:
        durable.open_output(path)
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (number, message, str(path))
    assert descriptors() == before
    assert victim.read_bytes() == b"x"
    assert names_in(tmp_path) == names


def test_a_device_is_not_opened() -> None:
    before = descriptors()
    with pytest.raises(OSError, match="it is not a regular file"):
        durable.open_output(Path(os.devnull))
    assert descriptors() == before


def test_a_file_that_is_there_keeps_its_data_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    with durable.open_output(path) as file:
        assert file.read(2) == b"ab"
        assert durable.write_all(file, b"XY") == 2
    assert path.read_bytes() == b"abXYef"


def test_what_the_system_does_not_take_at_once_is_written_in_pieces() -> None:
    class Reluctant:
        taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return len(data[:3])

    for size in (0, 1, 3, 4, 10):
        file = Reluctant()
        assert durable.write_all(file, bytes(range(size))) == size  # type: ignore[arg-type]
        assert file.taken == bytes(range(size))


def test_no_descriptor_stays_open_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kept = descriptors(), list[Any]()
    for number in range(-1, 20):
        with suppress(OutputError), failing_at(monkeypatch, number), begin(tmp_path / str(number)) as writer:
            kept.append(writer)  # so that nothing is closed because nobody has it any more
            for name, tensor in ROWS.items():
                writer.write(name, tensor)
            commit(writer)
        assert descriptors() == before, number
    assert not (tmp_path / "0" / "config.json").exists()
    assert (tmp_path / "-1" / "config.json").exists()
    stop(tmp_path / "out", written="w")
    with pytest.raises(OutputError) as another:
        CheckpointWriter(tmp_path / "out", 32, {"source": "another"})
    kept.append(another)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: kept[len(kept)])
    with pytest.raises(IndexError) as unlocked:
        Journal(tmp_path / "out", {})
    kept.append(unlocked)
    assert descriptors() == before


@pytest.mark.parametrize(("number", "told"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_a_directory_that_cannot_be_flushed_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: bool
) -> None:
    def fsync(descriptor: int) -> None:
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    before = descriptors()
    with pytest.raises(OSError, match=os.strerror(number)) if told else nullcontext():
        durable.sync_directory(tmp_path)
    assert descriptors() == before


def test_directories_are_flushed_up_to_where_their_file_system_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, flushed = Path.stat, list[Path]()

    def mounted(path: Path, **named: Any) -> Any:
        found = status(path, **named)
        device = found.st_dev + (path == tmp_path.parent)  # what is above that may be of the same disk again
        return os.stat_result((*found[:2], device, *found[3:]))

    inside = tmp_path / "a", tmp_path / "a" / "b"
    inside[1].mkdir(parents=True)
    monkeypatch.setattr(Path, "stat", mounted)
    monkeypatch.setattr(durable, "sync_directory", flushed.append)
    durable.sync_with_parents(inside[1])
    assert flushed == [inside[1], inside[0], tmp_path]


@pytest.mark.parametrize(("arguments", "named"), [((errno.EIO, "no"), "x/y"), ((errno.EIO, "no", "x/z"), "x/z")])
def test_an_error_names_the_file_that_it_is_of(arguments: Sequence[Any], named: str) -> None:
    with pytest.raises(OutputError) as caught, durable.named_errors(Path("x/y")):
        raise OSError(*arguments)
    assert str(caught.value) == f"{named}: cannot be written: no"


def test_json_is_laid_out_as_the_files_of_the_hub_are() -> None:
    value = {"b": {"ü": [1, -2.5], "a": []}, "a": [[1, 2], ["x"]], "c": None}
    expected = (
        '{\n  "b": {\n    "ü": [1, -2.5],\n    "a": []\n  },\n  "a": [\n    [1, 2],\n    [\n      "x"\n    ]\n  ],\n'
        '  "c": null\n}\n'
    )
    assert durable.encode_json(value) == expected.encode()


def test_a_link_in_an_unfinished_directory_is_refused(tmp_path: Path) -> None:
    stop(tmp_path / "out", written="w")
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    for start_over in (False, True):
        with pytest.raises(OutputError, match=r"link: is a link, and an unfinished conversion has none; remove it"):
            CheckpointWriter(tmp_path / "out", 32, start_over=start_over)


def test_blocks_of_other_rows_are_refused_by_what_writes_them(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 100)
    shards.plan([[TensorSpec("x", "I32", (2, 2))]])
    wrong: list[list[Tensor]] = [[torch.ones(1, 4, dtype=torch.int32)], [torch.ones(2, 2)]]
    for blocks in wrong:
        with pytest.raises(ValueError, match=r"x: rows .*, planned was"):
            shards.write("x", blocks)
    rows = torch.arange(4, dtype=torch.int32).reshape(2, 2)
    assert shards.write("x", [rows[:1], rows[1:]]) == hashlib.sha256(bytes(rows.numpy().data)).hexdigest()
    assert torch.equal(shards.read("x"), rows)
