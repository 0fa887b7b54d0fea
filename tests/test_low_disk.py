"""`--low-disk`: shards come from the Hub as they are needed and go when they are converted."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import constants, file_download
from safetensors.torch import load, save

from llmint8 import converter
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.hub import low_disk, remote
from llmint8.formats import CorruptFileError, OutputError, SourceError, open_source
from llmint8.formats.disk.names import WORKING_NAME
from llmint8.kernels.reference import quantize_weight

REPO = "alice/tiny"
WEIGHTS = r"safetensors$"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in four shards: each layer lies in two of them."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path, max_shard_size="76KB")
    assert len(shards(path)) == 4
    return path


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second and more before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


@pytest.fixture
def most_on_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many shards were in the folder at each download, the one downloaded included."""
    counts: list[int] = []
    download = low_disk.hf_hub_download

    def watched(*arguments: Any, local_dir: Path, **options: Any) -> str:
        counts.append(len(shards(local_dir)) + 1)
        path: str = download(*arguments, local_dir=local_dir, **options)
        assert len(shards(local_dir)) == counts[-1]
        return path

    monkeypatch.setattr(low_disk, "hf_hub_download", watched)
    yield counts
    assert max(counts) <= 2


def shards(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(convert_command, list(map(str, arguments)))


def downloads(hub: Any) -> list[str]:
    """The names of the shards whose downloads were begun; a header is asked for without a HEAD."""
    return [request.rpartition("/")[2] for request in hub.asked(f"^HEAD .*-of-.*{WEIGHTS}")]


@pytest.mark.parametrize("outliers", ["none", "top-k=4"])
def test_the_result_is_that_of_an_ordinary_conversion_and_two_shards_are_there_at_most(
    outliers: str, hub: Any, source: Path, tmp_path: Path, most_on_disk: list[int]
) -> None:
    hub.add(REPO, files_of(source))
    converter.convert(REPO, tmp_path / "out", outliers=outliers, low_disk=True)
    assert sorted(downloads(hub)) == shards(source)  # each once
    assert len(most_on_disk) == 4
    cached = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*")}
    assert "config.json" in cached
    assert not cached & set(shards(source))
    converter.convert(REPO, tmp_path / "ordinary", outliers=outliers)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "ordinary")


def test_weights_in_8_bits_are_released_with_their_scales(
    hub: Any, source: Path, tmp_path: Path, most_on_disk: list[int]
) -> None:
    files, weight_map = files_of(source), {}
    for shard in shards(source):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load(files[shard]).items():
            tensors[name] = tensor
            if "_proj" in name and name.endswith(".weight"):
                tensors[name], tensors[name.replace("weight", "SCB")] = quantize_weight(tensor)
        files[shard] = save(tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    hub.add(REPO, files)
    converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True)
    assert not (tmp_path / "out" / WORKING_NAME).exists()
    converter.convert(REPO, tmp_path / "ordinary", outliers="none")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "ordinary")


def test_of_a_tensor_in_two_shards_the_one_of_the_index_is_read_and_both_files_go(
    hub: Any, source: Path, tmp_path: Path
) -> None:
    files = files_of(source)
    first, second = shards(source)[:2]
    tensors = load(files[second]) | {name: tensor + 1 for name, tensor in load(files[first]).items()}
    hub.add(REPO, files | {second: save(tensors, {"format": "pt"})})
    report = converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True)
    assert any(f"in {first} and {second}, perhaps with other values" in notice for notice in report.notices)
    assert not (tmp_path / "out" / "source.partial").exists()
    converter.convert(source, tmp_path / "ordinary", outliers="none")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "ordinary" / "model.safetensors"
    ).read_bytes()


def test_one_file_without_an_index(hub: Any, source: Path, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "whole")
    hub.add(REPO, files_of(tmp_path / "whole"))
    converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True)
    converter.convert(tmp_path / "whole", tmp_path / "ordinary", outliers="none")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "ordinary")]
    assert weights[0] == weights[1]


def test_the_plan_needs_no_weights_and_writes_nothing(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))
    result = run(REPO, tmp_path / "out", "--low-disk", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert downloads(hub) == []
    plan, ordinary = (
        converter.make_plan(converter.resolve(REPO, kind="source", low_disk=low), tmp_path / "out")
        for low in (True, False)
    )
    largest = sorted(file.stat().st_size for file in source.glob("*.safetensors"))[-2:]
    assert plan.disk_needed == ordinary.disk_needed + sum(largest)


def test_a_header_larger_than_the_first_request_takes_a_second(
    hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add(REPO, files_of(source))
    monkeypatch.setattr(remote, "_FIRST_REQUEST", 100)
    found = converter.make_plan(converter.resolve(REPO, low_disk=True), tmp_path / "out").source.tensors
    assert found == converter.make_plan(converter.Resolved(source), tmp_path / "out").source.tensors
    for name in shards(source):
        header = 8 + int.from_bytes(repo.files()[name][:8], "little")
        request = f"GET /{REPO}/resolve/{repo.refs['main'][-1]}/{name}"
        assert hub.sent[request] == header
        assert len(hub.asked(re.escape(request))) == 2


def test_a_tensor_that_is_needed_again_is_fetched_again(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))
    plan = converter.make_plan(converter.resolve(REPO, low_disk=True), tmp_path / "out")
    expected = converter.make_plan(converter.Resolved(source), tmp_path / "out").source
    for name in 2 * list(expected.tensors):
        assert torch.equal(plan.source.read(name), expected.read(name))
    assert len(downloads(hub)) == 8
    for name in expected.tensors:
        plan.source.release(name)
    assert not (tmp_path / "out" / "source.partial").exists()


def test_a_second_run_of_the_pass_fetches_no_shard_tensor_by_tensor(
    hub: Any, source: Path, tmp_path: Path, most_on_disk: list[int]
) -> None:
    """By then nearly all tensors have been released."""
    hub.add(REPO, files_of(source))
    plan = converter.make_plan(converter.resolve(REPO, low_disk=True), tmp_path / "out")
    names = sorted(plan.source.tensors, key=lambda name: plan.source.tensors[name].file)
    for name in names:
        plan.source.read(name)
        if name != names[-1]:
            plan.source.release(name)
    for name in names:
        plan.source.read(name)
    assert sorted(downloads(hub)) == sorted(2 * shards(source))
    plan.source.release(names[-1])
    assert not (tmp_path / "out" / "source.partial").exists()
    # What went with the folder is not taken for present.
    plan.source.read(next(name for name in names if plan.source.tensors[name].file == shards(source)[2]))
    assert len(downloads(hub)) == 9


def test_threads_share_the_shards(hub: Any, source: Path, tmp_path: Path, most_on_disk: list[int]) -> None:
    hub.add(REPO, files_of(source))
    plan = converter.make_plan(converter.resolve(REPO, low_disk=True), tmp_path / "out")
    expected = converter.make_plan(converter.Resolved(source), tmp_path / "out").source
    names = list(expected.tensors)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(plan.source.read, names[::2] + names[1::2]))
    assert all(torch.equal(tensor, expected.read(n)) for tensor, n in zip(found, names[::2] + names[1::2], strict=True))


def test_a_download_that_was_cut_goes_on_where_it_stopped(
    hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    repo = hub.add(REPO, files_of(source))
    plan = converter.make_plan(converter.resolve(REPO, low_disk=True), tmp_path / "out")
    name, size = shards(source)[3], len(repo.files()[shards(source)[3]])
    hub.cut, hub.sent = re.compile(name), {}
    plan.source.read(next(tensor for tensor, info in plan.source.tensors.items() if info.file == name))
    assert hub.cut is None
    arrived = size // 2 // 1024 * 1024
    assert hub.sent[f"GET /{REPO}/resolve/{repo.refs['main'][-1]}/{name}"] == size + size - arrived


def test_a_killed_conversion_leaves_shards_that_are_not_fetched_again(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))
    code = f"from llmint8 import converter; converter.convert({REPO!r}, {str(tmp_path / 'out')!r}, low_disk=True)"
    held = shards(source)[2]
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    # Its header may come, the file itself hangs.
    hub.after = lambda request: hub.stall(f"GET .*{held}") if re.search(f"HEAD .*{held}", request) else None
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | settings)
    try:
        assert hub.stalled.wait(60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder = tmp_path / "out" / "source.partial"
    left = shards(folder)
    assert left
    assert held not in left
    assert list(folder.rglob("*.incomplete"))

    hub.stall("(?!)")
    hub.after, hub.requests = (lambda request: None), []
    again = low_disk.open_remote(converter.resolve(REPO, low_disk=True), folder)
    for name, info in again.tensors.items():
        if info.file in [*left, held]:
            again.read(name)
    assert downloads(hub) == [held]
    assert not list(folder.rglob("*.incomplete"))


def test_what_is_left_of_another_file_is_fetched_anew(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))

    def interrupt(name: str, nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True, jobs=1, progress=interrupt)
    folder = tmp_path / "out" / "source.partial"
    for name in shards(source)[:2]:
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / shards(source)[1]).write_bytes(b"of something else")
    before = len(downloads(hub))
    converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True)
    converter.convert(source, tmp_path / "ordinary", outliers="none")
    assert sorted(downloads(hub)[before:]) == shards(source)[1:]


def test_with_a_search_for_values_that_are_not_finite(hub: Any, source: Path, tmp_path: Path) -> None:
    """It reads the weights before anything is converted; what is interrupted then goes on, or starts over."""
    hub.add(REPO, files_of(source))
    result = run(REPO, tmp_path / "out", "--low-disk", "--outliers", "none", "--on-nonfinite", "keep")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "source.partial").exists()


@pytest.mark.parametrize("options", [{"outliers": "none"}, {"calibration_tokens": 2}], ids=str)
def test_going_on_fetches_only_shards_with_something_left(
    hub: Any, source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Killed in the last shard; with two tokens the outputs of all layers are kept, and their weights not needed."""
    hub.add(REPO, files_of(source))
    last = set(open_source(source).files[-1].tensors)

    def interrupt(name: str, nbytes: int) -> None:
        if name in last and "layers" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converter.convert(REPO, tmp_path / "out", low_disk=True, progress=interrupt, **options)
    before = len(downloads(hub))
    converter.convert(REPO, tmp_path / "out", low_disk=True, **options)
    assert len(set(downloads(hub)[before:])) < len(shards(source)) / 2
    converter.convert(source, tmp_path / "ordinary", **options)
    for file in (tmp_path / "ordinary").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "out" / "source.partial").exists()


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not know this token"), (403, "no access"), (404, "no such file"), (500, "500")]
)
@pytest.mark.parametrize("when", ["header", "download"])
def test_what_the_hub_refuses_is_one_line(
    when: str, status: int, words: str, hub: Any, source: Path, tmp_path: Path
) -> None:
    hub.add(REPO, files_of(source))
    name = shards(source)[2]
    codes = {404: "EntryNotFound"}
    if when == "header":
        hub.fail(f"GET .*{name}", status, 20, codes.get(status, ""))
    else:
        hub.fail(f"HEAD .*{name}", status, 20, codes.get(status, ""))
    result = run(REPO, tmp_path / "out", "--low-disk", "--outliers", "none")
    refused(result, f"{REPO}: {name}: ", words)
    if when == "header":
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(status: int, hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))
    for method in ("GET", "HEAD"):
        hub.fail(f"{method} .*{shards(source)[1]}", status)
    converter.convert(REPO, tmp_path / "out", outliers="none", low_disk=True)
    assert not hub.failures


def test_a_full_disk_is_one_line(hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, files_of(source))

    http_get = file_download.http_get

    def full(url: str, *arguments: Any, **options: Any) -> None:
        if url.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        http_get(url, *arguments, **options)

    monkeypatch.setattr(file_download, "http_get", full)
    result = run(REPO, tmp_path / "out", "--low-disk", "--outliers", "none")
    refused(result, f"{REPO}: {shards(source)[0]}: ", "No space left on device")


def test_a_disk_too_small_for_two_shards_is_said_before(
    hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files_of(source))
    origin = converter.resolve(REPO, low_disk=True)
    plan = converter.make_plan(origin, tmp_path / "out")
    monkeypatch.setattr(type(plan), "disk_free", plan.disk_needed - 1)
    with pytest.raises(OutputError, match="needs"):
        converter.execute(plan)
    assert downloads(hub) == []


def test_a_server_without_parts_is_refused(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(source))
    hub.gives_parts = False
    refused(run(REPO, tmp_path / "out", "--low-disk"), shards(source)[0], "no parts of files")


def test_a_file_that_is_not_what_its_header_announced_is_refused(hub: Any, source: Path, tmp_path: Path) -> None:
    repo = hub.add(REPO, files_of(source))
    origin = converter.resolve(REPO, low_disk=True)
    plan = converter.make_plan(origin, tmp_path / "out")
    name = shards(source)[0]
    repo.files()[name] = repo.files()[shards(source)[1]]
    with pytest.raises(SourceError, match=f"{name}: what was downloaded is not"):
        plan.source.read(next(tensor for tensor, info in plan.source.tensors.items() if info.file == name))


def test_headers_from_the_hub_are_checked_as_those_on_the_disk(hub: Any, source: Path, tmp_path: Path) -> None:
    files, name = files_of(source), shards(source)[0]
    length = int.from_bytes(files[name][:8], "little")
    header = json.loads(files[name][8 : 8 + length])
    next(entry for key, entry in header.items() if key != "__metadata__")["data_offsets"][1] += 2
    raw = json.dumps(header).encode()
    broken = {
        "empty": b"\x10",
        "long": (1 << 40).to_bytes(8, "little") + files[name][8:],
        "offsets": len(raw).to_bytes(8, "little") + raw + files[name][8 + length :],
        "short": files[name][:-2],
    }
    for number, (what, data) in enumerate(broken.items()):
        hub.add(f"{REPO}-{number}", files | {name: data})
        with pytest.raises(CorruptFileError, match=name):
            converter.make_plan(converter.resolve(f"{REPO}-{number}", low_disk=True), tmp_path / what)
        assert not (tmp_path / what).exists()


def test_where_there_is_nothing_to_fetch_it_is_refused(hub: Any, source: Path, tmp_path: Path) -> None:
    refused(run(source, tmp_path / "out", "--low-disk"), str(source), "is a local directory")
    files = {name: data for name, data in files_of(source).items() if "safetensors" not in name}
    hub.add(REPO, files | {"pytorch_model.bin": b"weights"})
    refused(run(REPO, tmp_path / "out", "--low-disk"), REPO, "no safetensors")
    assert not hub.asked(r"GET .*\.bin")
