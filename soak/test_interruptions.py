"""Conversions killed and starved for real: SIGKILL at random moments, a full file system, little address space.

Every trial is a process of its own, forked from this one, which has imported everything and run nothing.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, formats

KILLS = 70
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OPTIONS = {
    "calibrated": {"calibration_tokens": 64},
    "outputs-kept": {"calibration_tokens": 16},
    "data-free": {"outliers": "none"},
    "rotated": {"calibration_tokens": 64, "format": 2, "rotate": True},
}


def start(action: Callable[[], Any]) -> int:
    """Run an action in a child; it exits with 0, or with 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_source(path: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, **changes}))
    model.half().save_pretrained(path, max_shard_size="200KB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "source"
    assert finish(start(lambda: make_source(path))) == 0
    return path


def convert(source: Path, out: Path, **options: Any) -> Callable[[], Any]:
    return lambda: converter.convert(source, out, max_shard_size="100KB", **options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_killed_at_random(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each conversion is killed again and again until it gets to its end in the time it was given."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    started = time.monotonic()
    assert finish(start(convert(source, whole, **options))) == 0
    duration = time.monotonic() - started
    expected, chance = contents(whole), random.Random(0)
    kills = conversions = 0
    while kills < KILLS:
        child = start(convert(source, out, **options))
        time.sleep(chance.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        if finish(child) == -signal.SIGKILL:
            kills += 1
            if (out / "config.json").exists():
                assert not formats.check_values(formats.open_checkpoint(out))
        if out.exists() and not formats.is_unfinished(out) and any(out.iterdir()):
            conversions += 1
            assert contents(out) == expected
            shutil.rmtree(out)
    if out.exists():
        assert finish(start(convert(source, out, **options))) == 0
        assert contents(out) == expected
    print(f"{kills} kills, {conversions} conversions that came to their end all the same, 0 bytes lost")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_killed_at_every_tensor(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """One conversion, killed after every single tensor; shards begin and end at some of them."""
    assert finish(start(convert(source, tmp_path / "whole", **options))) == 0

    def kill(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) > len(kills):
            os.kill(os.getpid(), signal.SIGKILL)

    kills: list[int] = []
    seen: list[str] = []
    while (code := finish(start(convert(source, tmp_path / "out", progress=kill, **options)))) == -signal.SIGKILL:
        kills.append(code)
    assert code == 0
    # And when the outlier columns, and then all that is written, are about to go to the disk.
    assert len(kills) == len(formats.open_source(source).tensors) + 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    print(f"{len(kills)} kills, one after each tensor")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("no file system may be mounted here; tests/test_writer.py starves the writer by a limit instead")
    yield path
    subprocess.run(["umount", path], check=True)


def fill_up(source: Path, out: Path, filler: Path, number: int, options: dict[str, Any]) -> None:
    """Convert, and leave no room on the disk once a number of tensors is done; expect to be told."""
    seen: list[str] = []

    def progress(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) == number + 1:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(formats.OutputError, match="No space left on device"):
        convert(source, out, jobs=1, progress=progress, **options)()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_disk_fills_up_at_every_tensor(
    source: Path, tmp_path: Path, small_disk: Path, options: dict[str, Any]
) -> None:
    assert finish(start(convert(source, tmp_path / "whole", **options))) == 0
    out, filler = small_disk / "out", small_disk / "filler"
    tensors = len(formats.open_source(source).tensors)
    full = 0
    for number in range(tensors):
        code = finish(start(lambda number=number: fill_up(source, out, filler, number, options)))
        filler.unlink(missing_ok=True)
        # With the last tensors everything may have found its place before the disk was full.
        assert code == 0 or number > tensors // 2
        full += code == 0
        if code == 0:
            assert formats.is_unfinished(out)
            assert not (out / "config.json").exists()
            assert finish(start(convert(source, out, **options))) == 0
        assert contents(out) == contents(tmp_path / "whole")
        shutil.rmtree(out)
    print(f"{full} full disks, one after each tensor as long as something was left to write")


@pytest.mark.parametrize("options", [{"outliers": "none", "jobs": 1}, {"calibration_tokens": 64}], ids=str)
def test_little_address_space(tmp_path: Path, options: dict[str, Any]) -> None:
    """400 MiB of address space more than the process has when it starts are enough; threads take most of them."""
    import resource

    source = tmp_path / "source"
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 8}
    assert finish(start(lambda: make_source(source, **wide))) == 0
    size = sum(info.nbytes for info in formats.open_source(source).tensors.values())

    def limited() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (400 << 20), resource.RLIM_INFINITY))
        convert(source, tmp_path / "out", **options)()

    assert finish(start(limited)) == 0
    assert not formats.check_values(formats.open_checkpoint(tmp_path / "out"))
    print(f"{size / 1e6:.0f} MB converted in 400 MiB")
