"""Interrupted conversions: what is left, what goes on, and that the result has the same bytes whatever happened."""

import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmint8 import converter, formats
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.conversion.provenance import fingerprint
from llmint8.converter.conversion.transfer import Transfer
from llmint8.formats.disk import durable
from llmint8.formats.disk.names import JOURNAL_NAME
from llmint8.formats.writing import journal as journal_module
from llmint8.formats.writing import shards as shards_module

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
# Every layer's output is small enough to be put aside with 2 tokens, and none is with 64.
OPTIONS = {
    "calibrated": {"calibration_tokens": 64},
    "outputs-kept": {"calibration_tokens": 2},
    "data-free": {"outliers": "none"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, quiet_transformers):
    path = tmp_path_factory.mktemp("model") / "source"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).half().save_pretrained(path)
    return path


def convert(source: Path, out: Path, **options: Any) -> converter.ConversionReport:
    return converter.convert(source, out, max_shard_size="6KB", **options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may run after it."""


class Kill:
    """Kills at the event of a number. Events are writes, of which half is done first, and changes of names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.count = number, 0
        for module in (shards_module, journal_module, durable):
            monkeypatch.setattr(module, "write_all", self._halved(durable.write_all))
        for name in ("replace", "unlink"):
            monkeypatch.setattr(Path, name, self._before(getattr(Path, name)))
        monkeypatch.setattr(os, "fsync", self._before(os.fsync))
        monkeypatch.setattr(formats.CheckpointWriter, "__exit__", lambda writer, *error: writer.journal.close())

    def _now(self) -> bool:
        self.count += 1
        return self.count - 1 == self.number

    def _halved(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def halved(file: Any, data: Any) -> Any:
            if self._now():
                write(file, memoryview(data)[: len(data) // 2])
                raise Killed
            return write(file, data)

        return halved

    def _before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def before(*arguments: Any, **named: Any) -> Any:
            if self._now():
                raise Killed
            return action(*arguments, **named)

        return before


KILLED = [
    pytest.param(options, id=name, marks=[pytest.mark.soak] * (name == "outputs-kept"))
    for name, options in OPTIONS.items()
]


@pytest.mark.parametrize("options", KILLED)
def test_killed_at_any_moment_the_result_has_the_same_bytes(source, tmp_path, monkeypatch, options):
    """Every run is killed some events later than the one before, and goes on in the directory that one left.

    `soak/test_interruptions.py` kills for real, and far more often.
    """
    convert(source, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        kill = Kill(patch, -1)
        convert(source, tmp_path / "counted", jobs=1, **options)
    events = kill.count
    assert events > 60
    # Some moments on the way, and of the end, where files get their names, every third: the options together try each.
    end, shift = events - 39, list(OPTIONS.values()).index(options)
    for number in (*range(0, end, end // 10), *range(end + shift, events, 3)):
        out = tmp_path / f"killed-{number}"
        with monkeypatch.context() as patch:
            Kill(patch, number)
            with pytest.raises(Killed):
                convert(source, out, jobs=1, **options)
        if number % 2:  # and once more, a little after it went on
            with monkeypatch.context() as patch:
                Kill(patch, 7)
                with pytest.raises(Killed):
                    convert(source, out, jobs=1, **options)
        assert not (out / "config.json").exists() or (out / JOURNAL_NAME).exists()
        convert(source, out, **options)
        assert contents(out) == contents(tmp_path / "whole"), f"killed at event {number}"
        shutil.rmtree(out)


@pytest.mark.parametrize("outliers", ["none", "top-k=3"])
def test_any_number_of_jobs_gives_the_same_bytes(source, tmp_path, outliers):
    for jobs in (1, 2, 5):
        convert(source, tmp_path / str(jobs), outliers=outliers, jobs=jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def interrupt_after(count: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[str, int], None]:
    done = []

    def progress(name: str, nbytes: int) -> None:
        done.append(name)
        if len(done) == count:
            raise error

    return progress


def test_what_is_done_is_not_read_again(source, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", outliers="none", jobs=1, progress=interrupt_after(10))
    reads = []
    read_rows = formats.Source.read_rows
    monkeypatch.setattr(formats.Source, "read_rows", lambda self, name: reads.append(name) or read_rows(self, name))
    convert(source, tmp_path / "out", outliers="none")
    assert 0 < len(reads) <= len(formats.open_source(source).tensors) - 10


def test_a_pass_that_goes_on_reads_no_weight_whose_output_was_kept(source, tmp_path, monkeypatch):
    options = OPTIONS["outputs-kept"]
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(14), **options)
    reads = []
    read = formats.Source.read
    monkeypatch.setattr(formats.Source, "read", lambda self, name: reads.append(name) or read(self, name))
    convert(source, tmp_path / "out", **options)
    weights = {name for name in reads if "_proj" in name}
    assert 0 < len(weights) < 14
    assert not any("layers.0.self_attn" in name for name in weights)


def test_an_interruption_says_what_is_left(source, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, tmp_path / "out", progress=interrupt_after(5))
    assert caught.value.__notes__ == [
        f"{tmp_path / 'out'} keeps what is done so far; the same command goes on, --force starts over"
    ]
    with pytest.raises(formats.CheckpointError, match="unfinished"):
        formats.open_checkpoint(tmp_path / "out")


def test_before_the_first_tensor_nothing_is_left(source, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.Source, "read_rows", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "out", outliers="none")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def quantized(monkeypatch):
    """The names of the layers that are quantized from now on, in the order in which they are."""
    names: list[str] = []
    quantize = Transfer._quantized
    monkeypatch.setattr(Transfer, "_quantized", lambda self, *a: names.append(a[0].name) or quantize(self, *a))
    return names


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_bad_value_near_the_end_costs_no_work(source, tmp_path, quantized, options):
    copy = shutil.copytree(source, tmp_path / "source")
    model = transformers.LlamaForCausalLM.from_pretrained(copy, dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(copy)
    convert(copy, tmp_path / "fresh", on_nonfinite="keep", **options)
    quantized.clear()
    with pytest.raises(formats.SourceError, match=r"output row 3 holds NaN.*go on with --on-nonfinite keep") as caught:
        convert(copy, tmp_path / "out", jobs=1, **options)
    assert "keeps what is done so far" in caught.value.__notes__[0]
    *done, bad = quantized
    assert len(done) > 7
    quantized.clear()
    convert(copy, tmp_path / "out", on_nonfinite="keep", **options)
    assert not {*done, bad} & {*quantized}
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("outliers", ["none", "top-k=3"])
@pytest.mark.parametrize("way_out", ["bfloat16", None])
def test_a_value_that_does_not_fit_costs_no_work(source, tmp_path, quantized, outliers, way_out):
    """With calibration the columns that stay in 16 bit are cast at the very end."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    model.model.layers[1].mlp.down_proj.weight.data[3] = 1e6
    model.model.norm.weight.data[0] = 1e6 if outliers == "none" else 1
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "fresh", outliers=outliers, dtype=way_out)
    quantized.clear()
    with pytest.raises(formats.SourceError, match=r"1e.06 does not fit float16; go on with --dtype bf.* or without"):
        convert(tmp_path / "source", tmp_path / "out", outliers=outliers, dtype="float16", jobs=1)
    assert len({*quantized}) == 14
    quantized.clear()
    convert(tmp_path / "source", tmp_path / "out", outliers=outliers, dtype=way_out)
    assert not quantized
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_read_error_leaves_what_is_done(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    plan = converter.make_plan(converter.resolve(copy), tmp_path / "out", converter.Options(outliers="none", jobs=1))
    size = (copy / "model.safetensors").stat().st_size
    os.truncate(copy / "model.safetensors", size - 100)  # as if the disk went bad after the plan
    with pytest.raises(formats.CorruptFileError, match="too early") as caught:
        converter.execute(plan)
    assert "keeps what is done" in caught.value.__notes__[0]
    assert formats.is_unfinished(tmp_path / "out")


CHANGES = {
    "outliers": ({"outliers": "top-k=2"}, "--outliers was top-k=16 and is top-k=2"),
    "tokens": ({"calibration_tokens": 9}, "--calibration-tokens was 512 and is 9"),
    "code": ({"trust_remote_code": True}, "--trust-remote-code was False and is True"),
}


@pytest.mark.parametrize(("options", "message"), CHANGES.values(), ids=CHANGES)
def test_another_pass_is_refused_by_name(source, tmp_path, options, message):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(5))
    before = contents(tmp_path / "out")
    with pytest.raises(formats.OutputError, match=message) as caught:
        convert(source, tmp_path / "out", **options)
    assert "--force" in str(caught.value)
    assert contents(tmp_path / "out") == before
    convert(source, tmp_path / "out", force=True, **options)
    convert(source, tmp_path / "new", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


OTHERS = {
    "skip": {"skip": [r"layers\.1.*(down|q)_proj"]},
    "only": {"only": ["layers.0", "v_proj"]},
    "head": {"quantize_head": True},
    "smaller-shards": {"max_shard_size": "3KB"},
    "larger-shards": {"max_shard_size": "5GB"},
    "dtype": {"dtype": "bfloat16"},
    "keep": {"on_nonfinite": "keep"},
}


@pytest.mark.parametrize(
    ("options", "outliers"),
    [(options, ("none", "top-k=3")[number % 2]) for number, options in enumerate(OTHERS.values())],
    ids=OTHERS,
)
def test_with_other_options_what_is_finished_is_used(source, tmp_path, quantized, outliers, options):
    """They change which tensors are wanted and where they lie, and none that is finished; the pass goes on too."""
    begun = {"max_shard_size": "6KB", "outliers": outliers, "calibration_tokens": 64}
    converter.convert(source, tmp_path / "fresh", **begun | options)
    quantized.clear()
    with pytest.raises(KeyboardInterrupt):
        converter.convert(source, tmp_path / "out", jobs=1, progress=interrupt_after(14), **begun)
    done = quantized[:-1]  # of the one it was interrupted in, nothing may have been put aside
    assert len(done) > 7
    quantized.clear()
    with pytest.raises(KeyboardInterrupt):  # and once more, when all has moved
        converter.convert(source, tmp_path / "out", jobs=1, progress=interrupt_after(13), **begun | options)
    converter.convert(source, tmp_path / "out", **begun | options)
    assert not {*done} & {*quantized}
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_conversion_may_go_on_on_another_device(source, tmp_path):
    """As when a GPU has too little memory: integers are the same on all, and columns are the source's."""
    options = (converter.Options(device="cuda", jobs=2), converter.Options(device="cpu", jobs=3))
    one, other = (fingerprint(converter.make_plan(converter.resolve(source), tmp_path / "out", o)) for o in options)
    assert one == other


def test_killed_while_what_is_finished_moves(source, tmp_path, monkeypatch):
    """Other options give the shards another layout: the old ones go when all that is of use has been copied."""
    begun, now = {"outliers": "none"}, {"outliers": "none", "max_shard_size": "9KB"}
    converter.convert(source, tmp_path / "fresh", **now)
    for number in range(0, 60, 7):
        out = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, progress=interrupt_after(18), **begun)
        with monkeypatch.context() as patch:
            Kill(patch, number)
            with pytest.raises(Killed):
                converter.convert(source, out, jobs=1, **now)
        converter.convert(source, out, **now)
        assert contents(out) == contents(tmp_path / "fresh"), f"killed at event {number}"


def test_the_calibration_text_may_move_but_not_change(source, tmp_path):
    texts = [tmp_path / name for name in ("one.txt", "two.txt", "other.txt")]
    for file, text in zip(texts, ("abc", "abc", "abd"), strict=True):
        file.write_text(text)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", calibration=texts[0], progress=interrupt_after(5))
    with pytest.raises(formats.OutputError, match=r"the calibration was \w+ and is \w+"):
        convert(source, tmp_path / "out", calibration=texts[2])
    convert(source, tmp_path / "out", calibration=str(texts[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_changed_source_is_refused_by_name(source, tmp_path, name):
    copy = shutil.copytree(source, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(copy, tmp_path / "out", progress=interrupt_after(5))
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + b" " if name.endswith(".json") else data[:-1] + b"\0")
    with pytest.raises(formats.OutputError, match=rf"the source's {name} was .* and is .*--force"):
        convert(copy, tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_what_is_finished_is_recognised_and_left_as_it_is(source, tmp_path, force):
    first = convert(source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    before = contents(tmp_path / "out")
    again = convert(source, tmp_path / "out", force=force)
    assert contents(tmp_path / "out") == before
    assert again == dataclasses.replace(first, seconds=0.0, already=True, notices=[])


def test_what_is_finished_is_not_that_of_other_options(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Something else to calibrate with. " * 99)
    convert(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    for options, words in [
        ({"skip": ["up_proj"]}, "--skip was  and is 'up_proj'"),
        ({"dtype": "bfloat16"}, "--dtype was None and is bfloat16"),
        ({"quantize_head": True}, "--quantize-head was False and is True"),
        ({"outliers": "threshold=9"}, "--outliers was .* and is threshold=9"),
        ({"calibration": text}, "--calibration was .* and is [0-9a-f]+"),
    ]:
        with pytest.raises(formats.OutputError, match=f"a finished conversion of something else: {words}"):
            convert(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_is_finished_is_not_that_of_a_changed_source(source, tmp_path, name):
    copy = shutil.copytree(source, tmp_path / "source")
    convert(copy, tmp_path / "out")
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + b" " if name.endswith(".json") else data[:-1] + b"\0")
    later = (tmp_path / "out" / "config.json").stat().st_mtime + 10
    os.utime(copy / name, (later, later))
    named = {"config.json": "the source's config_sha256 was", "generation_config.json": rf"the source's {name} was"}
    with pytest.raises(formats.OutputError, match=named.get(name, "not what quantizing the source gives|differs")):
        convert(copy, tmp_path / "out")


def test_other_weights_under_the_same_name_are_not_what_is_finished(source, tmp_path):
    """As of two fine-tunes of one model, each in a directory called `final`, older than the result."""
    one, other = (shutil.copytree(source, tmp_path / name / "final") for name in ("one", "other"))
    name = max(load_file(other / "model.safetensors"), key=lambda name: "down_proj" in name)
    tensors = load_file(other / "model.safetensors")
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    os.utime(other / "model.safetensors", (1, 1))
    convert(one, tmp_path / "out")
    assert convert(one, tmp_path / "out").already
    with pytest.raises(formats.OutputError, match=f"something else: {name}: not what quantizing the source gives"):
        convert(other, tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "other"])
def test_a_result_without_its_small_files_is_a_damaged_one(source, tmp_path, change):
    convert(source, tmp_path / "out")
    file = tmp_path / "out" / "generation_config.json"
    file.unlink() if change == "missing" else file.write_text("{}")
    with pytest.raises(
        formats.OutputError, match=r"a damaged conversion: generation_config\.json is missing or another"
    ):
        convert(source, tmp_path / "out")


def test_a_journal_whose_beginning_is_damaged_is_not_thrown_away(source, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(14))
    path = tmp_path / "out" / JOURNAL_NAME
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    with pytest.raises(formats.OutputError, match=r"its beginning is damaged, or of another version.*--force"):
        convert(source, tmp_path / "out")
    assert path.read_bytes()[1:] == whole[1:]
    place = whole.index(b'"kind"', len(whole) // 2)
    path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
    convert(source, tmp_path / "out")
    assert "bytes are cut short or damaged; that is done again" in caplog.text


def test_layers_that_are_all_nan_are_refused_in_one_line(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    tensors = {n: t.fill_(float("nan")) if "proj" in n else t for n, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for outliers in ("none", "top-k=4"):
        with pytest.raises(formats.SourceError, match=r"no layer is left to quantize: .* and all others hold NaN"):
            convert(copy, tmp_path / "out", outliers=outliers, on_nonfinite="keep")
        assert not (tmp_path / "out" / "config.json").exists()


def test_a_damaged_result_is_not_taken_for_a_finished_one(source, tmp_path):
    convert(source, tmp_path / "out")
    min((tmp_path / "out").glob("*.safetensors")).unlink()
    with pytest.raises(formats.OutputError, match=r"holds a damaged conversion: E05 .*remove it to convert again"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("what", ["shard", "journal"])
def test_what_a_power_failure_damaged_is_done_again(source, tmp_path, what):
    """Data that never reached the disk reads as zeros, in the shards or at the end of the journal."""
    convert(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(12))
    file = tmp_path / "out" / ("model-00001.safetensors.partial" if what == "shard" else JOURNAL_NAME)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_candidates_that_changed_places_in_the_journal_are_found_again(source, tmp_path):
    """Swapped dims of the same length once gave a finished checkpoint with columns under the wrong dimensions."""
    convert(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(14))
    path = tmp_path / "out" / JOURNAL_NAME
    dims = re.compile(rb'"value":\[(\d+),(\d+),')
    swapped, count = dims.subn(rb'"value":[\2,\1,', path.read_bytes())
    assert count > 5
    path.write_bytes(swapped)
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_conversions_into_one_directory(source, tmp_path):
    def second(name: str, nbytes: int) -> None:
        if not tried:
            tried.append(name)
            with pytest.raises(formats.OutputError, match="another conversion is writing to it"):
                convert(source, tmp_path / "out")

    tried: list[str] = []
    convert(source, tmp_path / "out", progress=second)
    assert tried
    convert(source, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def failing(number: int) -> Callable[..., None]:
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_a_conversion_goes_on_and_says_so(source, tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    convert(source, tmp_path / "out", outliers="none")
    assert formats.open_checkpoint(tmp_path / "out")
    assert caplog.messages == [
        f"{tmp_path / 'out'}: no locks there ({os.strerror(number)}): begin no second conversion into it"
    ]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, r"out: another conversion is writing to it"),
        (errno.EAGAIN, r"out: another conversion is writing to it"),
        (errno.EIO, r"conversion\.partial: cannot be locked: Input/output error"),
    ],
)
def test_a_lock_that_fails_otherwise_is_told_in_one_line(source, tmp_path, monkeypatch, number, message):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(formats.OutputError, match=message):
        convert(source, tmp_path / "out", outliers="none")


def test_the_journal_is_opened_once(source, tmp_path, monkeypatch):
    """On CIFS a lock is mandatory, and shuts out our own process too when it opens the file again."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(14))
    opened = os.open

    def refusing(path: Any, *arguments: Any, **named: Any) -> int:
        assert Path(path).name != JOURNAL_NAME or len(opens) == 0, "opened again"
        opens.extend([path] if Path(path).name == JOURNAL_NAME else [])
        return opened(path, *arguments, **named)

    opens: list[Any] = []
    monkeypatch.setattr(os, "open", refusing)
    convert(source, tmp_path / "out")
    assert len(opens) == 1


def link(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.hardlink_to(victim)


def fifo(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


OUTPUTS = ["*.safetensors.partial", JOURNAL_NAME, "config.json.new.partial", "llmint8_manifest.json.new.partial"]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("plant", [link, hard_link, fifo])
def test_what_is_not_a_plain_file_is_never_written_to(source, tmp_path, name, plant):
    """An unfinished directory that was copied, linked or handed on: nothing outside of it is ours to write."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", outliers="none", progress=interrupt_after(5))
    found = sorted((tmp_path / "out").glob(name))
    path = found[0] if found else tmp_path / "out" / name
    victim = tmp_path / "victim"
    victim.write_bytes(path.read_bytes() if found else b"x")
    before = victim.read_bytes()
    plant(path, victim)
    # Without its journal the directory is not an unfinished one.
    reasons = "is a link|has another name too|is not a regular file|is not an empty directory"
    with pytest.raises(formats.OutputError, match=rf"out.*: .*({reasons})"):
        convert(source, tmp_path / "out", outliers="none")
    assert victim.read_bytes() == before
    assert not (tmp_path / "out" / "config.json").exists()
    if name != JOURNAL_NAME:
        path.unlink()
        convert(source, tmp_path / "out", outliers="none")
        formats.open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", ["source.partial", "additional_chat_templates"])
def test_a_folder_that_is_a_link_is_refused(source, tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", outliers="none", progress=interrupt_after(5))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(formats.OutputError, match=f"{name}: is a link"):
        convert(source, tmp_path / "out", outliers="none")


def test_an_output_directory_may_be_a_link(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    convert(source, tmp_path / "out", outliers="none")
    formats.open_checkpoint(tmp_path / "elsewhere")


def test_windows_is_refused_before_anything_is_done(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(formats.OutputError, match="on Windows convert in WSL"):
        converter.make_plan(converter.resolve(source), tmp_path / "out")


SIGNAL = """
import os, signal, sys
import transformers.models.llama.modeling_llama  # once for all, and not in every child
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.conversion import convert
# Under nohup, as a background job and in many a CI it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
execute = convert.execute
done = []
def interrupted(plan, force, progress):
    def kill(name, nbytes):
        done.append(name)
        if len(done) == 5:
            os.kill(os.getpid(), number)
    return execute(plan, force, kill)
convert.execute = interrupted
source, folder, *numbers = sys.argv[1:]
for number in map(int, numbers):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}/said-{number}", os.O_WRONLY | os.O_CREAT), 2)
        convert_command([source, f"{folder}/{number}"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_signal_leaves_what_goes_on(source, tmp_path):
    codes = {signal.SIGINT: 1, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
    command = [sys.executable, "-c", SIGNAL, source, tmp_path, *(str(int(number)) for number in codes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [str(code) for code in codes.values()], done.stderr
    converter.convert(source, tmp_path / "whole")
    for number in codes:
        said = (tmp_path / f"said-{int(number)}").read_text(encoding="utf-8")
        assert "Traceback" not in said
        assert ("the same command goes on" in said) == (number != signal.SIGKILL)
        out = tmp_path / str(int(number))
        result = CliRunner().invoke(convert_command, [str(source), str(out)])
        assert result.exit_code == 0, result.output
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", ["calibrated", "outputs-kept"])
def test_going_on_where_rounding_is_another_stores_the_right_columns(source, tmp_path, monkeypatch, options):
    """As on another machine: the candidates come in another order then, and may be others."""
    from llmint8.converter.calibration import streaming

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(14), **OPTIONS[options])
    generator, linear = torch.Generator().manual_seed(0), streaming.blockwise_linear
    noise = lambda out: out * (1 + torch.rand(out.shape, generator=generator))  # noqa: E731
    monkeypatch.setattr(streaming, "blockwise_linear", lambda x, weight: noise(linear(x, weight)))
    # Layers whose output is kept do not multiply: the embedding is what differs then.
    embedding = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda *a, **k: noise(embedding(*a, **k).float()) if a[1].ndim == 2 else 0
    )
    convert(source, tmp_path / "out", **OPTIONS[options])
    checkpoint, original = formats.open_checkpoint(tmp_path / "out"), formats.open_source(source)
    assert not formats.check_values(checkpoint)
    for name in checkpoint.records:
        dims = checkpoint.read(f"{name}.outlier_dims").long()
        assert torch.equal(checkpoint.read(f"{name}.outlier_weight"), original.read(f"{name}.weight")[:, dims]), name


def test_out_of_memory_in_the_pass_is_no_early_end_of_it(source, tmp_path, monkeypatch):
    read = formats.Source.read

    def starved(self, name):
        if "layers.1.mlp" in name:
            torch.empty(1 << 58, dtype=torch.uint8)
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(formats.Source, "read", starved)
        with pytest.raises(RuntimeError, match="allocate"):
            convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_file_named_as_the_journal_is_copied(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "conversion").write_text("mine")
    convert(copy, tmp_path / "out")
    assert (tmp_path / "out" / "conversion").read_text() == "mine"
    assert not formats.is_unfinished(tmp_path / "out")


def signed(raw: bytes) -> bytes:
    return hashlib.sha256(raw).hexdigest().encode() + b" " + raw + b"\n"


ODD_LINES = {
    "empty": signed(b"{}"),
    "shape": signed(b'{"kind":"tensor","name":"x","value":1,"tensors":[["F16",5]],"sha256":""}'),
    "dtype": signed(b'{"kind":"tensor","name":"x","value":1,"tensors":[[[],[1]]],"sha256":""}'),
    "key": signed(b'{"kind":"tensor","name":"x","tensors":[],"sha256":""}'),
    "deep": signed(b"[" * 100_000),
    "binary": signed(b"\xff\0"),
    "unsigned": b'{"kind":"tensor","name":"x","value":1,"tensors":[],"sha256":""}\n',
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_journal_is_gone_on_with_or_forced(source, tmp_path, line, force):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", outliers="none", progress=interrupt_after(5))
    with (tmp_path / "out" / JOURNAL_NAME).open("ab") as file:
        file.write(line)
    convert(source, tmp_path / "out", outliers="none", force=force)
    convert(source, tmp_path / "whole", outliers="none")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("force", [False, True])
def test_a_journal_removes_nothing_outside(source, tmp_path, force):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", outliers="none", progress=interrupt_after(5))
    (tmp_path / "victim").write_text("x")
    with (tmp_path / "out" / JOURNAL_NAME).open("ab") as file:
        value = b'{"files":["../victim"],"shards":{}}'
        nothing = hashlib.sha256(b"").hexdigest().encode()
        file.write(signed(b'{"kind":"commit","name":"","value":%b,"tensors":[],"sha256":"%b"}' % (value, nothing)))
    with pytest.raises(formats.OutputError, match="names files outside"):
        convert(source, tmp_path / "out", outliers="none", force=force)
    assert (tmp_path / "victim").exists()


def test_force_leaves_what_is_not_ours(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_after(5))
    (tmp_path / "out" / "mine.partial").mkdir()
    (tmp_path / "out" / "mine.partial" / "thesis").write_text("x")
    convert(source, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "mine.partial" / "thesis").read_text() == "x"


def test_an_empty_file_with_the_journals_name_makes_no_directory_ours(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    (tmp_path / "out" / JOURNAL_NAME).touch()
    with pytest.raises(formats.OutputError, match="not the journal of a conversion"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_an_io_error_names_the_source(source, tmp_path, monkeypatch):
    from llmint8.formats.sources import weight_files as source_module

    class Broken:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def readinto(self, view):
            raise OSError(5, "Input/output error")

    opened = source_module.open_regular
    monkeypatch.setattr(source_module, "open_regular", lambda path: Broken(opened(path)))
    plan = converter.make_plan(converter.resolve(source), tmp_path / "out", converter.Options(outliers="none"))
    with pytest.raises(formats.CorruptFileError, match=r"model\.safetensors: .*: cannot be read: Input/output error"):
        converter.execute(plan)
