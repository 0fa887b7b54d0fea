"""An int8 checkpoint, opened: what spec.md calls its structure is checked, in the order and with the codes given there.

Values are checked by `validate.py`: that reads every byte, this reads headers only.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..containers.index import read_weight_map
from ..containers.safetensors import METADATA, read_header
from ..containers.tensors import TensorInfo, read_blocks, read_tensor
from ..disk.names import CONFIG_NAME, LEGACY_QUANTIZATION_NAME, is_unfinished
from ..disk.reading import open_regular, read_json, require_inside
from ..errors import CheckpointError, CorruptFileError, LLMInt8Error
from .layouts import BITSANDBYTES, LAYOUTS, NATIVE, Layout
from .quantization import Quantization
from .records import Int8Record, check_record


@dataclass(frozen=True)
class Checkpoint:
    """An int8 checkpoint whose structure is valid."""

    path: Path
    config: dict[str, Any]
    quantization: Quantization
    tensors: dict[str, TensorInfo]
    records: dict[str, Int8Record]

    @property
    def layout(self) -> Layout:
        """What files and tensors are called."""
        return self.quantization.layout

    def read(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own."""
        info = self.tensors[name]
        return read_tensor(self.path / info.file, info)

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor in blocks of its rows, each in memory of its own; a scalar as it is."""
        info = self.tensors[name]
        path = self.path / info.file
        with open_regular(path) as file:
            yield from read_blocks(file, path, info)

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted({info.file for info in self.tensors.values()})


def open_checkpoint(
    path: str | Path, headers_elsewhere: Callable[[str], Mapping[str, TensorInfo]] | None = None
) -> Checkpoint:
    """Open an int8 checkpoint directory and check its structure, rules E01 to E11.

    Args:
        path: the directory.
        headers_elsewhere: returns the header of a weight file that is not there; E10, which reads one, waits then.

    Raises:
        CheckpointError: the first rule that is broken, with the file, the tensor and what would be right.

    """
    path = Path(path)
    config = _checked("E01", lambda: _read_config(path))
    quantization = _quantization(path, config)
    local = headers_elsewhere is None
    weight_map = _checked("E04", lambda: _weight_map(path, quantization.layout, local))
    file_names = sorted(set(weight_map.values())) if weight_map else [quantization.layout.single]
    for name in file_names if local else ():
        if not (path / name).is_file():
            raise CheckpointError("E05", f"{path / name}: no such regular file; is the download complete?")
        _checked("E05", lambda name=name: require_inside(path / name, path))
    said = METADATA if quantization.llmint8 else None
    read = headers_elsewhere or (lambda name: read_header(path / name, said))
    headers = {name: _checked("E06", lambda name=name: read(name)) for name in file_names}
    tensors = _merge(path, headers, weight_map)
    modules = [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and quantization.is_quantized(name.removesuffix(".weight"), info.dtype)
    ]
    _check_presence(path, tensors, modules, quantization)
    records = {name: check_record(path, tensors, name, quantization) for name in modules}
    checkpoint = Checkpoint(path, config, quantization, tensors, records)
    for name in records if local else ():
        _check_weight_format(checkpoint, name)
    _check_counts(checkpoint)
    return checkpoint


def _checked(code: str, action: Any) -> Any:
    try:
        return action()
    except CheckpointError:
        raise
    except LLMInt8Error as error:
        raise CheckpointError(code, str(error)) from None


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).exists():
        if is_unfinished(path):
            raise CorruptFileError(f"{path}: an unfinished conversion; the command that began it goes on with it")
        raise CorruptFileError(f"{path / CONFIG_NAME}: missing; is this the directory of a finished conversion?")
    return read_json(path / CONFIG_NAME)


def _quantization(path: Path, config: Mapping[str, Any]) -> Quantization:
    raw = config.get("quantization_config")
    if raw is None and (path / LEGACY_QUANTIZATION_NAME).exists():
        raw = _checked("E01", lambda: read_json(path / LEGACY_QUANTIZATION_NAME))
    if not isinstance(raw, dict):
        raise CheckpointError("E02", f"{path / CONFIG_NAME}: not an int8 checkpoint; llmint8-convert makes one")
    try:
        quantization = Quantization.from_dict(raw)
    except ValueError as error:
        raise CheckpointError("E02", f"{path / CONFIG_NAME}: quantization_config: {error}") from None
    native = quantization.layout == NATIVE
    if not native and "llmint8" not in raw:
        return quantization
    try:
        return quantization.with_block(raw if native else raw["llmint8"])
    except ValueError as error:
        where = "" if native else ".llmint8"
        raise CheckpointError("E03", f"{path / CONFIG_NAME}: quantization_config{where}: {error}") from None


def _weight_map(path: Path, layout: Layout, local: bool) -> dict[str, str]:
    """Return the index's map, or nothing for a checkpoint in one file; `local` tells whether that would be here."""
    for other in LAYOUTS.values():
        if other != layout and (strange := _weights_of(path, other)):
            raise CorruptFileError(
                f"{strange[0]}: a weight file of format {other.major}, where config.json says {layout.major}; "
                "remove it if it belongs elsewhere"
            )
    index, single = (path / layout.index).exists(), (path / layout.single).exists()
    if local and index == single:
        what = "both are there" if index else "neither is there"
        raise CorruptFileError(f"{path}: expected either {layout.single} or {layout.index}, {what}")
    return read_weight_map(path / layout.index, ".safetensors") if index else {}


def _weights_of(path: Path, layout: Layout) -> list[Path]:
    """Return the weight files in a directory that are named as a layout names them."""
    if layout == BITSANDBYTES:
        return [path / name for name in (layout.single, layout.index) if (path / name).exists()]
    return sorted(path.glob("llmint8-*.safetensors"))


def _merge(
    path: Path, headers: Mapping[str, Mapping[str, TensorInfo]], weight_map: Mapping[str, str]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, infos in headers.items():
        for name, info in infos.items():
            if name in tensors:
                raise CheckpointError("E07", f"{path / file}: {name}: also in {tensors[name].file}")
            if weight_map and weight_map.get(name) != file:
                raise CheckpointError("E07", f"{path / file}: {name}: the index has it in {weight_map.get(name)}")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError("E07", f"{path / file}: {name}: the index has it here, the file does not")
    return tensors


def _check_presence(
    path: Path, tensors: Mapping[str, TensorInfo], modules: Collection[str], quantization: Quantization
) -> None:
    """Every record is whole, and no part of one stands alone. bitsandbytes may leave the last three out."""
    layout, llmint8 = quantization.layout, quantization.llmint8
    for name in modules:
        outliers = [f"{name}.outlier_dims", f"{name}.outlier_weight"]
        suffixes = layout.weight_suffixes(quantization.scheme_of(name))
        required = [f"{name}.{suffix}" for suffix in suffixes if llmint8 or suffix != "weight_format"]
        if llmint8 or any(key in tensors for key in outliers):
            required += outliers
        for key in required:
            if key not in tensors:
                file = tensors[f"{name}.weight"].file
                raise CheckpointError("E08", f"{path / file}: {key}: missing, but {name}.weight is quantized")
    names = set(modules)
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in layout.reserved_suffixes and module not in names:
            raise CheckpointError("E08", f"{path / info.file}: {name}: {module}.weight is not there, quantized")


def _check_weight_format(checkpoint: Checkpoint, name: str) -> None:
    key = f"{name}.weight_format"
    if key in checkpoint.tensors:
        value = int(_checked("E06", lambda: checkpoint.read(key)))
        if value != 0:
            file = checkpoint.path / checkpoint.tensors[key].file
            raise CheckpointError(
                "E10",
                f"{file}: {key}: is {value}, expected 0 (row-major); save the model again with bitsandbytes >= 0.45",
            )


def _check_counts(checkpoint: Checkpoint) -> None:
    """Compare the counts in config.json with the records; a loader sizes its layers by either."""
    if not checkpoint.quantization.llmint8:
        return
    where, stated = checkpoint.path / CONFIG_NAME, checkpoint.quantization.outliers
    for name in stated.keys() - checkpoint.records.keys():
        raise CheckpointError("E11", f"{where}: outliers.counts names {name}, which is not a quantized layer")
    for name, record in checkpoint.records.items():
        if stated.get(name) != record.outlier_count:
            raise CheckpointError(
                "E11",
                f"{where}: outliers.counts[{name!r}] is {stated.get(name)}, the file has {record.outlier_count}",
            )
