"""What the calibrated pass shows to a model, and what is recorded and said of it afterwards."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.inputs import takes_text
from ..planning.plan import ConversionPlan
from ..words import written
from .processor import load_samples
from .text import Calibration, load_calibration, without_text


def load_batch(plan: ConversionPlan) -> Calibration | None:
    """Return what the pass shows to the model; None where there is no model to be shown anything.

    Raises:
        SourceError: text, images or sounds cannot be read, or not be made what the model takes.

    """
    if plan.config is None:
        return None
    source, config, options = plan.source.beside, plan.config, plan.options
    text = None if options.calibration is None or plan.samples else Path(options.calibration)
    batch = load_calibration(source, config, text, options.calibration_tokens) if takes_text(config) else without_text()
    if plan.samples is None:
        return batch
    return dataclasses.replace(batch, given=load_samples(source, config, plan.samples))


def record(
    plan: ConversionPlan, batch: Calibration | None, shown: Mapping[str, int], layers: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what is recorded of the calibration, None where no layer has been measured, and what to tell the user.

    Args:
        plan: of the conversion.
        batch: what there was to show.
        shown: what layers were reached with, and how many tokens of text it had.
        layers: how many were measured.

    """
    if batch is None:
        return None, _unused(plan)
    if not layers:
        return None, ["nothing could be measured: without calibration no outlier columns are stored"]
    tokens = max(shown.values())
    recorded = {**(batch if tokens else without_text()).provenance, "tokens": tokens}
    notices = [*batch.notices] if tokens else [] if plan.samples else _unused(plan)
    others, given = [what for what in shown if what != "text"], {one.what for one in batch.given.values()}
    reached = sorted(given & shown.keys())
    notices += [f"{what}: no layer was reached" for what in sorted(given - shown.keys())]
    if others:
        recorded |= {"text": recorded["text"] or " and ".join(others), "inputs": list(shown)}
    if plan.samples and reached:
        recorded |= {"files": len(plan.samples.all_files), "files_sha256": plan.samples.sha256}
    if made_up := " and ".join(what for what in others if what not in given):
        told = "what text does not reach was calibrated" if "text" in shown else "calibrated"
        told = f"beyond {' and '.join(reached)}, layers were calibrated" if reached else told
        notices.append(f"{told} with {made_up}, which is worse than what the model is made for")
    return {**recorded, "layers": layers}, notices


def _unused(plan: ConversionPlan) -> list[str]:
    """Say it where what the user named was not used."""
    calibration = plan.options.calibration
    if calibration is None:
        return []
    if plan.samples is not None:
        return [f"nothing was shown to the model: {plan.samples.name} was not used"]
    return [f"no text was shown to the model: {written(Path(calibration).name)} was not used"]
