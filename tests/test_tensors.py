"""The safetensors container as we read and write it, against the safetensors library and against broken files."""

import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from llmint8.formats import DTYPES, CorruptFileError, TensorSpec
from llmint8.formats.containers.safetensors import encode_header, read_header
from llmint8.formats.containers.tensors import as_bytes, read_tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" "), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
LIBRARY_DTYPES = sorted(DTYPES.keys() - {"C64"})  # complex numbers are newer than the oldest library we allow


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of every dtype and of odd shapes, with arbitrary bytes in them."""
    result = {}
    for name in draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=5, unique=True)):
        spec = TensorSpec(name, draw(st.sampled_from(LIBRARY_DTYPES)), draw(SHAPES))
        data = bytearray(draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes)))
        if spec.dtype == "BOOL":
            data = bytearray(byte % 2 for byte in data)
        raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        result[name] = raw.view(DTYPES[spec.dtype]).reshape(spec.shape)
    return result


def contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tuple(tensor.shape), bytes(as_bytes(tensor))) for name, tensor in tensors.items()}


def read_all(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(path, info) for name, info in read_header(path).items()}


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a file with any header: an object to encode, or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


@given(tensors=tensor_dicts())
@settings(max_examples=80, deadline=None)
def test_the_library_reads_what_we_write(folder: Path, tensors: dict[str, Tensor]) -> None:
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    specs = [TensorSpec(name, spelling[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, offsets = encode_header(specs)
    assert len(header) % 64 == 0
    path = folder / "ours.safetensors"
    path.write_bytes(header + b"".join(as_bytes(tensor) for tensor in tensors.values()))
    assert contents(safetensors.torch.load_file(path)) == contents(tensors)
    assert contents(read_all(path)) == contents(tensors)
    assert [info.offset for info in read_header(path).values()] == offsets


@given(tensors=tensor_dicts())
@settings(max_examples=80, deadline=None)
def test_we_read_what_the_library_writes(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "theirs.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "more": "of it"})
    assert contents(read_all(path)) == contents(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_is_read_back(tmp_path: Path, dtype: str) -> None:
    spec = TensorSpec("t", dtype, (2, 1))
    header, _ = encode_header([spec])
    path = tmp_path / "f.safetensors"
    path.write_bytes(header + bytes(spec.nbytes))
    tensor = read_all(path)["t"]
    assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], (2, 1))
    assert bytes(as_bytes(tensor)) == bytes(spec.nbytes)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=400, deadline=None)
def test_we_are_never_laxer_than_the_library(folder: Path, position: int, byte: int) -> None:
    tensors = {"a.weight": torch.arange(6, dtype=torch.int8).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    data = bytearray(safetensors.torch.save(tensors))
    data[position % len(data)] = byte
    path = folder / "changed.safetensors"
    path.write_bytes(data)
    try:
        ours = read_all(path)
    except CorruptFileError:
        return
    assert contents(safetensors.torch.load_file(path)) == contents(ours)


GOOD = entry("F16", [2], 0, 4)
BAD_HEADERS = {
    "a list": ([], "not a JSON object"),
    "a number": (b"7", "not a JSON object"),
    "not JSON": (b"{,", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "leading white space": (b'  {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}', "not a JSON object"),
    "nested too deeply": (b'{"a":' + b"[" * 200_000, "not valid JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    "NaN": (b'{"__metadata__": {"x": NaN}}', "NaN is no number in JSON"),
    "an infinity": (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "half a surrogate pair": ({"\ud800": {}}, "surrogate"),
    "a name twice": (b'{"a": ' + json.dumps(GOOD).encode() + b', "a": ' + json.dumps(GOOD).encode() + b"}", "twice"),
    "a key of an entry twice": (b'{"a":{"dtype":"F16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', "twice"),
    "an entry that is no object": ({"a": [1]}, "must have dtype"),
    "an entry that is a list of its keys": ({"a": ["dtype", "shape", "data_offsets"]}, "must have dtype"),
    "an entry that is a number": ({"a": 5}, "must have dtype"),
    "an entry with a key too many": ({"a": GOOD | {"more": 1}}, "must have dtype"),
    "an entry with a key too few": ({"a": {"dtype": "F16", "shape": [2]}}, "must have dtype"),
    "unknown dtype": ({"a": entry("F4", [2], 0, 4)}, "unknown dtype 'F4'"),
    "a dtype that is no string": ({"a": entry(["F16"], [2], 0, 4)}, "unknown dtype"),
    "negative size": ({"a": entry("F16", [-1, -2], 0, 4)}, "shape"),
    "a size that is a float": ({"a": entry("F16", [2.0], 0, 4)}, "shape"),
    "a size that is true": ({"a": entry("F16", [2, True], 0, 4)}, "shape"),
    "a shape that is no list": ({"a": entry("F16", 2, 0, 4)}, "shape"),
    "a size of 2**63": ({"a": entry("F16", [0, 2**63], 0, 0)}, "shape"),
    "strides that overflow": ({"a": entry("F16", [0, 2**62, 2**62], 0, 0)}, "shape"),
    "65 dimensions": ({"a": entry("F16", [2] + [1] * 64, 0, 4)}, "shape"),
    "an element count that wraps to 2": ({"a": entry("U8", [2**62, 4, 2], 0, 2)}, "shape"),
    "negative offset": ({"a": entry("F16", [2], -4, 0)}, "data_offsets"),
    "one offset": ({"a": GOOD | {"data_offsets": [4]}}, "data_offsets"),
    "offsets that are strings": ({"a": entry("F16", [2], "0", "4")}, "data_offsets"),
    "size and offsets disagree": ({"a": entry("F16", [3], 0, 4)}, "takes 6 bytes"),
    "offsets in the wrong order": ({"a": entry("F16", [2], 4, 0)}, "takes 4 bytes"),
    "a hole at the start": ({"a": entry("F16", [1], 2, 4)}, "starts at byte"),
    "a hole in between": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, "starts at byte"),
    "an overlap": ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, "starts at byte"),
    "the same bytes twice": ({"a": GOOD, "b": GOOD}, "starts at byte"),
    "beyond the end": ({"a": entry("U8", [2**40], 0, 2**40)}, "cut short"),
    "bytes left over": ({"a": entry("U8", [3], 0, 3)}, "left over"),
    "no tensor but data": ({}, "left over"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, case: str, spec_reader: ModuleType) -> None:
    header, message = BAD_HEADERS[case]
    path = file_of(tmp_path / "f.safetensors", header, b"1234")
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if "shape" in message or "offsets" in message or "bytes" in message:
        assert re.search(r": [ab]: ", str(caught.value))
    with pytest.raises(spec_reader.UnreadableError):
        spec_reader.header(tmp_path, path.name, strict=False)


@pytest.mark.parametrize("name", ["", "a" * 1025, "a\x1b[2Jb", "a\nb", "a\u202eb", "a\u2028", "a\u00a0b"])
def test_a_name_that_cannot_be_printed_is_refused_and_not_printed(tmp_path: Path, name: str) -> None:
    path = file_of(tmp_path / "f.safetensors", {name: GOOD}, b"1234")
    with pytest.raises(CorruptFileError, match="tensor name") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a" * 1024, "../../x", "with space", "weiß.重み", "__metadata"])
def test_a_name_that_can_be_printed_is_read(tmp_path: Path, name: str) -> None:
    path = file_of(tmp_path / "f.safetensors", {"__metadata__": {"x": "y"}, name: GOOD}, b"1234")
    assert list(read_header(path)) == [name]


def test_a_shape_made_to_take_forever_is_refused_before_it_is_multiplied(tmp_path: Path) -> None:
    """The product of so many sizes is a number of megabits; with ten times as many it took minutes."""
    path = file_of(tmp_path / "f.safetensors", {"a": entry("U8", [2**62] * 20_000, 0, 4)}, b"1234")
    with pytest.raises(CorruptFileError, match="is not a list of sizes, or is too large") as caught:
        read_header(path)
    assert len(str(caught.value)) < 400


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    header, _ = encode_header([TensorSpec("a", "F16", (3,)), TensorSpec("b", "I8", (2, 2))])
    whole = header + bytes(range(10))
    path = tmp_path / "f.safetensors"
    path.write_bytes(whole)
    assert len(read_all(path)) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"f\.safetensors: cut short"):
            read_header(path)


def test_a_file_cut_short_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f.safetensors", {"a": GOOD}, b"1234")
    info = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptFileError, match=r"f\.safetensors: a: the file ends 1 bytes too early"):
        read_tensor(path, info)


@pytest.mark.parametrize(("length", "message"), [(100_000_001, "at most 100000000"), (2**64 - 1, "cut short")])
def test_a_huge_header_is_refused_unread(tmp_path: Path, length: int, message: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_100)  # a sparse file
    with pytest.raises(CorruptFileError, match=message):
        read_header(path)


def test_a_tensor_read_is_memory_of_its_own(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f.safetensors", {"a": GOOD}, b"1234")
    before = path.read_bytes()
    tensor = read_all(path)["a"]
    os.truncate(path, 0)
    assert bytes(as_bytes(tensor)) == b"1234"
    path.write_bytes(before)
    tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="needs FIFOs")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(CorruptFileError, match=f"{path}: (not a regular file|cannot be opened)"):
            read_header(path)


def test_the_library_agrees_that_these_are_broken(tmp_path: Path) -> None:
    """Where it does not, we are stricter by intent; the list says where."""
    stricter = set()
    for case, (header, _) in BAD_HEADERS.items():
        path = file_of(tmp_path / "f.safetensors", header, b"1234")
        try:
            safetensors.torch.load_file(path)
            stricter.add(case)
        except (SafetensorError, RuntimeError, TypeError, ValueError):
            pass
    assert "a name twice" in stricter
    assert stricter <= {
        "a name twice",
        "an entry with a key too many",
        "leading white space",
        "65 dimensions",
    }
