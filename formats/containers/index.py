"""The index of a checkpoint in shards: which file holds a tensor."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from ..disk.reading import read_json
from ..errors import CorruptFileError
from .tensors import is_tensor_name


def read_weight_map(index_path: Path, suffix: str) -> dict[str, str]:
    """Return tensor name -> file name from an index. Every file name must be a plain name with this suffix."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index_path}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and PurePosixPath(file).name == file == PureWindowsPath(file).name
        if not is_tensor_name(tensor) or not plain or not file.endswith(suffix) or not file.isprintable():
            raise CorruptFileError(
                f"{index_path}: {tensor[:80]!r} is in {file!r}, expected a printable tensor name and the name of a "
                f"{suffix} file in this directory"
            )
    return weight_map
