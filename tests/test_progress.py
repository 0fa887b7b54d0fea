"""What is seen of the work while it goes on: a bar on a terminal, lines elsewhere, and what is left out."""

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, formats
from llmint8.converter.commands import progress
from llmint8.formats.disk import small_files

GB = 10**9


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool = False, verbose: bool = False) -> str:
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(4 * GB, "Converting", quiet, verbose) as advance:
        advance("a.weight", GB)
        advance("b.\x1b[2Jweight", GB)
        advance("everything to the disk", 0)
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_it_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert "\r" not in "".join(lines)
    assert re.fullmatch(r"Converting: 25 %, 1\.00G of 4\.00G, 1 tensors, a\.weight, about [0-9:?]+ left", lines[-2])
    assert re.fullmatch(r"Converting: 50 %, 2\.00G of 4\.00G, 2 tensors, b\.\S*weight, about [0-9:?]+ left", lines[-1])
    assert "\x1b" not in lines[-1]


def test_what_takes_less_than_a_minute_prints_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False) == ""


def test_a_terminal_gets_a_bar_that_says_what_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 tensors, everything to the disk" in shown(monkeypatch, terminal=True)


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    assert shown(monkeypatch, terminal, quiet=True, verbose=True) == ""


def test_verbose_names_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, terminal=False, verbose=True).splitlines()
    assert lines[0] == "a.weight: 1.00 GB"
    assert len(lines) == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("model") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


def test_a_conversion_tells_of_everything_that_takes_time(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    options = converter.Options(outliers="top-k=4", calibration_tokens=32, on_nonfinite="keep")
    plan = converter.make_plan(converter.resolve(source), tmp_path / "out", options)
    converter.execute(plan, progress=lambda name, nbytes: told.append((name, nbytes)))
    stages = [name for name, nbytes in told if not nbytes]
    assert stages[:7] == [f"looking for NaN in {name}" for name in plan.selection.layers]
    assert stages[7:] == ["outlier columns", "everything to the disk"]
    assert sum(nbytes for _, nbytes in told) == plan.bytes_before


def test_what_is_too_large_to_be_copied_is_named(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "source"
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "vocabulary.txt").write_bytes(bytes(3 << 20))
    (path / "model.gguf").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(small_files, "MAX_SMALL_FILE_BYTES", 1 << 20)
    report = converter.convert(path, tmp_path / "out", outliers="none")
    assert report.notices == ["vocabulary.txt (3.1 MB) stays behind: only files of up to 64 MiB are copied"]
    assert not (tmp_path / "out" / "vocabulary.txt").exists()


@pytest.mark.skipif(os.name != "posix", reason="names are bytes there only")
def test_a_name_that_is_not_utf_8_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe9le"))
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("the file system takes no such name")
    for file in source.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    with pytest.raises(formats.SourceError, match="has a name that cannot be printed; rename the directory"):
        converter.make_plan(converter.resolve(odd), tmp_path / "out", converter.Options())
