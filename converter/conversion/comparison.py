"""Compare an int8 checkpoint with the source it was made from, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmint8.formats import DTYPES, NATIVE, Checkpoint, Source
from llmint8.kernels.weights import rotate

from ..coding import round_to_nearest
from ..model.architecture import settle_class
from ..model.build import meta_model
from ..model.config import load_config
from ..model.limits import bounded_modules
from ..model.names import parameter_tensors
from ..planning.plan import in_file_order
from ..planning.selection import select_layers


@dataclass(frozen=True)
class Comparison:
    """What comparing with the source found.

    `errors` has, per quantized layer, the relative error of the dequantized weight in the Frobenius norm, its stored
    outlier columns taken as they are. `problems` says what is not what a conversion of this source gives.
    """

    errors: dict[str, float]
    problems: list[str]


def compare_with_source(
    checkpoint: Checkpoint, source: Source, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Comparison:
    """Convert the source once more in memory, tensor by tensor, and compare bit for bit."""
    config = load_config(source.beside)
    config = None if config is None else settle_class(config, source)[0]
    with bounded_modules(len(source.tensors)):
        model = None if config is None else meta_model(config)
    selection = select_layers(source, model, (), (), experts=checkpoint.layout == NATIVE)
    source.split(stack for stack in selection.stacks if f"{stack}.0" in checkpoint.records)
    layer_of = selection.layer_of
    errors: dict[str, float] = {}
    heads = _tied_heads(checkpoint, source, model)
    known = {*(name.removesuffix(".weight") for name in source.tensors), *heads.values()}
    problems = [
        f"{name}: in the checkpoint, not in the source"
        for name in sorted(checkpoint.tensors.keys() - source.tensors.keys())
        if name.rpartition(".")[0] not in checkpoint.records.keys() & known
    ]
    for info in in_file_order(source):
        name = info.name.removesuffix(".weight")
        tensor = source.read(info.name)
        if name in checkpoint.records and info.name not in heads:
            transposed = info.name in layer_of and layer_of[info.name].transposed
            errors[name], problem = _compare_layer(checkpoint, name, tensor.t() if transposed else tensor)
            problems += problem
        elif info.name not in checkpoint.tensors:
            problems.append(f"{info.name}: in the source, not in the checkpoint")
        else:
            stored = checkpoint.read(info.name)
            expected = tensor.to(DTYPES[checkpoint.tensors[info.name].dtype])
            if stored.shape != expected.shape or not torch.equal(_bits(stored), _bits(expected)):
                problems.append(f"{info.name}: differs from the source")
        if info.name in heads:
            head = heads[info.name]
            errors[head], problem = _compare_layer(checkpoint, head, tensor)
            problems += problem
        progress(info.name, info.nbytes)
    return Comparison(errors, problems)


def _tied_heads(checkpoint: Checkpoint, source: Source, model: Any | None) -> dict[str, str]:
    """Return tensor of the source -> int8 layer made of it, for layers that the source has under another's name."""
    tensor_of = {} if model is None else parameter_tensors(model, source.tensors)
    missing = [name for name in checkpoint.records if f"{name}.weight" not in source.tensors]
    return {tensor_of[f"{name}.weight"]: name for name in missing if f"{name}.weight" in tensor_of}


def _compare_layer(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> tuple[float, list[str]]:
    record, layout = checkpoint.records[name], checkpoint.layout
    if (record.out_features, record.in_features) != tuple(weight.shape):
        shape = [record.out_features, record.in_features]
        return float("nan"), [f"{name}.weight: shape {shape}, the source has {list(weight.shape)}"]
    problems = []
    expected, grid = round_to_nearest(weight, record.scheme)
    stored = checkpoint.read(f"{name}.weight")
    scales = {suffix: checkpoint.read(f"{name}.{suffix}") for suffix in layout.weight_suffixes(record.scheme)[1:]}
    # What GPTQ makes of a weight depends on the calibration and on the machine; what is not the source's is found by
    # its scales and its columns.
    same = checkpoint.quantization.rounding != "nearest" or torch.equal(stored, grid.stored(expected))
    if not same or not all(torch.equal(scales[suffix], tensor) for suffix, tensor in grid.scales(layout).items()):
        problems.append(f"{name}.weight: not what quantizing the source gives")
    grid = grid.with_absmax(scales[layout.absmax])
    restored = rotate(grid.dequantize(grid.codes(stored, record.in_features)), record.scheme.rotation)
    if f"{name}.outlier_dims" in checkpoint.tensors:
        dims = checkpoint.read(f"{name}.outlier_dims").long()
        columns = checkpoint.read(f"{name}.outlier_weight")
        if not torch.equal(columns, weight[:, dims].to(columns.dtype)):
            problems.append(f"{name}.outlier_weight: not the source's columns")
        restored[:, dims] = columns.float()
    norm = float(weight.float().norm())
    return float((restored - weight.float()).norm()) / norm if norm else 0.0, problems


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes, so that NaN equals NaN and 0 differs from -0."""
    return tensor.reshape(-1).view(torch.uint8)
