"""To the Hub and back, with the real client, over HTTP to a Hub of our own (`fake_hub.py`)."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants

from llmint8 import converter, runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.formats import CheckpointError, LLMInt8Error
from llmint8.runtime.commands.main import main

ROOT = Path(__file__).parent.parent
SOURCE, REPO = "alice/tiny", "alice/tiny-int8"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
TOKENS = torch.arange(16)[None]
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- tiny\n---\n\n# Tiny\n\nThe original's own words.\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    (path / "README.md").write_text(CARD)
    (path / "LICENSE").write_text("Do as you like.\n")
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """In three shards, of known names."""
    out = source.with_name("out")
    converter.convert(source, out, outliers="none", max_shard_size="30KB")
    assert sorted(path.name for path in out.glob("*.safetensors")) == SHARDS
    return out


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second and more before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(*arguments: object, command: Any = main) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def push(out: Path, *options: str, repo: str = REPO) -> str:
    result = run("push", out, repo, *options)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def assert_refused(result: Any, *words: str) -> None:
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in result.stderr


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


# From the Hub


def test_load_gives_the_model_of_the_local_directory_and_fetches_only_what_it_reads(hub: Any, converted: Path) -> None:
    others = ["onnx/model.onnx", "consolidated.safetensors", "pytorch_model.bin", "original/params.json", "extra.gguf"]
    hub.add(REPO, files_of(converted) | dict.fromkeys(others, b"large"))
    model = runtime.load(REPO)
    assert torch.equal(logits(model), logits(runtime.load(converted)))
    fetched = {request.rsplit("/", 1)[1] for request in hub.asked("^GET .*/resolve/")}
    assert {*SHARDS, "config.json", "model.safetensors.index.json"} <= fetched
    assert not fetched & {name.rpartition("/")[2] for name in others}


def test_a_source_is_converted_without_its_other_formats(hub: Any, source: Path, tmp_path: Path) -> None:
    repo = hub.add(SOURCE, files_of(source) | dict.fromkeys(["pytorch_model.bin", "fp32/model.safetensors"], b"large"))
    converter.convert(SOURCE, tmp_path / "out", outliers="none")
    assert not hub.asked("pytorch_model.bin|fp32")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["llmint8"]["source"] == {"name": SOURCE, "repo": SOURCE, "commit": repo.refs["main"][-1]}
    assert f"commit [`{repo.refs['main'][-1]}`]" in (tmp_path / "out" / "README.md").read_text()


def test_pytorch_weights_are_fetched_where_there_are_no_others(hub: Any, source: Path, tmp_path: Path) -> None:
    files = files_of(source)
    del files["model.safetensors"]
    torch.save(transformers.LlamaForCausalLM.from_pretrained(source).state_dict(), tmp_path / "weights")
    hub.add(SOURCE, files | {"pytorch_model.bin": (tmp_path / "weights").read_bytes()})
    assert converter.convert(SOURCE, tmp_path / "out", outliers="none").layers == 7


def test_all_is_of_one_commit_though_the_branch_moves(hub: Any, converted: Path) -> None:
    repo = hub.add(REPO, files_of(converted))
    first = repo.refs["main"][-1]

    def move(request: str) -> None:
        if re.search(r"GET .*/config\.json", request):
            repo.commit({"config.json": b"{}", **dict.fromkeys(SHARDS, b"of another commit")})

    hub.after = move
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(converted)))
    assert len(repo.refs["main"]) == 2
    assert all(f"/{first}/" in request for request in hub.asked("GET .*safetensors"))
    assert torch.equal(logits(runtime.load(REPO, revision=first)), logits(runtime.load(converted)))


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub: Any, converted: Path) -> None:
    hub.add(REPO, files_of(converted))
    hub.cut = re.compile(SHARDS[1])
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(converted)))
    assert len(hub.asked(f"GET .*{SHARDS[1]}")) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(status: int, hub: Any, converted: Path) -> None:
    hub.add(REPO, files_of(converted))
    for request in ("HEAD .*config.json", "GET .*/tree/", f"GET .*{SHARDS[0]}"):
        hub.fail(request, status)
    runtime.load(REPO)
    assert not hub.failures


@pytest.mark.parametrize("gone", ["offline", "network"])
def test_what_is_in_the_cache_needs_no_network(
    gone: str, hub: Any, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files_of(converted))
    runtime.load(REPO)
    if gone == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.stop()
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(converted)))


def test_half_of_it_in_the_cache_is_not_enough(hub: Any, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, files_of(converted))
    runtime.load(REPO)
    next(Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/*/{SHARDS[1]}")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LLMInt8Error, match="not completely, in the cache; HF_HUB_OFFLINE"):
        runtime.load(REPO)


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("alice/nothing", "hf_write", "no such repo on the Hub, or it is private"),
        ("alice/nothing", None, "set HF_TOKEN or run `hf auth login`"),
        ("alice/private", "hf_stranger", "this token may not read it"),
        ("alice/private", None, "set HF_TOKEN"),
        ("alice/gated", "hf_write", "gated: ask for access"),
        ("alice/gated", None, "gated: ask for access"),
        (REPO, "hf_wrong", r"does not know this token \(401\)"),
        ("alice/empty", "hf_write", "has no config.json"),
        (SOURCE, "hf_write", f"E02 .*not an int8 checkpoint; make one with: llmint8-convert {SOURCE} OUT"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    repo: str, token: str | None, words: str, hub: Any, converted: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files_of(converted))
    hub.add(SOURCE, files_of(source))
    hub.add("alice/private", files_of(converted), private=True)
    hub.add("alice/gated", files_of(converted), gated=True)
    hub.add("alice/empty", {"README.md": b""})
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LLMInt8Error, match=words) as caught:
        runtime.load(repo)
    assert "\n" not in str(caught.value)
    assert not hub.asked("GET .*safetensors$")


def test_a_missing_revision_is_named(hub: Any, converted: Path) -> None:
    hub.add(REPO, files_of(converted))
    with pytest.raises(LLMInt8Error, match="has no revision 'v9'"):
        runtime.load(REPO, revision="v9")


def test_a_token_that_is_given_is_the_one_that_is_shown(
    hub: Any, source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every request: for the small files, the headers and parts of weights, and whole ones."""
    hub.add(REPO, files_of(converted), private=True)
    hub.add(SOURCE, files_of(source), private=True)
    with pytest.raises(LLMInt8Error, match="private: set HF_TOKEN"):  # which is set
        runtime.load(REPO, token=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LLMInt8Error, match="private: this token may not read it"):
        runtime.load(REPO, token="hf_stranger")
    with pytest.raises(LLMInt8Error, match=r"does not know this token \(401\)"):
        runtime.load(REPO, token="hf_wrong")
    assert torch.equal(logits(runtime.load(REPO, token="hf_read")), logits(runtime.load(converted)))
    for low_disk in (True, False):  # of the second the weights are fetched after the plan
        out = tmp_path / f"low-disk-{low_disk}"
        converter.convert(SOURCE, out, outliers="none", low_disk=low_disk, token="hf_read")
        assert not any("hf_read" in path.read_text() for path in out.glob("*.json"))
        assert torch.equal(logits(runtime.load(out)), logits(runtime.load(converted)))


def test_without_a_network_that_is_said(hub: Any) -> None:
    hub.stop()
    assert_refused(run("inspect", REPO), f"{REPO}: no such directory here", "no network to http://127.0.0.1", "cache")


def test_an_int8_repo_is_no_source(hub: Any, converted: Path, tmp_path: Path) -> None:
    hub.add(REPO, files_of(converted))
    result = run(REPO, tmp_path / "out", command=convert_command)
    assert_refused(result, "already quantized")
    assert not hub.asked("GET .*safetensors$")


def test_an_adapter_on_the_hub_is_called_what_it_is(hub: Any, tmp_path: Path) -> None:
    hub.add(
        REPO, {"adapter_config.json": b'{"base_model_name_or_path": "alice/base"}', "adapter_model.safetensors": b"x"}
    )
    result = run(REPO, tmp_path / "out", command=convert_command)
    assert_refused(result, "adapter_config.json: an adapter and no model", "'alice/base'")
    assert not hub.asked("GET .*safetensors$")


def test_what_is_left_of_a_quantization_does_not_keep_a_repo_from_being_converted(
    hub: Any, source: Path, tmp_path: Path
) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    hub.add(SOURCE, files_of(source) | {"config.json": json.dumps(config).encode()})
    report = converter.convert(SOURCE, tmp_path / "out", outliers="none")
    assert any("quantization_config (bitsandbytes) in config.json is left out" in notice for notice in report.notices)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["load_in_8bit"]
    assert not stored["load_in_4bit"]
    runtime.load(tmp_path / "out")


def test_the_parts_of_a_sentence_encoder_come_along_and_other_folders_do_not(
    hub: Any, source: Path, tmp_path: Path
) -> None:
    parts = {"modules.json": b'[{"path": ""}, {"path": "1_Pooling"}]', "1_Pooling/config.json": b'{"pooling": 1}'}
    hub.add(SOURCE, files_of(source) | parts | {"1_Pooling/model.onnx": b"x", "onnx/config.json": b"{}"})
    converter.convert(SOURCE, tmp_path / "out", outliers="none")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b'{"pooling": 1}'
    assert not hub.asked("onnx")
    push(tmp_path / "out")
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(tmp_path / "out")))
    assert hub.asked("GET .*tiny-int8/.*1_Pooling/config.json")


# To the Hub


def test_push_sends_weights_before_what_makes_the_repo_whole(hub: Any, out: Path) -> None:
    said = push(out, "--commit-message", "First")
    repo = hub.repos[REPO]
    assert not repo.private
    history = [(repo.titles[oid], set(repo.commits[oid])) for oid in repo.refs["main"][1:]]
    assert [title for title, _ in history] == ["First: weights, part 1", "First"]
    assert history[0][1] == {".gitattributes", *SHARDS}
    assert repo.files().items() >= files_of(out).items()
    first_put, last_put = hub.requests.index(hub.asked("PUT ")[0]), hub.requests.index(hub.asked("PUT ")[-1])
    commits = [number for number, request in enumerate(hub.requests) if "/commit/" in request]
    assert first_put < last_put < commits[0]
    assert re.search(rf"^{len(files_of(out))} files, \d+\.\d kB, to {REPO}$", said, re.MULTILINE)
    assert f"Published: {hub.url}/{REPO}\n" in said
    assert f"  from llmint8 import runtime\n  model = runtime.load('{REPO}')\n" in said


def test_the_second_push_sends_nothing(hub: Any, out: Path) -> None:
    push(out)
    before, hub.requests = hub.repos[REPO].refs["main"][-1], []
    (out / "tokenizer.json.new.partial").write_text("what a run that was killed has left")
    assert "Nothing has changed" in push(out)
    assert not hub.asked("PUT |/commit/")
    assert hub.repos[REPO].refs["main"][-1] == before


def test_a_push_that_was_killed_is_continued(hub: Any, out: Path) -> None:
    code = f"from llmint8.runtime.commands.main import main; main(['push', {str(out)!r}, {REPO!r}])"
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONUNBUFFERED": "1"}
    # One file of weights arrives; the next two hang, and then the process dies.
    hub.stall(f"PUT (?!/lfs/{digest(out / SHARDS[0])})")
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | settings, cwd=ROOT.parent)
    try:
        assert hub.stalled.wait(40)
        for _ in range(200):
            if hub.blobs:
                break
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert set(hub.blobs) == {digest(out / SHARDS[0])}
    assert "config.json" not in hub.repos[REPO].files()

    hub.stall("(?!)")
    hub.requests = []
    push(out)
    assert sorted(hub.asked("PUT ")) == sorted(f"PUT /lfs/{digest(out / name)}" for name in SHARDS[1:])
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(out)))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_upload_without_its_last_commit_is_not_whole_and_goes_on(hub: Any, out: Path) -> None:
    hub.fail(r"POST .*/preupload/", 403, times=1)
    assert_refused(run("push", out, REPO), "no access (403)")
    for _ in range(3):
        hub.fail("POST .*/commit/", 500)
    assert_refused(run("push", out, REPO), "out of order (500)", "start again to continue")
    with pytest.raises(LLMInt8Error, match=r"no config\.json"):
        runtime.load(REPO)
    hub.requests = []
    push(out)
    assert not hub.asked("PUT ")
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(out)))


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_hub_gets_the_upload_a_little_later(status: int, hub: Any, out: Path) -> None:
    requests = ["GET /api/whoami", "POST .*/create", "POST .*/preupload/", "POST .*/batch", "PUT ", "POST .*/commit/"]
    for request in [*requests, "GET /api/models/"]:
        hub.fail(request, status)
    push(out)
    assert not hub.failures
    assert len(hub.repos[REPO].refs["main"]) == 3
    assert hub.repos[REPO].files().items() >= files_of(out).items()


def test_a_pull_request_gets_all_commits_and_main_none(hub: Any, out: Path) -> None:
    repo = hub.add(REPO, {"README.md": b"A repo."})
    said = push(out, "--create-pr")
    assert f"Published: {hub.url}/{REPO}/discussions/1\n" in said
    assert f"runtime.load('{REPO}', revision='refs/pr/1')" in said
    assert len(repo.refs["main"]) == 1
    assert len(repo.refs["refs/pr/1"]) == 2
    assert repo.files("refs/pr/1").items() >= files_of(out).items()
    assert torch.equal(logits(runtime.load(REPO, revision="refs/pr/1")), logits(runtime.load(out)))
    assert "Nothing has changed" in push(out, "--revision", "refs/pr/1")


def test_a_stranger_may_open_a_pull_request(hub: Any, out: Path) -> None:
    hub.add(REPO, {"README.md": b"A repo."})
    push(out, "--create-pr", "--token", "hf_stranger")
    assert "refs/pr/1" in hub.repos[REPO].refs


def test_a_large_checkpoint_goes_in_several_commits(hub: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmint8.converter.hub.push._COMMIT_BYTES", 50_000)
    push(out)
    repo = hub.repos[REPO]
    weights = [sorted(set(repo.commits[oid]) & set(SHARDS)) for oid in repo.refs["main"][1:]]
    assert weights == [SHARDS[:2], SHARDS, SHARDS]
    assert "config.json" not in repo.commits[repo.refs["main"][2]]


def test_a_checkpoint_of_bitsandbytes_can_be_published_too(hub: Any, out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["llmint8"]
    (out / "config.json").write_text(json.dumps(config))
    for name in ("llmint8_manifest.json", "README.md"):
        (out / name).unlink()
    push(out)
    assert "made by bitsandbytes" in hub.repos[REPO].files()["README.md"].decode()
    runtime.load(REPO, outliers="none")


def test_a_card_that_the_hub_rejects_is_said(hub: Any, out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: 7"))
    assert_refused(run("push", out, REPO), "README.md")


def test_private_is_private(hub: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(out, "--private")
    assert hub.repos[REPO].private
    runtime.load(REPO)
    hub.add("alice/public", {})
    assert_refused(run("push", out, "alice/public", "--private"), "exists and is public")
    assert not hub.repos["alice/public"].files()


def test_a_branch_of_its_own(hub: Any, out: Path) -> None:
    hub.add(SOURCE, {"config.json": b"{}", "model.safetensors": b"in 16 bit"})
    said = push(out, "--revision", "int8", repo=SOURCE)
    assert f"{hub.url}/{SOURCE}/tree/int8\n" in said
    assert len(hub.repos[SOURCE].refs["main"]) == 1
    assert "model.safetensors" not in hub.repos[SOURCE].files("int8")
    runtime.load(SOURCE, revision="int8")


def test_what_is_whole_already_is_replaced_in_one_commit(hub: Any, out: Path, source: Path, tmp_path: Path) -> None:
    push(out)
    count = len(hub.repos[REPO].refs["main"])
    converter.convert(source, tmp_path / "other", skip=["up_proj"], outliers="none")
    push(tmp_path / "other")
    assert len(hub.repos[REPO].refs["main"]) == count + 1
    left = {name for name in hub.repos[REPO].files() if "safetensors" in name}
    assert left == {"model.safetensors"}
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(tmp_path / "other")))


@pytest.mark.parametrize(
    ("token", "repo", "options", "words"),
    [
        ("hf_read", REPO, [], ["may only read", "settings/tokens"]),
        ("hf_wrong", REPO, [], ["does not know this token (401)"]),
        (None, REPO, [], ["nothing to sign in with", "hf auth login"]),
        ("hf_write", "bob/model", [], ["no access (403)", "bob/model"]),
        ("hf_write", "alice/not a name", [], ["alice/not a name"]),
        ("hf_write", REPO, ["--create-pr", "--revision", "x"], ["pull request", "--revision x"]),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_sent(
    token: str | None, repo: str, options: list[str], words: list[str], hub: Any, out: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert_refused(run("push", out, repo, *options), *words)
    assert not hub.repos
    assert not hub.asked("PUT |/commit/")


def test_a_damaged_checkpoint_is_not_published(hub: Any, out: Path) -> None:
    manifest = json.loads((out / "llmint8_manifest.json").read_text())
    del manifest["tensors"]["lm_head.weight"]
    (out / "llmint8_manifest.json").write_text(json.dumps(manifest))
    assert_refused(run("push", out, REPO), "E17", "lm_head.weight", "not in the manifest")
    (out / SHARDS[0]).unlink()
    assert_refused(run("push", out, REPO), "E05", SHARDS[0])
    assert not hub.requests


def test_the_source_is_not_overwritten(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    converter.convert(SOURCE, tmp_path / "out", outliers="none")
    assert_refused(run("push", tmp_path / "out", SOURCE), "is the source of this checkpoint")


def test_a_name_alone_is_of_the_tokens_owner(hub: Any, out: Path) -> None:
    assert f"{hub.url}/{REPO}\n" in push(out, repo="tiny-int8")


def test_convert_and_push_in_one(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    arguments = (SOURCE, tmp_path / "out", "--push-to-hub", REPO, "--private", "--outliers", "none")
    result = run(*arguments, command=convert_command)
    assert result.exit_code == 0, result.output
    assert f"Published: {hub.url}/{REPO}" in result.stdout
    assert hub.repos[REPO].private
    assert torch.equal(logits(runtime.load(REPO)), logits(runtime.load(tmp_path / "out")))


def test_private_needs_something_to_publish(source: Path, tmp_path: Path) -> None:
    assert_refused(run(source, tmp_path / "out", "--private", command=convert_command), "add --push-to-hub")


@pytest.mark.parametrize("reason", ["token", "licence"])
def test_convert_and_push_fails_before_the_work(
    reason: str, hub: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CARD.replace("apache-2.0", "cc-by-nc-nd-4.0") if reason == "licence" else CARD
    hub.add(SOURCE, files_of(source) | {"README.md": card.encode()})
    monkeypatch.setenv("HF_TOKEN", "hf_read" if reason == "token" else "hf_write")
    result = run(SOURCE, tmp_path / "out", "--push-to-hub", REPO, command=convert_command)
    assert_refused(result, "may only read" if reason == "token" else "allows no adaptations")
    assert not (tmp_path / "out").exists()


def test_a_licence_in_the_way_is_stepped_over_only_when_one_says_so(hub: Any, out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: cc-by-nd-4.0"))
    assert_refused(run("push", out, REPO), "allows no adaptations", "--i-have-the-right")
    assert not hub.requests
    push(out, "--i-have-the-right")


def test_the_card_on_the_hub_is_valid(hub: Any, source: Path, tmp_path: Path) -> None:
    hub.add(SOURCE, files_of(source))
    converter.convert(SOURCE, tmp_path / "out", outliers="none")
    push(tmp_path / "out")
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.base_model == SOURCE
    assert f'runtime.load("{REPO}")' in card.text
    bad = ModelCard(card.content.replace("quantized", "squeezed"))
    with pytest.raises(ValueError, match="base_model_relation"):
        bad.validate()


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained({repo!r})
assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.int8
with torch.no_grad():
    torch.save(model(torch.arange(16)[None]).logits, {out!r})
"""


def test_stock_transformers_and_bitsandbytes_load_what_was_pushed(hub: Any, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    push(out)
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    code = STOCK.format(repo=REPO, out=str(tmp_path / "logits"))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = logits(runtime.load(out))
    assert (torch.load(tmp_path / "logits") - expected).norm() < 0.02 * expected.norm()


def test_not_an_int8_checkpoint_has_its_code(hub: Any, source: Path) -> None:
    hub.add(SOURCE, files_of(source))
    with pytest.raises(CheckpointError) as caught:
        runtime.load(SOURCE)
    assert caught.value.code == "E02"
