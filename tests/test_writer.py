"""Writing a checkpoint: where tensors land, what failures leave behind, and when config.json appears."""

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmint8.formats import (
    BITSANDBYTES,
    DTYPES,
    CheckpointError,
    CheckpointWriter,
    Manifest,
    OutputError,
    Quantization,
    TensorSpec,
    check_values,
    is_unfinished,
    open_checkpoint,
)
from llmint8.formats.disk.durable import write_durably

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONFIG = {"model_type": "test", "z": 1, "a": "ü", "text": "[  1,  2\n ]", "sizes": [1, -2.5e-07], "none": []}
SOURCE = {"name": "s", "repo": None, "commit": None}
SMALL_FILES = {"tokenizer.json": b"{}", "additional_chat_templates/tool.jinja": b"{{ x }}"}


def layer_tensors(name: str, out_features: int, in_features: int, dims: list[int]) -> dict[str, Tensor]:
    weight = torch.randint(-126, 127, (out_features, in_features), dtype=torch.int8)
    weight[:, 0] = 127
    absmax = torch.rand(out_features) + 0.5
    return {
        f"{name}.weight": weight,
        f"{name}.SCB": absmax,
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
        f"{name}.outlier_dims": torch.tensor(dims, dtype=torch.int32),
        f"{name}.outlier_weight": (weight[:, dims] * absmax[:, None] / 127).half(),
    }


Model = dict[str, dict[str, Tensor]]


def two_layers() -> Model:
    """Groups of tensors; a layer's group has the layer's name."""
    torch.manual_seed(0)
    return {
        "m.a": layer_tensors("m.a", 8, 6, [0, 5]),
        "m.b": layer_tensors("m.b", 5, 7, []),
        "": {"norm.weight": torch.randn(6, dtype=torch.bfloat16)},
    }


def groups_of(model: Model) -> list[list[TensorSpec]]:
    groups = []
    for name, tensors in model.items():
        if name:
            out_features, in_features = tensors[f"{name}.weight"].shape
            count = len(tensors[f"{name}.outlier_dims"])
            groups.append(BITSANDBYTES.record_specs(name, out_features, in_features, count, "F16"))
        else:
            spelling = {dtype: dtype_name for dtype_name, dtype in DTYPES.items()}
            groups += [[TensorSpec(n, spelling[t.dtype], tuple(t.shape))] for n, t in tensors.items()]
    return groups


def commit(writer: CheckpointWriter, model: Model, small_files: dict[str, bytes] | None = None) -> Manifest:
    counts = {name: len(tensors[f"{name}.outlier_dims"]) for name, tensors in model.items() if name}
    quantization = Quantization(["lm_head"], counts, criterion="by hand", producer="test 1", source=SOURCE)
    identity = {**SOURCE, "config_sha256": "0" * 64, "files": {}}
    return writer.commit(CONFIG, quantization, identity, {name: {"x": 1} for name in counts}, small_files or {})


def write(out: Path, model: Model, max_shard_bytes: int = 1 << 30, backwards: bool = False) -> Manifest:
    with CheckpointWriter(out, max_shard_bytes) as writer:
        writer.plan(groups_of(model))
        tensors = [item for group in model.values() for item in group.items()]
        for name, tensor in reversed(tensors) if backwards else tensors:
            writer.write(name, tensor)
        return commit(writer, model, SMALL_FILES)


def everything_in(path: Path) -> dict[str, bytes | None]:
    return {str(item.relative_to(path)): item.read_bytes() if item.is_file() else None for item in path.rglob("*")}


def assert_holds(path: Path, model: Model) -> None:
    checkpoint = open_checkpoint(path)
    assert check_values(checkpoint) == []
    expected = {name: tensor for group in model.values() for name, tensor in group.items()}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        info = checkpoint.tensors[name]
        assert info.offset % DTYPES[info.dtype].itemsize == 0


@pytest.mark.skipif(os.name != "posix", reason="directories are flushed on POSIX only")
def test_the_disk_has_the_shards_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure must not leave a whole name over data that was never flushed; config.json comes last of all."""
    events: list[tuple[str, object]] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(("name", target.relative_to(out).as_posix()))
        return replace(path, target)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write(out, two_layers(), max_shard_bytes=60)
    names = [name for what, name in events if what == "name"]
    shards = [name for name in names if str(name).endswith(".safetensors")]
    assert len(shards) > 2
    assert names[-1] == "config.json"
    for file in [path for path in out.rglob("*") if path.is_file()]:
        name = file.relative_to(out).as_posix()
        assert events.index(("flush", file.stat().st_ino)) < events.index(("name", name)), name
    config, folder = events.index(("name", "config.json")), ("flush", out.stat().st_ino)
    assert folder in events[events.index(("name", names[-2])) : config]
    assert folder in events[config:]


@pytest.mark.skipif(os.name != "posix", reason="directories are flushed on POSIX only")
def test_every_directory_that_was_written_to_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was there already too: without its entry a new OUT is lost, with all that is in it."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    monkeypatch.chdir(tmp_path)
    out = Path("new/below/out")
    write(out, two_layers())
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    assert len(folders) == 5
    assert {folder.stat().st_ino for folder in folders} <= set(flushed)
    config = flushed.index((out / "config.json").stat().st_ino)
    assert (out / "additional_chat_templates").stat().st_ino in flushed[:config]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_flushes_no_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "out", two_layers(), 200)
    assert_holds(tmp_path / "out", two_layers())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to advise")
def test_a_file_system_that_takes_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fadvise", refusing)
    write(tmp_path / "out", two_layers(), 200)
    assert_holds(tmp_path / "out", two_layers())


def test_a_parent_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Path, *arguments: int, **named: int) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    write(tmp_path / "out", two_layers(), 200)
    assert_holds(tmp_path / "out", two_layers())


@pytest.mark.parametrize("data", [b"", b"new", b"longer than what was there"])
def test_nothing_stays_of_what_a_killed_run_has_written_under_the_temporary_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.new.partial").write_bytes(b"what was there")
    write_durably(tmp_path / "file", data)
    assert everything_in(tmp_path) == {"file": data}


def test_one_file(tmp_path: Path) -> None:
    model = two_layers()
    write(tmp_path / "out", model)
    assert_holds(tmp_path / "out", model)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {"model.safetensors", "config.json", "llmint8_manifest.json", "tokenizer.json"}
    for name, data in SMALL_FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_config_json_keeps_the_keys_of_the_source_in_order(tmp_path: Path) -> None:
    write(tmp_path / "out", two_layers())
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert list(config) == [*CONFIG, "quantization_config"]
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert '"sizes": [1, -2.5e-07],' in text
    assert '"a": "ü"' in text
    assert text.endswith("}\n")
    assert config["quantization_config"]["llmint8"]["outliers"]["counts"] == {"m.a": 2, "m.b": 0}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    limit=st.integers(1, 400),
    backwards=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_shards(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int, int]], limit: int, backwards: bool
) -> None:
    model: Model = {
        f"m.{number}": layer_tensors(f"m.{number}", n, k, list(range(min(k, outliers))))
        for number, (n, k, outliers) in enumerate(sizes)
    }
    model[""] = {"norm.weight": torch.ones(3, dtype=torch.float64), "mask": torch.tensor([True, False])}
    out = tmp_path_factory.mktemp("shards") / "out"
    manifest = write(out, model, limit, backwards)
    assert_holds(out, model)
    checkpoint = open_checkpoint(out)
    count = len(checkpoint.files)
    expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert checkpoint.files == (expected if count > 1 else ["model.safetensors"])
    assert {name: entry.file for name, entry in manifest.tensors.items()} == {
        name: info.file for name, info in checkpoint.tensors.items()
    }
    for file in checkpoint.files:
        inside = [info for info in checkpoint.tensors.values() if info.file == file]
        assert len(inside) == 1 or sum(info.nbytes for info in inside) <= limit
    for group in model.values():
        files = {checkpoint.tensors[name].file for name in group}
        fits = sum(checkpoint.tensors[name].nbytes for name in group) <= limit
        assert len(files) == 1 or not fits or group is model[""]
    if count > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())


def test_a_statistic_that_overflowed_does_not_spoil_the_manifest(tmp_path: Path) -> None:
    """Squared errors of a model with huge activations may; NaN is no JSON, and the manifest would be refused."""
    statistics = {"m.a": {"errors": [1.0, math.inf, math.nan], "kept_absmax": -math.inf, "dims": [1]}}
    stored = Manifest("1.0", "test 1", {}, {}, statistics).to_dict()["modules"]
    assert stored == {"m.a": {"errors": [1.0, None, None], "kept_absmax": None, "dims": [1]}}


def test_plans_may_follow_writes(tmp_path: Path) -> None:
    model = two_layers()
    with CheckpointWriter(tmp_path / "out", 1 << 30) as writer:
        for group, specs in zip(model.values(), groups_of(model), strict=True):
            writer.plan([specs])
            for name, tensor in group.items():
                writer.write(name, tensor)
        commit(writer, model)
    assert_holds(tmp_path / "out", model)
    assert len(open_checkpoint(tmp_path / "out").files) == 3


def test_any_strides_are_written(tmp_path: Path) -> None:
    wide = torch.randn(400, 100)
    model: Model = {"": {"columns": wide[:, ::3], "transposed": wide.t(), "grad": torch.ones(2, requires_grad=True)}}
    write(tmp_path / "out", model)
    assert_holds(tmp_path / "out", model)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one", two_layers(), 200)
    write(tmp_path / "two", two_layers(), 200, backwards=True)
    assert everything_in(tmp_path / "one") == everything_in(tmp_path / "two")


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out", two_layers(), 200)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match=f"{tmp_path}: is not an empty directory"):
        CheckpointWriter(tmp_path, 1)
    with pytest.raises(OutputError, match=r"mine: is not an empty directory"):
        CheckpointWriter(tmp_path / "mine", 1)
    with pytest.raises(OutputError, match=r"below: cannot be used as a directory"):
        CheckpointWriter(tmp_path / "mine" / "below", 1)
    assert everything_in(tmp_path) == {"mine": b"x"}


def wrong_shape(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (2,))]])
    writer.write("x", torch.ones(3))


def wrong_dtype(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (2,))]])
    writer.write("x", torch.ones(2, dtype=torch.int32))


def too_few_rows(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (3,))]])
    writer.write_rows("x", [torch.ones(1), torch.ones(1)])


def too_many_rows(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (3,))]])
    writer.write_rows("x", [torch.ones(2), torch.ones(2)])


def never_written(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (2,)), TensorSpec("y", "F32", (2,))]])
    writer.write("x", torch.ones(2))
    commit(writer, {})


def planned_twice(writer: CheckpointWriter) -> None:
    writer.plan([[TensorSpec("x", "F32", (2,))]])
    writer.plan([[TensorSpec("x", "I8", (2,))]])


def in_a_writer(out: Path, action: Callable[[CheckpointWriter], object], max_shard_bytes: int = 200) -> None:
    with CheckpointWriter(out, max_shard_bytes) as writer:
        action(writer)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (wrong_shape, r"x: has shape \[3\], planned was \[2\]"),
        (wrong_dtype, r"x: rows torch\.int32 \[2\], planned was"),
        (too_few_rows, r"x: 4 bytes less than planned"),
        (too_many_rows, r"x: rows torch\.float32 \[2\], planned was"),
        (never_written, "1 planned tensors were never written, y"),
        (planned_twice, "x is planned twice"),
    ],
)
def test_mistakes_of_the_caller(tmp_path: Path, action: Callable[[CheckpointWriter], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_a_writer(tmp_path / "out", action)


def interrupted(writer: CheckpointWriter) -> None:
    writer.plan(groups_of(two_layers()))
    raise KeyboardInterrupt


@pytest.mark.parametrize("existed", [True, False])
def test_before_the_first_tensor_what_was_written_is_removed(tmp_path: Path, existed: bool) -> None:
    if existed:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        in_a_writer(tmp_path / "out", interrupted)
    assert everything_in(tmp_path) == ({"out": None} if existed else {})


def test_files_of_others_are_left(tmp_path: Path) -> None:
    def action(writer: CheckpointWriter) -> None:
        (tmp_path / "out" / "notes").write_text("x")
        interrupted(writer)

    with pytest.raises(KeyboardInterrupt):
        in_a_writer(tmp_path / "out", action)
    assert everything_in(tmp_path) == {"out": None, "out/notes": b"x"}


def test_shards_that_are_not_needed_any_more_are_removed_at_commit(tmp_path: Path) -> None:
    """The run before laid out more of them: another machine chooses other columns."""
    model = two_layers()

    def interrupted_later(writer: CheckpointWriter) -> None:
        extra = [[TensorSpec(f"extra.{number}", "F32", (20,))] for number in range(3)]
        writer.plan([*groups_of(model), *extra])
        writer.write("m.a.SCB", model["m.a"]["m.a.SCB"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_a_writer(tmp_path / "out", interrupted_later)
    write(tmp_path / "out", model, 200)
    write(tmp_path / "fresh", model, 200)
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "fresh")


def test_until_the_commit_every_name_is_partial(tmp_path: Path) -> None:
    def action(writer: CheckpointWriter) -> None:
        writer.plan(groups_of(two_layers()))
        assert len(everything_in(tmp_path / "out")) > 1
        assert all(name.endswith(".partial") for name in everything_in(tmp_path / "out"))

    in_a_writer(tmp_path / "out", action, max_shard_bytes=100)


def failing(number: int, error: int) -> Callable[[int], None]:
    """Return an fsync whose call of this number fails."""
    calls = iter(range(sys.maxsize))

    def fsync(descriptor: int) -> None:
        if next(calls) == number:
            raise OSError(error, os.strerror(error))

    return fsync


def test_after_a_failing_flush_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may report that it is full as late as this. Every flush fails once; after the last, all is well."""
    messages: list[str] = []
    for number in range(100):
        monkeypatch.setattr(os, "fsync", failing(number, errno.ENOSPC))
        try:
            write(tmp_path / "out", two_layers(), 200)
            break
        except OutputError as error:
            messages += [str(error), *error.__notes__]
        assert is_unfinished(tmp_path / "out")
    assert_holds(tmp_path / "out", two_layers())
    assert len(messages) > 10
    assert all(text.startswith(str(tmp_path / "out")) and "No space left" in text for text in messages[::2])
    assert all("keeps what is done" in text for text in messages[1::2])


def test_config_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash would leave, seen at every flush: no config.json, or a checkpoint that is whole."""
    seen = []

    def fsync(descriptor: int) -> None:
        complete = (tmp_path / "out" / "config.json").exists()
        seen.append(complete)
        if complete:
            assert_holds(tmp_path / "out", two_layers())
        else:
            with pytest.raises(CheckpointError, match=r"^E01"):
                open_checkpoint(tmp_path / "out")

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "out", two_layers(), 200)
    assert seen == sorted(seen)
    assert seen.count(True) == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond this size, which looks to a program as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize("moment", ["plan", "write", "commit"])
def test_a_full_disk_is_told_and_the_next_run_goes_on(tmp_path: Path, moment: str) -> None:
    big: Model = {"": {"big": torch.ones(1 << 18)}}
    full = [True]

    def action(writer: CheckpointWriter) -> None:
        with largest_file(4096 if full[0] and moment == "plan" else 1 << 40):
            writer.plan(groups_of(big))
        with largest_file(4096 if full[0] and moment == "write" else 1 << 40):
            writer.write("big", big[""]["big"])
        with largest_file(4096 if full[0] else 1 << 40):
            commit(writer, big, {"tokenizer.json": bytes(8192)})

    with pytest.raises(OutputError, match=r"out/.*: cannot be written: "):
        in_a_writer(tmp_path / "out", action)
    # Without a single tensor done there is nothing to go on with.
    assert is_unfinished(tmp_path / "out") == (moment == "commit")
    full[0] = False
    in_a_writer(tmp_path / "out", action)
    assert_holds(tmp_path / "out", big)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        in_a_writer(tmp_path, lambda writer: writer.plan(groups_of(two_layers())))
