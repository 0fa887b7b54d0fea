"""What can be known is said before the weights of a Hub repo are fetched: plans, refusals, and what is done already."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import constants

from llmint8 import converter, formats
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.hub import remote
from llmint8.converter.planning.plan import ConversionPlan
from llmint8.runtime.commands.main import main

SOURCE, REPO = "alice/tiny", "alice/tiny-int8"
LAYOUTS = ["one file", "shards", "torch", "legacy torch", "torch shards"]


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).half()


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny"
    model.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second and more before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


@pytest.fixture(autouse=True)
def small_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of tests are smaller than what is asked for at first; here a header takes two requests."""
    monkeypatch.setattr(remote, "_FIRST_REQUEST", 100)


def laid_out(model: Any, source: Path, layout: str, path: Path) -> Path:
    """A source in one of the layouts of the Hub."""
    if layout == "one file":
        return Path(shutil.copytree(source, path))
    if layout == "shards":
        model.save_pretrained(path, max_shard_size="50KB")
        return path
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors"))
    state, zipped = model.state_dict(), layout != "legacy torch"
    if layout != "torch shards":
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return path
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    parts = [dict(list(state.items())[start::2]) for start in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, path / name)
    index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def weights_in_cache() -> list[str]:
    found = Path(constants.HF_HUB_CACHE).rglob("*")
    return sorted(path.name for path in found if path.suffix in (".safetensors", ".bin"))


def run(*arguments: object, command: Any = convert_command) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def assert_refused(result: Any, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert re.search(words, line), line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_is_made_from_headers(layout: str, hub: Any, model: Any, source: Path, tmp_path: Path) -> None:
    path = laid_out(model, source, layout, tmp_path / "tiny")
    hub.add(SOURCE, files_of(path))
    result = run(SOURCE, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert weights_in_cache() == []
    # A legacy file has no directory, and its first 16 MiB are read.
    if layout != "legacy torch":
        weights = sum(len(data) for name, data in files_of(path).items() if name.endswith((".safetensors", ".bin")))
        assert sum(sent for request, sent in hub.sent.items() if "/resolve/" in request) < weights / 2
    plan = converter.make_plan(converter.resolve(SOURCE, kind="source", weights=False), tmp_path / "out")
    local = converter.make_plan(converter.resolve(path), tmp_path / "out")
    assert plan.source.tensors == local.source.tensors
    assert plan.bytes_to_fetch == sum(local.source.stored.values())
    lines, expected = result.stdout.splitlines(), run(path, tmp_path / "out", "--dry-run").stdout.splitlines()
    assert lines[1:5] == expected[1:5]
    assert lines[-1].startswith("Download     1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_planned_is_fetched_and_converted(
    layout: str, hub: Any, model: Any, source: Path, tmp_path: Path
) -> None:
    path = laid_out(model, source, layout, tmp_path / "tiny")
    hub.add(SOURCE, files_of(path))
    converter.convert(SOURCE, tmp_path / "out", outliers="top-k=4", calibration_tokens=8)
    converter.convert(path, tmp_path / "local", outliers="top-k=4", calibration_tokens=8)
    found, expected = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    assert all(found[name] == data for name, data in expected.items() if name.endswith(".safetensors"))
    assert weights_in_cache() == sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))


@pytest.mark.parametrize(("layout", "offline"), [(layout, number % 2 > 0) for number, layout in enumerate(LAYOUTS)])
def test_weights_in_the_cache_need_no_network(
    layout: str, offline: bool, hub: Any, model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(SOURCE, files_of(laid_out(model, source, layout, tmp_path / "tiny")))
    converter.resolve(SOURCE, kind="source")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.stop()
    converter.convert(SOURCE, tmp_path / "out", outliers="none")


def test_headers_that_cannot_be_had_are_one_line(
    hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(SOURCE, files_of(source))
    converter.resolve(SOURCE, kind="source", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(run(SOURCE, tmp_path / "out"), "not completely, in the cache; HF_HUB_OFFLINE is set")


def test_a_server_without_parts_of_files_is_told_apart(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    hub.gives_parts = False
    assert_refused(run(SOURCE, tmp_path / "out", "--outliers", "none"), "gives no parts of files.*`hf download`")
    converter.resolve(SOURCE, kind="source")  # which is what that does
    assert run(SOURCE, tmp_path / "out", "--outliers", "none").exit_code == 0


def test_weights_that_are_not_those_of_the_plan_are_refused(hub: Any, source: Path, tmp_path: Path) -> None:
    repo = hub.add(SOURCE, files_of(source))
    plan = converter.make_plan(converter.resolve(SOURCE, kind="source", weights=False), tmp_path / "out")
    converter.convert(source, tmp_path / "other", outliers="none")
    repo.files()["model.safetensors"] = (tmp_path / "other" / "model.safetensors").read_bytes()
    with pytest.raises(formats.SourceError, match="is not what its headers announced"):
        converter.execute(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip", "("], r"--skip '\(' is not a regular expression"),
        (["--only", "nothing"], "no linear layer is left"),
        (["--max-shard-size", "5XB"], "size '5XB', expected"),
        (["--outliers", "many"], "'many'"),
        (["--device", "nowhere"], "nowhere"),
        (["--calibration", "PICTURE"], "not UTF-8 text"),
        (["--push-to-hub", SOURCE], "is the source of this checkpoint"),
        (["--push-to-hub", "alice/16-bit"], "holds weights that are no int8 checkpoint"),
        (["--push-to-hub", "alice/public", "--private"], "exists and is public"),
        (["--push-to-hub", "alice/not a name"], "alice/not a name"),
        (["--push-to-hub", "bob/new"], r"no access \(403\)"),
        (["--push-to-hub", "bob/there"], r"no access \(403\)"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_before_weights_are_fetched(
    arguments: list[str], words: str, hub: Any, source: Path, tmp_path: Path
) -> None:
    hub.add(SOURCE, files_of(source))
    hub.add("alice/16-bit", files_of(source))
    hub.add("alice/public", {})
    hub.add("bob/there", {})
    (tmp_path / "PICTURE").write_bytes(b"\xff\xd8")
    arguments = [str(tmp_path / "PICTURE") if argument == "PICTURE" else argument for argument in arguments]
    assert_refused(run(SOURCE, tmp_path / "out", *arguments), words)
    assert weights_in_cache() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reason", ["read-only token", "licence", "licence of the base", "full OUT"])
def test_what_is_in_the_way_is_said_before_weights_are_fetched(
    reason: str, hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = {"licence": "license: cc-by-nd-4.0", "licence of the base": "base_model: facebook/opt-125m"}
    card = f"---\n{cards.get(reason, 'license: mit')}\n---\n".encode()
    hub.add(SOURCE, files_of(source) | {"README.md": card})
    if reason == "read-only token":
        monkeypatch.setenv("HF_TOKEN", "hf_read")
    if reason == "full OUT":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
    words = {
        "read-only token": "may only read",
        "licence": "allows no adaptations",
        "licence of the base": "OPT-175B",
        "full OUT": "is not an empty directory",
    }
    assert_refused(run(SOURCE, tmp_path / "out", "--push-to-hub", REPO), words[reason])
    assert weights_in_cache() == []
    assert REPO not in hub.repos


@pytest.mark.parametrize("where", ["out", "cache"])
def test_too_little_room_for_what_has_to_be_fetched_is_said_before(
    where: str, hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(SOURCE, files_of(source))
    options = converter.Options(outliers="none")
    plan = converter.make_plan(converter.resolve(SOURCE, kind="source", weights=False), tmp_path / "out", options)
    local = converter.make_plan(converter.resolve(source), tmp_path / "out", options)
    # Both are on one disk here.
    assert plan.disk_needed == local.disk_needed + plan.bytes_to_fetch
    free, room = ("disk_free", plan.disk_needed) if where == "out" else ("cache_free", plan.bytes_to_fetch)
    monkeypatch.setattr(ConversionPlan, free, room - 1)
    words = "B are free there" if where == "out" else "HF_HUB_CACHE names another place"
    assert_refused(run(SOURCE, tmp_path / "out", "--outliers", "none"), words)
    assert "does not fit" in run(SOURCE, tmp_path / "out", "--outliers", "none", "--dry-run").output
    assert weights_in_cache() == []
    monkeypatch.setattr(ConversionPlan, free, room)
    assert run(SOURCE, tmp_path / "out", "--outliers", "none").exit_code == 0


def test_the_repo_is_there_before_the_work_and_not_for_a_plan(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    assert run(SOURCE, tmp_path / "out", "--push-to-hub", REPO, "--dry-run").exit_code == 0
    assert REPO not in hub.repos
    there = []
    hub.after = lambda request: there.append(REPO in hub.repos) if "HEAD" in request and "safetensors" in request else 0
    assert run(SOURCE, tmp_path / "out", "--push-to-hub", REPO).exit_code == 0
    assert there[-1]


@pytest.mark.parametrize("content", [b"weights", b"PK\x03\x04" + bytes(9999), b"\x80\x02", b"\0" * 9999], ids=len)
def test_headers_that_are_broken_are_one_line(content: bytes, hub: Any, source: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        files = {file: data for file, data in files_of(source).items() if not file.endswith(".safetensors")}
        hub.add(SOURCE, files | {name: content})
        assert_refused(run(SOURCE, tmp_path / "out"), f"{name}: ")
    assert weights_in_cache() == []


@pytest.mark.parametrize("layout", ["one file", "torch"])
def test_a_hub_that_fails_in_the_midst_of_a_header_is_not_taken_for_a_broken_file(
    layout: str, hub: Any, model: Any, source: Path, tmp_path: Path
) -> None:
    path = laid_out(model, source, layout, tmp_path / "tiny")
    name = next(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
    hub.add(SOURCE, files_of(path))
    hub.after = lambda request: hub.fail(f"GET .*{name}", 403) if re.search(f"GET .*{name}", request) else None
    assert_refused(run(SOURCE, tmp_path / "out"), rf"{SOURCE}: {name}: the Hub gives no access \(403\)")
    hub.failures, hub.after = [], lambda request: None
    hub.fail(f"GET .*{name}", 503)
    assert run(SOURCE, tmp_path / "out", "--dry-run").exit_code == 0


def test_files_of_a_licence_are_fetched_however_they_are_spelled(hub: Any, source: Path, tmp_path: Path) -> None:
    names = ["LICENCE", "license-model", "Copying", "NOTICE", "Notice.rst", "Use_Policy"]
    hub.add(SOURCE, files_of(source) | dict.fromkeys(names, b"as you like"))
    converter.convert(SOURCE, tmp_path / "out", outliers="none")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= set(names)


# What is finished


def test_the_same_command_says_that_it_is_done(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    arguments = (SOURCE, tmp_path / "out", "--outliers", "none")
    assert run(*arguments).exit_code == 0
    shutil.rmtree(constants.HF_HUB_CACHE)
    before = files_of(tmp_path / "out")
    for more in ([], ["--jobs", "1"], ["--low-disk"], ["--dry-run"]):
        result = run(*arguments, *more)
        assert result.exit_code == 0, result.output
        assert (
            f"{tmp_path / 'out'} is finished: made before, from the same source with the same options" in result.stdout
        )
    assert not run(*arguments, "--quiet").output
    assert files_of(tmp_path / "out") == before
    assert weights_in_cache() == []
    hub.repos[SOURCE].commit(files_of(source))
    assert_refused(run(*arguments), "a finished conversion of something else: the source's commit was .* and is")


def test_a_push_that_had_failed_is_made_up_for(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    arguments = (SOURCE, tmp_path / "out", "--push-to-hub", REPO, "--outliers", "none")
    hub.fail("POST .*/commit/", 500, times=3)
    assert_refused(run(*arguments), r"out of order \(500\)")
    shutil.rmtree(constants.HF_HUB_CACHE)
    before, hub.requests = files_of(tmp_path / "out"), []
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "is finished: made before" in result.stdout
    assert f"Published: {hub.url}/{REPO}" in result.stdout
    assert weights_in_cache() == []
    assert files_of(tmp_path / "out") == before
    assert hub.repos[REPO].files().items() >= before.items()


# A repo that holds something else


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    converter.convert(source, tmp_path / "out", outliers="none", max_shard_size="60KB")
    return tmp_path / "out"


def push(out: Path, *options: str) -> Any:
    return run("push", out, REPO, *options, command=main)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("whole", [True, False])
def test_16_bit_weights_on_the_hub_are_replaced_only_when_one_says_so(
    layout: str, whole: bool, hub: Any, out: Path, model: Any, source: Path, tmp_path: Path
) -> None:
    there = files_of(laid_out(model, source, layout, tmp_path / "tiny"))
    repo = hub.add(REPO, there if whole else {name: data for name, data in there.items() if name != "config.json"})
    before = dict(repo.files())
    assert_refused(push(out), "holds weights that are no int8 checkpoint, .*model.* among them.*--replace-weights")
    assert repo.files() == before
    assert not hub.asked("PUT |/commit/")
    assert push(out, "--replace-weights").exit_code == 0
    assert repo.files().items() >= files_of(out).items()


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq", "bits": 4}, "broken", None])
def test_other_weights_are_not_taken_for_int8(quantization: Any, hub: Any, out: Path) -> None:
    config = json.dumps({"quantization_config": quantization}).encode()
    hub.add(REPO, {"config.json": config, "model.safetensors": b"of another kind"})
    assert_refused(push(out), "holds weights that are no int8 checkpoint")


def test_what_of_an_upload_has_arrived_is_no_obstacle(hub: Any, out: Path) -> None:
    names = sorted(path.name for path in out.glob("*.safetensors"))
    hub.add(REPO, {name: (out / name).read_bytes() for name in names[:2]})
    assert push(out).exit_code == 0


def test_a_branch_with_weights_of_its_own_is_not_replaced(hub: Any, out: Path, source: Path) -> None:
    repo = hub.add(REPO, files_of(source))
    repo.refs["same"] = list(repo.refs["main"])
    repo.commit(files_of(source) | {"more.txt": b""}, "other")
    assert_refused(push(out, "--revision", "other"), "holds weights that are no int8 checkpoint")
    for options in (["--revision", "same"], ["--revision", "new"], ["--create-pr"], ["--revision", "refs/pr/1"]):
        assert push(out, *options).exit_code == 0
    assert push(out, "--revision", "same").exit_code == 0
