"""Printing decides neither what a command does nor its exit code; `converter/commands/output.py`."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tokenizers
import torch
import transformers

from llmint8.converter.commands.command import Command
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.commands.output import echo_result, forgiving_output
from llmint8.runtime.commands.main import main

CHINESE = "\u4e2d\u6587"


class Stream(io.TextIOWrapper):
    """Standard output in an encoding; writing to it fails as it is told."""

    def __init__(self, encoding: str = "utf-8", fails: int | None = None) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.fails = fails

    def write(self, text: str) -> int:
        if self.fails is not None and text:
            raise OSError(self.fails, os.strerror(self.fails))
        return super().write(text)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Stream, Stream]]:
    """Replaces standard output and standard error."""

    def replace(encoding: str = "utf-8", out: int | None = None, err: int | None = None) -> tuple[Stream, Stream]:
        made = Stream(encoding, out), Stream(encoding, err)
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    return replace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer whose words no Western encoding has, and its int8 checkpoint, in such a directory."""
    folder = tmp_path_factory.mktemp(CHINESE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=16, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder / "source")
    words = tokenizers.models.WordLevel({chr(0x4E00 + i): i for i in range(16)}, unk_token="\u4e00")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="\u4e00").save_pretrained(
        folder / "source"
    )
    (folder / "text.txt").write_text(" ".join(chr(0x4E00 + i % 16) for i in range(99)), encoding="utf-8")
    assert call(convert_command, folder / "source", folder / "out", "--quiet") == 0
    return folder


def call(command: Any, *arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        command.main([str(argument) for argument in arguments], prog_name="llmint8")
    assert isinstance(exit.value.code, int)
    return exit.value.code


# Every command that runs without a GPU and a Hub: whether what it prints is its result, and how it is called.
COMMANDS: dict[str, tuple[bool, Callable[[Path, Path], list[object]]]] = {
    "convert": (False, lambda folder, new: [folder / "source", new / "out"]),
    "convert --dry-run": (True, lambda folder, new: [folder / "source", new / "out", "--dry-run"]),
    "verify": (False, lambda folder, new: [folder / "out"]),
    "verify --source": (False, lambda folder, new: [folder / "out", "--source", folder / "source"]),
    "report": (False, lambda folder, new: [folder / "out", "--output", new / "page", "--no-run"]),
    "plan": (True, lambda folder, new: [folder / "source", "--gpu", "T4"]),
    "inspect": (True, lambda folder, new: [folder / "out"]),
    "inspect --json": (True, lambda folder, new: [folder / "out", "--json"]),
    "generate": (True, lambda folder, new: [folder / "out", "--prompt", "\u4e01 \u4e02", "--max-new-tokens", 9]),
    "eval": (
        True,
        lambda folder, new: [
            *(folder / "out", "--reference", folder / "source", "--text", folder / "text.txt"),
            *("--tokens", 32, "--window", 16),
        ],
    ),
}
each_command = pytest.mark.parametrize(("is_result", "name"), [(v[0], k) for k, v in COMMANDS.items()], ids=COMMANDS)


def run(name: str, folder: Path, new: Path) -> int:
    return call(main, name.split()[0], *COMMANDS[name][1](folder, new))


@pytest.mark.parametrize(
    ("is_result", "name", "encoding"),
    [
        *((is_result, name, "ascii") for name, (is_result, _) in COMMANDS.items()),
        *((True, "inspect", encoding) for encoding in ("latin-1", "cp1252")),
    ],
)
def test_an_encoding_that_lacks_a_character_is_no_error(
    is_result: bool, name: str, encoding: str, folder: Path, tmp_path: Path, streams: Any
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib")
    out, err = streams(encoding)
    assert run(name, folder, tmp_path / CHINESE) == 0
    assert "Error" not in err.text
    known = {"eval": "windows", "generate": "\\u4e0", "inspect": "mlp.up_proj", "plan": "model.layers.0"}
    assert known.get(name.split()[0], "\\u4e2d\\u6587") in out.text or name in ("convert --dry-run", "inspect --json")


@each_command
def test_a_full_disk_is_an_error_of_what_prints_its_result(
    is_result: bool, name: str, folder: Path, tmp_path: Path, streams: Any
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib")
    _, err = streams(out=errno.ENOSPC)
    assert run(name, folder, tmp_path) == int(is_result)
    told = "Error: standard output: No space" if is_result else "Note: standard output: No space left on device; what"
    assert told in err.text
    assert err.text.count("standard output") == 1


@each_command
def test_a_reader_who_has_seen_enough_is_no_error(
    is_result: bool, name: str, folder: Path, tmp_path: Path, streams: Any
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib")
    _, err = streams(out=errno.EPIPE)
    assert run(name, folder, tmp_path) == 0
    assert "rror" not in err.text


def test_the_work_is_done_when_nothing_can_be_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: Any
) -> None:
    streams(out=errno.EIO, err=errno.EIO)
    assert call(main, "convert", folder / "source", tmp_path / "out", "--outliers", "none", "--verbose") == 0
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert call(main, "verify", tmp_path / "out", "--source", folder / "source") == 0
    (tmp_path / "out" / "config.json").unlink()
    assert call(main, "verify", tmp_path / "out") == 1


def test_what_is_wrong_is_an_error_however_it_is_printed(folder: Path, tmp_path: Path, streams: Any) -> None:
    _, err = streams("ascii", out=errno.EPIPE)
    assert call(main, "verify", folder / "source") == 1
    assert err.text.startswith("Error: ")
    assert "\\u4e2d\\u6587" in err.text


def test_generation_ends_when_nobody_reads(folder: Path, streams: Any) -> None:
    streams(out=errno.EPIPE)
    written = []

    def count(*arguments: object) -> None:
        written.append(arguments)
        echo_result("x")

    @click.command(cls=Command)
    def endless() -> None:
        while True:
            count()

    assert call(endless) == 0
    assert len(written) == 1


def test_the_streams_are_as_before_afterwards(streams: Any) -> None:
    out, err = streams()
    with forgiving_output():
        assert sys.stdout is not out
        assert not hasattr(sys.stdout, "buffer")
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")  # type: ignore[arg-type]
        sys.stdout.writelines(["a", "\ud800"])  # of a file name that is not UTF-8
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.text == "a\\ud800"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_python_does_not_try_again_when_it_ends() -> None:
    script = "from llmint8.runtime.commands.main import main; main(['--help'])"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stderr == "Note: standard output: No space left on device; what was printed is not complete\n"
