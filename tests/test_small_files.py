"""What lies beside the weights, and JSON from strangers: what is taken, what stays behind, and what is refused."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llmint8.formats import CorruptFileError, SourceError, is_unfinished
from llmint8.formats.disk import reading, strict_json
from llmint8.formats.disk import small_files as beside
from llmint8.formats.disk.names import JOURNAL_NAME
from llmint8.formats.disk.reading import open_regular, read_json, require_inside
from llmint8.formats.disk.small_files import left_behind, module_folders, small_files
from llmint8.formats.disk.strict_json import finite, member, parse_json

MIB = 1 << 20
POINTER = "version https://git-lfs.github.com/spec/v1\n"


def put(path: Path, **sizes: int) -> None:
    """Make sparse files of so many MiB."""
    for name, size in sizes.items():
        (path / name).touch()
        os.truncate(path / name, size)


def write(path: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)


def taken(path: Path) -> list[str]:
    return [file.relative_to(path).as_posix() for file in small_files(path)]


def test_what_goes_along_and_what_is_said_to_stay(tmp_path: Path) -> None:
    """In a folder that `modules.json` names there are a config and weights of its own; they go along as they are."""
    along = ["1/adapter_config.json", "1/config.json", "1/model.safetensors", "1/pytorch_model.BIN", "2/deep/x.txt"]
    along += ["LICENSE", "additional_chat_templates/a.jinja", "modules.json", "tokenizer.json", "train.py"]
    write(tmp_path, *along)
    write(tmp_path, "adapter_config.json", "config.json", "quantization_config.json", "model.safetensors", "a.bin")
    write(
        tmp_path,
        "x.index.json",
        ".hidden",
        "llmint8_manifest.json",
        "a.PT",
        "x.partial",
        "additional_chat_templates/b.bin",
    )
    write(tmp_path, "1/.hidden", "1/x.index.json", "1/optimizer.pt", "1/more/x.txt", "2/x.txt", "llmint8_x/y")
    write(tmp_path, ".git/x", "__pycache__/x", "onnx/config.json")
    (tmp_path / "modules.json").write_text('[{"path": "1"}, {"path": "2/deep"}, {"path": "absent"}, {"path": ""}]')
    assert taken(tmp_path) == sorted(along, key=lambda name: (tmp_path / name).parts)
    assert left_behind(tmp_path) == [
        f"{name}/ stays behind: a folder that no modules.json names" for name in ("llmint8_x", "onnx")
    ]


def test_how_large_they_may_be(tmp_path: Path) -> None:
    whole = {f"{number}.txt": 64 * MIB for number in range(8)}
    put(tmp_path, **whole, **{"large.txt": 64 * MIB + 1, "large.bin": 64 * MIB + 1})
    assert taken(tmp_path) == sorted(whole)
    assert left_behind(tmp_path) == ["large.txt (67.1 MB) stays behind: only files of up to 64 MiB are copied"]
    put(tmp_path, **{"more.txt": 1})
    with pytest.raises(SourceError, match=f"{8 * 64 * MIB + 1} bytes beside the weights, at most {8 * 64 * MIB} are"):
        small_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.json", True),
        ("x.JSON", True),
        ("x.tiktoken", True),
        ("tokenizer.x", True),
        ("Vocab.x", True),
        ("merges", True),
        ("spiece.x", True),
        ("1/model.safetensors", True),
        ("1/x.bin", True),
        ("x.png", False),
        ("a-vocab.x", False),
        ("1/plot.svg", False),
    ],
)
def test_a_pointer_of_git_lfs_is_refused_where_something_reads_the_file(tmp_path: Path, name: str, read: bool) -> None:
    write(tmp_path, "modules.json", content='[{"path": "1"}]')
    write(tmp_path, name, content=POINTER)
    if read:
        with pytest.raises(CorruptFileError, match=rf"{name}: a pointer of git-lfs"):
            small_files(tmp_path)
    else:
        assert taken(tmp_path) == ["modules.json"]
        assert left_behind(tmp_path) == [f"{name} stays behind: a pointer of git-lfs in place of the file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such names")
def test_a_name_that_cannot_be_printed_is_refused_where_the_file_would_go_along(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J.bin").touch()
    assert taken(tmp_path) == []
    (tmp_path / "a\x1b[2J.txt").touch()
    with pytest.raises(SourceError, match=r"'a\\x1b\[2J.txt' is not a name that can be printed"):
        small_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "folders"),
    [
        ("[]", []),
        ("{", []),
        ('{"path": "1"}', []),
        ('["1", 1, null]', []),
        ('[{"path": "1"}, {"path": null}, {"path": ""}, {"path": "."}, {}, {"path": "2_x.y/a-b"}]', ["1", "2_x.y/a-b"]),
        ('[{"path": "b"}, {"path": "a"}, {"path": "b"}]', ["b", "a"]),
        (json.dumps([{"path": f"m{number}"} for number in range(101)]), [f"m{number}" for number in range(100)]),
        *(
            (json.dumps([{"path": name}]), None)
            for name in ("..", "a/..", "a//b", "/a", "a/", "-a", "a\n", ".a", 5, ["a"])
        ),
    ],
)
def test_folders_that_modules_json_names(tmp_path: Path, content: str, folders: list[str] | None) -> None:
    write(tmp_path, "modules.json", content=content)
    if folders is None:
        with pytest.raises(SourceError, match=r"modules\.json: path is .*, expected a folder in this directory"):
            module_folders(tmp_path)
        return
    assert module_folders(tmp_path) == []
    assert module_folders(tmp_path, there=False) == folders
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    assert module_folders(tmp_path) == folders


def test_a_modules_json_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "MAX_SMALL_FILE_BYTES", 100)
    for size, folders in ((100, ["a"]), (101, [])):
        (tmp_path / "modules.json").write_bytes(b'[{"path": "a"}]'.ljust(size))
        assert module_folders(tmp_path, there=False) == folders


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_where_links_may_lead(tmp_path: Path) -> None:
    home = tmp_path / "models--a" / "snapshots" / "0123"
    places = {"models--a/blobs/x": True, "models--a/snapshots/0123/deep/x": True, "models--a/blobs/deep/x": False}
    places |= {"x": False, "models--a/other/x": False, "models--a/snapshots/0124/x": False}
    write(tmp_path, *places)
    for number, (place, inside) in enumerate(places.items()):
        link = home / f"link{number}"
        link.symlink_to(tmp_path / place)
        if inside:
            require_inside(link, home)
        else:
            with pytest.raises(SourceError, match=rf"link{number}: a link to {tmp_path / place}, outside of the"):
                require_inside(link, home)
    other = tmp_path / "models--a" / "elsewhere" / "0123"
    other.mkdir(parents=True)
    (other / "link").symlink_to(tmp_path / "models--a/blobs/x")
    with pytest.raises(SourceError, match="outside of the checkpoint"):
        require_inside(other / "link", other)


# JSON.


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"a": [1, 2.5, "\\ud83d\\ude00", null, true]}', {"a": [1, 2.5, "\U0001f600", None, True]}),
        (b'"\\\\ud800"', "\\ud800"),
        (b"\xef\xbb\xbf{}", "begins with a byte-order mark"),
        (b'{"a": 1, "a": 1}', "a key stands twice"),
        (b'[{"b": {"a": 1, "a": 2}}]', "a key stands twice"),
        (b"NaN", "NaN is no number in JSON"),
        (b"[-Infinity]", "-Infinity is no number in JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFff": 1}', "half of a surrogate pair"),
        (b'"\xff"', "'utf-8' codec can't decode"),
        (b"{", "Expecting property name"),
        (b"1 2", "Extra data"),
    ],
)
def test_json_that_is_read_and_that_is_refused(raw: bytes, expected: Any) -> None:
    if not isinstance(expected, str) or raw.startswith(b'"\\\\'):
        assert parse_json(raw) == expected
        return
    for constants in (False, True):
        if constants and "no number" in expected:
            value = parse_json(raw, constants=True)
            assert math.isnan(value) if raw == b"NaN" else value == [-math.inf]
            continue
        with pytest.raises(ValueError, match=f"^{expected}"):
            parse_json(raw, constants=True) if constants else parse_json(raw)


def test_json_of_many_values_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_VALUES", 4)
    for raw in (b"[1,2,3,4]", b"[[[[]]]]", b'{"a":{"a":{"a":{}}}}', b'{"a":[],"b":1,"c":2}'):
        parse_json(raw)
        with pytest.raises(ValueError, match=r"^5 values, at most 4 are allowed"):
            parse_json(raw + b",")


def test_what_json_has_no_number_for_becomes_null() -> None:
    value = {"a": [1.5, math.nan, {"b": -math.inf}], "c": "NaN", "d": math.inf, "e": (1,), "f": 3}
    assert finite(value) == {"a": [1.5, None, {"b": None}], "c": "NaN", "d": None, "e": (1,), "f": 3}


@pytest.mark.parametrize(
    ("path", "kinds", "expected"),
    [
        ("a", (dict,), {"b": 1, "t": True}),
        ("a.b", (int,), 1),
        ("a.b", (str, int), 1),
        ("n", (str, type(None)), None),
        ("a.b", (str,), "a.b is '1', expected a string"),
        ("a.t", (list,), "a.t is 'True', expected a list"),
        ("n", (dict,), "n is 'None', expected an object"),
        ("a.c", (str, type(None)), "a.c is missing, expected a string or null"),
        ("n.c", (bool,), "n.c is missing, expected true or false"),
        ("long", (dict,), f"long is '{'x' * 80}', expected an object"),
    ],
)
def test_members_have_their_types(path: str, kinds: tuple[type, ...], expected: Any) -> None:
    value = {"a": {"b": 1, "t": True}, "n": None, "long": "x" * 100}
    if not isinstance(expected, str):
        assert member(value, path, *kinds) == expected
        return
    with pytest.raises(ValueError, match="is") as caught:
        member(value, path, *kinds)
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["config.json", "quantization_config.json", "other.json"])
def test_only_what_transformers_writes_has_its_dialect(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": Infinity}')
    if name != "other.json":
        assert read_json(tmp_path / name) == {"a": math.inf}
        return
    with pytest.raises(CorruptFileError, match=rf"{name}: not valid JSON: Infinity is no number"):
        read_json(tmp_path / name)


def test_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    put(tmp_path, **{"x.json": 256 * MIB + 1})
    with pytest.raises(CorruptFileError, match=f"{256 * MIB + 1} bytes, at most {256 * MIB} are allowed"):
        read_json(path)
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 60)
    for content, message in (
        ("{}".ljust(60), None),
        ("{}".ljust(61), "61 bytes, at most 60 are allowed"),
        ("[]", "holds a list, expected a JSON object"),
        ("null", "holds a NoneType, expected a JSON object"),
        ("", "not valid JSON: Expecting value"),
        (POINTER, f"a pointer of git-lfs in place of the file; `git lfs pull` in {tmp_path} fetches the file"),
    ):
        path.write_text(content)
        if message is None:
            assert read_json(path) == {}
            continue
        with pytest.raises(CorruptFileError) as caught:
            read_json(path)
        assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.skipif(os.name != "posix", reason="needs FIFOs")
def test_what_is_no_regular_file_is_closed_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path, tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(CorruptFileError, match=f"{path}: not a regular file"):
            open_regular(path)
    with pytest.raises(CorruptFileError, match="absent: cannot be opened: No such file or directory"):
        open_regular(tmp_path / "absent")
    assert len(os.listdir("/dev/fd")) == before


def test_a_directory_is_unfinished_where_it_has_a_journal(tmp_path: Path) -> None:
    assert not is_unfinished(tmp_path)
    (tmp_path / JOURNAL_NAME).mkdir()
    assert not is_unfinished(tmp_path)
    (tmp_path / JOURNAL_NAME).rmdir()
    (tmp_path / JOURNAL_NAME).touch()
    assert is_unfinished(tmp_path)
