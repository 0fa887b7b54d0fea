"""The export: an int8 checkpoint written anew in the form of another program, a block of rows at a time.

It needs nothing but the checkpoint. What an interruption leaves, the same call goes on with, as a conversion does.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import (
    Checkpoint,
    CheckpointWriter,
    Manifest,
    TensorSpec,
    open_checkpoint,
    read_manifest,
)
from llmint8.formats.disk.names import CARD_NAME, CONFIG_NAME, MANIFEST_NAME
from llmint8.formats.disk.small_files import small_files
from llmint8.formats.writing.writer import require_writable

from ..hub.usage import harmless
from ..model.build import meta_model
from ..model.config import load_config
from ..planning.out import require_apart
from ..words import count, parse_size
from .gguf import require_gguf_dest, write
from .layers import Layer, Stack, layers_of
from .targets import FLOAT16, GGUF, TARGETS, Blocks, Target


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: layers in int8, layers restored to 16 bit, bytes of all tensors."""

    dest: Path
    int8: int
    restored: int
    nbytes: int
    notices: list[str]


@dataclass(frozen=True)
class _Output:
    """Tensors that are written together, and what writes them."""

    specs: list[TensorSpec]
    write: Callable[[], Iterator[tuple[str, Blocks]]]
    nbytes: int


def export(
    out: Path,
    dest: Path,
    to: str,
    *,
    keep_outlier_layers: float = 0.0,
    max_shard_size: str | int = "5GB",
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> ExportReport:
    """Write an int8 checkpoint in another form.

    Args:
        out: the int8 checkpoint.
        dest: a new directory, or one that an interrupted export left.
        to: `bitsandbytes`, `compressed-tensors`, `float16` or `gguf`.
        keep_outlier_layers: the share of the int8 layers to restore to 16 bit, those that lose most without columns.
        max_shard_size: of a weight file.
        progress: called with the name and bytes of each tensor of the checkpoint that is done.

    Raises:
        CheckpointError: the checkpoint breaks a rule of spec.md.
        LLMInt8Error: GGUF has no place for this model.
        OutputError: DEST is or lies inside OUT, or holds something else.
        ValueError: an option's value is not valid.

    """
    if to not in TARGETS:
        raise ValueError(f"to {to!r}, expected one of {', '.join(TARGETS)}")
    if not 0 <= keep_outlier_layers <= 1:
        raise ValueError(f"keep_outlier_layers is {keep_outlier_layers}, expected a share from 0 to 1")
    target, checkpoint = TARGETS[to], open_checkpoint(out)
    require_apart(out, dest, "checkpoint")
    (require_gguf_dest if target is GGUF else require_writable)(dest)
    config = load_config(out)
    model = None if config is None else meta_model(config)
    layers, stacks, experts = layers_of(checkpoint, model)
    notices = []
    restored = set(layers) if target is FLOAT16 else set(experts)
    if experts and target is not FLOAT16:
        notices.append(f"{count(len(restored), 'matrix', 'matrices')} of experts in 16 bit: {to} has no place for them")
    tables = {name for name, layer in layers.items() if layer.record.scheme.lookup is not None}
    if tables and target is not FLOAT16:
        notices.append(f"{' and '.join(sorted(tables))}: an embedding, in 16 bit: {to} has no place for one in int8")
        restored |= tables
    manifest = read_manifest(out) if (out / MANIFEST_NAME).exists() else None
    if target is not FLOAT16:
        int8 = {name: layer for name, layer in layers.items() if name not in restored}
        chosen, said = _with_outliers(_groups(int8, manifest), round(keep_outlier_layers * len(layers)))
        restored |= chosen
        notices += said if target is not GGUF else []  # they are rounded from what they were
    if target is GGUF:
        nbytes, said = write(checkpoint, dest, config, layers, restored, _card(checkpoint, to), progress)
        return ExportReport(dest, len(layers) - len(restored), len(restored), nbytes, notices + said)
    outputs = list(_outputs(checkpoint, layers, stacks, restored, target))
    with CheckpointWriter(
        dest, parse_size(max_shard_size), _fingerprint(checkpoint, to, keep_outlier_layers)
    ) as writer:
        writer.plan([output.specs for output in outputs])
        for output in outputs:
            if not writer.has(*(spec.name for spec in output.specs)):
                for name, blocks in output.write():
                    writer.write_rows(name, blocks)
            progress(output.specs[0].name, output.nbytes)
        written = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        if target.quantization is not None:
            skipped = _left_alone(checkpoint, layers, restored, model)
            written["quantization_config"] = dict(target.quantization(skipped))
        files = {str(file.relative_to(out)): file.read_bytes() for file in small_files(out) if file.name != CARD_NAME}
        files[CARD_NAME] = _card(checkpoint, to).encode()
        writer.commit_other(written, files)
        return ExportReport(dest, len(layers) - len(restored), len(restored), writer.nbytes, notices)


def _outputs(
    checkpoint: Checkpoint, layers: dict[str, Layer], stacks: dict[str, Stack], restored: set[str], target: Target
) -> Iterator[_Output]:
    """Yield what is to be written, in the order of the checkpoint's files."""
    stack_of = {layer.name: stack for stack in stacks.values() for layer in stack.layers}
    layer_of = {tensor: layer for layer in layers.values() for tensor in layer.tensors}
    done: set[str] = set()
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset)):
        layer = layer_of.get(info.name)
        if layer is None:
            spec = TensorSpec(info.name, info.dtype, info.shape)
            yield _Output([spec], partial(_copied, checkpoint, info.name), info.nbytes)
            continue
        whole: Layer | Stack = stack_of.get(layer.name, layer)
        if whole.name in done:
            continue
        done.add(whole.name)
        parts = whole.layers if isinstance(whole, Stack) else [whole]
        nbytes = sum(checkpoint.tensors[name].nbytes for part in parts for name in part.tensors)
        if isinstance(whole, Stack):
            yield _Output([whole.weight], partial(_restored, whole), nbytes)
        else:
            how = FLOAT16 if layer.name in restored else target
            yield _Output(how.specs(layer), partial(how.blocks, layer), nbytes)


def _copied(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, Blocks]]:
    yield name, checkpoint.read_rows(name)


def _restored(stack: Stack) -> Iterator[tuple[str, Blocks]]:
    yield stack.name, stack.original()


@dataclass(frozen=True)
class _Group:
    """Layers with the same input and the same columns; their squared relative errors, together, with and without."""

    names: list[str]
    kept: float
    without: float


def _groups(layers: dict[str, Layer], manifest: Manifest | None) -> list[_Group]:
    """Return the calibrated layers that have columns."""
    modules = manifest.modules if manifest else {}
    together: dict[str, list[str]] = defaultdict(list)
    for name, statistics in modules.items():
        if name in layers and layers[name].record.outlier_count:
            together[statistics.get("shares_input_with", name)].append(name)
    found = []
    for first, names in together.items():
        ks, errors = modules[first].get("ks"), modules[first].get("errors")
        if ks and errors:
            kept = bisect_right(ks, layers[names[0]].record.outlier_count) - 1
            found.append(_Group(names, errors[kept], errors[0]))
    return found


def _with_outliers(groups: list[_Group], wanted: int) -> tuple[set[str], list[str]]:
    """Choose at most so many layers, those that lose most without their columns; and say what the others lose."""
    chosen = set[str]()
    for group in sorted(groups, key=lambda group: group.kept - group.without):
        if len(chosen) + len(group.names) <= wanted:
            chosen.update(group.names)
    left = [group for group in groups if group.names[0] not in chosen]
    if not left:
        return chosen, []
    number = sum(len(group.names) for group in left)
    kept, without = sum(group.kept for group in left) / number, sum(group.without for group in left) / number
    return chosen, [
        f"{count(number, 'layer')} lose their outlier columns: on the calibration the squared relative error of "
        f"an output was {kept:.2g} with them and is {without:.2g} without"
    ]


def _left_alone(checkpoint: Checkpoint, layers: dict[str, Layer], restored: set[str], model: Any | None) -> list[str]:
    """Return the names of the linear modules that are in 16 bit."""
    int8 = {layer.module for name, layer in layers.items() if name not in restored}
    if model is None:
        return [*checkpoint.quantization.skip_modules, *sorted(restored)]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if name not in int8]


def _fingerprint(checkpoint: Checkpoint, to: str, share: float) -> dict[str, str]:
    found = {"the form": to, "--keep-outlier-layers": str(share), "the checkpoint": str(checkpoint.path.resolve())}
    for name in [CONFIG_NAME, *checkpoint.files]:
        status = (checkpoint.path / name).stat()
        found[f"the checkpoint's {name}"] = f"{status.st_size} bytes, modified {status.st_mtime_ns}"
    return found


def _card(checkpoint: Checkpoint, to: str) -> str:
    source = checkpoint.quantization.source
    named = harmless(str(source.get("repo") or source.get("name") or checkpoint.path.resolve().name))
    return (
        f"# {named}, exported\n\nThis is an int8 checkpoint of `{named}` that llmint8 wrote in another form, {to}. "
        "What the model is for and under which licence, the card of the original says.\n"
    )
