"""Coverage-guided fuzzing of everything that reads bytes from strangers.

    python soak/fuzz_readers.py TARGET -runs=100000 -seed=1

The invariant: any bytes give either a valid object or an LLMInt8Error with one printable line, in bounded time and
memory. libFuzzer, through atheris, starts from valid files and keeps every input that reaches new code; it stops at
the first that breaks the invariant and writes it to `crash-...`. What it finds becomes a case in tests/test_hostile.py.
"""

import contextlib
import dataclasses
import io
import json
import logging
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["llmint8.formats", "pickletools", "zipfile"]):
    from llmint8 import formats
    from llmint8.formats.containers import index as shard_index
    from llmint8.formats.containers import safetensors, tensors
    from llmint8.formats.containers.pytorch import file as torch_file
    from llmint8.formats.containers.pytorch import pickles
    from llmint8.formats.disk import durable, lending, names, reading, strict_json
    from llmint8.formats.int8 import manifest, quantization

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
SOURCE = {"name": "s", "repo": None, "commit": None}
QUANTIZATION = quantization.Quantization(["lm_head"], {"a": 1}, criterion="top-k=1", source=SOURCE)
QUANTIZATION_2 = dataclasses.replace(QUANTIZATION, layout=formats.NATIVE, layers={"a": "int8"})


def header(data: bytes) -> None:
    """A safetensors file: its header, then every tensor."""
    path = FOLDER / "model.safetensors"
    path.write_bytes(data)
    for info in formats_or_error(lambda: safetensors.read_header(path)).values():
        tensors.read_tensor(path, info)


def index(data: bytes) -> None:
    """An index."""
    path = FOLDER / "model.safetensors.index.json"
    path.write_bytes(data)
    for name, file in formats_or_error(lambda: shard_index.read_weight_map(path, ".safetensors")).items():
        assert name.isprintable()
        assert Path(file).name == file


def manifest_file(data: bytes) -> None:
    """A manifest, read and written again."""
    (FOLDER / names.MANIFEST_NAME).write_bytes(data)
    found = formats_or_error(lambda: manifest.read_manifest(FOLDER))
    if found:
        durable.encode_json(found.to_dict())


def quantization_config(data: bytes) -> None:
    """A `quantization_config`, read and written again."""
    try:
        value = strict_json.parse_json(data)
        if isinstance(value, dict):
            found = quantization.Quantization.from_dict(value)
            native = found.layout == formats.NATIVE
            if native or "llmint8" in value:
                found = found.with_block(value if native else value["llmint8"])
            durable.encode_json(found.to_dict())
    except ValueError as error:
        check_line(error)


def pickle(data: bytes) -> None:
    """The stack machine alone."""
    with contextlib.suppress(ValueError):
        pickles.PickleReader(data, lambda name: True).read()


def torch_save(data: bytes) -> None:
    """A `torch.save` file in either layout: its list, then every tensor."""
    path = FOLDER / "pytorch_model.bin"
    path.write_bytes(data)
    opened = formats_or_error(lambda: torch_file.TorchFile(path, lending.OpenFiles(reading.open_regular)))
    for name, info in opened.tensors.items() if opened else ():
        tensor = formats_or_error(lambda name=name: opened.read(name))
        assert tensor is None or (tuple(tensor.shape), tensor.nbytes) == (info.shape, info.nbytes)


def checkpoint(data: bytes) -> None:
    """A whole int8 checkpoint with one file replaced; the first byte says which."""
    path = FOLDER / "checkpoint"
    if data:
        name = CHECKPOINT_FILES[data[0] % len(CHECKPOINT_FILES)]
        (path / name).write_bytes(data[1:])
        opened = formats_or_error(lambda: formats.open_checkpoint(path))
        for problem in formats.check_values(opened) if opened else ():
            check_line(problem)
        (path / name).write_bytes(ORIGINALS[name])


def formats_or_error(read: Callable[[], Any]) -> Any:
    """Return what is read, an empty dict where that is refused."""
    try:
        return read()
    except formats.LLMInt8Error as error:
        check_line(error)
        return {}


def check_line(error: Exception) -> None:
    """Hold an error to one line of bounded length. The commands print it through `printable`."""
    assert len(str(error)) < 2000, str(error)[:200]


def small_checkpoint(path: Path) -> None:
    """Write a checkpoint of one layer and one norm in two shards."""
    weight, absmax = torch.tensor([[127, -3], [2, -127]], dtype=torch.int8), torch.tensor([1.0, 2.0])
    dims = torch.tensor([1], dtype=torch.int32)
    columns = (weight[:, dims] * absmax[:, None] / 127).half()
    values = {"a.weight": weight, "a.SCB": absmax, "a.weight_format": torch.zeros((), dtype=torch.uint8)}
    values |= {"a.outlier_dims": dims, "a.outlier_weight": columns, "norm.weight": torch.ones(2).half()}
    with formats.CheckpointWriter(path, 24) as writer:
        writer.plan(
            [formats.BITSANDBYTES.record_specs("a", 2, 2, 1, "F16"), [formats.TensorSpec("norm.weight", "F16", (2,))]]
        )
        for name, value in values.items():
            writer.write(name, value)
        identity = {**SOURCE, "config_sha256": "0" * 64, "files": {}}
        writer.commit({"model_type": "x"}, QUANTIZATION, identity, {}, {})


def saved(**options: Any) -> bytes:
    """Return what torch.save writes for tensors of three kinds and a number."""
    buffer = io.BytesIO()
    base = torch.arange(6).half().reshape(2, 3)
    torch.save({"a": base, "b": base.t()[1:], "c": torch.nn.Parameter(torch.ones(2)), "n": 3}, buffer, **options)
    return buffer.getvalue()


small_checkpoint(FOLDER / "checkpoint")
ORIGINALS = {path.name: path.read_bytes() for path in (FOLDER / "checkpoint").iterdir()}
CHECKPOINT_FILES = sorted(ORIGINALS)
SHARD = min(name for name in CHECKPOINT_FILES if name.endswith(".safetensors"))
Target = tuple[Callable[[bytes], None], list[bytes]]
TARGETS: dict[str, Target] = {
    "header": (header, [ORIGINALS[SHARD], struct.pack("<Q", 2) + b"{}"]),
    "index": (index, [ORIGINALS[names.SAFETENSORS_INDEX_NAME]]),
    "manifest": (manifest_file, [ORIGINALS[names.MANIFEST_NAME]]),
    "quantization": (
        quantization_config,
        [json.dumps(of.to_dict()).encode() for of in (QUANTIZATION, QUANTIZATION_2)],
    ),
    "pickle": (pickle, [zipfile.ZipFile(io.BytesIO(saved())).read("archive/data.pkl")]),
    "torch-save": (torch_save, [saved(), saved(_use_new_zipfile_serialization=False)]),
    "checkpoint": (
        checkpoint,
        [bytes([number]) + ORIGINALS[name] for number, name in enumerate(CHECKPOINT_FILES)],
    ),
}


# What a value of JSON is replaced by.
NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\x1b",
]
NASTY += [
    "\x1b",
    "\ud800",
    "F32",
    "U8",
    "1.0",
    "2.0",
    [],
    [0, 4],
    {},
    {"a": 1},
    [[]],
    [2**62, 4],
    ["x"],
    "a.weight",
    "0" * 64,
]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value of the JSON in the input, where there is any, or else some bytes as libFuzzer does."""
    chance = random.Random(seed)
    start = data.find(b"{")
    if start < 0 or chance.random() < 0.4:
        return atheris.Mutate(data, max_size)
    try:
        text = data[start:].decode("latin-1")
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return atheris.Mutate(data, max_size)
    raw = json.dumps(changed(value, chance)).encode()
    before = data[:start]
    if start >= 8 and struct.unpack("<Q", before[-8:])[0] == end:
        before = before[:-8] + struct.pack("<Q", len(raw))
    return (before + raw + data[start + end :])[:max_size]


def changed(value: Any, chance: random.Random) -> Any:
    """Return the value with one of its parts replaced, dropped, doubled or renamed."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        kind = chance.random()
        if kind < 0.8:
            copy[key] = changed(copy[key], chance)
        elif kind < 0.9 or isinstance(copy, list):
            del copy[key]
        else:
            copy[str(chance.choice(NASTY))] = copy[key]
        return copy
    return chance.choice(NASTY)


def main() -> None:
    """Fuzz one target; the other arguments are libFuzzer's."""
    name, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
        target(seed)
    logging.disable()  # tensors left out are told, and here they are many
    limits = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=3000", "-keep_seed=1"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
