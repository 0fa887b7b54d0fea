"""Reading int8 checkpoints: the valid ones, and for every rule of spec.md one that breaks it and is told so.

The checkpoints are put together with the safetensors library, json and hashlib, and not with our writer.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmint8.formats import CheckpointError, check_values, open_checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, MANIFEST = "model.safetensors.index.json", "llmint8_manifest.json"
FLOAT16 = torch.float16
Codes = Callable[[Path], list[str]]
DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", FLOAT16: "F16", torch.float32: "F32"}


def layer(name: str, dims: list[int]) -> dict[str, Tensor]:
    """A layer of 3 rows, the last of them zeros, and 4 columns."""
    weight = torch.tensor([[127, -3, 12, 50], [2, -127, -50, 3], [0, 0, 0, 0]], dtype=torch.int8)
    absmax = torch.tensor([1.5, 300.0, 0.0])
    return {
        f"{name}.weight": weight,
        f"{name}.SCB": absmax,
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
        f"{name}.outlier_dims": torch.tensor(dims, dtype=torch.int32),
        f"{name}.outlier_weight": (weight[:, dims] * absmax[:, None] / 127).to(FLOAT16),
        f"{name}.bias": torch.tensor([1, 2, 3], dtype=FLOAT16),
    }


@dataclass
class Draft:
    """A checkpoint that is not on the disk yet; tests break it before or after."""

    files: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {
            ONE: {**layer("m.a", [1, 3]), "emb.weight": torch.ones(2, 4, dtype=FLOAT16)},
            TWO: {**layer("m.b", []), "norm.weight": torch.ones(4, dtype=torch.float32)},
        }
    )
    config: Any = field(
        default_factory=lambda: {
            "model_type": "test",
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_8bit": True,
                "llm_int8_threshold": 6.0,
                "llm_int8_skip_modules": ["lm_head"],
                "llmint8": {
                    "format_version": "1.0",
                    "producer": "test 1",
                    "activation": "zeropoint",
                    "outliers": {"criterion": "by hand", "counts": {"m.a": 2, "m.b": 0}},
                    "source": {"name": "s", "repo": None, "commit": None},
                },
            },
        }
    )
    index: Any = None
    manifest: Any = None
    afterwards: list[Callable[[Path], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.describe()

    def describe(self) -> None:
        """Make index and manifest say what the files hold now."""
        places = {name: file for file, tensors in self.files.items() for name in tensors}
        self.index = {"metadata": {"total_size": 1}, "weight_map": places}
        self.manifest = {
            "format_version": "1.0",
            "producer": "test 1",
            "source": {"name": "s", "repo": None, "commit": None, "config_sha256": "0" * 64, "files": {"s.bin": 1}},
            "modules": {"m.a": {"kept_absmax": 1.5}},
            "tensors": {
                name: {
                    "file": file,
                    "dtype": DTYPES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "sha256": hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest(),
                }
                for file, tensors in self.files.items()
                for name, tensor in tensors.items()
            },
        }

    @property
    def block(self) -> dict[str, Any]:
        return self.config["quantization_config"]["llmint8"]

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        return next(tensors for tensors in self.files.values() if name in tensors)

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor everywhere: the file is consistent, only the value is new."""
        self.tensors_of(name)[name] = tensor
        self.describe()

    def write(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        for file, tensors in self.files.items():
            safetensors.torch.save_file(tensors, path / file)
        for name, value in (("config.json", self.config), (INDEX, self.index), (MANIFEST, self.manifest)):
            if value is not None:
                (path / name).write_text(json.dumps(value))
        for action in self.afterwards:
            action(path)
        return path

    def replace_json(self, name: str, content: bytes) -> None:
        """Put other bytes into a file that `write` writes."""
        self.afterwards.append(lambda path: (path / name).write_bytes(content))


def as_bitsandbytes(draft: Draft) -> None:
    """Turn a draft into what bitsandbytes writes."""
    del draft.config["quantization_config"]["llmint8"]
    for tensors in draft.files.values():
        for name in [name for name in tensors if ".outlier_" in name]:
            del tensors[name]
    draft.describe()
    draft.manifest = None


@pytest.fixture
def all_codes(spec_reader: ModuleType) -> Codes:
    """Lists the rules that a checkpoint breaks. `spec_reader.py` must find the same."""

    def read(path: Path) -> list[str]:
        try:
            found = [error.code for error in check_values(open_checkpoint(path))]
        except CheckpointError as error:
            found = [error.code]
        try:
            theirs = [error.code for error in spec_reader.problems(spec_reader.open_checkpoint(path))]
        except spec_reader.BrokenError as error:
            theirs = [error.code]
        assert sorted(theirs) == sorted(found)
        return found

    return read


# What is valid.


def test_a_checkpoint_opens(tmp_path: Path) -> None:
    draft = Draft()
    checkpoint = open_checkpoint(str(draft.write(tmp_path / "c")))
    assert check_values(checkpoint) == []
    assert {name: (r.out_features, r.in_features, r.outlier_count) for name, r in checkpoint.records.items()} == {
        "m.a": (3, 4, 2),
        "m.b": (3, 4, 0),
    }
    assert checkpoint.files == [ONE, TWO]
    for tensors in draft.files.values():
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    quantization = checkpoint.quantization
    assert (quantization.scheme.activation, quantization.criterion) == ("zeropoint", "by hand")
    assert quantization.outliers == {"m.a": 2, "m.b": 0}
    assert quantization.source == {"name": "s", "repo": None, "commit": None}


def test_progress_names_every_tensor_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Draft().write(tmp_path / "c"))
    seen: list[tuple[str, int]] = []
    check_values(checkpoint, lambda name, nbytes: seen.append((name, nbytes)))
    assert sorted(seen) == sorted((info.name, info.nbytes) for info in checkpoint.tensors.values())


def test_one_file_needs_no_index(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    draft.files = {"model.safetensors": draft.files[ONE] | draft.files[TWO]}
    draft.describe()
    draft.index = None
    assert all_codes(draft.write(tmp_path / "c")) == []


def test_what_bitsandbytes_wrote_opens(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    as_bitsandbytes(draft)
    draft.files[ONE]["m.a.weight"][0, 0] = -128
    draft.files[TWO]["m.b.weight"][0, 0] = 100  # no row has to reach 127
    del draft.files[ONE]["m.a.weight_format"]
    draft.describe()
    draft.manifest = None
    del draft.config["quantization_config"]["llm_int8_threshold"]
    draft.config["quantization_config"]["llm_int8_skip_modules"] = None
    path = draft.write(tmp_path / "c")
    assert all_codes(path) == []
    checkpoint = open_checkpoint(path)
    assert not checkpoint.quantization.llmint8
    assert (checkpoint.quantization.threshold, checkpoint.quantization.skip_modules) == (6.0, [])
    assert [record.outlier_count for record in checkpoint.records.values()] == [None, None]


def test_a_quantization_config_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    draft = Draft()
    as_bitsandbytes(draft)
    path = draft.write(tmp_path / "c")
    quantization = draft.config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(draft.config))
    (path / "quantization_config.json").write_text(json.dumps(quantization | {"llm_int8_threshold": 5}))
    assert open_checkpoint(path).quantization.threshold == 5.0


def test_unknown_keys_and_tensors_are_accepted(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    draft.files[ONE]["m.a.lora_A.weight"] = torch.ones(1, 4)
    draft.files[ONE]["m.a.row_sum"] = torch.ones(3, dtype=torch.int32)
    draft.files[ONE]["table"] = torch.ones(3, dtype=torch.int8)
    draft.describe()
    draft.block["format_version"] = "1.42"
    draft.manifest["format_version"] = "1.42"
    for place in (draft.config, draft.block, draft.block["outliers"], draft.index, draft.manifest):
        place["new"] = {"a": 1}
    draft.manifest["tensors"]["table"]["new"] = 1
    path = draft.write(tmp_path / "c")
    assert all_codes(path) == []
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.records) == {"m.a", "m.b"}
    assert checkpoint.quantization.format_version == "1.42"


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.42"])
@pytest.mark.parametrize("group", ["missing", None, 64, 128, 256])
def test_inputs_have_groups_where_the_checkpoint_says_so(
    tmp_path: Path, all_codes: Codes, version: str, group: Any
) -> None:
    draft = Draft()
    draft.block["format_version"] = draft.manifest["format_version"] = version
    if group != "missing":
        draft.block["activation_group"] = group
    path = draft.write(tmp_path / "c")
    assert all_codes(path) == []
    quantization = open_checkpoint(path).quantization
    assert quantization.scheme.activation_group == (None if group == "missing" else group)
    assert quantization.format_version == version


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_what_transformers_writes_for_infinity_is_read_in_config_json(
    tmp_path: Path, all_codes: Codes, value: float
) -> None:
    """Mamba 2 has `"time_step_limit": [0.0, Infinity]`."""
    draft = Draft()
    draft.config["time_step_limit"] = [0.0, value]
    path = draft.write(tmp_path / "c")
    assert all_codes(path) == []
    checkpoint = open_checkpoint(path)
    assert repr(checkpoint.config["time_step_limit"]) == f"[0.0, {value}]"


@pytest.mark.parametrize(("in_features", "bitsandbytes"), [(133_144, False), (132_104, True)])
def test_the_longest_rows_are_accepted(tmp_path: Path, all_codes: Codes, in_features: int, bitsandbytes: bool) -> None:
    draft = Draft()
    if bitsandbytes:
        as_bitsandbytes(draft)
    long_layer(draft, in_features)
    draft.manifest = None if bitsandbytes else draft.manifest
    assert all_codes(draft.write(tmp_path / "c")) == []


@pytest.mark.parametrize("offload", [False, True])
def test_an_offload_is_the_affair_of_the_loader(tmp_path: Path, all_codes: Codes, offload: bool) -> None:
    draft = Draft()
    draft.config["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = offload
    assert all_codes(draft.write(tmp_path / "c")) == []


def test_columns_too_small_for_float16_are_no_error(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    draft.set("m.a.SCB", torch.tensor([1e-30, 1e-8, 0.0]))
    draft.set("m.a.outlier_weight", torch.zeros(3, 2, dtype=FLOAT16))
    assert all_codes(draft.write(tmp_path / "c")) == []


@pytest.mark.parametrize("linked", ["config.json", ONE, INDEX, MANIFEST])
def test_a_snapshot_of_the_hub_cache_opens(tmp_path: Path, all_codes: Codes, linked: str) -> None:
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    path = Draft().write(repo / "snapshots" / "0123abc")
    (path / linked).rename(repo / "blobs" / "hash")
    (path / linked).symlink_to("../../blobs/hash")
    assert all_codes(path) == []


def test_links_inside_the_directory_and_to_it_are_followed(tmp_path: Path, all_codes: Codes) -> None:
    path = Draft().write(tmp_path / "c")
    (path / ONE).rename(path / "elsewhere")
    (path / ONE).symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(path)
    assert all_codes(tmp_path / "link") == []


# What is broken: the rule, what the message must name, and how it is done.

BROKEN: list[Any] = []


def breaks(code: str, *named: str) -> Callable[[Callable[[Draft], object]], Callable[[Draft], object]]:
    def register(action: Callable[[Draft], object]) -> Callable[[Draft], object]:
        BROKEN.append(pytest.param(code, named, action, id=f"{code}-{action.__name__.strip('_')}"))
        return action

    return register


def breaks_each(code: str, named: str, name: str, actions: dict[str, Callable[[Draft], object]]) -> None:
    for what, action in actions.items():
        BROKEN.append(pytest.param(code, (named,), action, id=f"{code}-{name}-{what}"))


def outside(name: str) -> Callable[[Path], None]:
    """Move a file out of the directory and link to it."""

    def move(path: Path) -> None:
        (path / name).rename(path.parent / "away")
        (path / name).symlink_to(path.parent / "away")

    return move


def fifo(name: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return replace


def after(action: Callable[[Path], object]) -> Callable[[Draft], None]:
    return lambda draft: draft.afterwards.append(action)


def put(place: str, key: str, value: Any) -> Callable[[Draft], None]:
    """Set a key of config.json: in `quantization_config`, or the block, or its `outliers`."""

    def change(draft: Draft) -> None:
        where = {
            "config": draft.config,
            "quantization": draft.config["quantization_config"],
            "block": draft.block,
            "outliers": draft.block["outliers"],
        }[place]
        where[key] = value
        if value is None:
            del where[key]

    return change


MISSING = object()


def in_block_source(key: str, value: Any) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        draft.block["source"][key] = value
        if value is MISSING:
            del draft.block["source"][key]

    return change


def map_to(file: Any, tensor: str = "m.a.weight") -> Callable[[Draft], None]:
    return lambda draft: draft.index["weight_map"].__setitem__(tensor, file)


for json_name, json_code in (("config.json", "E01"), (INDEX, "E04"), (MANIFEST, "E16")):
    breaks_each(
        json_code,
        json_name,
        json_name,
        {
            "not JSON": lambda draft, name=json_name: draft.replace_json(name, b"{"),
            "empty": lambda draft, name=json_name: draft.replace_json(name, b""),
            "a list": lambda draft, name=json_name: draft.replace_json(name, b"[]"),
            "not text": lambda draft, name=json_name: draft.replace_json(name, b"\xff\xfe\xfd"),
            "a byte-order mark": after(
                lambda path, name=json_name: (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
            ),
            "nested": lambda draft, name=json_name: draft.replace_json(name, b'{"a":' + b"[" * 200_000),
            "outside": after(outside(json_name)),
            "a FIFO": after(fifo(json_name)),
            "a folder": after(lambda path, name=json_name: [(path / name).unlink(), (path / name).mkdir()]),
        },
    )
    breaks_each(
        json_code,
        f"{json_name}: 268435457 bytes, at most 268435456",
        json_name,
        {"too large": after(lambda path, name=json_name: os.truncate(path / name, (256 << 20) + 1))},
    )
breaks_each(
    "E01",
    "config.json",
    "config.json",
    {"missing": after(lambda path: (path / "config.json").unlink())},
)
breaks_each(
    "E02",
    "config.json: quantization_config",
    "quantization_config",
    {
        "another method": put("quantization", "quant_method", "gptq"),
        "4 bit": put("quantization", "load_in_8bit", False),
        "8 bit as a number": put("quantization", "load_in_8bit", 1),
        "negative threshold": put("quantization", "llm_int8_threshold", -1.0),
        "no number as threshold": put("quantization", "llm_int8_threshold", "6.0"),
        "NaN as threshold": put("quantization", "llm_int8_threshold", float("nan")),
        "skip_modules a string": put("quantization", "llm_int8_skip_modules", "lm_head"),
        "skip_modules of numbers": put("quantization", "llm_int8_skip_modules", [1]),
        "skip_modules 0": put("quantization", "llm_int8_skip_modules", 0),
        "skip_modules false": put("quantization", "llm_int8_skip_modules", False),
        "skip_modules an object": put("quantization", "llm_int8_skip_modules", {}),
        "true as threshold": put("quantization", "llm_int8_threshold", True),
        "no method": put("quantization", "quant_method", None),
        "a list as method": put("quantization", "quant_method", ["bitsandbytes"]),
        "4 bit too": put("quantization", "load_in_4bit", True),
        "4 bit as a number": put("quantization", "load_in_4bit", 0),
        "16-bit weights": put("quantization", "llm_int8_has_fp16_weight", True),
        "offload a string": put("quantization", "llm_int8_enable_fp32_cpu_offload", "no"),
    },
)
breaks_each(
    "E02",
    "config.json",
    "quantization_config",
    {
        "missing": put("config", "quantization_config", None),
        "a list": put("config", "quantization_config", []),
    },
)
breaks_each(
    "E03",
    "config.json: quantization_config.llmint8: format_version",
    "version",
    {
        "next": put("block", "format_version", "2.0"),
        "10": put("block", "format_version", "10.0"),
        "0": put("block", "format_version", "0.9"),
        "number": put("block", "format_version", 1.0),
        "no minor": put("block", "format_version", "1"),
        "three": put("block", "format_version", "1.0.0"),
        "letters": put("block", "format_version", "1.x"),
        "missing": put("block", "format_version", None),
        "block is null": lambda draft: draft.config["quantization_config"].__setitem__("llmint8", None),
        "block is a list": put("quantization", "llmint8", ["1.0"]),
    },
)
breaks_each(
    "E03", "activation", "activation", {"row": put("block", "activation", "row"), "3": put("block", "activation", 3)}
)
breaks_each(
    "E03",
    "activation_group",
    "activation_group",
    {
        "100": put("block", "activation_group", 100),
        "0": put("block", "activation_group", 0),
        "-64": put("block", "activation_group", -64),
        "true": put("block", "activation_group", True),
        "64.0": put("block", "activation_group", 64.0),
        "a string": put("block", "activation_group", "64"),
        "row": put("block", "activation_group", "row"),
        "a list": put("block", "activation_group", [64]),
    },
)
breaks_each("E03", "producer", "producer", {"missing": put("block", "producer", None)})
breaks_each(
    "E03",
    "source",
    "source",
    {"a string": put("block", "source", "s")}
    | {
        f"{key} {what}": in_block_source(key, value)
        for key in ("name", "repo", "commit")
        for what, value in {"missing": MISSING, "a number": 0, "false": False}.items()
    },
)
breaks_each("E03", "source.name is 'None', expected a string", "source", {"no name": in_block_source("name", None)})
breaks_each("E03", "criterion", "criterion", {"missing": put("outliers", "criterion", None)})
breaks_each(
    "E03", "outliers", "outliers", {"missing": put("block", "outliers", None), "list": put("block", "outliers", [])}
)
breaks_each(
    "E03",
    "calibration",
    "calibration",
    {"a list": put("block", "calibration", []), "a string": put("block", "calibration", "c4")},
)
breaks_each(
    "E03",
    "counts",
    "counts",
    {
        "a list": put("outliers", "counts", [2, 0]),
        "negative": put("outliers", "counts", {"m.a": -2, "m.b": 0}),
        "float": put("outliers", "counts", {"m.a": 2.0, "m.b": 0}),
        "true": put("outliers", "counts", {"m.a": True, "m.b": 0}),
        "escape sequence": put("outliers", "counts", {"m.a\x1b[2J": 2}),
    },
)
breaks_each(
    "E04",
    INDEX,
    "index",
    {
        "NaN": lambda draft: draft.index.update(new=float("nan")),
        "no map": lambda draft: draft.index.pop("weight_map"),
        "empty map": lambda draft: draft.index.update(weight_map={}),
        "map is a list": lambda draft: draft.index.update(weight_map=[ONE]),
        "file is a number": map_to(1),
        "parent": map_to("../" + ONE),
        "absolute": map_to("/etc/" + ONE),
        "subfolder": map_to("sub/" + ONE),
        "here": map_to("./" + ONE),
        "backslash": map_to("..\\" + ONE),
        "drive": map_to("C:" + ONE),
        "NUL": map_to("a\0.safetensors"),
        "newline": map_to("a\n.safetensors"),
        "another suffix": map_to("model.bin"),
        "dots": map_to(".."),
        "no file name": map_to(""),
        "escape sequence": map_to(ONE, "a\x1b[2J"),
    },
)
breaks_each(
    "E04",
    "model.safetensors",
    "weights",
    {
        "single file too": after(lambda path: shutil.copy(path / ONE, path / "model.safetensors")),
        "none": after(lambda path: (path / INDEX).unlink()),
    },
)
breaks_each(
    "E04",
    "llmint8-00001.safetensors: a weight file of format 2, where config.json says 1",
    "weights",
    {
        "of two layouts": after(lambda path: shutil.copy(path / ONE, path / "llmint8-00001.safetensors")),
        "of a later layout": after(
            lambda path: [(path / INDEX).unlink(), (path / ONE).rename(path / "llmint8-00001.safetensors")]
        ),
    },
)
breaks_each(
    "E05",
    TWO,
    "shard",
    {
        "missing": after(lambda path: (path / TWO).unlink()),
        "outside": after(outside(TWO)),
        "a FIFO": after(fifo(TWO)),
        "dangling": after(lambda path: [(path / TWO).unlink(), (path / TWO).symlink_to("nowhere")]),
    },
)
breaks_each(
    "E06",
    TWO,
    "shard",
    {
        "cut short": after(lambda path: os.truncate(path / TWO, (path / TWO).stat().st_size - 1)),
        "longer": after(lambda path: os.truncate(path / TWO, (path / TWO).stat().st_size + 1)),
        "empty": after(lambda path: (path / TWO).write_bytes(b"")),
        "a pickle": after(lambda path: torch.save({"m.a.weight": torch.ones(1)}, path / TWO)),
    },
)


@breaks("E07", TWO, "m.a.bias", f"also in {ONE}")
def tensor_in_two_files(draft: Draft) -> None:
    draft.files[TWO]["m.a.bias"] = draft.files[ONE]["m.a.bias"].clone()


@breaks("E07", ONE, "norm.weight", TWO)
def index_has_it_elsewhere(draft: Draft) -> None:
    draft.index["weight_map"]["norm.weight"] = ONE


@breaks("E07", TWO, "norm.weight")
def index_lacks_it(draft: Draft) -> None:
    del draft.index["weight_map"]["norm.weight"]


@breaks("E07", TWO, "more.weight")
def index_has_one_more(draft: Draft) -> None:
    draft.index["weight_map"]["more.weight"] = TWO


def without(name: str, bitsandbytes: bool = False) -> Callable[[Draft], None]:
    def remove(draft: Draft) -> None:
        if bitsandbytes:
            as_bitsandbytes(draft)
            draft.files[ONE] |= layer("m.a", [1])
        del draft.tensors_of(name)[name]
        draft.describe()

    return remove


for suffix in ("SCB", "weight_format", "outlier_dims", "outlier_weight"):
    breaks_each("E08", f"{ONE}: m.a.{suffix}", "missing", {suffix: without(f"m.a.{suffix}")})
    breaks_each(
        "E08",
        f"{ONE}: x.{suffix}",
        "stray",
        {suffix: lambda draft, name=f"x.{suffix}": [draft.files[ONE].update({name: torch.ones(1)}), draft.describe()]},
    )
for suffix in ("SCB", "outlier_dims", "outlier_weight"):
    breaks_each("E08", f"{ONE}: m.a.{suffix}", "bitsandbytes", {suffix: without(f"m.a.{suffix}", bitsandbytes=True)})


@breaks("E08", ONE, "m.a.outlier_dims")
def both_outlier_tensors_missing(draft: Draft) -> None:
    del draft.files[ONE]["m.a.outlier_dims"], draft.files[ONE]["m.a.outlier_weight"]
    draft.describe()


@breaks("E08", ONE, "m.a.SCB")
def layer_without_its_int8(draft: Draft) -> None:
    draft.set("m.a.weight", torch.ones(3, 4))


for wrong_name, wrong_tensor in {
    "m.a.weight": torch.zeros(12, dtype=torch.int8),
    "m.a.SCB": torch.ones(3, 1),
    "m.a.weight_format": torch.zeros(1, dtype=torch.uint8),
    "m.a.outlier_dims": torch.zeros(2, 1, dtype=torch.int32),
    "m.a.outlier_weight": torch.zeros(2, 3, dtype=FLOAT16),
    "m.a.bias": torch.zeros(4, dtype=FLOAT16),
}.items():
    breaks_each(
        "E09",
        f"{ONE}: {wrong_name}",
        "shape",
        {wrong_name: lambda draft, n=wrong_name, t=wrong_tensor: draft.set(n, t)},
    )
for wrong_name, wrong_tensor in {
    "m.a.SCB": torch.ones(3, dtype=FLOAT16),
    "m.a.weight_format": torch.zeros((), dtype=torch.int8),
    "m.a.outlier_dims": torch.tensor([1, 3], dtype=torch.uint8),
    "m.a.outlier_weight": torch.zeros(3, 2, dtype=torch.int8),
    "m.a.bias": torch.zeros(3, dtype=torch.int32),
}.items():
    breaks_each(
        "E09",
        f"{ONE}: {wrong_name}",
        "dtype",
        {wrong_name: lambda draft, n=wrong_name, t=wrong_tensor: draft.set(n, t)},
    )


@breaks("E09", ONE, "m.a.outlier_dims")
def dims_are_a_scalar(draft: Draft) -> None:
    draft.set("m.a.outlier_dims", torch.zeros((), dtype=torch.int32))


@breaks("E09", ONE, "m.a.outlier_dims")
def more_outliers_than_dimensions(draft: Draft) -> None:
    draft.set("m.a.outlier_dims", torch.arange(5, dtype=torch.int32))
    draft.set("m.a.outlier_weight", torch.zeros(3, 5, dtype=FLOAT16))


def long_layer(draft: Draft, in_features: int) -> None:
    weight = torch.zeros(3, in_features, dtype=torch.int8)
    weight[:2, 0] = 127
    draft.set("m.b.weight", weight)


@breaks("E09", TWO, "m.b.weight: 133145 columns, at most 133144")
def more_columns_than_add_up_in_32_bits(draft: Draft) -> None:
    long_layer(draft, 133_145)


@breaks("E09", TWO, "m.b.weight: 132105 columns, at most 132104")
def more_columns_than_add_up_where_128_may_occur(draft: Draft) -> None:
    as_bitsandbytes(draft)
    long_layer(draft, 132_105)
    draft.manifest = None


@breaks("E10", TWO, "m.b.weight_format", "is 2")
def weight_is_tiled(draft: Draft) -> None:
    draft.set("m.b.weight_format", torch.tensor(2, dtype=torch.uint8))


breaks_each(
    "E11",
    "config.json: outliers.counts",
    "counts",
    {
        "another": put("outliers", "counts", {"m.a": 1, "m.b": 0}),
        "too few": put("outliers", "counts", {"m.a": 2}),
        "too many": put("outliers", "counts", {"m.a": 2, "m.b": 0, "m.c": 0}),
        "none": put("outliers", "counts", {}),
    },
)
for value in ("nan", "inf", "-1"):
    breaks_each(
        "E12",
        f"{ONE}: m.a.SCB: row 1",
        "SCB",
        {value: lambda draft, v=float(value): draft.set("m.a.SCB", torch.tensor([1.5, v, 0.0]))},
    )


def weight_element(row: int, column: int, value: int) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        draft.files[TWO]["m.b.weight"][row, column] = value
        draft.describe()

    return change


breaks_each(
    "E13", f"{TWO}: m.b.weight: row 0", "weight", {"126": weight_element(0, 0, 126), "-128": weight_element(0, 0, -128)}
)
breaks_each("E13", f"{TWO}: m.b.weight: row 2", "weight", {"zero row": weight_element(2, 1, 5)})
for values in ([3, 1], [1, 1], [-1, 1], [1, 4]):
    breaks_each(
        "E14",
        f"{ONE}: m.a.outlier_dims",
        "dims",
        {str(values): lambda draft, v=values: draft.set("m.a.outlier_dims", torch.tensor(v, dtype=torch.int32))},
    )
for element in (float("nan"), float("inf"), 3.0):
    breaks_each(
        "E15",
        f"{ONE}: m.a.outlier_weight",
        "columns",
        {
            str(element): lambda draft, v=element: draft.set(
                "m.a.outlier_weight",
                draft.files[ONE]["m.a.outlier_weight"] + torch.tensor([[0, v], [0, 0], [0, 0]], dtype=FLOAT16),
            )
        },
    )


@breaks("E15", ONE, "m.a.outlier_weight")
def columns_are_in_another_order(draft: Draft) -> None:
    draft.set("m.a.outlier_weight", draft.files[ONE]["m.a.outlier_weight"].flip(1).contiguous())


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Draft], None]:
    return lambda draft: change(draft.manifest)


def entry_is(key: str, value: Any) -> Callable[[Draft], None]:
    return in_manifest(lambda manifest: manifest["tensors"]["m.a.SCB"].__setitem__(key, value))


breaks_each(
    "E16",
    MANIFEST,
    "manifest",
    {
        "missing": after(lambda path: (path / MANIFEST).unlink()),
        "version": in_manifest(lambda manifest: manifest.update(format_version="2.0")),
        "version is a number": in_manifest(lambda manifest: manifest.update(format_version=1.0)),
        "no version": in_manifest(lambda manifest: manifest.pop("format_version")),
        "another version": in_manifest(lambda manifest: manifest.update(format_version="1.42")),
        "producer is a number": in_manifest(lambda manifest: manifest.update(producer=5)),
        "another producer": in_manifest(lambda manifest: manifest.update(producer="test 2")),
        "no producer": in_manifest(lambda manifest: manifest.pop("producer")),
        "source is a list": in_manifest(lambda manifest: manifest.update(source=[])),
        "source of pairs": in_manifest(lambda manifest: manifest.update(source=list(manifest["source"].items()))),
        "modules is a list": in_manifest(lambda manifest: manifest.update(modules=[])),
        "modules of another": in_manifest(lambda manifest: manifest.update(modules={"m.c": {}})),
        "modules of a number": in_manifest(lambda manifest: manifest.update(modules={"m.a": 1})),
        "modules of an escape sequence": in_manifest(lambda manifest: manifest.update(modules={"\x1b[2J": {}})),
        "files is null": in_manifest(lambda manifest: manifest.update(files=None)),
        "files is a list": in_manifest(lambda manifest: manifest.update(files=[])),
        "Infinity": in_manifest(lambda manifest: manifest["modules"]["m.a"].update(kept_absmax=float("inf"))),
        "no tensors": in_manifest(lambda manifest: manifest.pop("tensors")),
        "tensors is a list": in_manifest(lambda manifest: manifest.update(tensors=[])),
        "no source": in_manifest(lambda manifest: manifest.pop("source")),
        "modules is a string": in_manifest(lambda manifest: manifest.update(modules="m")),
        "an entry is null": in_manifest(lambda manifest: manifest["tensors"].update({"m.a.SCB": None})),
        "short hash": entry_is("sha256", "0" * 63),
        "upper-case hash": entry_is("sha256", "A" * 64),
        "no hash": entry_is("sha256", None),
        "shape is a number": entry_is("shape", 3),
        "shape of strings": entry_is("shape", ["3"]),
        "unknown dtype": entry_is("dtype", "F99"),
        "dtype is a list": entry_is("dtype", ["F32"]),
        "file is a number": entry_is("file", 1),
        "file is an escape sequence": entry_is("file", "\x1b[2J"),
        "escape sequence": in_manifest(
            lambda manifest: manifest["tensors"].update({"\x1b[2J": manifest["tensors"]["m.a.SCB"]})
        ),
    },
)
for manifest_key, manifest_value in {
    "name": "another",
    "repo": "a/b",
    "commit": 0,
    "config_sha256": "0" * 63,
    "files": [],
}.items():
    breaks_each(
        "E16",
        manifest_key,
        "manifest source",
        {
            f"{manifest_key} {what}": in_manifest(
                lambda manifest, k=manifest_key, v=value: manifest.update(
                    source={
                        key: v if key == k else said
                        for key, said in manifest["source"].items()
                        if key != k or v is not MISSING
                    }
                )
            )
            for what, value in {"another": manifest_value, "missing": MISSING}.items()
        },
    )
breaks_each(
    "E16",
    f"{MANIFEST}: source.files",
    "manifest source",
    {
        what: in_manifest(lambda manifest, v=value: manifest["source"].update(files={"s.bin": v}))
        for what, value in {"true": True, "1.0": 1.0, "-1": -1, "a string": "1", "2**63": 2**63}.items()
    },
)
breaks_each(
    "E16",
    MANIFEST,
    "a file named",
    {
        repr(name): in_manifest(lambda manifest, n=name: manifest.update(files={n: "0" * 64}))
        for name in ("", ".", "..", "../x", "/x", "a//b", "a/", "a/./b", "a/../b", "a\\b", "a\x1b[2J")
    }
    | {"of the source": in_manifest(lambda manifest: manifest["source"].update(files={"\x1b[2J": 1}))}
    | {"without its hash": in_manifest(lambda manifest: manifest.update(files={"x": "0" * 63}))},
)
breaks_each(
    "E17",
    f"{MANIFEST}: m.a.SCB",
    "manifest",
    {
        "lacks it": in_manifest(lambda manifest: manifest["tensors"].pop("m.a.SCB")),
        "dtype": entry_is("dtype", "F16"),
        "shape": entry_is("shape", [3, 1]),
        "file": entry_is("file", TWO),
    },
)


@breaks("E17", MANIFEST, "more.weight")
def manifest_has_one_more(draft: Draft) -> None:
    draft.manifest["tensors"]["more.weight"] = draft.manifest["tensors"]["m.a.SCB"]


@breaks("E18", TWO, "norm.weight")
def one_bit_differs(draft: Draft) -> None:
    draft.files[TWO]["norm.weight"][3] = 1.0000001


@breaks("E18", ONE, "m.a.bias")
def a_part_of_a_layer_differs(draft: Draft) -> None:
    draft.files[ONE]["m.a.bias"][0] = -1


def other_file(action: Callable[[Path], object] = lambda path: None) -> Callable[[Draft], None]:
    """Have the manifest name `folder/file`, which `action` breaks when all is written."""

    def change(draft: Draft) -> None:
        draft.manifest["files"] = {"folder/file": hashlib.sha256(b"whole").hexdigest(), "not fetched": "0" * 64}
        draft.afterwards.append(lambda path: (path / "folder").mkdir())
        draft.afterwards.append(lambda path: (path / "folder" / "file").write_bytes(b"whole"))
        draft.afterwards.append(action)

    return change


breaks_each(
    "E19",
    "folder/file",
    "file",
    {
        "changed": other_file(lambda path: (path / "folder" / "file").write_bytes(b"other")),
        "outside": other_file(outside("folder/file")),
        "a FIFO": other_file(fifo("folder/file")),
        "dangling outside": other_file(
            lambda path: [(path / "folder/file").unlink(), (path / "folder/file").symlink_to("../../nowhere")]
        ),
    },
)


def test_files_without_tensors_are_hashed_and_may_be_missing(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    other_file()(draft)
    assert all_codes(draft.write(tmp_path / "c")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="uses FIFOs and links")
@pytest.mark.parametrize(("code", "named", "action"), BROKEN)
def test_a_broken_checkpoint_is_refused(
    tmp_path: Path, all_codes: Codes, code: str, named: tuple[str, ...], action: Callable[[Draft], object]
) -> None:
    draft = Draft()
    action(draft)
    path = draft.write(tmp_path / "c")
    if code < "E12":
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        errors = [caught.value]
    else:
        errors = check_values(open_checkpoint(path))
    assert [error.code for error in errors] == [code]
    message = str(errors[0])
    assert message.startswith(f"{code} {path}")
    assert all(what in message for what in named), message
    assert message.isprintable()
    assert all_codes(path) == [code]


def test_every_rule_has_a_checkpoint_that_breaks_it() -> None:
    assert {parameter.values[0] for parameter in BROKEN} == {f"E{number:02d}" for number in range(1, 20)}


def test_the_first_broken_rule_is_the_one_told(tmp_path: Path, all_codes: Codes) -> None:
    """Break every pair of rules of the structure that can be broken together, the later one in an earlier place."""
    steps: dict[str, Callable[[Draft], object]] = {
        "E02": put("quantization", "load_in_8bit", False),
        "E03": put("block", "format_version", "2.0"),
        "E06": after(lambda path: os.truncate(path / TWO, (path / TWO).stat().st_size - 1)),
        "E07": lambda draft: draft.index["weight_map"].pop("norm.weight"),
        "E08": lambda draft: [draft.files[TWO].pop("m.b.SCB"), draft.index["weight_map"].pop("m.b.SCB")],
        "E09": lambda draft: draft.files[ONE].update({"m.a.bias": torch.ones(1)}),
        "E10": lambda draft: draft.files[ONE].update({"m.a.weight_format": torch.tensor(1, dtype=torch.uint8)}),
        "E11": lambda draft: draft.block["outliers"]["counts"].pop("m.a"),
    }
    for number, (first, second) in enumerate(itertools.combinations(steps, 2)):
        draft = Draft()
        steps[second](draft)
        steps[first](draft)
        assert all_codes(draft.write(tmp_path / str(number))) == [first], (first, second)


def test_all_broken_values_are_told(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    draft.files[ONE]["m.a.weight"][0, 0] = 1
    draft.set("m.a.outlier_dims", torch.tensor([3, 1], dtype=torch.int32))
    draft.files[TWO]["norm.weight"][0] = 3
    draft.files[TWO]["m.b.SCB"][1] = float("nan")
    del draft.manifest["tensors"]["emb.weight"]
    assert all_codes(draft.write(tmp_path / "c")) == ["E17", "E13", "E14", "E18", "E12", "E18"]


def test_a_layer_inside_a_layer_hides_nothing(tmp_path: Path, all_codes: Codes) -> None:
    draft = Draft()
    draft.files[ONE] |= layer("m.a.inner", [])
    draft.block["outliers"]["counts"]["m.a.inner"] = 0
    draft.files[ONE]["m.a.weight"][0, 0] = 1
    draft.describe()
    assert all_codes(draft.write(tmp_path / "c")) == ["E13"]


def test_a_file_cut_short_while_open_is_told(tmp_path: Path) -> None:
    path = Draft().write(tmp_path / "c")
    checkpoint = open_checkpoint(path)
    last = max((info for info in checkpoint.tensors.values() if info.file == TWO), key=lambda info: info.offset)
    os.truncate(path / TWO, (path / TWO).stat().st_size - 1)
    (error,) = check_values(checkpoint)
    assert error.code == "E06"
    assert f"{TWO}: {last.name}" in str(error)
    os.truncate(path / TWO, min(info.offset for info in checkpoint.tensors.values()))
    lost = [name for name, info in sorted(checkpoint.tensors.items()) if info.file == TWO and info.nbytes]
    errors = check_values(checkpoint)
    assert [error.code for error in errors] == ["E06"] * len(lost)
    assert all(f"{TWO}: {name}: " in str(error) for name, error in zip(lost, errors, strict=True))


def test_a_layer_whose_absmax_cannot_be_read_is_told_so_once(tmp_path: Path) -> None:
    draft = Draft()
    draft.files[ONE]["m.b.SCB"] = draft.files[TWO].pop("m.b.SCB")
    draft.describe()
    path = draft.write(tmp_path / "c")
    checkpoint = open_checkpoint(path)
    os.truncate(path / ONE, min(info.offset for info in checkpoint.tensors.values() if info.file == ONE))
    told = [str(error) for error in check_values(checkpoint)]
    assert len([text for text in told if "m.b." in text]) == 1
    assert all(text.startswith("E06") for text in told)


def test_the_manifest_is_not_needed_to_compute(tmp_path: Path) -> None:
    path = Draft().write(tmp_path / "c")
    (path / MANIFEST).unlink()
    assert set(open_checkpoint(path).records) == {"m.a", "m.b"}


def test_other_weight_files_are_not_looked_at(tmp_path: Path, all_codes: Codes) -> None:
    path = Draft().write(tmp_path / "c")
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (path / "training_args.bin").write_bytes(b"x")
    assert all_codes(path) == []
