"""The Hub when it is busy: how often it is asked again, after how long, and when not at all; and how it is sent to."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from llmint8.converter.hub import push
from llmint8.converter.hub.answers import explain, patiently
from llmint8.converter.hub.destination import _may_write


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
