"""The Hub when it is busy: how often it is asked again, after how long, and when not at all; and how it is sent to."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from llmint8.converter.hub import destination as places
from llmint8.converter.hub import push, remote
from llmint8.converter.hub.answers import explain, patiently
from llmint8.converter.hub.destination import _may_write
from llmint8.converter.hub.origin import Resolved, is_repo_id
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.hub.usage import usage
from llmint8.formats import BITSANDBYTES, NATIVE, LLMInt8Error, SourceError


def refusal(status: int, retry_after: str | None = None) -> HfHubHTTPError:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    response: Any = SimpleNamespace(status_code=status, headers=headers, request=None)
    return HfHubHTTPError("the Hub says no", response=response)


@pytest.mark.parametrize(
    ("answers", "transient", "waits", "gets_it"),
    [
        ([], None, [], True),
        *[([status], None, [1], True) for status in (429, 500, 502, 503, 504)],
        ([503, 429], None, [1, 4], True),
        ([503, 503, 503], None, [1, 4], False),
        *[([status], None, [], False) for status in (400, 401, 403, 404, 409, 501)],
        ([500], (429, 503), [], False),  # a pull request may be there
        ([503], (429, 503), [1], True),
        ([(429, "7")], None, [7], True),
        ([(429, "0"), 503], None, [0, 4], True),
        ([(429, "299"), (429, "86400")], None, [299, 300], True),
        ([(429, "Wed, 21 Oct 2026 07:28:00 GMT")], None, [1], True),
    ],
)
def test_a_busy_hub_is_asked_twice_more(monkeypatch, answers, transient, waits, gets_it):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    left = [refusal(*(answer if isinstance(answer, tuple) else (answer,))) for answer in answers]

    def call() -> str:
        if left:
            raise left.pop(0)
        return "it"

    options: dict[str, Any] = {} if transient is None else {"transient": transient}
    if gets_it:
        assert patiently(call, **options) == "it"
    else:
        with pytest.raises(HfHubHTTPError):
            patiently(call, **options)
    assert slept == waits


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not know this token (401)"),
        (403, "gives no access (403)"),
        (429, "too many requests (429)"),
        (500, "out of order (500)"),
        (499, "refuses (499): the Hub says no"),
    ],
)
def test_what_the_hub_answers_is_told(status, said):
    assert said in explain(refusal(status))


@pytest.mark.parametrize(
    ("sizes", "whole", "batches"),
    [
        ([4, 4], False, [["0", "1"], ["config.json"]]),
        ([5, 5], False, [["0", "1"], ["config.json"]]),  # as much as may be
        ([5, 6], False, [["0"], ["1"], ["config.json"]]),
        ([20, 1, 9, 1], False, [["0"], ["1", "2"], ["3"], ["config.json"]]),
        ([20, 1, 9, 1], True, [["0", "1", "2", "3", "config.json"]]),  # else old and new would be mixed
    ],
)
def test_weights_go_in_commits_of_bounded_size_and_config_json_in_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], whole: bool, batches: list[list[str]]
) -> None:
    monkeypatch.setattr(push, "_COMMIT_BYTES", 10)
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).write_bytes(bytes(size))
    (tmp_path / "config.json").write_bytes(bytes(100))
    names = [str(number) for number in range(len(sizes))]
    files = {name: tmp_path / name for name in [*names, "config.json"]}
    upload: Any = push.Upload(SimpleNamespace(), SimpleNamespace(files=names), files)  # type: ignore[arg-type]
    assert push._batches(upload, whole) == batches
    assert upload.nbytes == sum(sizes) + 100


@pytest.mark.parametrize(
    ("options", "asked", "words"),
    [
        ({}, ["may write", "other weights"], None),
        ({"replace_weights": True}, ["may write"], None),
        ({"revision": "int8"}, ["may write", "other weights"], None),
        # A pull request replaces nothing, and anybody may open one.
        ({"create_pr": True}, [], None),
        ({"revision": "refs/pr/3"}, [], None),
        ({"private": True}, ["may write", "other weights"], None),
        ({"private": True, "public": True}, [], "exists and is public; --private is for a new repo"),
        ({"public": True}, ["may write", "other weights"], None),
        ({"source": "alice/int8"}, [], "is the source of this checkpoint"),
        ({"source": "alice/int8", "revision": "main"}, [], "is the source of this checkpoint"),
        ({"source": "alice/int8", "revision": "int8"}, ["may write", "other weights"], None),
        ({"source": "alice/int8", "create_pr": True}, [], None),
        ({"source": "alice/other"}, ["may write", "other weights"], None),
        ({"create_pr": True, "revision": "x"}, [], "a pull request is made against main; leave out --revision x"),
    ],
    ids=str,
)
def test_what_is_asked_of_a_repo_that_is_there(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], asked: list[str], words: str | None
) -> None:
    options, found = dict(options), []
    main = SimpleNamespace(private=not options.pop("public", False))
    api: Any = SimpleNamespace(model_info=lambda repo: main)
    monkeypatch.setattr(places, "_writer", lambda repo, token, create_pr: (api, repo))
    monkeypatch.setattr(places, "_try_to_write", lambda api, repo: found.append("may write"))
    monkeypatch.setattr(places, "_keep_other_weights", lambda to, there: found.append("other weights"))
    source = options.pop("source", None)
    if words is None:
        to = places.destination("alice/int8", source, **options)
        expected = options.get("private", False), options.get("revision"), options.get("create_pr", False)
        assert (to.repo, to.private, to.revision, to.create_pr) == ("alice/int8", *expected)
    else:
        with pytest.raises((LLMInt8Error, ValueError), match=words):
            places.destination("alice/int8", source, **options)
    assert found == asked


@pytest.mark.parametrize(("status", "refused"), [(200, False), (401, True), (403, True), (404, False), (500, False)])
def test_only_a_clear_no_to_whether_one_may_write_counts(
    monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    def raised(answer: Any) -> None:
        raise refusal(answer.status_code)

    session = SimpleNamespace(get=lambda url, headers: SimpleNamespace(status_code=status))
    monkeypatch.setattr(places, "get_session", lambda: session)
    monkeypatch.setattr(places, "hf_raise_for_status", raised)
    api: Any = SimpleNamespace(endpoint="https://hub", token="hf_token")
    if refused:
        with pytest.raises(HfHubHTTPError):
            places._try_to_write(api, "alice/int8")
    else:
        places._try_to_write(api, "alice/int8")


@pytest.mark.parametrize(
    ("granted", "create_pr", "may"),
    [
        ({}, False, False),
        ({"global": ["repo.write"]}, False, True),
        ({"global": ["discussion.write"]}, False, False),
        ({"global": ["discussion.write"]}, True, True),
        ({"scoped": [{"permissions": ["repo.content.read"]}, {"permissions": ["repo.write"]}]}, False, True),
        ({"scoped": [{"permissions": ["repo.content.read"]}]}, True, False),
    ],
)
def test_what_a_fine_grained_token_may(granted, create_pr, may):
    assert _may_write({"fineGrained": granted}, create_pr) is may


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("folder", {}, None),
        ("folder", {"kind": "source"}, None),
        ("a.gguf", {"kind": "source"}, None),
        ("a.GGUF", {"kind": "source"}, None),
        ("a.gguf", {"kind": "int8"}, "not a directory; name the checkpoint's directory"),
        ("a.gguf", {}, "not a directory"),
        ("a.bin", {"kind": "source"}, "not a directory"),
        ("folder", {"revision": "main"}, "is a local directory, which has no revision 'main'"),
        ("folder", {"low_disk": True}, "is a local directory; --low-disk is for a repo on the Hub"),
    ],
    ids=str,
)
def test_what_is_on_the_disk_is_taken_as_it_is(name: str, options: Any, words: str | None, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("a.gguf", "a.GGUF", "a.bin"):
        (tmp_path / file).touch()
    if words is None:
        found = resolve(tmp_path / name, **options)
        assert found == Resolved(tmp_path / name, None, None, False, False, None)
        assert found.name == name
    else:
        with pytest.raises(SourceError, match=words):
            resolve(tmp_path / name, **options)


def test_a_name_that_may_be_a_repos_is_no_path() -> None:
    names = ["gpt2", "alice/tiny", "a.b/c-d_e.f", "./a", "a/b/c", "/a", "a/", "~/a", "a b", "a/\u00e9", "", "-a"]
    assert [name for name in names if is_repo_id(name)] == names[:3]


def test_of_a_file_on_the_hub_only_what_is_asked_for_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning at once; what is read behind that with a request each, of the bytes that are not there yet."""
    content, asked = bytes(range(200)), []

    def bytes_of(url: str, start: int, end: int, token: object) -> tuple[bytes, int]:
        asked.append((start, end))
        return content[start:end], len(content)

    monkeypatch.setattr(remote, "_bytes_of", bytes_of)
    monkeypatch.setattr(remote, "_FIRST_REQUEST", 100)
    file = remote._RemoteFile(Resolved(Path("snapshot"), "alice/tiny", "0" * 40), "model.safetensors")
    assert (file.size, file.readable(), file.seekable()) == (200, True, True)
    assert file.read(10) == content[:10]
    assert file.read(10) == content[10:20]
    assert (file.seek(-15, 1), file.read(15)) == (5, content[5:20])
    assert file.seek(0) == 0
    assert file.read(100) == content[:100]
    assert asked == [(0, 100)]
    assert (file.seek(90), file.read(20)) == (90, content[90:110])
    assert (file.seek(-20, 2), file.read(50), file.read(1)) == (180, content[180:], b"")
    assert asked == [(0, 100), (100, 110), (180, 200)]
    with pytest.raises(OSError, match="before the beginning"):
        file.seek(-201, 2)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "AutoModelForCausalLM.from_pretrained("),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "AutoModelForSeq2SeqLM.from_pr"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "AutoModelForMaskedLM.from_pretrained("),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "AutoModel.from_pretrained("),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "AutoModelForTextEncoding.from_pretrained("),
        ({"architectures": ["NobodysModel"], "model_type": "bert"}, "NobodysModel.from_pretrained("),
        ({"architectures": ["no name"]}, "AutoModelForCausalLM.from_pretrained("),
        ({}, "AutoModelForCausalLM.from_pretrained("),
        (
            {"auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M"}},
            'AutoModel.from_pretrained("alice/tiny", trust_remote_code=True)',
        ),
        ({"auto_map": {"AutoModel": "m.M", "AutoModelForSeq2SeqLM": "m.N"}}, "AutoModelForSeq2SeqLM.from_pretrained("),
        ({"auto_map": {"AutoConfig": "c.C"}}, "AutoModelForCausalLM.from_pretrained("),
    ],
    ids=str,
)
def test_a_card_says_with_which_class_stock_transformers_loads_it(config: dict[str, Any], line: str) -> None:
    assert f"model = {line}" in "\n".join(usage(config, BITSANDBYTES, False, "alice/tiny"))
    native = "\n".join(usage(config, NATIVE, False, None))
    assert "transformers" not in native
    assert "With llmint8, and nothing else:" in native
    assert 'runtime.load("path/to/this/directory"' in native
    assert ("trust_remote_code" in native) == ("auto_map" in config)
    sentences = "\n".join(usage(config, BITSANDBYTES, True, "alice/tiny"))
    assert "from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer(" in sentences
    assert "which uses the outlier columns: the encoder:" in sentences
