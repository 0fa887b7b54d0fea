"""The conversion itself: plan, calibrated pass, everything else, outlier columns, and the files that complete it."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmint8.formats import CheckpointWriter, Manifest, OutputError, Quantization, SourceError, open_source
from llmint8.formats.disk.names import CARD_NAME
from llmint8.formats.disk.small_files import MODULES_NAME
from llmint8.formats.writing.journal import Journal

from ..calibration.batch import load_batch, record
from ..calibration.calibrator import Calibrator
from ..calibration.columns import Outliers, known_columns
from ..calibration.sizing import Sizes, choose_bits
from ..calibration.text import Calibration
from ..coding import coded_in
from ..hub.card import Subject, new_card
from ..hub.download import fetch_weights
from ..hub.front_matter import read_card
from ..hub.origin import Token
from ..hub.resolve import resolve
from ..machine import usable_device
from ..planning.options import Options
from ..planning.plan import ConversionPlan, make_plan, with_schemes, with_selection
from ..words import size
from .finished import finished
from .provenance import describe, fingerprint, identify, output_config
from .transfer import Progress, Transfer


def _no_progress(name: str, nbytes: int) -> None:
    pass


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or the one before that had finished it. Sizes are bytes of tensor data."""

    out: Path
    layers: int
    kept: dict[str, str]  # linear layers left in 16 bit -> why
    uncalibrated: list[str]  # quantized layers for which no outliers could be looked for
    outlier_share: float  # of the input columns of the quantized layers
    bytes_before: int
    bytes_after: int
    seconds: float
    notices: list[str]
    already: bool = False  # it was finished before
    precision: str = "16 bit"  # what the layers are in where they are not quantized; or `float32`
    coding: str = "int8"  # what the layers are in where they are
    searches: bool = True  # whether uncalibrated layers search their outliers in every call


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    token: Token = None,
    low_disk: bool = False,
    force: bool = False,
    progress: Progress = _no_progress,
    **options: Any,
) -> ConversionReport:
    """Convert a 16-bit checkpoint to an int8 one.

    The weights are never in memory together: a forward pass over a few hundred tokens goes through the model layer by
    layer, and each layer is read, measured, quantized and written when the pass reaches it. OUT has a config.json only
    when it is complete. What an error or a kill interrupts goes on when `convert` is called again with the same
    arguments, and has the same result; or with others, but for `outliers`, the calibration and `trust_remote_code`, and
    has the result of those. What is finished is left as it is, and reported once more. Of a Hub repo the weights are
    fetched when everything else has been checked.

    Args:
        source: a directory, or a Hub repo id.
        out: the directory to write: new, empty, unfinished, or finished by the same call.
        revision: branch, tag or commit of a Hub repo.
        token: for the Hub; that of HF_TOKEN or `hf auth login` by default, and False for none.
        low_disk: of a Hub repo, keep two shards on the disk at most, each for as long as it is needed.
        force: start over where OUT is unfinished, whatever it was begun with.
        progress: called with the name and source bytes of each tensor that is done, from several threads in turn.
        options: the attributes of `Options`, such as `outliers="none"`.

    Raises:
        SourceError, CorruptFileError, OutputError: with one line that says what is wrong.
        ValueError: an option's value is not valid.

    """
    chosen = Options(**options)
    plan = make_plan(resolve(source, revision, "source", low_disk, False, token), Path(out), chosen)
    return execute(plan, force, progress)


def execute(plan: ConversionPlan, force: bool = False, progress: Progress = _no_progress) -> ConversionReport:
    """Carry out a plan; see `convert`."""
    started = time.monotonic()
    if report := already_done(plan):
        return report
    options, device, calibrated = plan.options, usable_device(plan.options.device), plan.calibrated
    _require_room(plan)
    batch, sizes = load_batch(plan) if calibrated or options.target_size else None, Sizes({}, {}, 0)
    with CheckpointWriter(plan.out, plan.max_shard_bytes, fingerprint(plan), force) as writer:
        plan = _with_weights(plan)
        if options.on_nonfinite == "keep":
            plan = _without_nonfinite(plan, writer.journal, progress)
        if options.target_size:
            plan, sizes = _sized(plan, batch, device, writer.journal, progress)
        writer.plan(plan.groups)
        transfer = Transfer(plan, writer, device, progress)
        calibrator = Calibrator(plan, batch, device, writer.journal) if batch and calibrated else None
        if calibrator:
            calibrator.run(transfer.read, transfer.quantize, transfer.has)
        transfer.convert_rest()
        outliers = calibrator.choose() if calibrator else known_columns(plan)
        progress("outlier columns", 0)
        transfer.write_outliers(outliers)
        progress("everything to the disk", 0)
        shown = calibrator.shown if calibrator else sizes.shown
        calibration, said = record(plan, batch, shown, len(outliers.statistics) if calibrator else sizes.measured)
        manifest = _commit(plan, writer, outliers, calibration)
    notices = [*plan.selection.notices, *outliers.notices, *said, *plan.source.differences]
    multiplied = plan.selection.multiplied
    columns = sum(layer.in_features for layer in multiplied.values())
    return ConversionReport(
        plan.out,
        len(multiplied),
        plan.selection.kept,
        [name for name in multiplied if calibrated and name not in outliers.statistics],
        sum(outliers.counts.values()) / columns,
        plan.bytes_before,
        sum(entry.nbytes for entry in manifest.tensors.values()),
        time.monotonic() - started,
        notices,
        precision=plan.precision,
        coding=_coding(plan, describe(plan, {}, None)),
        searches=plan.options.layout.searches,
    )


def already_done(plan: ConversionPlan, progress: Progress = _no_progress) -> ConversionReport | None:
    """Report a conversion that has been finished before; None where there is something to do. Writes nothing.

    Weights of a directory are all read for it, and compared; `progress` is told.

    Raises:
        OutputError: OUT holds a finished conversion of something else.

    """
    found = finished(plan, progress)
    if found is None:
        return None
    checkpoint, manifest = found
    records = {name: record for name, record in checkpoint.records.items() if record.scheme.lookup != "only"}
    return ConversionReport(
        plan.out,
        len(records),
        {name: reason for name, reason in plan.selection.kept.items() if name not in records},
        [name for name in records if plan.calibrated and name not in manifest.modules],
        sum(checkpoint.quantization.outliers.values()) / sum(record.in_features for record in records.values()),
        plan.bytes_before,
        sum(entry.nbytes for entry in manifest.tensors.values()),
        0.0,
        [],
        already=True,
        precision=plan.precision,
        coding=_coding(plan, checkpoint.quantization),
        searches=plan.options.layout.searches,
    )


def _coding(plan: ConversionPlan, quantization: Quantization) -> str:
    """Say in what the layers are: in more detail where all are alike."""
    return coded_in(quantization) if plan.options.target_size else plan.options.coding


def _require_room(plan: ConversionPlan) -> None:
    """Refuse to begin what will not fit on the disks."""
    if plan.disk_needed > plan.disk_free:
        raise OutputError(f"{plan.out}: needs {size(plan.disk_needed)}, {size(plan.disk_free)} are free there")
    if plan.bytes_to_fetch > plan.cache_free:
        raise SourceError(
            f"{plan.origin.name}: its weights take {size(plan.bytes_to_fetch)}, {size(plan.cache_free)} "
            f"are free in {plan.origin.path.parent}; HF_HUB_CACHE names another place, and --low-disk needs less"
        )


def _with_weights(plan: ConversionPlan) -> ConversionPlan:
    """Return the plan with its weights on the disk, where they are not fetched as they are read."""
    origin = plan.origin
    if not origin.remote or origin.low_disk:
        return plan
    fetch_weights(origin, [path.name for path in plan.source.stored])
    source = open_source(origin.path)
    source.split(plan.selection.stacks)
    if source.tensors != plan.source.tensors:
        raise SourceError(f"{origin.name}: what was downloaded is not what its headers announced")
    return dataclasses.replace(plan, source=source, origin=dataclasses.replace(origin, remote=False))


def _commit(
    plan: ConversionPlan, writer: CheckpointWriter, outliers: Outliers, calibration: dict[str, Any] | None
) -> Manifest:
    """Complete the checkpoint: small files, a card in place of the source's, manifest and config."""
    config, identity, quantization = output_config(plan), identify(plan), describe(plan, outliers.counts, calibration)
    in_features = [layer.in_features for layer in plan.selection.multiplied.values()]
    small_files = {str(file.relative_to(plan.source.beside)): file.read_bytes() for file in plan.source.small_files}
    names = [spec.name for group in plan.groups for spec in group]
    beside = MODULES_NAME in small_files
    subject = Subject(config, quantization, identity, in_features, writer.nbytes, sentences=beside, tensors=names)
    small_files[CARD_NAME] = new_card(subject, read_card(plan.source.beside)).encode()
    return writer.commit(config, quantization, identity, outliers.statistics, small_files)


def _sized(
    plan: ConversionPlan, batch: Calibration | None, device: torch.device, journal: Journal, progress: Progress
) -> tuple[ConversionPlan, Sizes]:
    """Return the plan with the bits of each layer that `--target-size` gives it, and how they were found."""
    earlier = journal.get("bits", "")
    found = None if earlier is None else Sizes(*earlier.value)
    if found is None or found.bits.keys() != plan.selection.layers.keys():
        progress("measuring the layers", 0)
        found = choose_bits(plan, batch, device, plan.source.read)
        journal.put("bits", "", list(found))
    by_bits = {kbit.bits: kbit for kbit in plan.options.candidates}
    return with_schemes(plan, {name: by_bits[bits] for name, bits in found.bits.items()}), found


def _without_nonfinite(plan: ConversionPlan, journal: Journal, progress: Progress) -> ConversionPlan:
    """Return the plan with every layer whose weight is not finite left in 16 bit."""
    reasons = {}
    for name, layer in plan.selection.layers.items():
        if journal.get("tensor", f"{name}.{plan.options.layout.absmax}"):  # what has been quantized was finite
            continue
        progress(f"looking for NaN in {name}", 0)
        if not all(bool(rows.isfinite().all()) for rows in plan.source.read_rows(layer.weight.name)):
            reasons[name] = "holds NaN or infinity"
    if reasons.keys() == plan.selection.layers.keys():
        name = next(iter(reasons))
        raise SourceError(f"{plan.source.path}: no layer is left to quantize: {name} and all others hold NaN")
    selection = plan.selection.without(reasons)
    plan.source.join(set(plan.selection.stacks) - set(selection.stacks))
    return with_selection(plan, selection)
