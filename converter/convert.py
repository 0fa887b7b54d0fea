"""The conversion itself: read a tensor, quantize it or not, write it, forget it."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmint8.formats import DTYPES, CheckpointWriter, OutputError, Quantization, SourceError, TensorInfo
from llmint8.kernels.reference import quantize_weight

from .hub import resolve
from .plan import ConversionPlan, in_file_order, lay_out, make_plan, output_dtype
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
    bytes_before: int
    bytes_after: int
    seconds: float
    notices: list[str]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    outliers: str = "none",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    on_nonfinite: OnNonfinite = "error",
    progress: Progress = _no_progress,
) -> ConversionReport:
    """Convert a 16-bit checkpoint to an int8 one.

    One tensor is in memory at a time. OUT has a config.json only when it is complete; after an error, what was
    written is removed.

    Args:
        source: a directory, or a Hub repo id.
        out: the directory to write; new or empty.
        revision: branch, tag or commit of a Hub repo.
        outliers: which columns stay in 16 bit; `none` is the one criterion there is so far.
        dtype: `float16` or `bfloat16` to cast what stays unquantized, None to leave it.
        skip: regular expressions of layer names to leave in 16 bit.
        only: regular expressions of layer names to quantize, instead of all.
        max_shard_size: bytes, or a string such as `5GB`.
        on_nonfinite: `error`, or `keep` to leave weights with NaN or infinity in 16 bit (reads the weights twice).
        progress: called with the name and source bytes of each tensor that is done.

    Raises:
        SourceError, CorruptFileError, OutputError: with one line that says what is wrong.
        ValueError: an option's value is not valid.

    """
    origin = resolve(source, revision)
    plan = make_plan(origin, Path(out), dtype, skip, only, max_shard_size)
    return execute(plan, outliers, on_nonfinite, progress)


def execute(
    plan: ConversionPlan,
    outliers: str = "none",
    on_nonfinite: OnNonfinite = "error",
    progress: Progress = _no_progress,
) -> ConversionReport:
    """Carry out a plan; see `convert`."""
    if outliers != "none":
        raise ValueError(f"outliers {outliers!r}, expected none")
    started = time.monotonic()
    if on_nonfinite == "keep":
        plan = _without_nonfinite(plan)
    if plan.disk_needed > plan.disk_free:
        raise OutputError(
            f"{plan.out}: needs {plan.disk_needed / 1e9:.2f} GB, {plan.disk_free / 1e9:.2f} GB are free there"
        )
    with CheckpointWriter(plan.out, plan.max_shard_bytes) as writer:
        writer.plan(plan.groups)
        for info in in_file_order(plan.source):
            layer = plan.selection.layers.get(info.name.removesuffix(".weight"))
            if layer is not None and info.name == layer.weight.name:
                _convert_layer(plan, layer, writer)
            else:
                _copy_tensor(plan, info, writer)
            progress(info.name, info.nbytes)
        writer.commit(
            _config(plan),
            _quantization(plan, outliers),
            _identity(plan),
            {},
            {str(file.relative_to(plan.source.path)): file.read_bytes() for file in plan.source.small_files},
        )
    return ConversionReport(
        plan.out,
        len(plan.selection.layers),
        plan.selection.kept,
        plan.bytes_before,
        plan.bytes_after,
        time.monotonic() - started,
        plan.selection.notices,
    )


def _copy_tensor(plan: ConversionPlan, info: TensorInfo, writer: CheckpointWriter) -> None:
    tensor = plan.source.read(info.name)
    writer.write(info.name, cast(tensor, output_dtype(info.dtype, plan.dtype), plan.source.path, info))


def _convert_layer(plan: ConversionPlan, layer: SelectedLayer, writer: CheckpointWriter) -> None:
    weight = _read_weight(plan, layer)
    with _one_thread():
        values, absmax = quantize_weight(weight)
    if not bool(absmax.isfinite().all()):
        row = int((~absmax.isfinite()).nonzero()[0])
        raise SourceError(
            f"{plan.source.path / layer.weight.file}: {layer.weight.name}: output row {row} holds NaN or infinity; "
            "--on-nonfinite keep leaves such tensors in 16 bit"
        )
    dims = torch.empty(0, dtype=torch.int32)
    stored = output_dtype(layer.weight.dtype, plan.dtype)
    columns = cast(weight[:, dims.long()], stored, plan.source.path, layer.weight)
    writer.write(f"{layer.name}.weight", values)
    writer.write(f"{layer.name}.SCB", absmax)
    writer.write(f"{layer.name}.weight_format", torch.zeros((), dtype=torch.uint8))
    writer.write(f"{layer.name}.outlier_dims", dims)
    writer.write(f"{layer.name}.outlier_weight", columns)


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


def _read_weight(plan: ConversionPlan, layer: SelectedLayer) -> Tensor:
    """Return the weight as [out, in], whichever way it is stored."""
    weight = plan.source.read(layer.weight.name)
    return weight.t() if layer.transposed else weight


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
    return lay_out(plan.source, plan.origin, plan.out, selection, plan.dtype, plan.max_shard_bytes)


def _config(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's config, its dtype replaced when tensors were cast."""
    config = dict(plan.source.config)
    if plan.dtype:
        name = str(DTYPES[plan.dtype]).removeprefix("torch.")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    return config


def _quantization(plan: ConversionPlan, outliers: str) -> Quantization:
    source = {"name": plan.origin.name, "repo": plan.origin.repo, "commit": plan.origin.commit}
    counts = dict.fromkeys(plan.selection.layers, 0)
    return Quantization(
        plan.selection.skip_modules,
        counts,
        criterion=outliers,
        producer=f"llmint8 {_version()}",
        source=source,
    )


def _identity(plan: ConversionPlan) -> dict[str, Any]:
    """Identify the source in the manifest: where it came from, the sizes of its files, the hash of its config."""
    config = (plan.source.path / "config.json").read_bytes()
    return {
        "name": plan.origin.name,
        "repo": plan.origin.repo,
        "commit": plan.origin.commit,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": {file.path.name: file.path.stat().st_size for file in plan.source.files},
    }


def _version() -> str:
    try:
        return version("llmint8")
    except PackageNotFoundError:
        return "unknown"
