"""Files that stay open: how often they are opened, how many are open, and what a conversion makes of that."""

import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from llmint8 import converter, formats
from llmint8.formats.containers import tensors
from llmint8.formats.disk.lending import OpenFiles
from llmint8.formats.disk.names import JOURNAL_NAME
from llmint8.formats.disk.reading import open_regular


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened by us, by its path."""
    found: Counter[str] = Counter()
    opened = os.open

    def counted(path: Path, *arguments: int, **named: int) -> int:
        found[os.fspath(path)] += 1
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", counted)
    return found


def test_a_file_is_opened_once_for_uses_one_after_the_other(tmp_path: Path, opens: Counter[str]) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    files = OpenFiles(open_regular)
    for _ in range(5):
        with files.lend(tmp_path / "x") as file:
            file.seek(1)
            assert file.read() == b"bc"
    assert opens[str(tmp_path / "x")] == 1


def test_two_users_at_a_time_have_a_place_in_the_file_each(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    files = OpenFiles(open_regular)
    with files.lend(tmp_path / "x") as one, files.lend(tmp_path / "x") as other:
        assert one.read(1) == b"a"
        assert other.read(2) == b"ab"
        assert one.read(1) == b"b"


def test_few_files_stay_open_and_none_when_their_owner_is_gone(tmp_path: Path) -> None:
    opened = []

    def open_file(path: Path) -> object:
        opened.append(open_regular(path))
        return opened[-1]

    files = OpenFiles(open_file)  # type: ignore[arg-type]
    for number in range(100):
        (tmp_path / str(number)).touch()
        with files.lend(tmp_path / str(number)):
            pass
    assert sum(not file.closed for file in opened) == 32
    assert not opened[-1].closed
    del files
    assert all(file.closed for file in opened)


def test_many_threads_share_few_files(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    files, wrong = OpenFiles(open_regular), []

    def use() -> None:
        for number in list(range(50)) * 4:
            with files.lend(tmp_path / str(number)) as file:
                file.seek(number % 10)
                if file.read() != bytes([number]) * (10 - number % 10):
                    wrong.append(number)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("model") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.mark.parametrize("outliers", ["none", "top-k=16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_conversion_opens_a_file_a_few_times_whatever_it_holds(
    source: Path, tmp_path: Path, opens: Counter[str], monkeypatch: pytest.MonkeyPatch, outliers: str, kind: str
) -> None:
    """Not for every outlier column, nor for every tensor, nor for every block of one."""
    if kind == "bin":
        original, source = formats.open_source(source), tmp_path / "source"
        source.mkdir()
        torch.save({name: original.read(name) for name in original.tensors}, source / "pytorch_model.bin")
        (source / "config.json").write_bytes((original.path / "config.json").read_bytes())
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 512)
    opens.clear()
    converter.convert(source, tmp_path / "out", outliers=outliers, jobs=1)
    assert opens[str(tmp_path / "out" / JOURNAL_NAME)] == 1
    # What is finished is opened by the tests' own reader.
    ours = [path for path in map(Path, opens) if path.parent == source or path.suffix == ".partial"]
    weights = {path.name: opens[str(path)] for path in ours if "model" in path.name}
    assert len(weights) >= 2
    # Once for the header, and once for each that uses it at the same time: the pass, and what reads ahead for it.
    assert max(weights.values()) <= 4, weights


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_more_shards_than_a_process_may_have_open(source: Path, tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)  # descriptors are numbered from the lowest that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 60, limits[1]))
    try:
        converter.convert(source, tmp_path / "out", outliers="none", max_shard_size="100B", jobs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(formats.open_checkpoint(tmp_path / "out").files) > 60
