"""Reading checkpoints of format 2: every way to code a layer, and for each rule what breaks it and what just does not.

They are put together with the safetensors library, json and hashlib, as those of `test_checkpoint.py`; and whatever is
said of one, `spec_reader.py` must say too.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmint8.formats import (
    BITSANDBYTES,
    NATIVE,
    CheckpointError,
    KBit,
    Quantization,
    Scheme,
    check_values,
    open_checkpoint,
)
from llmint8.formats.int8.manifest import ManifestEntry

INT8 = {"bits": 8, "data_type": "int", "group": None, "rotation": None, "inputs": "int8-absmax", "input_group": None}
ROTATED = INT8 | {"rotation": {"kind": "hadamard", "block": 64}, "inputs": "int8-zeropoint", "input_group": 64}
TABLE = INT8 | {"inputs": None, "lookup": True}
K3 = INT8 | {"bits": 3, "data_type": "quantile", "group": 32, "inputs": "16-bit"}
K6 = INT8 | {"bits": 6, "data_type": "float", "inputs": "16-bit"}
WEIGHTS, MANIFEST = "llmint8-model.safetensors", "llmint8_manifest.json"
DTYPES = {"int8": "I8", "uint8": "U8", "int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SOURCE = {"name": "s", "repo": None, "commit": None}
MISSING = object()


def hadamard() -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / 8


def rotated_back(weight: Tensor) -> Tensor:
    """The int8 weight [N, 150] with its two whole blocks of 64 rotated; the last 22 columns stay."""
    found = weight.double()
    for start in (0, 64):
        found[:, start : start + 64] = found[:, start : start + 64] @ hadamard()
    return found


def outliers(name: str, n: int, dims: list[int], columns: Tensor | None = None) -> dict[str, Tensor]:
    columns = torch.full((n, len(dims)), 0.25) if columns is None else columns
    return {f"{name}.outlier_dims": torch.tensor(dims, dtype=torch.int32), f"{name}.outlier_weight": columns.bfloat16()}


def tensors() -> dict[str, Tensor]:
    """A layer of each way: rotated, plain, a table, and of 3 and of 6 bits, 33 and 70 wide."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-126, 127, (3, 150), dtype=torch.int8, generator=draw)
    weight[:, 7], weight[2] = 127, 0
    absmax, dims = torch.tensor([1.5, 300.0, 0.0]), [1, 77, 127, 128, 149]
    columns = rotated_back(weight)[:, dims] * absmax[:, None] / 127
    return {
        **{"r.weight": weight, "r.absmax": absmax, **outliers("r", 3, dims), "r.outlier_weight": columns.float()},
        **{"r.bias": torch.ones(3), "p.weight": weight[:, :5] * 0, "p.absmax": torch.zeros(3), **outliers("p", 3, [])},
        **{"table.weight": weight[:2, :8].contiguous(), "table.absmax": absmax[:2], **outliers("table", 2, [])},
        **{"k3.weight": torch.arange(24, dtype=torch.uint8)[None], "k3.absmax": torch.ones(1, 2).half()},
        **{"k3.codebook": torch.tensor([-1, -0.5, -0.5, 0, 0.25, 0.5, 1, 1]).half(), **outliers("k3", 1, [2, 32])},
        **{"k6.weight": torch.zeros(2, 96, dtype=torch.uint8), "k6.absmax": torch.ones(2, 1).half()},
        **outliers("k6", 2, [69]),
        **{"norm.weight": torch.ones(4, dtype=torch.uint8), "r.SCB": torch.ones(1), "codebook": torch.ones(2)},
    }


@dataclass
class Draft:
    """A checkpoint that is not on the disk yet."""

    tensors: dict[str, Tensor] = field(default_factory=tensors)
    said: dict[str, Any] = field(
        default_factory=lambda: copy.deepcopy(
            {
                "quant_method": "llmint8",
                "format_version": "2.2",
                "producer": "test 1",
                "schemes": {"rotated": ROTATED, "int8": INT8, "table": TABLE, "k3": K3, "k6": K6},
                "layers": {"r": "rotated", "p": "int8", "table": "table", "k3": "k3", "k6": "k6"},
                "in_features": {"k3": 33, "k6": 70},
                "not_quantized": ["lm_head"],
                "rounding": "nearest",
                "outliers": {"criterion": "by hand", "counts": {"r": 5, "p": 0, "table": 0, "k3": 2, "k6": 1}},
                "calibration": None,
                "source": SOURCE,
            }
        )
    )

    def write(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        safetensors.torch.save_file(
            {n: t.clone(memory_format=torch.contiguous_format) for n, t in self.tensors.items()}, path / WEIGHTS
        )
        (path / "config.json").write_text(json.dumps({"quantization_config": self.said}))
        entries = {
            name: {
                "file": WEIGHTS,
                "dtype": DTYPES[str(tensor.dtype).removeprefix("torch.")],
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest(),
            }
            for name, tensor in self.tensors.items()
        }
        source = {**SOURCE, "config_sha256": "0" * 64, "files": {}}
        version, producer = self.said.get("format_version"), self.said.get("producer")
        manifest = {"format_version": version, "producer": producer, "source": source, "modules": {}}
        (path / MANIFEST).write_text(json.dumps({**manifest, "tensors": entries}))
        return path


Found = Callable[[Draft], list[CheckpointError]]


@pytest.fixture
def found(tmp_path: Path, spec_reader: ModuleType) -> Found:
    """Says what is wrong with a draft, and that the other reader says the same."""
    numbers = iter(range(1000))

    def read(draft: Draft) -> list[CheckpointError]:
        path = draft.write(tmp_path / str(next(numbers)))
        try:
            ours = check_values(open_checkpoint(path))
        except CheckpointError as error:
            ours = [error]
        try:
            theirs = [error.code for error in spec_reader.problems(spec_reader.open_checkpoint(path))]
        except spec_reader.BrokenError as error:
            theirs = [error.code]
        assert sorted(theirs) == sorted(error.code for error in ours)
        return ours

    return read


Change = Callable[[Draft], object]
CASES: list[Any] = []


def case(code: str | None, name: str, named: str, *changes: Change) -> None:
    CASES.append(pytest.param(code, named, changes, id=f"{code or 'valid'}-{name}"))


def put(name: str, tensor: Tensor | None) -> Change:
    return lambda draft: draft.tensors.pop(name) if tensor is None else draft.tensors.update({name: tensor})


def element(name: str, place: tuple[int, ...], value: float) -> Change:
    return lambda draft: draft.tensors[name].__setitem__(place, value)


def moved(place: tuple[int, int], steps: float) -> Change:
    """Move an outlier's value away from what it stands for, by so many steps of its row."""
    return lambda draft: draft.tensors["r.outlier_weight"].__setitem__(
        place, draft.tensors["r.outlier_weight"][place] + steps * draft.tensors["r.absmax"][place[0]] / 127
    )


def said(path: str, value: Any) -> Change:
    def change(draft: Draft) -> None:
        holder, keys = draft.said, path.split("/")
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        if value is MISSING:
            del holder[keys[-1]]

    return change


GPTQ = said("rounding", "gptq")
case(None, "as it is", "")
case(None, "gptq, as it is", "", GPTQ)
# E12
for value in (float("nan"), float("inf"), -1.0):
    case("E12", f"k bits, {value}", "k3.absmax: row 0, block 1 is ", element("k3.absmax", (0, 1), value))
    case("E12", f"int8, {value}", "p.absmax: row 2 is ", element("p.absmax", (2,), value))
# E13: rows reach 127, or with GPTQ at most that; a codebook never falls.
case(
    "E13",
    "126",
    "r.weight: row 1 has magnitude 126, expected 127",
    lambda d: d.tensors["r.weight"][1].clamp_(-126, 126),
)
case(None, "gptq, 126", "", GPTQ, lambda d: d.tensors["r.weight"][1].clamp_(-126, 126))
case("E13", "-128", "r.weight: row 0 has magnitude 128, expected 127", element("r.weight", (0, 130), -128))
case("E13", "gptq, -128", "row 0 has magnitude 128, expected at most 127", GPTQ, element("r.weight", (0, 130), -128))
case("E13", "a zero row", "p.weight: row 1 has magnitude 1, expected 0", element("p.weight", (1, 4), -1))
case("E13", "gptq, a zero row", "row 1 has magnitude 1, expected at most 0", GPTQ, element("p.weight", (1, 4), 1))
case(None, "no columns at all", "", put("p.weight", torch.zeros(3, 0, dtype=torch.int8)))
for place, value in ((1, -1.5), (0, -1.001), (7, 1.001), (3, -0.75), (4, float("nan")), (7, float("inf"))):
    case("E13", f"codebook {place} {value}", "k3.codebook: expected rising", element("k3.codebook", (place,), value))
case(None, "codebook, all the same", "", put("k3.codebook", torch.ones(8).half()))
# E14: dimensions are below K, and not below what the packed row could hold.
for module, dims in (
    ("k6", [70]),
    ("k6", [-1]),
    ("k3", [2, 33]),
    ("k3", [2, 2]),
    ("k3", [32, 2]),
    ("r", [0, 1, 2, 3, 150]),
):
    case(
        "E14",
        f"{module} {dims}",
        f"{module}.outlier_dims",
        put(f"{module}.outlier_dims", outliers("x", 1, dims)["x.outlier_dims"]),
    )
# E15: how far an outlier column may be from what it is an original of.
for place in ((0, 0), (1, 1), (1, 2), (0, 3), (1, 4)):
    case(None, f"moved {place}", "", moved(place, 11.9))
    case("E15", f"moved too far {place}", "r.outlier_weight: not the originals", moved(place, 12.1))
    case("E15", f"moved too far back {place}", "r.outlier_weight", moved(place, -12.1))
    case(None, f"gptq, moved {place}", "", GPTQ, moved(place, 1000.0))
case("E15", "of a zero row", "r.outlier_weight", element("r.outlier_weight", (2, 3), 2.0**-24))
case(None, "of a zero row, as little as float16 loses", "", element("r.outlier_weight", (2, 3), 2.0**-25))
for value in (float("nan"), float("inf")):
    for module in ("r", "k3"):
        for rounding in ("nearest", "gptq"):
            changes = said("rounding", rounding), element(f"{module}.outlier_weight", (0, 1), value)
            case("E15", f"{rounding}, {module} {value}", f"{module}.outlier_weight: holds NaN or infinity", *changes)
case(None, "k bits, any column", "", element("k3.outlier_weight", (0, 1), 1e30))
# E08: what a layer must have.
for name in ("r.absmax", "r.outlier_dims", "r.outlier_weight", "k3.absmax", "k3.codebook", "k6.outlier_dims"):
    case("E08", f"without {name}", f"{name}: missing, but", put(name, None))
for name in ("x.absmax", "x.outlier_dims", "x.outlier_weight"):
    case("E08", f"stray {name}", f"{name}: x.weight is not there, quantized", put(name, torch.ones(1)))
case(
    "E08",
    "bytes of an int8 layer",
    "p.absmax: p.weight is not there",
    put("p.weight", torch.ones(3, 5, dtype=torch.uint8)),
)
case(None, "names of format 1", "", put("x.SCB", torch.ones(1)), put("x.weight_format", torch.ones(1)))
# E09: dtypes and shapes.
HALF = torch.float16
for name, tensor in {
    "r.absmax": torch.ones(3, dtype=HALF),
    "r.weight": torch.ones(3, 150, 1, dtype=torch.int8),
    "r.bias": torch.ones(3, 1),
    "r.outlier_weight": torch.ones(3, 5, dtype=torch.int8),
    "k3.absmax": torch.ones(1, 3, dtype=HALF),
    "k3.codebook": torch.ones(7, dtype=HALF),
    "k3.outlier_dims": torch.ones((), dtype=torch.int32),
    "k3.outlier_weight": torch.ones(2, 2, dtype=HALF),
    "k6.weight": torch.zeros(2, 96, dtype=torch.int8),
    "k6.absmax": torch.ones(2),
}.items():
    case("E09", name, name, put(name, tensor))
case(
    "E09", "not whole chunks", "k3.weight: has rows of 23 bytes", put("k3.weight", torch.ones(1, 23, dtype=torch.uint8))
)
case(
    "E09",
    "a chunk more",
    "k6.weight: has rows of 144 bytes, expected those of whole chunks of 64 codes, for 70",
    put("k6.weight", torch.ones(2, 144, dtype=torch.uint8)),
)
for width, code in ((64, "E09"), (65, None), (128, None), (129, "E09")):
    dims = outliers("x", 1, [64])["x.outlier_dims"]
    case(
        code,
        f"{width} wide",
        "k6.weight: has rows of 96" if code else "",
        said("in_features/k6", width),
        put("k6.outlier_dims", dims),
    )
case(None, "as wide as its rows", "", said("in_features/k6", MISSING), element("k6.outlier_dims", (0,), 127))
case(
    "E14",
    "wider than its rows",
    "k6.outlier_dims",
    said("in_features/k6", MISSING),
    element("k6.outlier_dims", (0,), 128),
)
many = {**outliers("x", 1, list(range(34)))}
case(
    "E09",
    "more outliers than columns",
    "k3.outlier_dims: 34 of them for 33 dimensions",
    put("k3.outlier_dims", many["x.outlier_dims"]),
    put("k3.outlier_weight", many["x.outlier_weight"]),
)
for count, code in ((33, None), (34, "E09")):
    whole = outliers("k3", 1, list(range(count)))
    changes = [put(name, tensor) for name, tensor in whole.items()]
    case(code, f"{count} outliers", "k3" if code else "", *changes, said("outliers/counts/k3", count))
wide = {"k6.weight": torch.zeros(2, 133_184 // 8 * 6, dtype=torch.uint8)}
case(
    None,
    "k bits add up whatever their number",
    "",
    said("in_features/k6", 133_145),
    put("k6.weight", wide["k6.weight"]),
)
case(
    "E09",
    "int8 does not",
    "p.weight: 133145 columns, at most 133144",
    put("p.weight", torch.zeros(3, 133_145, dtype=torch.int8)),
)
# E11, E16
case("E11", "counts", "outliers.counts['k3'] is 1, the file has 2", said("outliers/counts/k3", 1))
case(
    "E11",
    "a layer that is not there",
    "outliers.counts names x, which is not a quantized layer",
    said("outliers/counts/x", 0),
    said("layers/x", "int8"),
)
# E03: what is said of the layers.
for path, value, named in (
    ("schemes", MISSING, "schemes is missing, expected an object"),
    ("schemes", [], "schemes is '[]', expected an object"),
    ("schemes/a\x1b[2J", INT8, "schemes names 'a\\x1b[2J'"),
    ("schemes/", INT8, "schemes names ''"),
    ("schemes/k3", None, "schemes['k3'] is 'None', expected an object"),
    ("layers", MISSING, "layers is missing"),
    ("layers/p", 5, "layers['p'] is '5', expected one of rotated, int8"),
    ("layers/p", "x", "layers['p'] is 'x'"),
    ("layers/x", "int8", "'x' is in one of layers and outliers.counts"),
    ("layers/p", MISSING, "'p' is in one of layers and outliers.counts"),
    ("in_features", [], "in_features is '[]', expected an object"),
    ("in_features", None, "in_features is 'None', expected an object"),
    ("in_features/p", 5, "in_features names 'p', expected layers of k bits"),
    ("in_features/x", 5, "in_features names 'x', expected layers of k bits"),
    ("in_features/k3", 0, "in_features['k3'] is 0, expected a whole number >= 1"),
    ("in_features/k3", True, "in_features['k3'] is True"),
    ("in_features/k3", 33.0, "in_features['k3'] is 33.0"),
    ("rounding", MISSING, "rounding is missing"),
    ("rounding", "up", "rounding is 'up', expected one of nearest, gptq"),
    ("not_quantized", MISSING, "not_quantized is missing"),
    ("not_quantized", None, "not_quantized is 'None', expected a list"),
    ("not_quantized", ["a", 1], "not_quantized is"),
    ("calibration", [], "calibration is '[]', expected an object or null"),
    ("source/repo", 5, "source.repo is '5'"),
    ("format_version", "2.x", "format_version is '2.x'"),
    ("format_version", "22.0", "format_version is '22.0'"),
):
    name = f"{path} {value if value is not MISSING else 'missing'}"
    case("E03", name, f"config.json: quantization_config: {named}", said(path, value))
for name, version in (("calibration", MISSING), ("in_features", {"k6": 70, "k3": 64}), ("format_version", "2.99")):
    case(None, f"{name} {version if version is not MISSING else 'missing'}", "", said(name, version))


@pytest.mark.parametrize(("code", "named", "changes"), CASES)
def test_each_rule(found: Found, code: str | None, named: str, changes: tuple[Change, ...]) -> None:
    draft = Draft()
    for change in changes:
        change(draft)
    errors = found(draft)
    assert [error.code for error in errors] == ([] if code is None else [code])
    message = "".join(map(str, errors))
    assert named in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_named_as_those_of_format_1_are_refused(tmp_path: Path, name: str) -> None:
    path = Draft().write(tmp_path / "c")
    (path / name).touch()
    with pytest.raises(CheckpointError, match=rf"^E04 .*/{name}: a weight file of format 1, where config.json says 2"):
        open_checkpoint(path)


def test_headers_from_elsewhere_are_held_against_the_rules_that_need_no_byte(tmp_path: Path) -> None:
    """As `llmint8 inspect` of a checkpoint on the Hub has it: only the headers of its weight files were fetched."""
    path = Draft().write(tmp_path / "c")
    whole = open_checkpoint(path)
    os.unlink(path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"^E04 .*neither is there"):
        open_checkpoint(path)
    elsewhere = open_checkpoint(path, lambda name: {info.name: info for info in whole.tensors.values()})
    assert (elsewhere.records, elsewhere.tensors, elsewhere.files) == (whole.records, whole.tensors, [WEIGHTS])
    with pytest.raises(CheckpointError, match=r"^E08 .*k3\.absmax: missing"):
        open_checkpoint(path, lambda name: {n: info for n, info in whole.tensors.items() if n != "k3.absmax"})


# What schemes there are.


def all_schemes() -> Iterator[Scheme]:
    for lookup in (None, "only", "too"):
        for activation in ("absmax", "zeropoint"):
            for group in (None, 64, 128, 256):
                for rotation in (None, 64):
                    yield Scheme(activation, group, rotation, lookup)  # type: ignore[arg-type]
        for bits in range(3, 9):
            for data_type in ("int", "float", "dynamic", "quantile", *(["nf4"] if bits == 4 else [])):
                for block in (None, 32, 64, 128, 256, 512, 1024, 2048, 4096):
                    if (bits, data_type, block, lookup) != (8, "int", None, "only"):
                        yield Scheme(lookup=lookup, kbit=KBit(bits, data_type, block))  # type: ignore[arg-type]


def test_every_scheme_is_read_as_it_was_written_and_nothing_near_it_is(spec_reader: ModuleType) -> None:
    values: dict[str, tuple[Any, ...]] = {
        "bits": (2, 3, 4, 8, 9, 4.0, True, "4", None, MISSING),
        "data_type": ("int", "nf4", "quantile", "x", "", 1, ["int"], None, MISSING),
        "group": (None, 16, 32, 48, 4096, 8192, 64.0, 0, -32, True, "64", MISSING),
        "rotation": (None, {}, {"kind": "hadamard", "block": 64}, {"kind": "hadamard", "block": 64.0}, 64, MISSING),
        "inputs": ("int8-absmax", "int8-zeropoint", "int8", "16-bit", 16, None, MISSING),
        "input_group": (None, 32, 64, 512, 64.0, "64", MISSING),
        "lookup": (True, False, None, 1, "only", MISSING),
        "more": (None, 1, MISSING),
    }
    told = {True: 0, False: 0}
    spelled = set()
    for number, scheme in enumerate(all_schemes()):
        raw = scheme.to_dict()
        again = Scheme.from_dict(raw)
        assert again.to_dict() == raw
        # Where nothing is multiplied, how inputs would be quantized is nothing.
        assert again == scheme or (scheme.lookup == "only" and scheme.kbit is None)
        assert spec_reader.is_scheme(raw)
        spelled.add(json.dumps(raw))
        if number % 29:
            continue
        for key, others in values.items():
            for value in others:
                near = {**raw, key: value}
                if value is MISSING:
                    del near[key]
                try:
                    read = Scheme.from_dict(near).to_dict() == near
                except ValueError as error:
                    assert "which this program cannot compute; update llmint8" in str(error)  # noqa: PT017
                    read = False
                assert read == spec_reader.is_scheme(near), json.dumps(near)
                told[read] += 1
    assert min(told.values()) > 100
    assert len(spelled) > 500


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(), "int8"),
        (Scheme("zeropoint", 64, 64), "int8-hadamard64"),
        (Scheme(rotation=64, lookup="only"), "int8-hadamard64-embedding"),
        (Scheme(lookup="too"), "int8-tied"),
        (Scheme(kbit=KBit(4, "nf4", 64)), "nf4-block64"),
        (Scheme(kbit=KBit(3, "quantile", None), lookup="only"), "quantile3-row-embedding"),
    ],
)
def test_what_a_scheme_is_called(scheme: Scheme, name: str) -> None:
    assert scheme.name == name


@pytest.mark.parametrize(
    ("bits", "data_type", "block", "message"),
    [
        (2, "int", None, "2 bits, expected 3 to 8"),
        (9, "int", None, "9 bits, expected 3 to 8"),
        (True, "int", None, "True bits"),
        (4.0, "int", None, "4.0 bits"),
        (4, "nf3", None, "data type 'nf3', expected one of int, float"),
        (3, "nf4", None, "data type 'nf4' with 3 bits, expected 4"),
        (4, "int", 16, "block size 16, expected a power of two from 32 to 4096, or the row"),
        (4, "int", 48, "block size 48"),
        (4, "int", 8192, "block size 8192"),
        (4, "int", 64.0, "block size 64.0"),
    ],
)
def test_what_k_bits_there_are_not(bits: Any, data_type: Any, block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        KBit(bits, data_type, block)


def test_a_table_says_nothing_of_inputs() -> None:
    table = Scheme("zeropoint", 64, lookup="only").to_dict()
    assert (table["inputs"], table["input_group"]) == (None, None)


def test_an_embedding_of_8_bits_by_row_has_one_name() -> None:
    with pytest.raises(ValueError, match="expected that it is int8"):
        Scheme(lookup="only", kbit=KBit(8, "int", None))
    Scheme(lookup="too", kbit=KBit(8, "int", None))  # its head takes inputs in 16 bit, which int8 does not


def test_rows_of_k_bits_are_whole_chunks_of_64() -> None:
    for bits in range(3, 9):
        kbit = KBit(bits, "int", 32)
        sizes = [kbit.row_bytes(width) for width in (0, 1, 64, 65, 128)]
        assert sizes == [chunks * 8 * bits for chunks in (0, 1, 1, 2, 2)]
        assert [kbit.most_features(size) for size in sizes] == [0, 64, 64, 128, 128]
        assert kbit.most_features(8 * bits + 1) is kbit.most_features(8 * bits - 1) is None
    assert [KBit(3, "int", 32).blocks(width) for width in (0, 1, 32, 33, 64, 65)] == [1, 1, 1, 2, 2, 3]
    assert KBit(3, "int", None).blocks(1000) == 1


# What is written.


def test_the_oldest_version_that_has_all_of_it_is_written() -> None:
    tied, kbit = Scheme(lookup="too"), Scheme(kbit=KBit(4, "nf4", 64))

    def version(layout: Any, *schemes: Scheme) -> str:
        return Quantization([], {}, schemes={scheme.name: scheme for scheme in schemes}, layout=layout).format_version

    assert [version(BITSANDBYTES, Scheme()), version(BITSANDBYTES, Scheme("absmax", 64))] == ["1.0", "1.1"]
    assert [version(NATIVE, *schemes) for schemes in ([Scheme()], [Scheme(), tied], [tied, kbit], [kbit])] == [
        "2.0",
        "2.1",
        "2.2",
        "2.2",
    ]
    assert Quantization([], {}, layout=NATIVE, read_version="2.7").format_version == "2.7"
    assert Quantization([], {}, read_version="1.7").format_version == "1.7"


def test_the_head_among_the_layers_is_found() -> None:
    schemes = {"int8": Scheme(), "table": Scheme(lookup="only"), "tied": Scheme(lookup="too")}

    def head(*layers: str, **of: str) -> str | None:
        return Quantization([], dict.fromkeys([*layers, *of], 0), schemes=schemes, layers=of).int8_head

    assert head("m.a", "m.lm_head.x") is None
    for name in ("lm_head", "embed_out", "proj_out", "output_projection"):
        assert head("m.a", f"model.{name}") == f"model.{name}"
        assert head("m.a", name) == name
    assert head("lm_head", table="table") == "lm_head"
    assert head("lm_head", m="tied") == "m"


def test_names_of_weight_files() -> None:
    assert BITSANDBYTES.shard_names(1) == ["model.safetensors"]
    assert NATIVE.shard_names(2) == [f"llmint8-model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert (BITSANDBYTES.index, NATIVE.index) == (
        "model.safetensors.index.json",
        "llmint8-model.safetensors.index.json",
    )
    assert BITSANDBYTES.reserved_suffixes == ["SCB", "weight_format", "outlier_dims", "outlier_weight"]
    # Only bitsandbytes, and so format 1, can be asked to search for outliers in every call.
    assert (BITSANDBYTES.searches, NATIVE.searches) == (True, False)
    assert ManifestEntry("x", "F16", (2, 3), "").nbytes == 12
    assert NATIVE.reserved_suffixes == ["absmax", "outlier_dims", "outlier_weight"]
