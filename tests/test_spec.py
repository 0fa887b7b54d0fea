"""spec.md against the code: its vectors, its hex dump, its limits and its list of error codes are read from it.

`spec_reader.py` follows the text alone; it is held to the same.
"""

import ast
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmint8.formats import (
    BITSANDBYTES,
    DTYPES,
    FORMAT_VERSIONS,
    LAYOUTS,
    NATIVE,
    CheckpointError,
    CheckpointWriter,
    Layout,
    Quantization,
    Scheme,
    TensorSpec,
    check_values,
    open_checkpoint,
)
from llmint8.formats.containers import safetensors as container
from llmint8.formats.containers import tensors
from llmint8.formats.disk import reading, strict_json
from llmint8.formats.int8.manifest import tensor_sha256
from llmint8.kernels import linear, reference
from llmint8.kernels.kbit import levels, packing
from llmint8.kernels.kbit import linear as kbit_facade
from llmint8.kernels.kbit import reference as kbit
from llmint8.runtime.layers.embedding import Int8Embedding

ROOT = Path(__file__).parent.parent
SPEC = (ROOT / "spec.md").read_text(encoding="utf-8")
# Fenced blocks by the last word after the fence: "```json limits" and "```hexdump".
BLOCKS = dict(re.findall(r"^```(?:json )?(\S+)\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL))
INTS = {16: torch.int16, 32: torch.int32}


def vectors(name: str) -> list[Any]:
    """Of both formats, where both have some."""
    blocks = [BLOCKS[block] for block in (name, f"{name}_2") if block in BLOCKS]
    return [pytest.param(vector, id=vector.get("what")) for block in blocks for vector in json.loads(block)]


def absmax_of(vector: dict[str, Any]) -> str:
    return "SCB" if "SCB" in vector else "absmax"


def from_bits(rows: Any, dtype: str) -> Tensor:
    """Return a tensor from the hexadecimal digits of its items."""
    width = DTYPES[dtype].itemsize * 8
    items = torch.tensor(json.loads(re.sub(r'"(\w+)"', lambda hit: str(int(hit[1], 16)), json.dumps(rows))))
    return items.to(INTS[width]).view(DTYPES[dtype])


def minimal_file(layout: Layout = BITSANDBYTES) -> bytes:
    lines = BLOCKS[block("hexdump", layout)].splitlines()
    return b"".join(bytes.fromhex(line[8:].split("|")[0]) for line in lines)


def block(name: str, layout: Layout) -> str:
    stem, dot, suffix = name.partition(".")
    return name if layout == BITSANDBYTES else f"{stem}_2{dot}{suffix}"


def written(layout: Layout, path: Path) -> Path:
    (path / layout.single).write_bytes(minimal_file(layout))
    for name in ("config.json", "llmint8_manifest.json"):
        (path / name).write_text(BLOCKS[block(name, layout)], encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """The checkpoint of section 15, as a directory."""
    return written(BITSANDBYTES, tmp_path)


@pytest.fixture(params=LAYOUTS.values(), ids=lambda layout: f"format {layout.major}")
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture
def either(layout: Layout, tmp_path: Path) -> Path:
    """The checkpoint of section 15 or of section 23."""
    return written(layout, tmp_path)


def test_every_block_is_read() -> None:
    vector_blocks = {"quantize_weight", "quantize_rows", "linear", "sha256"}
    vector_blocks |= {"rotate", "quantize_weight_2", "quantize_rows_2", "linear_2", "lookup_2"}
    vector_blocks |= {"levels_2", "pack_2", "quantize_kbit_2", "linear_kbit_2"}
    files_of_minimal = {"hexdump", "config.json", "llmint8_manifest.json"}
    files_of_minimal |= {"hexdump_2", "config_2.json", "llmint8_manifest_2.json"}
    assert set(BLOCKS) == vector_blocks | files_of_minimal | {"limits", "dtypes"}


def test_the_links_of_the_contents_lead_to_the_headings() -> None:
    headings = re.findall(r"^## (.*)$", SPEC, re.MULTILINE)
    links = re.findall(r"^\d+\. \[(.*)\]\(#(.*)\)$", SPEC, re.MULTILINE)
    assert [f"{number}. {title}" for number, (title, _) in enumerate(links, start=1)] == headings
    for heading, (_, anchor) in zip(headings, links, strict=True):
        assert re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == anchor


def test_version() -> None:
    assert SPEC.startswith(f"# The llmint8 checkpoint format, versions {' and '.join(FORMAT_VERSIONS)}\n")


def test_limits_and_dtypes() -> None:
    assert json.loads(BLOCKS["limits"]) == {
        "header_bytes": container.MAX_HEADER_BYTES,
        "json_file_bytes": reading.MAX_JSON_BYTES,
        "json_values": strict_json.MAX_VALUES,
        "tensor_name_characters": tensors.MAX_NAME_LENGTH,
        "dimensions": tensors.MAX_DIMENSIONS,
        "elements": 2**63 - 1,
    }
    assert json.loads(BLOCKS["dtypes"]) == {name: dtype.itemsize for name, dtype in DTYPES.items()}


def test_the_other_reader_knows_nothing_of_ours(spec_reader: ModuleType) -> None:
    tree = ast.parse(Path(str(spec_reader.__file__)).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"numpy"}
    sizes = {name: np.dtype(item).itemsize for name, item in spec_reader.ITEMS.items()}
    assert sizes == json.loads(BLOCKS["dtypes"])
    limits = (spec_reader.HEADER_BYTES, spec_reader.JSON_FILE_BYTES, spec_reader.JSON_VALUES)
    limits += (spec_reader.NAME_CHARACTERS, spec_reader.DIMENSIONS, spec_reader.ELEMENTS)
    assert limits == tuple(json.loads(BLOCKS["limits"]).values())


def test_the_error_codes_are_those_of_the_code_in_order() -> None:
    listed = re.findall(r"^\| (E\d\d)\b", SPEC, re.MULTILINE)
    raised = {
        node.value
        for path in (ROOT / "formats").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"E\d\d", node.value)
    }
    assert listed == sorted(raised)
    assert listed == [f"E{number:02d}" for number in range(1, len(listed) + 1)]
    assert set(re.findall(r"\bE\d\d\b", SPEC)) == raised


@pytest.mark.parametrize("vector", vectors("quantize_weight"))
def test_quantize_weight(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    weight = from_bits(vector["weight"], vector["dtype"])
    values, absmax = reference.quantize_weight(weight, vector.get("rotation"))
    assert values.tolist() == vector["int8"]
    bits = from_bits(vector[absmax_of(vector)], "F32")
    assert torch.equal(absmax.view(torch.int32), bits.view(torch.int32))
    items = weight.view(INTS[weight.itemsize * 8]).numpy().tobytes()
    rotated = spec_reader.rotate(
        spec_reader.as_array(items, vector["dtype"], tuple(weight.shape)), vector.get("rotation")
    )
    values, absmax = spec_reader.quantize_weight(rotated)
    assert values.tolist() == vector["int8"]
    assert absmax.tobytes() == bits.numpy().tobytes()


@pytest.mark.parametrize("vector", vectors("rotate"))
def test_rotate(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    x = torch.tensor(vector["x"], dtype=torch.float32)
    assert reference.rotate(x, 64).tolist() == vector["y"]
    assert spec_reader.rotate(x.numpy(), 64).tolist() == vector["y"]
    assert spec_reader.rotate(np.array(vector["y"]), 64).tolist() == vector["x"]


@pytest.mark.parametrize("vector", vectors("quantize_rows"))
def test_quantize_rows(vector: dict[str, Any]) -> None:
    rows = reference.quantize_rows(
        torch.tensor(vector["x"], dtype=torch.float32),
        torch.tensor(vector["outlier_dims"], dtype=torch.int32),
        vector["activation"],
        vector["group"],
        vector.get("rotation"),
    )
    assert rows.values.tolist() == vector["int8"]
    assert rows.scale.tolist() == vector["scale"]
    assert (None if rows.zero_point is None else rows.zero_point.tolist()) == vector["zero_point"]


@pytest.mark.parametrize("vector", vectors("quantize_rows"))
def test_the_other_reader_quantizes_rows(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    x, dims = np.array(vector["x"]), np.array(vector["outlier_dims"], dtype=np.int64)
    how = vector["activation"], vector["group"], vector.get("rotation")
    values, scale, zero_point = spec_reader.quantize_rows(x, dims, *how)
    # In the outlier dimensions q holds z, as the text says; it adds nothing.
    assert values.tolist() == vector["int8"]
    assert scale.tolist() == vector["scale"]
    assert zero_point.tolist() == (vector["zero_point"] or np.zeros_like(scale).tolist())


@pytest.mark.parametrize("facade", [False, True], ids=["reference", "facade"])
@pytest.mark.parametrize("vector", vectors("linear"))
def test_linear(vector: dict[str, Any], facade: bool) -> None:
    x = torch.tensor(vector["x"], dtype=torch.float32)
    weight = reference.Int8Weight(
        torch.tensor(vector["int8"], dtype=torch.int8),
        torch.tensor(vector[absmax_of(vector)], dtype=torch.float32),
        torch.tensor(vector["outlier_dims"], dtype=torch.int32),
        torch.tensor(vector["outlier_weight"], dtype=torch.float16),
        torch.tensor(vector["bias"], dtype=torch.float16),
        group=vector["group"],
        rotation=vector.get("rotation"),
    )
    if facade:
        y = linear.int8_linear(x, linear.prepare(weight), vector["activation"])
    else:
        y = reference.int8_linear(x, weight, vector["activation"])
    assert y.tolist() == vector["y"]


@pytest.mark.parametrize("vector", vectors("linear"))
def test_the_other_reader_computes_a_layer(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    parts = {"weight": "int8", "absmax": absmax_of(vector), "outlier_weight": "outlier_weight", "bias": "bias"}
    layer = {part: np.array(vector[key]) for part, key in parts.items()}
    layer["outlier_dims"] = np.array(vector["outlier_dims"], dtype=np.int32)
    how = vector["activation"], vector["group"], vector.get("rotation")
    y = spec_reader.linear(np.array(vector["x"]), layer, *how)
    assert y.tolist() == vector["y"]


@pytest.mark.parametrize("vector", vectors("lookup"))
def test_looking_up(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    layer = {part: np.array(vector[part]) for part in ("absmax", "outlier_dims", "outlier_weight")}
    layer["weight"] = np.array(vector["int8"])
    assert spec_reader.look_up(layer, np.array(vector["rows"]), vector["rotation"]).tolist() == vector["y"]
    rows, width = layer["weight"].shape
    with torch.device("meta"):
        plain = torch.nn.Embedding(rows, width)
    table = Int8Embedding.in_place_of(plain, len(vector["outlier_dims"]), vector["rotation"], dtype=torch.float32)
    dtypes = {"weight": torch.int8, "outlier_dims": torch.int32}
    table.load_state_dict({part: torch.tensor(layer[part], dtype=dtypes.get(part, torch.float32)) for part in layer})
    assert table(torch.tensor(vector["rows"])).tolist() == vector["y"]


@pytest.mark.parametrize("vector", vectors("levels"))
def test_levels(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    how = vector["bits"], vector["data_type"]
    expected = from_bits(vector["levels"], "F32")
    assert torch.equal(levels.levels_of(how[1], how[0]), expected)
    assert spec_reader.levels(*how).tolist() == expected.tolist()


@pytest.mark.parametrize("vector", vectors("pack"))
def test_packing(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    bits, codes = vector["bits"], torch.tensor(vector["codes"], dtype=torch.uint8)
    packed = torch.tensor([list(bytes.fromhex(row)) for row in vector["packed"]], dtype=torch.uint8)
    assert torch.equal(packing.pack(codes, bits), packed)
    assert torch.equal(packing.unpack(packed, bits, codes.shape[1]), codes)
    assert spec_reader.codes(packed.numpy(), bits, codes.shape[1]).tolist() == vector["codes"]


@pytest.mark.parametrize("vector", vectors("quantize_kbit"))
def test_quantizing_to_k_bits(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    weight = torch.tensor(vector["weight"], dtype=torch.float32)
    how = vector["bits"], vector["data_type"], vector["group"]
    codes, absmax, _ = kbit.quantize_weight(weight, *how)
    assert (codes.tolist(), absmax.tolist()) == (vector["codes"], vector["absmax"])
    theirs = spec_reader.quantize_kbit(weight.numpy(), *how)
    assert [array.tolist() for array in theirs] == [vector["codes"], vector["absmax"]]


@pytest.mark.parametrize("vector", vectors("linear_kbit"))
def test_a_layer_of_k_bits(vector: dict[str, Any], spec_reader: ModuleType) -> None:
    bits, width, codebook = vector["bits"], vector["in_features"], vector["codebook"]
    packed = torch.tensor([list(bytes.fromhex(row)) for row in vector["packed"]], dtype=torch.uint8)
    layer = {part: torch.tensor(vector[part]) for part in ("outlier_dims", "outlier_weight", "absmax")}
    known = levels.levels_of(vector["data_type"], bits) if codebook is None else torch.tensor(codebook).float()
    parts = layer["absmax"].half(), known, width, vector["group"], layer["outlier_dims"].int(), layer["outlier_weight"]
    weight = kbit.KBitWeight(packed, *parts, torch.tensor(vector["bias"]).float())
    x = torch.tensor(vector["x"]).float()
    assert kbit.kbit_linear(x, weight).tolist() == vector["y"]
    y = kbit_facade.kbit_linear(x, kbit_facade.prepare(weight))
    # Compiled, x and levels are whole numbers of 2^-14 of the largest: 8, 14 and 6 dimensions that are not 0.
    assert torch.allclose(y, torch.tensor(vector["y"]), rtol=0, atol=8 * 14 * 6 * 2.0**-13)
    arrays = {part: tensor.numpy() for part, tensor in (layer | {"weight": packed}).items()}
    arrays |= {} if codebook is None else {"codebook": np.array(codebook)}
    dequantized = spec_reader.dequantize_kbit(arrays, vector, width)
    assert (x.numpy() @ dequantized.T + np.array(vector["bias"])).tolist() == vector["y"]


@pytest.mark.parametrize("vector", vectors("sha256"))
def test_sha256(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["data"])
    assert hashlib.sha256(data).hexdigest() == vector["sha256"]
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    tensor = raw.view(DTYPES[vector["dtype"]]).reshape(vector["shape"])
    assert tensor_sha256(tensor) == vector["sha256"]


def test_the_hex_dump_is_whole(layout: Layout) -> None:
    """Offsets, 16 bytes a line, and the text at the right: what a reader of the spec checks a program with."""
    data = minimal_file(layout)
    assert f"`{layout.single}`, {len(data)} bytes:" in SPEC
    for number, line in enumerate(BLOCKS[block("hexdump", layout)].splitlines()):
        chunk = data[16 * number : 16 * number + 16]
        assert int(line[:8], 16) == 16 * number
        assert line.partition("|")[2] == "".join(chr(byte) if 32 <= byte < 127 else "." for byte in chunk) + "|"


def test_the_minimal_checkpoint_is_valid(minimal: Path) -> None:
    checkpoint = open_checkpoint(minimal)
    assert check_values(checkpoint) == []
    (record,) = checkpoint.records.values()
    assert (record.name, record.out_features, record.in_features) == ("proj", 2, 4)
    assert (record.outlier_count, record.has_bias) == (1, True)
    quantization = checkpoint.quantization
    assert (quantization.llmint8, quantization.format_version) == (True, "1.0")  # it has nothing of a later one
    assert (quantization.criterion, quantization.scheme.activation, quantization.threshold) == (
        "top-k=1",
        "absmax",
        6.0,
    )
    assert quantization.scheme.activation_group is None
    assert quantization.skip_modules == ["lm_head"]


def test_the_other_reader_opens_checks_and_computes_the_minimal_checkpoint(
    minimal: Path, spec_reader: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = spec_reader.open_checkpoint(minimal)
    assert checkpoint.layers == {"proj": (2, 4, 1)}
    assert spec_reader.main(str(minimal)) == 0
    vector = json.loads(BLOCKS["linear"])[0]
    assert spec_reader.compute(checkpoint, "proj", np.array(vector["x"])).tolist() == vector["y"]
    data = bytearray((minimal / "model.safetensors").read_bytes())
    data[-1] = 1  # weight_format
    (minimal / "model.safetensors").write_bytes(data)
    assert spec_reader.main(str(minimal)) == 1
    assert capsys.readouterr().out.startswith("E10 ")


STRANGE = (None, True, False, 0, 1, -1, 2.0, 1e999, math.nan, 2**63, "", "x", "1.1", "\x1b", "..", "I8", [], [0], {})
NAMES = (
    "in_features",
    "more",
    "",
    "\u200b",
    ".weight",
    "SCB",
    "proj.proj.weight",
    "proj.row_sum",
    "llm_int8_threshold",
)


def mutated(value: Any, draw: random.Random) -> Any:
    """Change, rename, double or remove one value inside of a value from JSON."""
    value = json.loads(json.dumps(value))
    holders: list[Any] = [value]
    for holder in holders:
        inside = holder.values() if isinstance(holder, dict) else holder
        holders += [item for item in inside if item and isinstance(item, dict | list)]
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = draw.random() if isinstance(holder, dict) else 1
    if what < 0.3:
        holder[draw.choice(NAMES)] = holder[key]
    if what < 0.2:
        del holder[key]
    if what >= 0.3:
        holder[key] = draw.choice(STRANGE)
    return value


@pytest.fixture(params=["format 1", "format 2", "k bits"])
def some(request: pytest.FixtureRequest, tmp_path: Path, kbit_checkpoint: Callable[[Path], Path]) -> Path:
    """A minimal checkpoint of each kind."""
    if request.param == "k bits":
        return kbit_checkpoint(tmp_path)
    return written(BITSANDBYTES if request.param == "format 1" else NATIVE, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "llmint8_manifest.json", "header", "data"])
def test_both_readers_say_the_same_of_whatever_is_there(some: Path, spec_reader: ModuleType, name: str) -> None:
    minimal = some
    (weights,) = minimal.glob("*.safetensors")
    path = minimal / name if name.endswith(".json") else weights
    whole = path.read_bytes()
    start = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    told = set()
    for seed in range(150):
        draw = random.Random(seed)
        if name == "data":
            data = bytearray(whole)
            data[draw.randrange(start, len(whole))] ^= 1 << draw.randrange(8)
        elif name == "header":
            header = json.dumps(mutated(json.loads(whole[8:start]), draw)).encode()
            data = bytearray(len(header).to_bytes(8, "little") + header + whole[start:])
        else:
            data = bytearray(json.dumps(mutated(json.loads(whole), draw)).encode())
        path.write_bytes(data)
        try:
            ours = sorted(error.code for error in check_values(open_checkpoint(minimal)))
        except CheckpointError as error:
            ours = [error.code]
        try:
            theirs = sorted(error.code for error in spec_reader.problems(spec_reader.open_checkpoint(minimal)))
        except spec_reader.BrokenError as error:
            theirs = [error.code]
        assert theirs == ours, (seed, bytes(data))
        told.update(ours)
    assert len(told) > 1


def test_the_minimal_checkpoint_holds_the_layer_of_the_vectors(minimal: Path) -> None:
    checkpoint = open_checkpoint(minimal)
    stated = re.search(r"its\s+source\s+is\s+`(.*?)`\s+in\s+F16", SPEC)
    assert stated is not None
    source = torch.tensor(json.loads(stated[1]), dtype=torch.float16)
    values, absmax = reference.quantize_weight(source)
    vector = json.loads(BLOCKS["linear"])[0]
    dims = checkpoint.read("proj.outlier_dims")
    assert dims.tolist() == vector["outlier_dims"]
    assert torch.equal(checkpoint.read("proj.outlier_weight"), source[:, dims.long()])
    assert checkpoint.read("proj.weight").tolist() == values.tolist() == vector["int8"]
    assert checkpoint.read("proj.SCB").tolist() == absmax.tolist() == vector["SCB"]
    assert checkpoint.read("proj.bias").tolist() == vector["bias"]


def test_the_minimal_checkpoint_of_format_2_is_a_rotated_layer(tmp_path: Path, spec_reader: ModuleType) -> None:
    checkpoint = open_checkpoint(written(NATIVE, tmp_path))
    assert check_values(checkpoint) == []
    source = torch.zeros(2, 64)
    stated = re.search(r"all zeros but for\s+`(.*?)` and `(.*?)` in the first three columns and a 3 in the last", SPEC)
    assert stated is not None
    source[:, :3], source[1, 63] = torch.tensor([json.loads(stated[1]), json.loads(stated[2])]), 3
    values, absmax = reference.quantize_weight(source.half(), 64)
    assert torch.equal(checkpoint.read("proj.weight"), values)
    assert torch.equal(checkpoint.read("proj.absmax"), absmax)
    assert torch.equal(checkpoint.read("proj.outlier_weight"), source[:, [2]].half())
    assert checkpoint.records["proj"].scheme == Scheme("absmax", None, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 1
    found = spec_reader.compute(spec_reader.open_checkpoint(tmp_path), "proj", x.numpy())
    exact = x.double() @ source.double().t() + checkpoint.read("proj.bias").double()
    assert torch.allclose(torch.from_numpy(found), exact, atol=0.02 * float(exact.abs().max()))


def test_the_safetensors_library_reads_the_same(either: Path, layout: Layout) -> None:
    minimal = either
    checkpoint = open_checkpoint(minimal)
    theirs = safetensors.torch.load_file(minimal / layout.single)
    assert theirs.keys() == checkpoint.tensors.keys()
    for name, tensor in theirs.items():
        ours = checkpoint.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours, tensor)


def test_the_writer_makes_the_same_bytes(either: Path, layout: Layout, tmp_path: Path) -> None:
    minimal = either
    checkpoint = open_checkpoint(minimal)
    config = json.loads(BLOCKS[block("config.json", layout)])
    said = config.pop("quantization_config")
    quantization = Quantization.from_dict(said).with_block(said.get("llmint8", said))
    manifest = json.loads(BLOCKS[block("llmint8_manifest.json", layout)])
    out = tmp_path / "out"
    in_file_order = sorted(checkpoint.tensors.values(), key=lambda info: info.offset)
    with CheckpointWriter(out, 1 << 20) as writer:
        writer.plan([[TensorSpec(info.name, info.dtype, info.shape) for info in in_file_order]])
        for name in checkpoint.tensors:
            writer.write(name, checkpoint.read(name))
        writer.commit(config, quantization, manifest["source"], manifest["modules"], {})
    bytes_of = {path.name: path.read_bytes() for path in out.iterdir()}
    assert bytes_of.keys() == {layout.single, "config.json", "llmint8_manifest.json"}
    for name, data in bytes_of.items():
        assert data == (minimal / name).read_bytes(), name
