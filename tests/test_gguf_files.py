"""Files of GGUF, put together byte by byte: every kind of fact, every limit, blocks of rows, and what is written."""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmint8.formats import CorruptFileError, OutputError
from llmint8.formats.containers.gguf import writing
from llmint8.formats.containers.gguf.header import GgufTensor, read_gguf
from llmint8.formats.containers.gguf.rows import Rows
from llmint8.formats.containers.gguf.writing import GgufOutput, packs, write_gguf
from llmint8.formats.sources import gguf as sources
from llmint8.formats.sources.gguf import GgufFile, gguf_source, is_packed

gguf = pytest.importorskip("gguf")

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
ARCHITECTURE = ("general.architecture", 8, b"\5\0\0\0\0\0\0\0llama")


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(
    *tensors: tuple[str, tuple[int, ...], int, int],
    facts: Any = (),
    version: int = 3,
    counts: Any = None,
    name: bool = True,
) -> bytes:
    """The beginning of a file; tensors are (name, shape as torch has it, type, offset), facts (name, type, bytes)."""
    facts = [*((ARCHITECTURE,) if name else ()), *facts]
    raw = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(facts))))
    raw += b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in facts)
    for called, shape, kind, offset in tensors:
        raw += string(called) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
    return raw


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


FACTS = [
    ("u8", 0, b"\xff", 255),
    ("i8", 1, b"\xff", -1),
    ("u16", 2, b"\xff\xff", 65535),
    ("i16", 3, b"\xff\xff", -1),
    ("u32", 4, b"\1\0\0\x80", 2**31 + 1),
    ("i32", 5, b"\xff\xff\xff\xff", -1),
    ("f32", 6, struct.pack("<f", 1.5), 1.5),
    ("bool", 7, b"\1", True),
    ("string", 8, string("ü"), "ü"),
    ("u64", 10, b"\xff" * 8, 2**64 - 1),
    ("i64", 11, b"\xff" * 8, -1),
    ("f64", 12, struct.pack("<d", -0.1), -0.1),
    ("numbers", 9, array(5, 2, struct.pack("<ii", 7, -7)), [7, -7]),
    ("none", 9, array(8, 0, b""), []),
    ("strings", 9, array(8, 2, string("a") + string("")), ["a", ""]),
]


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_fact_is_read(tmp_path: Path, version: int) -> None:
    raw = header(facts=[(name, kind, value) for name, kind, value, _ in FACTS], version=version)
    (tmp_path / "x.gguf").write_bytes(raw)
    found = read_gguf(tmp_path / "x.gguf")
    assert found.facts == {"general.architecture": "llama", **{name: value for name, _, _, value in FACTS}}
    assert [type(found.facts[name]) for name, _, _, _ in FACTS] == [type(value) for _, _, _, value in FACTS]
    assert (found.architecture, found.tensors, found.path) == ("llama", {}, tmp_path / "x.gguf")
    for size in range(len(raw)):
        (tmp_path / "x.gguf").write_bytes(raw[:size])
        with pytest.raises(CorruptFileError):
            read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("alignment", [None, 1, 2, 64])
def test_tensors_lie_behind_the_facts_at_a_multiple_of_the_alignment(tmp_path: Path, alignment: int | None) -> None:
    facts = [] if alignment is None else [("general.alignment", 4, struct.pack("<I", alignment))]
    tensors = [("a", (3,), F32, 0), ("b", (2, 64), Q8_0, 64), ("c", (1, 1, 2, 2), F16, 224)]
    start = padded(header(*tensors, facts=facts), alignment or 32)
    (tmp_path / "x.gguf").write_bytes(start + bytes(232))
    found = read_gguf(tmp_path / "x.gguf").tensors
    assert list(found.values()) == [
        GgufTensor("a", (3,), F32, 1, 4, len(start)),
        GgufTensor("b", (2, 64), Q8_0, 32, 34, len(start) + 64),
        GgufTensor("c", (1, 1, 2, 2), F16, 1, 2, len(start) + 224),
    ]
    assert [(one.nbytes, one.row_bytes) for one in found.values()] == [(12, 12), (136, 68), (8, 4)]
    (tmp_path / "x.gguf").write_bytes(start + bytes(231))
    with pytest.raises(CorruptFileError, match=rf"c ends at {len(start) + 232}, the file at {len(start) + 231}"):
        read_gguf(tmp_path / "x.gguf")


def aligned(kind: int, raw: bytes) -> bytes:
    return header(facts=[("general.alignment", kind, raw)])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GGUX" + bytes(40), "does not begin as a GGUF file does"),
        (header(version=1), "is version 1, read are 2 and 3, little-endian"),
        (header(version=4), "is version 4"),
        (header(name=False), "names no general.architecture"),
        (header(facts=[("general.architecture", 4, bytes(4))]), "names no general.architecture"),
        (aligned(4, struct.pack("<I", 0)), "general.alignment is 0, expected a power of two"),
        (aligned(4, struct.pack("<I", 48)), "general.alignment is 48"),
        (aligned(5, struct.pack("<i", -32)), "general.alignment is -32"),
        (aligned(6, struct.pack("<f", 32)), "general.alignment is 32.0"),
        (aligned(8, string("32")), "general.alignment is 32, expected"),
        (header(facts=[("x", 13, bytes(9))]), "'x' is of type 13"),
        (header(facts=[("x", 9, array(13, 1, bytes(9)))]), "'x' is a list of type 13"),
        (header(facts=[("x", 9, array(9, 1, bytes(20)))]), "'x' is a list of type 9"),
        (header(facts=[("x", 8, string(b"\xff"))]), "holds at .* what is no UTF-8"),
        (header(("", (1,), F32, 0)), "'' is no name of a tensor, or of two"),
        (header(("a\x1b", (1,), F32, 0)), ".* is no name of a tensor"),
        (header(("a", (1,), F32, 0), ("a", (1,), F32, 32)), "'a' is no name of a tensor, or of two"),
        (header(("a", (1,), 99, 0)), "a is of type 99, which gguf-py does not know"),
        (header(("a", (), F32, 0)), r"a is \[\] in blocks of 1"),
        (header(("a", (2, 48), Q8_0, 0)), r"a is \[2, 48\] in blocks of 32"),
        (header(("a", (0, 32), Q8_0, 0)), r"a is \[0, 32\] in blocks of 32"),
        (header(("a", (1, 1, 1, 1, 1), F32, 0)), r"a is \[1, 1, 1, 1, 1\] in blocks of 1"),
        (header(counts=(10**6, 1)), r"names 1000000 tensors where \d+ bytes are left"),
        (header(counts=(0, 10**6)), r"names 1000000 facts where \d+ bytes are left"),
    ],
)
def test_what_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(padded(raw) + bytes(1000))
    with pytest.raises(CorruptFileError, match=rf"x\.gguf: {message}"):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("least", "what", "build"),
    [
        (13, "facts", lambda count: b"GGUF" + struct.pack("<IQQ", 3, 0, count)),
        (24, "tensors", lambda count: header(counts=(count, 1))),
        (8, "strings", lambda count: header(facts=[("x", 9, array(8, count, b""))])),
        (2, "numbers", lambda count: header(facts=[("x", 9, array(2, count, b""))])),
        (8, "dimensions", lambda count: header(counts=(1, 1)) + string("a") + struct.pack("<I", count)),
    ],
)
def test_a_count_of_more_than_there_is_room_for_is_refused_before_anything_is_made(
    tmp_path: Path, least: int, what: str, build: Any
) -> None:
    """With room for all of them it is something else that is wrong, if anything is."""
    (tmp_path / "x.gguf").write_bytes(build(7) + bytes(7 * least - 1))
    with pytest.raises(CorruptFileError, match=rf"names 7 {what} where {7 * least - 1} bytes are left"):
        read_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(build(7) + bytes(7 * least))
    try:
        read_gguf(tmp_path / "x.gguf")
    except CorruptFileError as error:
        assert f"names 7 {what}" not in str(error)  # noqa: PT017


# Rows.


def test_numbers_that_gguf_adds_and_what_stands_the_other_way() -> None:
    small = torch.tensor([2.0**-12, 1.0], dtype=torch.float16)
    (added,) = Rows(added=1.0).to_gguf([small])
    assert added.tolist() == [1 + 2.0**-12, 2.0]
    (back,) = Rows(added=1.0).from_gguf([added])
    assert back.tolist() == small.tolist()
    weight = torch.arange(6.0).reshape(3, 2)
    (turned,) = Rows(transposed=True).to_gguf(weight.split(2))
    assert torch.equal(turned, weight.t())
    assert turned.is_contiguous()
    blocks = list(Rows().from_gguf(weight.split(2)))
    assert [len(block) for block in blocks] == [2, 1]
    bias = torch.arange(8.0)
    assert torch.cat(list(Rows(head=4).to_gguf(bias.split(3)))).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def gguf_file(path: Path, rows: dict[str, Rows]) -> tuple[GgufFile, dict[str, Tensor]]:
    """A file with a tensor of each kind, and what they are."""
    draw = torch.Generator().manual_seed(0)
    tensors = {"v": torch.arange(5.0), "h": torch.randn(7, 6, generator=draw).half(), "b": torch.ones(2, 2).bfloat16()}
    packed = gguf.quantize(torch.randn(9, 64, generator=draw).numpy(), gguf.GGMLQuantizationType.Q8_0)
    data = [
        tensors["v"].numpy().tobytes(),
        tensors["h"].numpy().tobytes(),
        tensors["b"].view(torch.int16).numpy().tobytes(),
    ]
    data.append(packed.tobytes())
    starts = [0, *itertools.accumulate(len(padded(one)) for one in data)]
    places = [("V", (5,), F32, starts[0]), ("H", (7, 6), F16, starts[1]), ("B", (2, 2), BF16, starts[2])]
    raw = padded(header(*places, ("Q", (9, 64), Q8_0, starts[3]), ("other", (1,), F32, 0)))
    path.write_bytes(raw + b"".join(map(padded, data)))
    tensors["q"] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    names = {name.upper(): name for name in tensors}
    return GgufFile(read_gguf(path), names, lambda place: rows.get(place.name, Rows())), tensors


@pytest.mark.parametrize("block_bytes", [1, 600, 1 << 20])
def test_tensors_are_read_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block_bytes)
    file, tensors = gguf_file(tmp_path / "x.gguf", {"H": Rows(transposed=True)})
    tensors["h"] = tensors["h"].t()
    assert file.tensors.keys() == tensors.keys()
    assert file.stored == {tmp_path / "x.gguf": (tmp_path / "x.gguf").stat().st_size}
    for name, tensor in tensors.items():
        assert (file.tensors[name].dtype, file.tensors[name].shape) == (
            {"v": "F32", "h": "F16", "b": "BF16", "q": "F32"}[name],
            tuple(tensor.shape),
        )
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    assert [len(block) for block in file.read_rows("q")] == {1: [1] * 9, 600: [2, 2, 2, 2, 1], 1 << 20: [9]}[
        block_bytes
    ]
    header = read_gguf(tmp_path / "x.gguf")
    assert [is_packed(tensor) for tensor in header.tensors.values()] == [False, False, False, True, False]
    beside = TemporaryDirectory()
    (Path(beside.name) / "tokenizer.json").touch()
    source = gguf_source(file, {"a": 1}, beside, "Q8_0", ["said"])
    assert (source.config, source.quantized, source.notices, source.path) == ({"a": 1}, "Q8_0", ["said"], file.path)
    assert [path.name for path in source.small_files] == ["tokenizer.json"]
    assert source.beside == Path(beside.name)
    assert torch.equal(source.read("q"), tensors["q"])


# Writing.


def test_what_can_be_packed() -> None:
    assert [packs(shape) for shape in ((2, 64), (2, 32), (2, 48), (64,), (1, 2, 32))] == [
        True,
        True,
        False,
        False,
        False,
    ]


def outputs() -> Iterator[tuple[str, tuple[int, ...], str, list[Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    yield "v", (5,), "F32", [torch.randn(5, generator=draw).half()]
    yield "q", (5, 64), "Q8_0", list(torch.randn(5, 64, generator=draw).split(2))
    yield "h", (3, 5), "F16", list(torch.randn(3, 5, generator=draw).split(1))
    yield "b", (1, 3), "BF16", [torch.ones(1, 3)]


def made_header() -> bytes:
    sizes, starts, end = {"v": 20, "q": 5 * 68, "h": 30, "b": 6}, {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += size + -size % 32
    kinds = {"F32": F32, "Q8_0": Q8_0, "F16": F16, "BF16": BF16}
    return padded(header(*((name, shape, kinds[kind], starts[name]) for name, shape, kind, _ in outputs())))


@pytest.mark.parametrize("compared", [7, 1 << 20])
def test_a_file_is_what_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: int) -> None:
    monkeypatch.setattr(writing, "_COMPARED", compared)
    path = tmp_path / "x.gguf"
    (tmp_path / "x.gguf.new.partial").write_bytes(bytes(5000))  # what a kill has left
    write_gguf(path, made_header(), [GgufOutput(*one) for one in outputs()])
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert path.stat().st_size % 32 == 0
    found = read_gguf(path)
    file = GgufFile(found, {name: name for name in found.tensors}, lambda place: Rows())
    for name, shape, kind, blocks in outputs():
        tensor = torch.cat(blocks)
        assert GgufOutput(name, shape, kind, []).nbytes == found.tensors[name].nbytes
        if kind == "Q8_0":
            near = gguf.dequantize(
                gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
            assert np.array_equal(file.read(name).numpy(), near)
        else:
            assert torch.equal(file.read(name), tensor.to(file.read(name).dtype))
    end = max(one.offset + one.nbytes for one in found.tensors.values())
    assert path.stat().st_size == end + -end % 32


@pytest.mark.parametrize("place", ["first", "last", "shape", "missing"])
def test_what_is_read_again_as_something_else_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(writing, "_COMPARED", 64)
    written = [GgufOutput(*one) for one in outputs()]
    if place == "shape":
        written[1] = GgufOutput("q", (10, 32), "Q8_0", written[1].blocks)
    if place == "missing":
        written[3] = GgufOutput("x", (1, 3), "BF16", written[3].blocks)

    def flush(descriptor: int) -> None:
        """Damage what has been written, before it is read again."""
        if place in ("first", "last"):
            raw = bytearray((tmp_path / "x.gguf.new.partial").read_bytes())
            q = read_gguf(tmp_path / "x.gguf.new.partial").tensors["q"]
            raw[q.offset if place == "first" else q.offset + q.nbytes - 1] ^= 1
            (tmp_path / "x.gguf.new.partial").write_bytes(raw)

    monkeypatch.setattr(writing.os, "fsync", flush)
    with pytest.raises(OutputError, match=rf"{'x' if place == 'missing' else 'q'}: not what was written to it"):
        write_gguf(tmp_path / "x.gguf", made_header(), written)
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_size_than_planned_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="v: 16 bytes, planned were 20"):
        write_gguf(tmp_path / "x.gguf", made_header(), [GgufOutput("v", (5,), "F32", [torch.ones(4)])])
    assert not list(tmp_path.iterdir())
