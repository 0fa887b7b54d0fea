"""What is written is read back, for any layers, sizes and shards; PyTorch files say to us what they say to torch."""

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmint8.formats import (
    BITSANDBYTES,
    DTYPES,
    CheckpointWriter,
    Quantization,
    TensorSpec,
    check_values,
    open_checkpoint,
)
from llmint8.formats.containers.pytorch.file import TorchFile
from llmint8.formats.containers.pytorch.pickles import Call, PickleReader
from llmint8.formats.containers.tensors import as_bytes
from llmint8.formats.disk.lending import OpenFiles
from llmint8.formats.disk.reading import open_regular
from llmint8.kernels.reference import quantize_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = st.text(st.characters(categories=["L", "N"], include_characters=" _-./"), min_size=1, max_size=12)
# torch itself cannot read these back from the layout before 1.6.
NEWER = ("torch.uint16", "torch.uint32", "torch.uint64", "torch.float8")
FLOATS = st.sampled_from(["F16", "BF16", "F32"])


@contextmanager
def folder() -> Iterator[Path]:
    """hypothesis runs many examples in one test, and each needs a folder of its own."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, dict[str, Tensor]]:
    """Quantized layers by name, each with its tensors by suffix; sizes of 0 and 1 among them."""
    result = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        rows, columns = draw(st.integers(1, 5)), draw(st.integers(0, 6))
        dtype = DTYPES[draw(FLOATS)]
        torch.manual_seed(draw(st.integers(0, 99)))
        weight = (torch.randn(rows, columns) * 10.0 ** draw(st.integers(-3, 3))).to(dtype)
        if draw(st.booleans()):
            weight[0] = 0
        dims = torch.tensor(sorted(draw(st.sets(st.integers(0, columns - 1)))) if columns else [], dtype=torch.int32)
        values, absmax = quantize_weight(weight)
        result[name] = {
            "weight": values,
            "SCB": absmax,
            "weight_format": torch.zeros((), dtype=torch.uint8),
            "outlier_dims": dims,
            "outlier_weight": weight[:, dims.long()],
        }
        if draw(st.booleans()):
            result[name]["bias"] = torch.randn(rows).to(dtype)
    return result


@given(records=layers(), shard_bytes=st.integers(1, 300), others=st.dictionaries(NAMES, FLOATS, max_size=3))
@settings(max_examples=60, deadline=None)
def test_records_in_any_shards_are_read_back(
    records: dict[str, dict[str, Tensor]], shard_bytes: int, others: dict[str, str]
) -> None:
    tensors = {f"{name}.{suffix}": t for name, parts in records.items() for suffix, t in parts.items()}
    tensors = {f"other.{name}.x": torch.ones(3, dtype=DTYPES[dtype]) for name, dtype in others.items()} | tensors
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    groups = [[TensorSpec(name, spelling[t.dtype], tuple(t.shape))] for name, t in tensors.items()]
    for name, parts in records.items():
        rows, columns = parts["weight"].shape
        specs = BITSANDBYTES.record_specs(
            name, rows, columns, len(parts["outlier_dims"]), spelling[parts["outlier_weight"].dtype]
        )
        assert {spec.name: spec for spec in specs}.items() <= {group[0].name: group[0] for group in groups}.items()
    counts = {name: len(parts["outlier_dims"]) for name, parts in records.items()}
    with folder() as path:
        with CheckpointWriter(path / "out", shard_bytes) as writer:
            writer.plan(groups)
            for name, tensor in reversed(tensors.items()):
                writer.write(name, tensor)
            source = {"name": "s", "repo": None, "commit": None}
            identity = {**source, "config_sha256": "0" * 64, "files": {}}
            writer.commit({"model_type": "x"}, Quantization([], counts, source=source), identity, {}, {})
        checkpoint = open_checkpoint(path / "out")
        assert check_values(checkpoint) == []
        assert checkpoint.tensors.keys() == tensors.keys()
        assert {name: record.outlier_count for name, record in checkpoint.records.items()} == counts
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bytes(as_bytes(read)) == bytes(as_bytes(tensor.contiguous()))


@st.composite
def views(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any dtype that share storages, transposed, sliced, with steps, empty and scalar."""
    base = torch.arange(60, dtype=torch.uint8).repeat(8)
    # torch saves no storage under two dtypes.
    storages = {dtype: (base % 2 if dtype == torch.bool else base.clone()).view(dtype) for dtype in DTYPES.values()}
    result: dict[str, Tensor] = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        tensor = storages[DTYPES[draw(st.sampled_from(sorted(DTYPES)))]]
        tensor = tensor[: 2 * (len(tensor) // 2)].view(2, -1)[:, draw(st.integers(0, 8)) :: draw(st.integers(1, 5))]
        if draw(st.booleans()):
            tensor = tensor.t()
        if draw(st.booleans()):
            tensor = tensor[draw(st.integers(0, 2)) :]
        if draw(st.booleans()) and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor)
        result[name] = tensor
    return result


@given(state=views(), legacy=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_torch_file_says_what_it_says_to_torch(state: dict[str, Tensor], legacy: bool) -> None:
    if legacy:
        state = {name: t for name, t in state.items() if not str(t.dtype).startswith(NEWER)}
    with folder() as path:
        torch.save(state, path / "x.bin", _use_new_zipfile_serialization=not legacy)
        ours = TorchFile(path / "x.bin", OpenFiles(open_regular))
        theirs = torch.load(path / "x.bin", weights_only=True)
        assert ours.tensors.keys() == theirs.keys()
        for name, expected in theirs.items():
            read = ours.read(name)
            assert (read.dtype, read.shape, read.is_contiguous()) == (expected.dtype, expected.shape, True)
            assert bytes(as_bytes(read)) == bytes(as_bytes(expected.detach().contiguous()))


_NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31)])
_PLAIN = st.none() | st.booleans() | _NUMBERS | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300)
_PICKLED = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner) | st.lists(inner, max_size=5).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@settings(max_examples=200, deadline=None)
@given(_PICKLED, _PICKLED)
def test_pickles_are_read_as_python_reads_them(first: Any, second: Any) -> None:
    reader = PickleReader(pickle.dumps(first, protocol=2) + pickle.dumps(second, protocol=2) + b"what follows", bool)
    read = [reader.read(), reader.read()]
    assert [_bytes_called(value) for value in read] == [first, second]
    assert reader.position == len(pickle.dumps(first, protocol=2)) + len(pickle.dumps(second, protocol=2))


def _bytes_called(value: Any) -> Any:
    """Make what a pickle would make of bytes, which protocol 2 writes as a call."""
    if isinstance(value, Call):
        assert value.function.name == "_codecs.encode" or not value.arguments
        return value.arguments[0].encode(value.arguments[1]) if value.arguments else b""
    if isinstance(value, dict):
        return {key: _bytes_called(item) for key, item in value.items()}
    return type(value)(map(_bytes_called, value)) if isinstance(value, list | tuple) else value
