"""Everything about bytes on disk: source checkpoints read, int8 checkpoints read, written and checked (spec.md)."""

from .checkpoint import Checkpoint, Int8Record, int8_specs, open_checkpoint, outlier_specs, record_specs
from .errors import CheckpointError, CorruptFileError, LLMInt8Error, OutputError, SourceError
from .files import read_json
from .journal import is_unfinished
from .manifest import Manifest, read_manifest
from .quantization import FORMAT_VERSION, Quantization
from .source import Source, open_source
from .tensors import DTYPE_NAMES, DTYPES, FLOAT_DTYPES, TensorInfo, TensorSpec
from .validate import check_manifest, check_values
from .writer import CheckpointWriter, require_writable

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "FLOAT_DTYPES",
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "CorruptFileError",
    "Int8Record",
    "LLMInt8Error",
    "Manifest",
    "OutputError",
    "Quantization",
    "Source",
    "SourceError",
    "TensorInfo",
    "TensorSpec",
    "check_manifest",
    "check_values",
    "int8_specs",
    "is_unfinished",
    "open_checkpoint",
    "open_source",
    "outlier_specs",
    "read_json",
    "read_manifest",
    "record_specs",
    "require_writable",
]
