"""The manifest beside a checkpoint: a SHA-256 for every tensor, where it all came from, and per-layer statistics."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..containers.tensors import DTYPES, TensorSpec, as_bytes, is_shape, is_sizes, is_tensor_name
from ..disk.names import MANIFEST_NAME
from ..disk.reading import read_json
from ..disk.strict_json import finite, member
from ..errors import CheckpointError, LLMInt8Error
from .quantization import FORMAT_VERSIONS, Quantization, check_source, major


@dataclass(frozen=True)
class ManifestEntry:
    """What the manifest says about one tensor. `sha256` is over its data as stored, in hex."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return TensorSpec("", self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class Manifest:
    """The manifest's content; spec.md, section "Manifest", describes it.

    `source` identifies what was converted. `modules` has one free-form object of statistics per quantized layer.
    `files` has the SHA-256 of config.json, tokenizer and all other files that hold no tensor, but the model card.
    """

    format_version: str
    producer: str
    source: dict[str, Any]
    tensors: dict[str, ManifestEntry]
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that goes into the file."""
        return {
            "format_version": self.format_version,
            "producer": self.producer,
            "source": self.source,
            "modules": finite(self.modules),
            "files": dict(sorted(self.files.items())),
            "tensors": {
                name: {
                    "file": entry.file,
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "sha256": entry.sha256,
                }
                for name, entry in sorted(self.tensors.items())
            },
        }


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's data in row-major order, little-endian, in hex."""
    return hashlib.sha256(as_bytes(tensor.contiguous())).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in a checkpoint directory. Raises CheckpointError with rule E16."""
    file = path / MANIFEST_NAME
    try:
        return _manifest(read_json(file))
    except LLMInt8Error as error:
        raise CheckpointError("E16", str(error)) from None
    except ValueError as error:
        raise CheckpointError("E16", f"{file}: {error}; convert again to get a new one") from None


def _manifest(raw: dict[str, Any]) -> Manifest:
    version = member(raw, "format_version", str)
    if major(version) is None:
        raise ValueError(f"format_version is {version!r}, expected {' or '.join(FORMAT_VERSIONS)}")
    source = check_source(raw)
    _hash("source.config_sha256", member(raw, "source.config_sha256", str))
    sizes = member(raw, "source.files", dict)
    if not all(map(is_tensor_name, sizes)) or not is_sizes(list(sizes.values())):
        raise ValueError(f"source.files is {str(sizes)[:80]!r}, expected the bytes of each file")
    modules = member(raw, "modules", dict)
    for name, statistics in modules.items():
        if not is_tensor_name(name) or not isinstance(statistics, dict):
            raise ValueError(f"modules: {name[:80]!r} is {str(statistics)[:80]!r}, expected an object for each layer")
    hashes = member(raw, "files", dict) if "files" in raw else {}
    return Manifest(
        version,
        member(raw, "producer", str),
        source,
        {name: _entry(name, entry) for name, entry in member(raw, "tensors", dict).items()},
        modules,
        {_file_name(name): _hash(name, value) for name, value in hashes.items()},
    )


def _entry(name: str, raw: Any) -> ManifestEntry:
    file, dtype = member(raw, "file", str), member(raw, "dtype", str)
    # Names are printed in messages, so they must be harmless.
    if not is_tensor_name(name) or not is_tensor_name(file):
        raise ValueError(f"{name[:80]!r} in {file[:80]!r} is not the name of a tensor or of a file")
    shape = raw.get("shape")
    if dtype not in DTYPES or not is_shape(shape):
        raise ValueError(f"{name}: {dtype[:80]!r} {str(shape)[:80]!r} is not a dtype and a shape")
    return ManifestEntry(file, dtype, tuple(shape), _hash(name, raw.get("sha256")))


def _hash(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{name}: sha256 {str(value)[:80]!r} is not 64 hexadecimal digits")
    return value


def _file_name(name: str) -> str:
    """Return the name of a file in the checkpoint, or in a folder of it. Raises ValueError."""
    if not is_tensor_name(name) or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name[:80]!r} is not the name of a file in the checkpoint")
    return name


def contradictions(manifest: Manifest, quantization: Quantization) -> list[str]:
    """Say where the manifest and config.json, which tell of the same conversion, disagree."""
    said = {"format_version": manifest.format_version, "producer": manifest.producer}
    configured = {"format_version": quantization.format_version, "producer": quantization.producer}
    for key in ("name", "repo", "commit"):
        said[f"source.{key}"], configured[f"source.{key}"] = manifest.source[key], quantization.source[key]
    problems = [
        f"{key} is {str(value)[:80]!r}, config.json says {str(configured[key])[:80]!r}"
        for key, value in said.items()
        if value != configured[key]
    ]
    strangers = sorted(manifest.modules.keys() - quantization.outliers.keys())
    return problems + [f"modules names {name[:80]!r}, which is not a quantized layer" for name in strangers]


def differences(manifest: Manifest, tensors: dict[str, TensorSpec], files: dict[str, str]) -> list[str]:
    """Say where the manifest and the tensors in the files disagree: presence, file, dtype and shape."""
    problems = [f"{name}: in the manifest, in no file" for name in sorted(manifest.tensors.keys() - tensors.keys())]
    for name, spec in sorted(tensors.items()):
        entry = manifest.tensors.get(name)
        if entry is None:
            problems.append(f"{name}: in {files[name]}, not in the manifest")
        elif (entry.file, entry.dtype, entry.shape) != (files[name], spec.dtype, spec.shape):
            problems.append(
                f"{name}: is {spec.dtype} {list(spec.shape)} in {files[name]}, "
                f"the manifest says {entry.dtype} {list(entry.shape)} in {entry.file}"
            )
    return problems
