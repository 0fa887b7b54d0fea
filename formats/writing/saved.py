"""The manifest of a checkpoint that another program wrote: transformers, which saves a model it has loaded from one."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..disk.durable import encode_json, named_errors, write_durably
from ..disk.names import MANIFEST_NAME
from ..int8.checkpoint import open_checkpoint
from ..int8.manifest import Manifest, ManifestEntry, tensor_sha256


def write_manifest(
    path: Path, source: dict[str, Any], modules: dict[str, dict[str, Any]], files: Iterable[str]
) -> None:
    """Write the manifest of the checkpoint in a directory, of what is there; each tensor is read for its hash.

    Args:
        path: the directory.
        source: identifies what was converted once.
        modules: the statistics of each quantized layer.
        files: names of the files without tensors that belong to it.

    Raises:
        CheckpointError: the checkpoint breaks a rule of spec.md, E01 to E11.
        OutputError: the manifest cannot be written.

    """
    checkpoint = open_checkpoint(path)
    entries = {
        name: ManifestEntry(info.file, info.dtype, info.shape, tensor_sha256(checkpoint.read(name)))
        for name, info in checkpoint.tensors.items()
    }
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files if (path / name).is_file()}
    version, producer = checkpoint.quantization.format_version, checkpoint.quantization.producer
    manifest = Manifest(version, producer, source, entries, modules, hashes)
    with named_errors(path / MANIFEST_NAME):
        write_durably(path / MANIFEST_NAME, encode_json(manifest.to_dict()))
