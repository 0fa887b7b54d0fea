"""Check every value of an int8 checkpoint: rules E12 to E19 of spec.md. The structure has been checked by opening it.

Each tensor is read once, for its hash and for its values. All problems are returned, not only the first.
"""

import hashlib
from collections.abc import Callable

import torch

from ..disk.names import MANIFEST_NAME
from ..disk.reading import open_regular, require_inside
from ..errors import CheckpointError, LLMInt8Error
from .checkpoint import Checkpoint
from .manifest import Manifest, contradictions, differences, read_manifest, tensor_sha256
from .records import Int8Record

# The outlier columns are the originals of int8 columns, at most half a step away; casting them to another
# 16-bit dtype may move them further: never by a whole step more, or by half of float16's smallest number.
_MAX_STEPS_APART = 1.5
_MAX_UNDERFLOW = 2.0**-25


def check_manifest(checkpoint: Checkpoint) -> tuple[Manifest | None, list[CheckpointError]]:
    """Return the manifest, and every broken rule of E16 and E17. Reads no tensor."""
    # Without the block there need be none. One that is there all the same tells of a block that has been lost.
    if not checkpoint.quantization.llmint8 and not (checkpoint.path / MANIFEST_NAME).exists():
        return None, []
    try:
        manifest = read_manifest(checkpoint.path)
    except CheckpointError as error:
        return None, [error]
    where = checkpoint.path / MANIFEST_NAME
    files = {name: info.file for name, info in checkpoint.tensors.items()}
    llmint8 = checkpoint.quantization.llmint8
    found = [("E16", what) for what in (contradictions(manifest, checkpoint.quantization) if llmint8 else [])]
    found += [("E17", what) for what in differences(manifest, dict(checkpoint.tensors), files)]
    return manifest, [CheckpointError(code, f"{where}: {what}") for code, what in found]


def _check_files(checkpoint: Checkpoint, manifest: Manifest) -> list[CheckpointError]:
    """Return which files without tensors are not as written. One may be missing: not every reader fetches all."""
    problems = []
    for name, expected in manifest.files.items():
        path = checkpoint.path / name
        try:
            require_inside(path, checkpoint.path)
            if not path.exists():
                continue
            with open_regular(path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except LLMInt8Error as error:
            problems.append(CheckpointError("E19", str(error)))
            continue
        if found != expected:
            what = "its SHA-256 is not the manifest's: it was changed since the conversion, or damaged"
            problems.append(CheckpointError("E19", f"{path}: {what}"))
    return problems


def check_values(
    checkpoint: Checkpoint, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> list[CheckpointError]:
    """Return every broken rule from E12 on, in the order of the tensors' names.

    `progress` is called with the name and the bytes of each tensor after it was read.
    """
    manifest, problems = check_manifest(checkpoint)
    problems += _check_files(checkpoint, manifest) if manifest else []
    hashes = {name: entry.sha256 for name, entry in manifest.tensors.items()} if manifest else {}
    kept: dict[str, torch.Tensor] = {}
    parts = ("weight", checkpoint.layout.absmax, "codebook", "outlier_dims", "outlier_weight")
    suffixes = tuple(f".{name}" for name in parts)
    for name, info in sorted(checkpoint.tensors.items()):
        where = f"{checkpoint.path / info.file}: {name}"
        try:
            tensor = checkpoint.read(name)
        except LLMInt8Error as error:
            problems.append(CheckpointError("E06", str(error)))
            continue
        if name in hashes and tensor_sha256(tensor) != hashes[name]:
            problems.append(
                CheckpointError("E18", f"{where}: its SHA-256 is not the manifest's; fetch {info.file} again")
            )
        module = name.rpartition(".")[0]
        if module in checkpoint.records and name.endswith(suffixes):
            kept[name] = tensor
            # `weight` sorts last of these, so the record is complete here. Those of modules inside come between.
            if name == f"{module}.weight":
                problems += _check_record(checkpoint, checkpoint.records[module], kept)
                kept = {key: value for key, value in kept.items() if key.rpartition(".")[0] != module}
        progress(name, info.nbytes)
    return problems


def _check_record(
    checkpoint: Checkpoint, record: Int8Record, tensors: dict[str, torch.Tensor]
) -> list[CheckpointError]:
    scales, rounding = checkpoint.layout.absmax, checkpoint.quantization.rounding
    weight, absmax = tensors.get(f"{record.name}.weight"), tensors.get(f"{record.name}.{scales}")
    if weight is None or absmax is None:
        return []

    def broken(code: str, suffix: str, what: str) -> CheckpointError:
        file = checkpoint.tensors[f"{record.name}.{suffix}"].file
        return CheckpointError(code, f"{checkpoint.path / file}: {record.name}.{suffix}: {what}")

    valid = absmax.isfinite() & (absmax >= 0)
    if not bool(valid.all()):
        place = tuple((~valid).nonzero()[0].tolist())
        where = ", block ".join(map(str, place))
        # The rules that follow compare with the absmax, so they say nothing here.
        return [broken("E12", scales, f"row {where} is {float(absmax[place])}, expected a finite absmax >= 0")]
    if not checkpoint.quantization.llmint8:
        return []
    kbit = record.scheme.kbit
    what = _wrong_codebook(tensors.get(f"{record.name}.codebook")) if kbit else _wrong_values(weight, absmax, rounding)
    problems = [broken("E13", "codebook" if kbit else "weight", what)] if what else []
    dims = tensors.get(f"{record.name}.outlier_dims")
    columns = tensors.get(f"{record.name}.outlier_weight")
    if dims is None or columns is None or not len(dims):
        return problems
    if int(dims[0]) < 0 or int(dims[-1]) >= record.in_features or not bool((dims[1:] > dims[:-1]).all()):
        what = f"not sorted, not unique or not in [0, {record.in_features})"
        return [*problems, broken("E14", "outlier_dims", what)]
    if not bool(columns.isfinite().all()):
        return [*problems, broken("E15", "outlier_weight", "holds NaN or infinity")]
    if rounding != "nearest" or kbit:
        return problems
    step = absmax.double()[:, None] / 127
    apart = (columns.double() - _columns(weight, dims.long(), record.scheme.rotation) * step).abs()
    # Of a rotated column each element has the errors of as many, which may all be of one sign: 64 / 8 times one.
    errors = (record.scheme.rotation or 1) ** 0.5
    if not bool((apart <= _MAX_STEPS_APART * errors * step + _MAX_UNDERFLOW).all()):
        problems.append(broken("E15", "outlier_weight", "not the originals of the int8 columns at outlier_dims"))
    return problems


def _wrong_values(weight: torch.Tensor, absmax: torch.Tensor, rounding: str) -> str | None:
    """Say which row of an int8 weight does not fit its absmax; None where all do."""
    if not weight.shape[1]:
        return None
    largest = weight.amax(1).int().maximum(-weight.amin(1).int())
    most = torch.where(absmax > 0, 127, 0)
    # What makes up for other columns may be any value.
    wrong = largest != most if rounding == "nearest" else largest > most
    if not bool(wrong.any()):
        return None
    row = int(wrong.nonzero()[0])
    limit = "" if rounding == "nearest" else "at most "
    return f"row {row} has magnitude {int(largest[row])}, expected {limit}{int(most[row])} for its absmax"


def _wrong_codebook(codebook: torch.Tensor | None) -> str | None:
    """Say what is wrong with the levels of a layer, where it has some of its own; None where nothing is."""
    if codebook is None:
        return None
    inside = bool((codebook.abs() <= 1).all())  # which NaN is not either
    return None if inside and bool((codebook[1:] >= codebook[:-1]).all()) else "expected rising numbers from -1 to 1"


def _columns(values: torch.Tensor, dims: torch.Tensor, rotation: int | None) -> torch.Tensor:
    """Return the columns of int8 [N, K] at `dims`, float64 [N, k]; rotated back, if they are."""
    found = values[:, dims].double()
    if rotation is None:
        return found
    whole = values.shape[1] // rotation * rotation
    for place, dim in enumerate(dims.tolist()):
        if dim < whole:
            start = dim // rotation * rotation
            # Row `dim` of Sylvester's matrix: a sign for how many bits two numbers have in common.
            signs = [(-1.0) ** (other & (dim - start)).bit_count() for other in range(rotation)]
            block = values[:, start : start + rotation].double()
            found[:, place] = block @ torch.tensor(signs, dtype=torch.float64) * rotation**-0.5
    return found
