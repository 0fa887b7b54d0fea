"""Everything about bytes on disk: source checkpoints read, int8 checkpoints read, written and checked (spec.md)."""

from .containers.tensors import DTYPE_NAMES, DTYPES, FLOAT_DTYPES, TensorInfo, TensorSpec
from .disk.names import is_unfinished
from .disk.reading import read_json
from .errors import CheckpointError, CorruptFileError, LLMInt8Error, OutputError, SourceError
from .int8.checkpoint import Checkpoint, open_checkpoint
from .int8.layouts import BITSANDBYTES, LAYOUTS, NATIVE, Layout, outlier_specs
from .int8.manifest import Manifest, read_manifest
from .int8.quantization import FORMAT_VERSIONS, Quantization
from .int8.records import Int8Record
from .int8.schemes import KBit, Scheme
from .int8.validate import check_manifest, check_values
from .sources.memory import source_in_memory
from .sources.source import Source, open_source
from .writing.writer import CheckpointWriter, require_writable

__all__ = [
    "BITSANDBYTES",
    "DTYPES",
    "DTYPE_NAMES",
    "FLOAT_DTYPES",
    "FORMAT_VERSIONS",
    "LAYOUTS",
    "NATIVE",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "CorruptFileError",
    "Int8Record",
    "KBit",
    "LLMInt8Error",
    "Layout",
    "Manifest",
    "OutputError",
    "Quantization",
    "Scheme",
    "Source",
    "SourceError",
    "TensorInfo",
    "TensorSpec",
    "check_manifest",
    "check_values",
    "is_unfinished",
    "open_checkpoint",
    "open_source",
    "outlier_specs",
    "read_json",
    "read_manifest",
    "require_writable",
    "source_in_memory",
]
