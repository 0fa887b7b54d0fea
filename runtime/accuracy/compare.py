"""An int8 checkpoint against its 16-bit source on a text, and against the methods of the LLM.int8() paper.

There are two models in memory, in float32 where they are not int8: the source and the checkpoint. The paper's methods
are simulated on the first, and the checkpoint's other modes are the second with its layers switched.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmint8.converter.calibration.text import read_text
from llmint8.converter.gguf.source import open_local
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.machine import usable_device
from llmint8.converter.planning.options import ACTIVATION_GROUP
from llmint8.converter.words import kbit_in_words
from llmint8.formats import LLMInt8Error, Source

from ..layers.linear import QuantizedLinear
from ..layers.misses import outlier_misses
from ..model.load import load
from .evaluate import Evaluation, measure, token_windows
from .methods import METHODS, THRESHOLD
from .reference import check_window, load_model, reference_class, tokenizer_beside
from .runs import HEAD_OF_THE_SOURCE, Mode, Runs, int8_layers, stored_columns


class BeyondCalibration(NamedTuple):
    """Rows of inputs larger than those of the calibration: their share, 0 to 1, and the layer with the largest."""

    share: float
    layer: str
    layer_share: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, and on what."""

    windows: int
    layers: int  # in int8 in the checkpoint; the same are simulated
    head_kl: float | None  # what an int8 output head adds to the mean KL, nats; None where it is in 16 bit
    stored_columns: float  # share of their input columns that the checkpoint stores in 16 bit, 0 to 1
    beyond_calibration: BeyondCalibration | None  # None where it is unknown, and where other modes ran too
    evaluation: Evaluation


def compare(
    checkpoint: str | Path,
    source: str | Path,
    text: Path,
    *,
    tokens: int = 8192,
    window: int = 512,
    methods: bool = False,
    device: str = "cpu",
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> Comparison:
    """Measure how close an int8 checkpoint is to the source it was made from, both computed in float32.

    Args:
        checkpoint: a directory or Hub id; run as `runtime.load` runs it by default.
        source: the 16-bit checkpoint, a directory or Hub id; its tokenizer is used.
        text: a `.jsonl` file with a `text` field in each line, or any text file.
        tokens: so many from the beginning of the text, cut to whole windows.
        window: tokens in a forward pass.
        methods: measure the paper's methods too, and the checkpoint with the other kind of activations, with one scale
            for each row or else in groups, and with outliers searched in every call.
        device: where both models run.
        progress: called after each forward pass with a name and the number of all passes.

    Raises:
        ValueError: too short a text, a window longer than the model takes, no such device.
        LLMInt8Error: one of the two is not a checkpoint, they do not belong together, or they are not causal
            language models.

    """
    usable_device(device)
    resolved, origin = resolve(checkpoint, kind="int8"), resolve(source, kind="source")
    content = read_text(text)
    opened = open_local(origin.path)
    tokenizer = tokenizer_beside(opened.beside, origin.path)
    windows = token_windows(tokenizer, content, tokens, window)
    model = load(resolved.path, device=device, dtype=torch.float32)
    reference = load_reference(opened, window, device)
    layers = int8_layers(model)
    modes = modes_of(model.config.quantization_config, methods, layers.values())
    named = {f"{resolved.name}: {label}": mode for label, mode in modes.items()}
    runs = Runs(reference, model, named, METHODS if methods else (), windows)
    counted = not methods and starts_counting(model)

    def passed(name: str) -> None:
        progress(name, runs.passes)

    found = measure(runs.each(passed), progress=passed, **runs.positions)
    kl = {row.name: row.kl_mean for row in found.measurements}
    own = next(iter(named))
    without = f"{own}, {HEAD_OF_THE_SOURCE}"
    head_kl = kl[own] - kl[without] if without in kl else None
    beyond = beyond_calibration(model) if counted else None
    return Comparison(len(windows), len(layers), head_kl, stored_columns(layers.values()), beyond, found)


def load_reference(source: Source, window: int, device: str) -> Any:
    """Load a 16-bit source checkpoint as a causal language model in float32, in eval mode.

    Raises:
        SourceError, CorruptFileError: the checkpoint is not complete, or a file is broken.
        LLMInt8Error: transformers does not know the model, or it does not predict the next token.
        ValueError: the model takes fewer tokens than a window has.

    """
    config, cls = reference_class(source)
    if config.is_encoder_decoder or not cls.can_generate():
        raise LLMInt8Error(f"{source.path}: {cls.__name__} is no causal language model, and only these can be compared")
    check_window(window, config, source.path)
    return load_model(source, config, cls, device)


def modes_of(config: Any, methods: bool, layers: Collection[QuantizedLinear]) -> dict[str, Mode]:
    """Return the checkpoint's own mode; beside the paper's methods also other activations, and LLM.int8(); by labels.

    That searches for outliers, which rotated layers cannot. Layers of k bits have no activations to choose from.
    """
    own = Mode(config.outliers, config.threshold, config.activation, config.activation_group)
    kbits = {kbit_in_words(layer.kbit.bits, layer.kbit.data_type, layer.kbit.block) for layer in layers if layer.kbit}
    if layers and all(layer.kbit is not None for layer in layers):
        return {f"{own.outliers}, {' and '.join(sorted(kbits)) if len(kbits) < 3 else f'{len(kbits)} codes'}": own}
    if not methods:
        return {own.label: own}
    other = own._replace(activation="zeropoint" if own.activation == "absmax" else "absmax")
    grouped = own._replace(activation_group=ACTIVATION_GROUP if own.activation_group == "row" else "row")
    searchable = all(layer.rotation is None and layer.kbit is None for layer in layers)
    searched = [Mode("dynamic", THRESHOLD, "absmax", "row")] if searchable else []
    return {mode.label: mode for mode in (own, other, grouped, *searched)}


def starts_counting(model: Any) -> bool:
    """Count from now on what exceeds the calibration; False, and nothing is counted, where no layer has a limit."""
    counts = any(layer.kept_limit is not None for layer in int8_layers(model).values())
    if counts:
        outlier_misses(model)
    return counts


def beyond_calibration(model: Any) -> BeyondCalibration:
    """Return what a model has counted since `starts_counting`."""
    found = outlier_misses(model)
    shares = {name: counts.misses / max(1, counts.rows) for name, counts in found.items()}
    misses, rows = (sum(getattr(counts, key) for counts in found.values()) for key in ("misses", "rows"))
    worst = max(shares, key=lambda name: shares[name])
    return BeyondCalibration(misses / max(1, rows), worst, shares[worst])
