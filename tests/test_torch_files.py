"""Files of torch.save, operation by operation and number by number: what is read, and what is refused before it is."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.formats import CorruptFileError
from llmint8.formats.containers.pytorch import pickles, storages
from llmint8.formats.containers.pytorch.file import TorchFile, View, parse_torch_header, read_saved, views
from llmint8.formats.containers.pytorch.pickles import Call, Label, PickleReader, Reference
from llmint8.formats.containers.pytorch.storages import Place, Storage, parse_strictly, read_container, storage_of
from llmint8.formats.containers.tensors import TensorInfo
from llmint8.formats.disk.lending import OpenFiles
from llmint8.formats.disk.reading import open_regular

# Pickles: what stands on the stack in the end, or why not.


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\x80\x02N.", None),
        (b"\x88.", True),
        (b"\x89.", False),
        (b"K\xff.", 255),
        (b"M\x01\x02.", 0x201),
        (b"J\xff\xff\xff\xff.", -1),
        (b"J\xff\xff\xff\x7f.", 2**31 - 1),
        (b"\x8a\x00.", 0),
        (b"\x8a\x02\xff\x00.", 255),
        (b"\x8a\x01\x80.", -128),
        (b"G" + struct.pack(">d", -2.5) + b".", -2.5),
        (b"X\x02\0\0\0\xc3\xbc.", "ü"),
        (b"\x8c\x02\xc3\xbc.", "ü"),
        (b"X\x03\0\0\0\xed\xa0\x80.", "\ud800"),
        (b"T\x02\0\0\0\xc3\xbc.", "Ã¼"),
        (b"U\x02\xc3\xbc.", "Ã¼"),
        (b"B\x02\0\0\0\xff\0.", b"\xff\0"),
        (b"C\x01\xff.", b"\xff"),
        (b"}.", {}),
        (b"].", []),
        (b").", ()),
        (b"(K\1K\2t.", (1, 2)),
        (b"K\1\x85.", (1,)),
        (b"K\1K\2\x86.", (1, 2)),
        (b"K\1K\2K\3\x87.", (1, 2, 3)),
        (b"]K\1a.", [1]),
        (b"](K\1K\2e.", [1, 2]),
        (b"}K\1K\2s.", {1: 2}),
        (b"}(K\1K\2K\3K\4u.", {1: 2, 3: 4}),
        (b"]q\x05K\1ah\x05.", [1]),
        (b"]r\0\1\0\0K\1aj\0\1\0\0.", [1]),
        (b"cos\nmkdir\n.", Label("os.mkdir")),
        (b"ccollections\nOrderedDict\n)R.", {}),
        (b"ccollections\nOrderedDict\n](K\1K\2\x86K\3K\4\x86e\x85R.", {1: 2, 3: 4}),
        (b"NN0.", "operation POP is not one that torch.save writes"),
        (b"\xff.", "operation 0xff is not one"),
        (b"", "it does not end"),
        (b"N", "it does not end"),
        (b".", "its stack is empty"),
        (b"(.", "its stack is empty"),
        (b"K", "it ends in a number"),
        (b"M\1", "it ends in a number"),
        (b"X\x05\0\0\0ab", "it ends 3 bytes too early"),
        (b"C\x01", "it ends 1 bytes too early"),
        (b"cos\nmkdir", "a line does not end"),
        (b"K\1t.", "a mark is missing"),
        (b"t.", "a mark is missing"),
        (b"}K\1a.", "expected a list on the stack"),
        (b"K\1a.", "expected a list on the stack"),
        (b"]K\1K\2s.", "expected a dict on the stack"),
        (b"K\1K\2s.", "expected a dict on the stack"),
        (b"}(K\1u.", "a key without a value"),
        (b"(q\0.", "its stack is empty"),
        (b"q\0.", "expected a object on the stack"),
        (b"h\7.", "nothing was kept under 7"),
        (b"K\1)R.", "it calls what is no function"),
        (b"cos\nmkdir\nK\1R.", "it calls what is no function"),
        (b"ccollections\nOrderedDict\nK\1\x85R.", "an OrderedDict of something else than pairs"),
        (b"ccollections\nOrderedDict\n]K\1a\x85R.", "an OrderedDict of something else than pairs"),
    ],
)
def test_each_operation(raw: bytes, expected: Any) -> None:
    reader = PickleReader(raw + (b"rest" if raw.endswith(b".") else b""), bool)
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(ValueError, match=f"^{expected}"):
            reader.read()
        return
    value = reader.read()
    assert (type(value), value) == (type(expected), expected)
    assert reader.position == len(raw)


def test_what_is_called_stays_a_name_and_what_it_was_called_with() -> None:
    pair = b"cos\nmkdir\n(K\1K\2t"
    call = PickleReader(pair + b"R.", bool).read()
    assert isinstance(call, Call)
    assert (call.function, call.arguments, call.state, call.items) == (Label("os.mkdir"), (1, 2), None, {})
    built = PickleReader(pair + b"\x81K\7b(K\3K\4u.", bool).read()
    assert (built.function, built.arguments, built.state, built.items) == (Label("os.mkdir"), (1, 2), 7, {3: 4})
    again = PickleReader(pair + b"RK\7\x85R.", bool).read()  # what a call has made is called
    assert (again.function, again.arguments) == (Label("os.mkdir"), (7,))
    assert PickleReader(b"}K\7b.", bool).read() == {}
    reader = PickleReader(b"K\1QK\2Q\x86.", bool)
    assert (
        [reference.key for reference in reader.read()] == [reference.key for reference in reader.references] == [1, 2]
    )


def test_keys_of_other_kinds_are_not_hashed() -> None:
    (key,) = PickleReader(b"}" + b")" + b"\x85" * 100_000 + b"Ns.", bool).read()
    assert str(key) == "<a tuple>"
    assert len(PickleReader(b"}(]N]NC\1aN\x8c\1aNK\1Nu.", bool).read()) == 5


def test_names_are_asked_for_before_they_are_labels() -> None:
    asked: list[str] = []
    with pytest.raises(ValueError, match=r"it holds more than tensors \('os.mkdir'\), and loading that could run code"):
        PickleReader(b"cos\nmkdir\n.", lambda name: bool(asked.append(name))).read()
    assert asked == ["os.mkdir"]


def test_operations_are_counted_over_all_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 6)
    reader = PickleReader(b"NN." * 3, bool)
    assert reader.read() is reader.read() is None
    with pytest.raises(ValueError, match=r"^more than 6 operations"):
        reader.read()


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("collections.OrderedDict", True),
        ("torch.FloatStorage", True),
        ("torch.cuda.HalfStorage", True),
        ("torch.storage.UntypedStorage", True),
        ("torch._utils._rebuild_tensor_v2", True),
        ("torch._tensor._rebuild_from_type_v2", True),
        ("torch.nn.parameter.Parameter", True),
        ("torch.float8_e4m3fn", True),
        ("torch.bfloat16", True),
        ("torch.Size", True),
        ("builtins.set", True),
        ("_codecs.encode", True),
        ("os.system", False),
        ("builtins.eval", False),
        ("builtins.setattr", False),
        ("torch.load", False),
        ("torch.hub.load", False),
        ("torch.HalfTensor", False),
        ("torch._utils._rebuild_x.y", False),
        ("collectionsxOrderedDict", False),
        ("xtorch.FloatStorage", False),
        ("torch.nn.parameter.Parameter.x", False),
    ],
)
def test_what_a_file_of_tensors_may_name(name: str, may: bool) -> None:
    module, _, what = name.rpartition(".")
    raw = f"c{module}\n{what}\n.".encode()
    if may:
        assert parse_strictly(raw) == Label(name)
    else:
        with pytest.raises(ValueError, match="it holds more than tensors"):
            parse_strictly(raw)


# Storages.

HALF = Label("torch.HalfStorage")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (("storage", HALF, "0", "cpu", 3), Storage("0", "F16", 6, 0)),
        ((b"storage", HALF, b"7", "cpu", 0), Storage("7", "F16", 0, 0)),
        (("storage", HALF, 5, "cpu", 3, None), Storage("5", "F16", 6, 0)),
        (("storage", Label("torch.cuda.LongStorage"), "0", "cpu", 3, ("view", 2, 1)), Storage("0", "I64", 24, 16)),
        (("storage", Label("torch.storage.UntypedStorage"), "0", "cpu", 3), Storage("0", "U8", 3, 0)),
        (("storage", Label("torch.NewStorage"), "0", "cpu", 3), Storage("0", "New", 3, 0)),
        (("storage", "x", "0", "cpu", 3), Storage("0", "", 3, 0)),
        (("module", HALF, "0", "cpu", 3), "it has no storage"),
        (("storage", HALF, "0", "cpu"), "it has no storage"),
        (("storage", HALF, "0", "cpu", 3, None, None), "it has no storage"),
        ([*"abcde"], "it has no storage"),
        (("storage", HALF, "0", "cpu", -1), "the size of its storage is not a number >= 0"),
        (("storage", HALF, "0", "cpu", 3.0), "the size of its storage"),
        (("storage", HALF, "0", "cpu", True), "the size of its storage"),
        (("storage", HALF, "0", "cpu", 3, ("view", -1, 1)), "the size of its storage"),
        (("storage", HALF, "0", "cpu", 3, ("view", 1)), "the size of its storage"),
        (("storage", HALF, "0", "cpu", 3, "abc"), "the size of its storage"),
        (("storage", HALF, None, "cpu", 3), "a NoneType is where a string should be"),
        ((["storage"], HALF, "0", "cpu", 3), "a list is where a string should be"),
    ],
)
def test_what_is_said_of_a_storage(entry: Any, expected: Storage | str) -> None:
    if isinstance(expected, Storage):
        assert storage_of(Reference(entry)) == expected
        return
    with pytest.raises(ValueError, match=f"^{expected}"):
        storage_of(Reference(entry))
    with pytest.raises(ValueError, match=r"^it has no storage"):
        storage_of(entry)


def archive(entries: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return buffer.getvalue()


def read(raw: bytes, size: int | None = None) -> tuple[Any, dict[str, Place]]:
    return read_container(io.BytesIO(raw), len(raw) if size is None else size)


def legacy(*, magic: Any = 0x1950A86A20F9469CFC6C, version: Any = 1001, system: Any = None, keys: Any = ()) -> bytes:
    """The pickles of a file before torch 1.6, of a state that refers to the storages `0`, of 3 halves, and `1`."""
    system = {"little_endian": True} if system is None else system
    entries = [
        b"(\x8c\7storagectorch\n%sStorage\n\x8c\1%d\x8c\3cpuK\3tQ" % (kind, n)
        for n, kind in enumerate((b"Half", b"New"))
    ]
    values = magic, version, system
    first = b"".join(value if isinstance(value, bytes) else pickle.dumps(value, protocol=2) for value in values)
    return first + b"(" + b"".join(entries) + b"t." + pickle.dumps(keys, protocol=2)


STORED = struct.pack("<Q", 3) + b"abcdef"


def test_where_the_storages_of_both_layouts_lie() -> None:
    raw = archive({"x/data.pkl": b"K\7.", "x/data/0": b"abc", "x/data/1": b"", "x/other": b"o", "y": b"data/2"})
    state, places = read(raw)
    assert (state, {key: raw[p.offset : p.offset + p.nbytes] for key, p in places.items()}) == (
        7,
        {"0": b"abc", "1": b""},
    )
    assert read(archive({"x/data.pkl": b"N.", "x/byteorder": b"little"})) == (None, {})
    raw = legacy(keys=["0", "1"]) + STORED + struct.pack("<Q", 2) + b"gh"
    state, places = read(raw)
    assert [reference.key[2] for reference in state] == ["0", "1"]
    assert {key: raw[p.offset : p.offset + p.nbytes] for key, p in places.items()} == {"0": b"abcdef", "1": b"gh"}
    assert places["1"].offset + 2 == len(raw)
    assert read(legacy(system=b"}C\x0dlittle_endian\x88s.", keys=None))[1] == {}  # written by Python 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (archive({"x/other": b"N."}), "the archive has 0 entries data.pkl, expected one"),
        (archive({"x/data.pkl": b"N.", "y/data.pkl": b"N."}), "the archive has 2 entries data.pkl"),
        (archive({"data.pkl": b"N."}), "the archive has 0 entries data.pkl"),
        (archive({"x/data.pkl": b"N.", "x/byteorder": b"big"}), "it was written on a big-endian machine"),
        (
            archive({"x/data.pkl": b"N." * 9}, zipfile.ZIP_DEFLATED),
            "'x/data.pkl' is packed, which torch.save never does",
        ),
        (archive({"x/data.pkl": b"N.", "x/data/0": bytes(99)}, zipfile.ZIP_DEFLATED), "is packed"),
        (
            archive({"x/data.pkl": b"N."}).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"),
            "is packed",
        ),
        (
            b"PK\x03\x04" + archive({"x/data.pkl": b"N."}).replace(b"PK\x03\x04", b"PK\x03\x05"),
            "is not where the archive's",
        ),
        (legacy(magic=1), "it does not begin as a torch.save file does"),
        (legacy(version=1002), "it does not begin as a torch.save file does"),
        (legacy(system={"little_endian": False}), "it was written on a big-endian machine"),
        (legacy(system={"little_endian": 1}), "it was written on a big-endian machine"),
        (legacy(system={}), "it was written on a big-endian machine"),
        (legacy(system=[True]), "it was written on a big-endian machine"),
        (legacy(keys=["2"]), "storage '2' belongs to no tensor"),
        (legacy(keys=["0"]) + STORED[:-1], r"cut short: (\d+) bytes, a storage ends at"),
        (legacy(keys=["0", "1"]) + STORED + struct.pack("<Q", 1), "cut short"),
    ],
)
def test_what_is_no_container_of_tensors(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}" if message[0] != "i" else message):
        read(raw)


def test_a_storage_ends_where_the_file_does_and_not_behind_it() -> None:
    raw = legacy(keys=["0"]) + STORED
    read(raw)
    with pytest.raises(ValueError, match=f"^cut short: {len(raw) - 1} bytes, a storage ends at {len(raw)}"):
        read(raw, len(raw) - 1)


def test_pickles_are_bounded_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "MAX_PICKLE_BYTES", 1000)
    for size in (1000, 1001):
        raw = archive({"x/data.pkl": b"\x80\2" * (size // 2 - 1) + b"N." + b"." * (size % 2), "x/data/0": bytes(5000)})
        if size == 1000:
            assert read(raw)[0] is None
        else:
            with pytest.raises(ValueError, match=r"^'x/data.pkl' has 1001 bytes, at most 1000 are allowed"):
                read(raw)
    names = {f"x/data/{'n' * 50}{number}": b"" for number in range(20)}
    with pytest.raises(ValueError, match=r"^the archive's directory takes more than 1000 bytes"):
        read(archive({"x/data.pkl": b"N.", **names}))
    with pytest.raises(ValueError, match=r"it does not end|ends"):
        read(legacy(system={"little_endian": True, "x": "x" * 1000}))


# Tensors in storages.


@pytest.mark.parametrize(
    ("shape", "stride", "span", "contiguous"),
    [
        ((), (), 1, True),
        ((3,), (1,), 3, True),
        ((3,), (2,), 5, False),
        ((2, 3), (3, 1), 6, True),
        ((2, 3), (1, 2), 6, False),
        ((2, 3), (5, 1), 8, False),
        ((1, 3), (99, 1), 3, True),
        ((3, 1), (1, 99), 3, True),
        ((3, 1), (2, 1), 5, False),
        ((0, 3), (3, 1), 0, True),
        ((3, 0), (7, 1), 0, False),
        ((2, 2), (0, 1), 2, False),
    ],
)
def test_what_a_view_takes(shape: tuple[int, ...], stride: tuple[int, ...], span: int, contiguous: bool) -> None:
    view = View(TensorInfo("a", "F16", shape, "x", 0), stride)
    assert view.span == span
    assert view.contiguous == contiguous or span == 0  # of nothing either is true


def made(*arguments: Any, kind: str = "tensor_v2", dtype: str = "Half", count: Any = 6, part: Any = None) -> Call:
    storage = Reference(("storage", Label(f"torch.{dtype}Storage"), "0", "cpu", count, part))
    rest = arguments or (0, (3,), (1,), False, {})
    return Call(Label(f"torch._utils._rebuild_{kind}"), (storage, *rest))


PLACES = {"0": Place(100, 12)}
TENSOR = Label("torch._tensor._rebuild_from_type_v2")
V3 = {"kind": "tensor_v3", "dtype": "Untyped"}


@pytest.mark.parametrize(
    ("value", "dtype", "shape", "offset"),
    [
        (made(), "F16", (3,), 100),
        (made(1, (2,), (1,), False, {}), "F16", (2,), 102),
        (made(0, (2, 3), (3, 1)), "F16", (2, 3), 100),
        (made(0, (6,), (1,), False, {}, None, kind="tensor"), "F16", (6,), 100),
        (made(1, (2,), (1,), False, {}, part=("view", 3, 3)), "F16", (2,), 108),
        (made(6, (0,), (1,)), "F16", (0,), 112),
        (made(99, (0,), (1,)), "F16", (0,), 298),
        (made(0, (1,), (2**62,)), "F16", (1,), 100),
        (made(0, (3,), (1,), False, {}, Label("torch.int32"), count=12, **V3), "I32", (3,), 100),
        (made(1, (2,), (1,), False, {}, Label("torch.float8_e4m3fn"), None, count=12, **V3), "F8_E4M3", (2,), 101),
        (Call(Label("torch.nn.parameter.Parameter"), (made(), True)), "F16", (3,), 100),
        (Call(Label("torch._utils._rebuild_parameter"), (made(), True, {})), "F16", (3,), 100),
        (Call(Label("torch._utils._rebuild_parameter_with_state"), (made(), True, {}, {})), "F16", (3,), 100),
        (Call(TENSOR, (made().function, Label("x"), made().arguments, {})), "F16", (3,), 100),
    ],
)
def test_a_tensor_is_found(value: Any, dtype: str, shape: tuple[int, ...], offset: int) -> None:
    (view,) = views(Path("x.bin"), {"a": value}, PLACES).values()
    assert view.info == TensorInfo("a", dtype, shape, "x.bin", offset)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (made(kind="qtensor"), "unknown dtype or layout: qtensor"),
        (Call(Label("torch.Tensor"), ()), "unknown dtype or layout: torch.Tensor"),
        (Call(made().function, made().arguments[:3]), "unknown dtype or layout"),
        (Call(Label("torch._utils._rebuild_tensor_v3"), made().arguments), "unknown dtype or layout"),
        (made(0, (3,), (1,), False, {}, {"conj": True}), "it is stored conjugated or negated"),
        (made(0, (3,), (1,), False, {}, Label("torch.int8"), {"neg": True}, count=12, **V3), "it is stored conjugated"),
        (made(0, (3,), (1,), False, {}, Label("torch.int7"), count=12, **V3), "unknown dtype of a newer torch"),
        (made(0, (3,), (1,), False, {}, "torch.int8", count=12, **V3), "unknown dtype of a newer torch"),
        (made(dtype="QInt8"), "unknown dtype QInt8"),
        (made(count=7), "its storage has 14 bytes, the file has 12 of them"),
        (made(0, [3], (1,)), "its shape and strides are not sizes"),
        (made(0, (3,), [1]), "its shape and strides are not sizes"),
        (made(0, (3,), (1, 1)), "its shape and strides are not sizes"),
        (made(0, (-1,), (1,)), "its shape and strides are not sizes"),
        (made(0, (True,), (1,)), "its shape and strides are not sizes"),
        (made(0, (3,), (-1,)), "its shape and strides are not sizes"),
        (made(0, (3,), (2**63,)), "its shape and strides are not sizes"),
        (made(0, (2**62, 4), (0, 0)), "its shape and strides are not sizes, or are too large"),
        (made(-1, (3,), (1,)), "its place in the storage is not a number >= 0"),
        (made(1.0, (3,), (1,)), "its place in the storage"),
        (made(0, (7,), (1,)), "it ends at byte 14 of a storage of 12 bytes"),
        (made(4, (3,), (1,)), "it ends at byte 14"),
        (made(0, (4,), (2,)), "it ends at byte 14"),
        (made(0, (3,), (1,), part=("view", 4, 3)), "it ends at byte 14"),
        (made(0, (3,), (0,)), "3 elements share the place of 1; save it with .contiguous"),
        (made(0, (2, 3), (1, 1)), "6 elements share the place of 4"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(CorruptFileError) as caught:
        views(Path("x.bin"), {"a": value}, PLACES)
    assert str(caught.value).startswith(f"x.bin: a: {message}")
    with pytest.raises(CorruptFileError, match=r"^x\.bin: a: its storage has 12 bytes, the file has 0 of them"):
        views(Path("x.bin"), {"a": made()}, {"1": PLACES["0"]})


def test_what_is_no_tensor_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    others = {
        "number": (3, "int"),
        "call": (Call(Label("os.mkdir"), ()), "os.mkdir"),
        "nothing in it": (Call(Label("torch.nn.parameter.Parameter"), ()), "torch.nn.parameter.Parameter"),
        "no label": (Call(TENSOR, ("x", None, (), {})), TENSOR.name),
        "no tuple": (Call(TENSOR, (made().function, None, [], {})), TENSOR.name),
        "too few": (Call(TENSOR, (made().function, None, ())), TENSOR.name),
    }
    found = views(Path("x.bin"), {b"by": made(), **{name: value for name, (value, _) in others.items()}}, PLACES)
    assert list(found) == ["by"]
    assert caplog.messages == [
        f"x.bin: {name} is a {what} and not a tensor: left out" for name, (_, what) in others.items()
    ]
    for state, message in (
        ([], "holds a list, expected a dict of tensors"),
        ({3: made()}, "'3' is not a name a tensor"),
    ):
        with pytest.raises(CorruptFileError, match=rf"^x\.bin: {message}"):
            views(Path("x.bin"), state, PLACES)


def save(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_words_of_a_file(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float16).reshape(4, 6)
    state: dict[str, Any] = {
        "whole": base,
        "columns": base[1:, ::2],
        "turned": base.t(),
        "empty": base[:0],
        "word": "w",
        "n": 1,
    }
    path = tmp_path / "x.bin"
    path.write_bytes(save(OrderedDict(state), _use_new_zipfile_serialization=zipped))
    file = TorchFile(path, OpenFiles(open_regular))
    assert file.words == {"word": "w"}
    assert file.stored == {path: path.stat().st_size}
    assert parse_torch_header(path, path.open("rb"), path.stat().st_size) == file.tensors
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = file.read(name)
        assert torch.equal(found, tensor)
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == tensor.numel() * 2  # not what lies between its elements
        assert torch.equal(torch.cat([*file.read_rows(name), base[:0, : tensor.shape[1]]]), tensor)


def test_what_reading_raises_is_said_of_the_file() -> None:
    def fails(error: Exception) -> Callable[[bytes], Any]:
        def fail(raw: bytes) -> Any:
            raise error

        return fail

    raw = archive({"x/data.pkl": b"N."})
    for error, reason in (
        (ValueError("odd"), "odd"),
        (KeyError("k"), "KeyError: 'k'"),
        (MemoryError(), "MemoryError: "),
    ):
        with pytest.raises(CorruptFileError) as caught:
            read_saved(Path("x.bin"), io.BytesIO(raw), len(raw), fails(error))
        assert str(caught.value) == f"x.bin: cannot be read as a checkpoint of tensors: {reason}"
    with pytest.raises(CorruptFileError, match=r"^mine"):
        read_saved(Path("x.bin"), io.BytesIO(raw), len(raw), fails(CorruptFileError("mine")))
