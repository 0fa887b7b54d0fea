"""The conversion itself: read a tensor, quantize it or not, write it, forget it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmint8.formats import DTYPES, CheckpointWriter, Manifest, OutputError, SourceError, TensorInfo, outlier_specs
from llmint8.kernels.reference import quantize_weight

from .calibrate import Calibrator, Outliers
from .calibration_text import load_calibration
from .card import CARD_NAME, Subject, new_card, read_card
from .hub import resolve
from .models import usable_device
from .plan import CALIBRATION_TOKENS, ConversionPlan, in_file_order, make_plan, output_dtype, with_selection
from .provenance import describe, identify, output_config
from .select import SelectedLayer

Progress = Callable[[str, int], None]
OnNonfinite = Literal["error", "keep"]


def _no_progress(name: str, nbytes: int) -> None:
    pass


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. Sizes are bytes of tensor data."""

    out: Path
    layers: int
    kept: dict[str, str]  # linear layers left in 16 bit -> why
    uncalibrated: list[str]  # quantized layers for which no outliers could be looked for
    outlier_share: float  # of the input columns of the quantized layers
    bytes_before: int
    bytes_after: int
    seconds: float
    notices: list[str]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    outliers: str = "top-k=16",
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    quantize_head: bool = False,
    max_shard_size: str | int = "5GB",
    on_nonfinite: OnNonfinite = "error",
    low_disk: bool = False,
    progress: Progress = _no_progress,
) -> ConversionReport:
    """Convert a 16-bit checkpoint to an int8 one.

    The weights are never in memory together: a forward pass over a few hundred tokens goes through the model layer by
    layer, and each layer is read, measured, quantized and written when the pass reaches it. OUT has a config.json only
    when it is complete; after an error, what was written is removed.

    Args:
        source: a directory, or a Hub repo id.
        out: the directory to write; new or empty.
        revision: branch, tag or commit of a Hub repo.
        outliers: which columns stay in 16 bit, `top-k=16`, `threshold=6.0`, `systematic` or `none`; see `Criterion`.
            With `none` there is no forward pass.
        calibration: text for the pass, a `.jsonl` file with a `text` field or any text file; the packaged text by
            default.
        calibration_tokens: how much of it.
        device: where the pass runs.
        dtype: `float16` or `bfloat16` to cast what stays unquantized, None to leave it.
        skip: regular expressions of layer names to leave in 16 bit.
        only: regular expressions of layer names to quantize, instead of all.
        quantize_head: quantize the output head too; an embedding that is the same tensor stays beside it.
        max_shard_size: bytes, or a string such as `5GB`.
        on_nonfinite: `error`, or `keep` to leave weights with NaN or infinity in 16 bit (reads the weights twice).
        low_disk: of a Hub repo, keep two shards on the disk at most, each for as long as it is needed.
        progress: called with the name and source bytes of each tensor that is done.

    Raises:
        SourceError, CorruptFileError, OutputError: with one line that says what is wrong.
        ValueError: an option's value is not valid.

    """
    origin = resolve(source, revision, "source", low_disk)
    plan = make_plan(origin, Path(out), outliers, dtype, skip, only, max_shard_size, quantize_head)
    text = None if calibration is None else Path(calibration)
    return execute(plan, text, calibration_tokens, device, on_nonfinite, progress)


def execute(
    plan: ConversionPlan,
    calibration: Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    device: str | torch.device = "cpu",
    on_nonfinite: OnNonfinite = "error",
    progress: Progress = _no_progress,
) -> ConversionReport:
    """Carry out a plan; see `convert`."""
    started = time.monotonic()
    device = usable_device(device)
    if on_nonfinite == "keep":
        plan = _without_nonfinite(plan)
    if plan.disk_needed > plan.disk_free:
        raise OutputError(
            f"{plan.out}: needs {plan.disk_needed / 1e9:.2f} GB, {plan.disk_free / 1e9:.2f} GB are free there"
        )
    calibrated = plan.criterion.kind != "none"
    batch = load_calibration(plan.source.path, plan.config, calibration, calibration_tokens) if calibrated else None
    with CheckpointWriter(plan.out, plan.max_shard_bytes) as writer, ExitStack() as stack:
        conversion = _Conversion(plan, writer, progress)
        writer.plan(plan.groups)
        calibrator = stack.enter_context(Calibrator(plan, batch.tokens, device)) if batch else None
        if calibrator:
            calibrator.run(conversion.read, conversion.quantize)
        conversion.convert_rest()
        outliers = calibrator.choose() if calibrator else Outliers()
        conversion.write_outliers(outliers)
        manifest = _commit(plan, writer, outliers, batch.provenance if batch else None)
    notices = [*plan.selection.notices, *outliers.notices, *([batch.notice] if batch and batch.notice else [])]
    columns = sum(layer.in_features for layer in plan.selection.layers.values())
    return ConversionReport(
        plan.out,
        len(plan.selection.layers),
        plan.selection.kept,
        [name for name in plan.selection.layers if calibrated and name not in outliers.counts],
        sum(outliers.counts.values()) / columns,
        plan.bytes_before,
        sum(entry.nbytes for entry in manifest.tensors.values()),
        time.monotonic() - started,
        notices,
    )


def _commit(
    plan: ConversionPlan, writer: CheckpointWriter, outliers: Outliers, calibration: dict[str, Any] | None
) -> Manifest:
    """Complete the checkpoint: small files, a card in place of the source's, manifest and config."""
    config, identity, quantization = output_config(plan), identify(plan), describe(plan, outliers.counts, calibration)
    in_features = [layer.in_features for layer in plan.selection.layers.values()]
    subject = Subject(config, quantization, identity, in_features, writer.nbytes)
    small_files = {str(file.relative_to(plan.source.path)): file.read_bytes() for file in plan.source.small_files}
    small_files[CARD_NAME] = new_card(subject, read_card(plan.source.path)).encode()
    return writer.commit(config, quantization, identity, outliers.statistics, small_files)


class _Conversion:
    """A conversion under way: every tensor of the source is written once, whoever reads it first."""

    def __init__(self, plan: ConversionPlan, writer: CheckpointWriter, progress: Progress) -> None:
        self._plan, self._writer, self._progress = plan, writer, progress
        self._layer_of = plan.selection.layer_of
        # What is to be done with each tensor; with the embedding of a tied head, both.
        self._to_copy = {name for name in plan.source.tensors if self._is_copied(name)}
        self._to_quantize = set(self._layer_of)

    def _is_copied(self, name: str) -> bool:
        layer = self._layer_of.get(name)
        return layer is None or layer.tied

    def read(self, name: str) -> Tensor:
        """Read a tensor; write it if it is one that is stored as it is."""
        tensor = self._plan.source.read(name)
        if name in self._to_copy:
            info = self._plan.source.tensors[name]
            stored = output_dtype(info.dtype, self._plan.dtype)
            self._writer.write(name, cast(tensor, stored, self._plan.source.path, info))
            self._to_copy.remove(name)
            self._progressed(name)
        return tensor

    def quantize(self, layer: SelectedLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight [N, K], write it, and return its int8 values and absmax."""
        with _one_thread():
            values, absmax = quantize_weight(weight)
        if not bool(absmax.isfinite().all()):
            row = int((~absmax.isfinite()).nonzero()[0])
            raise SourceError(
                f"{self._plan.source.path / layer.weight.file}: {layer.weight.name}: output row {row} holds NaN or "
                "infinity; --on-nonfinite keep leaves such tensors in 16 bit"
            )
        self._writer.write(f"{layer.name}.weight", values)
        self._writer.write(f"{layer.name}.SCB", absmax)
        self._writer.write(f"{layer.name}.weight_format", torch.zeros((), dtype=torch.uint8))
        self._to_quantize.remove(layer.weight.name)
        self._progressed(layer.weight.name)
        return values, absmax

    def convert_rest(self) -> None:
        """Convert what has not been reached yet, from the front of the files to their end."""
        for info in in_file_order(self._plan.source):
            if info.name in self._to_copy or info.name in self._to_quantize:
                self._convert(info.name)

    def _convert(self, name: str) -> None:
        weight = self.read(name)
        if name in self._to_quantize:
            layer = self._layer_of[name]
            self.quantize(layer, weight.t() if layer.transposed else weight)

    def write_outliers(self, outliers: Outliers) -> None:
        """Write the outlier tensors of every layer, empty ones where none were chosen."""
        specs = {}
        for name, layer in self._plan.selection.layers.items():
            stored = output_dtype(layer.weight.dtype, self._plan.dtype)
            specs[name] = outlier_specs(name, layer.out_features, outliers.counts.get(name, 0), stored)
        if self._plan.criterion.kind != "none":
            self._writer.plan(specs.values())
        for name, (dims_spec, columns_spec) in specs.items():
            layer = self._plan.selection.layers[name]
            if outliers.counts.get(name):
                dims, columns = outliers.load(name)
            else:
                dims = torch.empty(0, dtype=torch.int32)
                columns = torch.empty(columns_spec.shape, dtype=DTYPES[layer.weight.dtype])
            self._writer.write(dims_spec.name, dims)
            columns = cast(columns, columns_spec.dtype, self._plan.source.path, layer.weight)
            self._writer.write(columns_spec.name, columns)

    def _progressed(self, name: str) -> None:
        if name not in self._to_copy and name not in self._to_quantize:
            self._plan.source.release(name)
            self._progress(name, self._plan.source.tensors[name].nbytes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread. For row blocks of cache size that is faster than a disk, and it never waits at the
    barriers of OpenMP, which stall by a factor of hundreds when something else uses the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cast(tensor: Tensor, dtype: str, path: Path, info: TensorInfo) -> Tensor:
    """Cast to a dtype by safetensors' name; a finite value that would become infinite is an error."""
    if tensor.dtype == DTYPES[dtype]:
        return tensor
    result = tensor.to(DTYPES[dtype])
    overflow = tensor.isfinite() & ~result.isfinite()
    if bool(overflow.any()):
        value = float(tensor[overflow].abs().max())
        raise SourceError(
            f"{path / info.file}: {info.name}: {value:g} does not fit {str(DTYPES[dtype]).removeprefix('torch.')}; "
            "use --dtype bfloat16 or leave --dtype out"
        )
    return result


def _without_nonfinite(plan: ConversionPlan) -> ConversionPlan:
    """Return the plan with every layer whose weight is not finite left in 16 bit."""
    reasons = {}
    for name, layer in plan.selection.layers.items():
        weight = plan.source.read(layer.weight.name)
        if not all(bool(rows.isfinite().all()) for rows in torch.split(weight, 1024)):
            reasons[name] = "holds NaN or infinity"
    selection = plan.selection.without(reasons)
    return with_selection(plan, selection)
