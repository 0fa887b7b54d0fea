"""A second reader of int8 checkpoints, which follows `spec.md` alone: it opens one, checks it, and computes its layers.

Only the standard library and NumPy, nothing of ours and no torch: where two programs that share no line disagree, one
of them or the text is wrong. conftest.py runs it on all that the suite writes, test_checkpoint.py on checkpoints that
break each rule.

    python tests/spec_reader.py DIRECTORY
"""

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Section 5. NumPy has no type of one byte for floats, and none for BF16: those are read as the integers that hold them.
ITEMS = {
    **{
        "BOOL": "u1",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "U16": "<u2",
        "I16": "<i2",
        "F16": "<f2",
    },
    **{"BF16": "<u2", "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8"},
}
HEADER_BYTES, JSON_FILE_BYTES, JSON_VALUES = 100_000_000, 268_435_456, 10_000_000
NAME_CHARACTERS, DIMENSIONS, ELEMENTS = 1024, 64, 2**63 - 1
# By MAJOR, sections 4, 6 and 17: how weight files are called, and the absmax of a layer.
STEMS, ABSMAX = {1: "model", 2: "llmint8-model"}, {1: "SCB", 2: "absmax"}
MANIFEST = "llmint8_manifest.json"
FLOATS = ("F16", "BF16", "F32")


class BrokenError(Exception):
    """A rule of section 11 that does not hold."""

    def __init__(self, code: str, what: object) -> None:
        super().__init__(f"{code} {what}")
        self.code = code


class UnreadableError(Exception):
    """A file that is not as the text wants it; which rule that breaks depends on the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's place; `begin` counts from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint for which E01 to E11 hold. `layers` has N, K and k, which is None where nobody chose outliers."""

    path: Path
    config: dict[str, Any]
    block: dict[str, Any] | None  # of format 2, quantization_config itself
    major: int
    tensors: dict[str, Tensor]
    layers: dict[str, tuple[int, int, int | None]]

    def kbit(self, name: str) -> dict[str, Any] | None:
        """Return the scheme of a layer of k bits, or None for one in int8."""
        return kbit_of(self.block, self.major, name)

    def scheme(self, name: str) -> tuple[str, int | None, int | None]:
        """Return how a layer is coded: mode and group of the inputs, and the block of a rotation."""
        block = self.block or {}
        if self.major == 1:
            return block.get("activation", "absmax"), block.get("activation_group"), None
        said = block["schemes"][block["layers"][name]]
        rotation = said["rotation"]
        inputs = said["inputs"] or "int8-absmax"  # of an embedding that nothing is multiplied by
        return inputs.removeprefix("int8-"), said["input_group"], rotation and rotation["block"]

    def data(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        place = self.tensors[name]
        with regular(self.path, place.file) as file:
            file.seek(place.begin)
            data: bytes = file.read(place.end - place.begin)
        if len(data) != place.end - place.begin:
            raise BrokenError("E06", f"{place.file}: {name}: cut short")
        return data

    def read(self, name: str) -> Array:
        """Return a tensor; BF16 as the float32 of the same value."""
        place = self.tensors[name]
        return as_array(self.data(name), place.dtype, place.shape)


def as_array(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    array = np.frombuffer(data, dtype=ITEMS[dtype]).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array


# Files, sections 4 and 12.


def regular(directory: Path, name: str) -> Any:
    """Open a file of the checkpoint, if it is a regular one that no link leads away from."""
    path = directory / name
    target, home = path.resolve(), directory.resolve()
    in_the_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_the_cache:
        raise UnreadableError(f"{path}: leads out of the directory")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UnreadableError(f"{path}: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def decode(raw: bytes, constants: bool = False) -> Any:
    """Decode JSON by the rules of section 4."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise UnreadableError("a key stands twice")
        return dict(pairs)

    def constant(word: str) -> float:
        if not constants:
            raise UnreadableError(f"{word} is no JSON")
        return float(word)

    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > JSON_VALUES:
        raise UnreadableError("too many values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair has no encoding
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnreadableError("no JSON object")
    return value


def json_file(directory: Path, name: str, constants: bool = False) -> dict[str, Any]:
    with regular(directory, name) as file:
        if os.fstat(file.fileno()).st_size > JSON_FILE_BYTES:
            raise UnreadableError(f"{name}: larger than {JSON_FILE_BYTES} bytes")
        found: dict[str, Any] = decode(file.read(), constants)
    return found


def is_name(name: Any) -> bool:
    """Section 5. `isprintable` is Python's word for the same categories."""
    return isinstance(name, str) and 0 < len(name) <= NAME_CHARACTERS and name.isprintable()


def is_whole(value: Any, below: int = 2**63) -> bool:
    return type(value) is int and 0 <= value < below


def is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and len(value) <= DIMENSIONS and all(map(is_whole, value))
    return sizes and math.prod(size or 1 for size in value) <= ELEMENTS


def header(directory: Path, name: str, strict: bool) -> dict[str, Tensor]:
    """Read the header of a weight file, section 5."""
    with regular(directory, name) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > HEADER_BYTES:
            raise UnreadableError(f"{name}: its header does not lie inside")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise UnreadableError(f"{name}: its header is no object")
    entries = decode(raw)
    if entries.pop("__metadata__", {"format": "pt"}) != {"format": "pt"} and strict:
        raise UnreadableError(f"{name}: __metadata__")
    start = 8 + length
    tensors = {tensor: place(name, tensor, entry, start) for tensor, entry in entries.items()}
    for found in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if found.begin != start:
            raise UnreadableError(f"{name}: a hole or an overlap at byte {start}")
        start = found.end
    if start != size:
        raise UnreadableError(f"{name}: {size} bytes, its header describes {start}")
    return tensors


def place(file: str, name: str, entry: Any, start: int) -> Tensor:
    """Check one entry of a header."""
    if not is_name(name) or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnreadableError(f"{file}: {name!r}: its entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMS or not is_shape(shape):
        raise UnreadableError(f"{file}: {name}: its dtype or shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
        raise UnreadableError(f"{file}: {name}: its offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(ITEMS[dtype]).itemsize:
        raise UnreadableError(f"{file}: {name}: its offsets are not those of its shape")
    return Tensor(file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


# Structure, rules E01 to E11.


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint. Raises BrokenError with the first rule of E01 to E11 that does not hold."""
    config = under("E01", lambda: json_file(directory, "config.json", constants=True))
    said = config.get("quantization_config")
    if said is None and (directory / "quantization_config.json").exists():
        said = under("E01", lambda: json_file(directory, "quantization_config.json", constants=True))
    major, block = checked_quantization(said)
    files = under("E04", lambda: weight_map(directory, STEMS[major]))
    names = sorted(set(files.values())) if files else [f"{STEMS[major]}.safetensors"]
    for name in names:
        under("E05", lambda name=name: regular(directory, name).close())  # type: ignore[misc]
    headers = {}
    for name in names:
        headers[name] = under("E06", lambda name=name: header(directory, name, block is not None))  # type: ignore[misc]
    tensors: dict[str, Tensor] = {}
    for found in headers.values():
        for name, tensor in found.items():
            require("E07", name not in tensors, f"{name}: in two files")
            tensors[name] = tensor
    agreed = not files or {name: tensor.file for name, tensor in tensors.items()} == files
    require("E07", agreed, "index and files disagree")
    layers = checked_layers(tensors, block, major)
    checkpoint = Checkpoint(directory, config, block, major, tensors, layers)
    for name in layers:
        if major == 1 and f"{name}.weight_format" in tensors:
            value = under("E06", lambda name=name: checkpoint.read(f"{name}.weight_format"))  # type: ignore[misc]
            require("E10", int(value) == 0, f"{name}: weight_format {value}")
    if block is not None:
        counts = {name: k for name, (_, _, k) in layers.items()}
        require("E11", block["outliers"]["counts"] == counts, "counts are not those of the tensors")
    return checkpoint


def under(code: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except UnreadableError as error:
        raise BrokenError(code, error) from None


def require(code: str, holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(code, what)


def checked_quantization(said: Any) -> tuple[int, dict[str, Any] | None]:
    """Check `quantization_config`, sections 9 and 20; return MAJOR and the block."""
    require("E02", isinstance(said, dict), "no quantization_config")
    if said.get("quant_method") == "llmint8":
        checked_block(said, 2)
        checked_coding(said)
        return 2, said
    require("E02", said.get("load_in_8bit") is True, "load_in_8bit")
    require("E02", said.get("quant_method", "bitsandbytes") == "bitsandbytes", "quant_method")
    require("E02", "quant_method" in said or "llmint8" not in said, "no quant_method")
    for key in ("load_in_4bit", "llm_int8_has_fp16_weight"):
        require("E02", said.get(key, False) is False, key)
    require("E02", type(said.get("llm_int8_enable_fp32_cpu_offload", False)) is bool, "offload")
    threshold, skipped = said.get("llm_int8_threshold", 6.0), said.get("llm_int8_skip_modules")
    require("E02", type(threshold) in (int, float) and 0 <= threshold <= sys.float_info.max, "llm_int8_threshold")
    named = skipped is None or (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped))
    require("E02", named, "llm_int8_skip_modules")
    if "llmint8" not in said:
        return 1, None
    block = said["llmint8"]
    checked_block(block, 1)
    require("E03", block.get("activation") in ("absmax", "zeropoint"), "activation")
    group = block.get("activation_group")
    require("E03", group is None or (type(group) is int and group in (64, 128, 256)), "activation_group")
    return 1, block


def checked_block(block: Any, major: int) -> None:
    """Check what is the same in both formats."""
    readable = isinstance(block, dict) and is_readable(block.get("format_version"), str(major))
    require("E03", readable, "format_version")
    require("E03", isinstance(block.get("producer"), str), "producer")
    require("E03", isinstance(block.get("calibration"), dict | None), "calibration")
    require("E03", is_source(block.get("source")), "source")
    outliers = block.get("outliers")
    require("E03", isinstance(outliers, dict) and isinstance(outliers.get("criterion"), str), "outliers.criterion")
    counts = outliers.get("counts")
    whole = isinstance(counts, dict) and all(is_name(name) and is_count(k) for name, k in counts.items())
    require("E03", whole, "outliers.counts")


def checked_coding(block: dict[str, Any]) -> None:
    """Check schemes, layers and rounding, sections 18 and 20."""
    schemes, layers = block.get("schemes"), block.get("layers")
    require("E03", isinstance(schemes, dict) and len(schemes) > 0, "schemes")
    for name, scheme in schemes.items():  # type: ignore[union-attr]
        require("E03", is_name(name) and is_scheme(scheme), f"schemes: {name!r}")
    require("E03", isinstance(layers, dict) and layers.keys() == block["outliers"]["counts"].keys(), "layers")
    for scheme in layers.values():  # type: ignore[union-attr]
        require("E03", isinstance(scheme, str) and scheme in schemes, "layers: scheme")  # type: ignore[operator]
    widths = block.get("in_features", {})
    require("E03", isinstance(widths, dict), "in_features")
    for name, width in widths.items():
        of_kbits = name in layers and is_kbit(schemes[layers[name]])  # type: ignore[operator, index]
        require("E03", of_kbits and is_count(width) and width > 0, f"in_features: {name!r}")
    require("E03", isinstance(block.get("rounding"), str) and block["rounding"] in ("nearest", "gptq"), "rounding")
    skipped = block.get("not_quantized")
    named = isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    require("E03", named, "not_quantized")


def is_scheme(scheme: Any) -> bool:
    if not isinstance(scheme, dict):
        return False
    rotation, group, bits = scheme.get("rotation"), scheme.get("input_group"), scheme.get("bits")
    block = rotation.get("block") if isinstance(rotation, dict) else None
    rotated = rotation == {"kind": "hadamard", "block": 64} and type(block) is int
    looked_up = "lookup" in scheme
    alone = (None,) if looked_up and group is None else ()
    keys = scheme.keys() - {"lookup"} == {"bits", "data_type", "group", "rotation", "inputs", "input_group"}
    if keys and is_kbit(scheme):
        data_type, size = scheme["data_type"], scheme["group"]
        return (
            type(bits) is int
            and 3 <= bits <= 8
            and isinstance(data_type, str)
            and data_type in ("int", "float", "dynamic", "quantile", "nf4")
            and (data_type != "nf4" or bits == 4)
            and (size is None or (type(size) is int and size in [2**i for i in range(5, 13)]))
            and rotation is None
            and group is None
            and (not looked_up or scheme["lookup"] is True)
            and (looked_up or scheme["inputs"] is not None)
        )
    return (
        keys
        and (type(bits) is int and bits == 8)
        and (scheme["data_type"], scheme["group"]) == ("int", None)
        and (rotation is None or rotated)
        and (not looked_up or scheme["lookup"] is True)
        and isinstance(scheme["inputs"], str | None)
        and scheme["inputs"] in ("int8-absmax", "int8-zeropoint", *alone)
        and (group is None or (type(group) is int and group in (64, 128, 256)))
    )


def is_kbit(scheme: Any) -> bool:
    """Tell a k-bit scheme by section 18: from its inputs, or where there are none from what is not that of int8."""
    inputs, bits = scheme.get("inputs"), scheme.get("bits")
    int8 = type(bits) is int and (bits, scheme.get("data_type"), scheme.get("group")) == (8, "int", None)
    return inputs == "16-bit" or (inputs is None and not int8)


def kbit_of(block: Mapping[str, Any] | None, major: int, name: str) -> dict[str, Any] | None:
    if block is None or major == 1 or name not in block["layers"]:
        return None
    scheme: dict[str, Any] = block["schemes"][block["layers"][name]]
    return scheme if is_kbit(scheme) else None


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_readable(version: Any, majors: str = "12") -> bool:
    return isinstance(version, str) and re.fullmatch(rf"[{majors}]\.[0-9]+", version) is not None


def is_source(source: Any) -> bool:
    return (
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and all(key in source and isinstance(source[key], str | None) for key in ("repo", "commit"))
    )


def weight_map(directory: Path, stem: str) -> dict[str, str]:
    """Return the index's map, section 4; nothing where all is in one file."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    other = r"llmint8-.*\.safetensors" if stem == "model" else r"model\.safetensors(\.index\.json)?"
    if any(re.fullmatch(other, path.name, re.DOTALL) for path in directory.iterdir()):
        raise UnreadableError("a file of another layout")
    indexed = (directory / index).exists()
    if indexed == (directory / single).exists():
        raise UnreadableError("either the index or one file")
    files = json_file(directory, index).get("weight_map") if indexed else {}
    if not isinstance(files, dict) or (indexed and not files):
        raise UnreadableError("weight_map")
    for tensor, file in files.items():
        plain = isinstance(file, str) and is_name(file) and not re.search(r"[/\\]|^[A-Za-z]:", file)
        if not is_name(tensor) or not plain or not file.endswith(".safetensors"):
            raise UnreadableError(f"weight_map: {tensor!r}")
    return files


def checked_layers(
    tensors: Mapping[str, Tensor], block: Mapping[str, Any] | None, major: int
) -> dict[str, tuple[int, int, int | None]]:
    """Check the records, rules E08 and E09 of sections 6 and 17."""
    absmax, ours = ABSMAX[major], block is not None
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    layers = {name for name in names if tensors[f"{name}.weight"].dtype == "I8"}
    kbits = {name: scheme for name in names if (scheme := kbit_of(block, major, name))}
    layers |= {name for name in kbits if tensors[f"{name}.weight"].dtype == "U8"}
    for name in layers:
        has_codebook = name not in kbits or kbits[name]["data_type"] != "quantile" or f"{name}.codebook" in tensors
        require("E08", has_codebook, f"{name}.codebook")
        optional = ["outlier_dims", "outlier_weight", *(["weight_format"] if major == 1 else [])]
        has = {suffix: f"{name}.{suffix}" in tensors for suffix in optional}
        require("E08", f"{name}.{absmax}" in tensors, f"{name}.{absmax}")
        require("E08", has["outlier_dims"] == has["outlier_weight"], f"{name}: one outlier tensor of two")
        require("E08", not ours or all(has.values()), f"{name}: not whole")
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        reserved = suffix in (absmax, "outlier_dims", "outlier_weight") or (major, suffix) == (1, "weight_format")
        require("E08", not reserved or module in layers, f"{name}: without its weight")
    return {name: checked_shapes(tensors, name, block, major) for name in sorted(layers)}


def checked_shapes(
    tensors: Mapping[str, Tensor], name: str, block: Mapping[str, Any] | None, major: int
) -> tuple[int, int, int | None]:
    weight, dims = tensors[f"{name}.weight"], tensors.get(f"{name}.outlier_dims")
    require("E09", len(weight.shape) == 2, f"{name}.weight")
    n, k = weight.shape
    ours, kbit = block is not None, kbit_of(block, major, name)
    own: list[tuple[str, tuple[str, ...], tuple[int | None, ...]]] = [(ABSMAX[major], ("F32",), (n,))]
    own += [("weight_format", ("U8",), ())] if major == 1 else []
    if kbit and block is not None:
        require("E09", weight.dtype == "U8" and k % (8 * kbit["bits"]) == 0, f"{name}.weight")
        most = 8 * k // kbit["bits"]
        width = block.get("in_features", {}).get(name, most)
        require("E09", most - 64 < width <= most or width == most, f"{name}: {width} in_features")
        k = width
        own = [(ABSMAX[major], ("F16",), (n, max(1, -(-k // (kbit["group"] or max(1, k))))))]
        own += [("codebook", ("F16",), (2 ** kbit["bits"],))] if kbit["data_type"] == "quantile" else []
    else:
        require("E09", k <= (133_144 if ours else 132_104), f"{name}: {k} columns")
    require("E09", dims is None or len(dims.shape) == 1, f"{name}.outlier_dims")
    count = None if dims is None else dims.shape[0]
    require("E09", (count or 0) <= k, f"{name}: k is more than K")
    for suffix, dtypes, shape in (
        *own,
        ("outlier_dims", ("I32",), (count,)),
        ("outlier_weight", FLOATS, (n, count)),
        ("bias", FLOATS, (n,)),
    ):
        tensor = tensors.get(f"{name}.{suffix}")
        require("E09", tensor is None or (tensor.dtype in dtypes and tensor.shape == shape), f"{name}.{suffix}")
    return n, k, count


# Values, rules E12 to E19.


def problems(checkpoint: Checkpoint) -> list[BrokenError]:
    """Return every broken rule of E12 to E19, one for each tensor and rule."""
    found: list[BrokenError] = []
    for name in checkpoint.layers:
        try:
            found += [BrokenError(code, name) for code in broken_values(checkpoint, name)]
        except (BrokenError, UnreadableError):
            continue  # told below, for the tensor that cannot be read
    manifest = None
    if checkpoint.block is not None or (checkpoint.path / MANIFEST).exists():
        try:
            manifest = json_file(checkpoint.path, MANIFEST)
            found += [BrokenError("E16", what) for what in manifest_problems(manifest, checkpoint)]
        except UnreadableError as error:
            found.append(BrokenError("E16", error))
    readable = manifest is not None and not list(malformed(manifest))
    if readable and manifest is not None:
        found += list(unlike_the_manifest(checkpoint, manifest))
    for name in checkpoint.tensors:
        try:
            digest = hashlib.sha256(checkpoint.data(name)).hexdigest()
        except (BrokenError, UnreadableError) as error:
            found.append(BrokenError("E06", error))
            continue
        if readable and manifest is not None and digest != manifest["tensors"].get(name, {}).get("sha256", digest):
            found.append(BrokenError("E18", name))
    return found


def broken_values(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    """Yield the codes of E12 to E15 that a layer breaks."""
    absmax = checkpoint.read(f"{name}.{ABSMAX[checkpoint.major]}")
    if not (np.isfinite(absmax) & (absmax >= 0)).all():
        yield "E12"
        return
    if checkpoint.block is None:
        return
    weight = checkpoint.read(f"{name}.weight").astype(np.int64)
    nearest = checkpoint.block.get("rounding", "nearest") == "nearest"
    kbit = checkpoint.kbit(name)
    if kbit is not None:
        if kbit["data_type"] == "quantile":
            book = checkpoint.read(f"{name}.codebook").astype(np.float64)
            if not ((abs(book) <= 1).all() and (np.diff(book) >= 0).all()):
                yield "E13"
    else:
        largest, most = abs(weight).max(axis=1, initial=0), np.where(absmax > 0, 127, 0)
        if weight.shape[1] and not (np.array_equal(largest, most) if nearest else (largest <= most).all()):
            yield "E13"
    dims = checkpoint.read(f"{name}.outlier_dims").astype(np.int64)
    if not ((np.diff(dims) > 0).all() and (dims >= 0).all() and (dims < checkpoint.layers[name][1]).all()):
        yield "E14"
        return
    columns = checkpoint.read(f"{name}.outlier_weight").astype(np.float64)
    if kbit is not None:
        if not np.isfinite(columns).all():
            yield "E15"
        return
    _, _, rotation = checkpoint.scheme(name)
    step = absmax.astype(np.float64)[:, None] / 127
    apart = abs(columns - rotate(weight, rotation)[:, dims] * step)
    near = (apart <= (12 if rotation else 1.5) * step + 2.0**-25).all()
    if not np.isfinite(columns).all() or (nearest and not near):
        yield "E15"


def manifest_problems(manifest: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what breaks E16: what is not as in section 10, or not as in config.json."""
    yield from malformed(manifest)
    block = checkpoint.block
    if block is None or list(malformed(manifest)):
        return
    yield from (key for key in ("format_version", "producer") if manifest[key] != block[key])
    yield from (key for key in ("name", "repo", "commit") if manifest["source"][key] != block["source"][key])
    yield from (name for name in manifest["modules"] if name not in checkpoint.layers)


def malformed(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the first thing that is not as in section 10."""
    objects = [manifest.get("modules"), manifest.get("files", {}), manifest.get("tensors")]
    source: Any = manifest.get("source")
    if not is_readable(manifest.get("format_version")) or not isinstance(manifest.get("producer"), str):
        yield "format_version or producer"
    elif not is_source(source) or not is_hash(source.get("config_sha256")):
        yield "source"
    elif not isinstance(source.get("files"), dict) or not all(map(is_name, source["files"])):
        yield "source.files"
    elif not all(map(is_whole, source["files"].values())):
        yield "source.files: bytes"
    elif not all(isinstance(value, dict) for value in objects):
        yield "modules, files or tensors"
    elif not all(is_name(name) and isinstance(value, dict) for name, value in manifest["modules"].items()):
        yield "modules"
    elif not all(is_path(name) and is_hash(value) for name, value in manifest.get("files", {}).items()):
        yield "files"
    elif not all(is_name(name) and is_entry(value) for name, value in manifest["tensors"].items()):
        yield "tensors"


def is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and is_name(entry.get("file"))
        and isinstance(entry.get("dtype"), str)
        and entry["dtype"] in ITEMS
        and is_shape(entry.get("shape"))
        and is_hash(entry.get("sha256"))
    )


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_path(name: str) -> bool:
    return is_name(name) and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def unlike_the_manifest(checkpoint: Checkpoint, manifest: dict[str, Any]) -> Iterator[BrokenError]:
    """Yield what breaks E17 and E19."""
    entries = manifest["tensors"]
    for name in sorted(entries.keys() | checkpoint.tensors.keys()):
        entry, tensor = entries.get(name), checkpoint.tensors.get(name)
        said = entry and (entry["file"], entry["dtype"], tuple(entry["shape"]))
        if said != (tensor and (tensor.file, tensor.dtype, tensor.shape)):
            yield BrokenError("E17", name)
    for name, digest in manifest.get("files", {}).items():
        try:
            with regular(checkpoint.path, name) as file:
                same = hashlib.sha256(file.read()).hexdigest() == digest
        except UnreadableError:
            inside = (checkpoint.path / name).resolve().is_relative_to(checkpoint.path.resolve())
            same = inside and not (checkpoint.path / name).exists()
        if not same:
            yield BrokenError("E19", name)


# Arithmetic, section 7.


def round_half_even(value: Fraction) -> int:
    return round(value)  # of a Fraction, Python rounds exactly


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Return int8 [N, K] and SCB [N], in exact arithmetic."""
    absmax = [max((abs(Fraction(float(w))) for w in row), default=Fraction(0)) for row in weight]
    values = [
        [round_half_even(127 * Fraction(float(w)) / a) if a else 0 for w in row]
        for row, a in zip(weight, absmax, strict=True)
    ]
    shape = weight.shape
    return np.array(values, dtype=np.int8).reshape(shape), np.array([float(a) for a in absmax], dtype=np.float32)


def rotate(x: Array, rotation: int | None) -> Array:
    """Return r(x) of section 19, in float64."""
    if rotation is None:
        return x
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(rotation)] for i in range(rotation)]
    y = x.astype(np.float64)
    for start in range(0, x.shape[1] - rotation + 1, rotation):
        y[:, start : start + rotation] = y[:, start : start + rotation] @ np.array(signs) / math.isqrt(rotation)
    return y


def groups(k: int, group: int | None) -> list[slice]:
    """Return the dimensions of each group; where K is 0, of the one group without any."""
    size = group or max(1, k)
    return [slice(start, start + size) for start in range(0, max(1, k), size)]


def quantize_rows(
    x: Array, dims: Array, activation: str, group: int | None, rotation: int | None = None
) -> tuple[Array, Array, Array]:
    """Return q [M, K], s [M, G] and z [M, G] of an input, float64 [M, K]."""
    kept = x.astype(np.float64)
    kept[:, dims] = 0  # changes neither the absmax nor a range that contains 0
    kept = rotate(kept, rotation)
    found = [quantize_group(kept[:, part], activation) for part in groups(x.shape[1], group)]
    q, s, z = zip(*found, strict=True)
    return np.concatenate(q, axis=1), np.stack(s, axis=1), np.stack(z, axis=1)


def quantize_group(kept: Array, activation: str) -> tuple[Array, Array, Array]:
    """Return q [M, b], s [M] and z [M] of a group."""
    if activation == "absmax":
        a = abs(kept).max(axis=1, initial=0)
        safe = np.where(a == 0, 1, a)[:, None]
        return np.rint(127 * kept / safe), a / 127, np.zeros(len(a))
    low, high = kept.min(axis=1, initial=0), kept.max(axis=1, initial=0)
    s = (high - low) / 254
    safe = np.where(s == 0, 1, s)
    z = np.rint(-127 - low / safe)
    return np.clip(np.rint(kept / safe[:, None]) + z[:, None], -127, 127), s, z


def linear(
    x: Array, layer: Mapping[str, Array], activation: str, group: int | None, rotation: int | None = None
) -> Array:
    """Return y, float64 [M, N], of x [M, K]; `layer` has a layer's tensors by their last component, SCB as absmax."""
    weight, absmax = layer["weight"].astype(np.float64), layer["absmax"].astype(np.float64)
    dims = layer["outlier_dims"].astype(np.int64)
    q, s, z = quantize_rows(x, dims, activation, group, rotation)
    y: Array = np.zeros((len(x), len(weight)))
    for g, part in enumerate(groups(x.shape[1], group)):
        # Whole numbers below 2^53: exact.
        sums = q[:, part] @ weight[:, part].T - z[:, g, None] * weight[:, part].sum(axis=1)
        y += s[:, g, None] * sums
    y *= absmax / 127
    y += x[:, dims].astype(np.float64) @ layer["outlier_weight"].astype(np.float64).T
    return y + layer["bias"].astype(np.float64) if "bias" in layer else y


def compute(checkpoint: Checkpoint, name: str, x: Array, activation: str | None = None) -> Array:
    """Return what a layer makes of x [M, K], float64 [M, N]."""
    if kbit := checkpoint.kbit(name):
        layer = stored(checkpoint, name)
        y: Array = x.astype(np.float64) @ dequantize_kbit(layer, kbit, x.shape[1]).T
        return y + layer["bias"].astype(np.float64) if "bias" in layer else y
    recorded, group, rotation = checkpoint.scheme(name)
    return linear(x, stored(checkpoint, name), activation or recorded, group, rotation)


def look_up(layer: Mapping[str, Array], rows: Array, rotation: int | None = None) -> Array:
    """Return rows of an embedding, float64 [M, K]; `layer` as above."""
    y: Array = rotate(layer["weight"][rows].astype(np.float64), rotation) * (layer["absmax"][rows, None] / 127.0)
    y[:, layer["outlier_dims"].astype(np.int64)] = layer["outlier_weight"][rows]
    return y


# Weights of k bits, section 19.


def levels(bits: int, data_type: str, codebook: Array | None = None) -> Array:
    """Return what the codes stand for, float64 [2 ** k], the values of binary32."""
    if codebook is not None:
        return codebook.astype(np.float64)
    if data_type == "nf4":
        return np.array(NF4, dtype=np.float32).astype(np.float64)
    if data_type == "int":
        most = 2 ** (bits - 1) - 1
        found = [Fraction(c - most, most) for c in range(2 * most + 1)]
    elif data_type == "float":
        exponents = {3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}[bits]
        s = 2 ** (bits - 1 - exponents)
        numbers = [Fraction(t, s) for t in range(1, s)]
        numbers += [Fraction(2) ** (e - 1) * (1 + Fraction(t, s)) for e in range(1, 2**exponents) for t in range(s)]
        found = sorted([0 / max(numbers)] + [sign * one / max(numbers) for one in numbers for sign in (1, -1)])
    else:
        tens = [(e, t) for e in range(bits - 1) for t in range(2**e)]
        numbers = [
            Fraction(1, 10 ** (bits - 2 - e)) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * t + 1, 2 ** (e + 1)))
            for e, t in tens
        ]
        found = sorted([Fraction(0), Fraction(1)] + [sign * one for one in numbers for sign in (1, -1)])
    found += [Fraction(1)] * (2**bits - len(found))
    return np.array([float(one) for one in found]).astype(np.float32).astype(np.float64)


NF4 = (
    *(-1.0, -0.69619289, -0.52507304, -0.39491749, -0.28444136, -0.18477344, -0.09104999, 0.0),
    *(0.07958033, 0.16093017, 0.24611229, 0.33791519, 0.4407098, 0.56261697, 0.72295673, 1.0),
)


def codes(packed: Array, bits: int, k: int) -> Array:
    """Return the codes [N, K] of rows of bytes: bit by bit, as the text has it."""
    found = np.zeros((len(packed), k), dtype=np.int64)
    for i in range(k):
        chunk, inside = divmod(i, 64)
        start, shift = chunk * 8 * bits, 0
        for w in (8, 4, 2, 1):
            if bits & w:
                place, j = divmod(inside, 8 * w)
                field = packed[:, start + j] >> (w * place) & ((1 << w) - 1)
                found[:, i] |= field.astype(np.int64) << shift
                start, shift = start + 8 * w, shift + w
    return found


def quantize_kbit(weight: Array, bits: int, data_type: str, group: int | None) -> tuple[Array, Array]:
    """Return the codes [N, K] and the absmax, float16 [N, G], of a weight in binary32, and levels in common."""
    k = weight.shape[1]
    parts = groups(k, group)
    absmax = np.stack([abs(weight[:, part]).max(axis=1, initial=0) for part in parts], axis=1).astype(np.float16)
    found = levels(bits, data_type).astype(np.float32)
    middles = (found[1:] + found[:-1]) / np.float32(2)
    scale = np.repeat(absmax.astype(np.float32), [part.stop - part.start for part in parts], axis=1)[:, :k]
    value = np.where(scale == 0, np.float32(0), weight.astype(np.float32) / np.where(scale == 0, np.float32(1), scale))
    return np.minimum((value[:, :, None] > middles).sum(axis=2), (found < found[-1]).sum()), absmax


def dequantize_kbit(layer: Mapping[str, Array], scheme: Mapping[str, Any], k: int) -> Array:
    """Return a weight, float64 [N, K]; `layer` as above."""
    known = levels(scheme["bits"], scheme["data_type"], layer.get("codebook"))
    found: Array = known[codes(layer["weight"], scheme["bits"], k)]
    for g, part in enumerate(groups(k, scheme["group"])):
        found[:, part] *= layer["absmax"][:, g, None].astype(np.float64)
    found[:, layer["outlier_dims"].astype(np.int64)] = layer["outlier_weight"]
    return found


def stored(checkpoint: Checkpoint, name: str) -> dict[str, Array]:
    """Return the tensors of a layer by their last component, SCB as absmax."""
    suffixes = ("weight", "codebook", "outlier_dims", "outlier_weight", "bias")
    layer = {
        suffix: checkpoint.read(f"{name}.{suffix}") for suffix in suffixes if f"{name}.{suffix}" in checkpoint.tensors
    }
    layer["absmax"] = checkpoint.read(f"{name}.{ABSMAX[checkpoint.major]}")
    layer.setdefault("outlier_dims", np.zeros(0, dtype=np.int32))
    layer.setdefault("outlier_weight", np.zeros((len(layer["absmax"]), 0), dtype=np.float32))
    return layer


def main(directory: str) -> int:
    """Print what is wrong with a checkpoint; return the exit status."""
    try:
        checkpoint = open_checkpoint(Path(directory))
        found = problems(checkpoint)
    except BrokenError as error:
        found = [error]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
