"""An encoder of sentences against its 16-bit source: how far its embeddings are off, and whether they rank texts alike.

A model without a next token has no KL. What it is used for is the order of texts by their cosine similarity, so that is
compared: of all pairs of texts, and the nearest other text of each. Every line is a text. Those of one length make a
batch, so there is no padding that a model, a pooling or a scale could be disturbed by. All is computed in float32 where
it is not int8, and compared in float64.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.converter.calibration.text import read_text
from llmint8.converter.gguf.source import open_local
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.machine import usable_device
from llmint8.converter.model.inputs import senses, takes_text
from llmint8.converter.model.limits import longest_text
from llmint8.formats import SourceError, open_checkpoint

from ..model.load import load
from ..model.pretrained import config_and_class
from .compare import BeyondCalibration, beyond_calibration, modes_of, starts_counting
from .methods import METHODS, Simulation
from .pooling import Pooling, read_pooling
from .reference import load_model, reference_class, tokenizer_beside
from .runs import int8_layers, run_in_mode, stored_columns

_BATCH = 16
# Pairs of two texts can be in one order only.
_FEWEST = 3


@dataclass(frozen=True)
class Distance:
    """One candidate against the reference: cosines of embeddings of the same text, and what follows for the order."""

    name: str
    cosine_mean: float
    cosine_min: float
    spearman: float  # rank correlation of the cosines of all pairs of texts, -1 to 1
    same_nearest: float  # share of the texts whose nearest other text is the same one, 0 to 1


@dataclass(frozen=True)
class EmbeddingComparison:
    """What `compare_embeddings` found, and on what."""

    texts: int
    tokens: int
    pooling: Pooling
    layers: int
    stored_columns: float  # share of their input columns that the checkpoint stores in 16 bit, 0 to 1
    beyond_calibration: BeyondCalibration | None  # as in `Comparison`
    measurements: list[Distance]


def is_encoder(checkpoint: str | Path) -> bool:
    """Tell whether an int8 checkpoint holds a model that makes vectors of a text, and no next token.

    Raises:
        CheckpointError, LLMInt8Error: it cannot be loaded.

    """
    config, cls = config_and_class(open_checkpoint(resolve(checkpoint, kind="int8").path), trust_remote_code=False)
    return not config.is_encoder_decoder and not cls.can_generate() and takes_text(config) and not senses(config)


def compare_embeddings(
    checkpoint: str | Path,
    source: str | Path,
    text: Path,
    *,
    tokens: int = 8192,
    window: int = 512,
    methods: bool = False,
    device: str = "cpu",
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> EmbeddingComparison:
    """Measure how close the embeddings of an int8 encoder are to those of its source, both computed in float32.

    Args:
        checkpoint: a directory or Hub id; run as `runtime.load` runs it by default.
        source: the 16-bit checkpoint, a directory or Hub id; its tokenizer is used, and its way of pooling.
        text: any text file of which each line is a text, or a `.jsonl` file with a `text` field in each line.
        tokens: so many from the beginning of the file, in whole lines; of equal lines the first counts.
        window: what is longer is cut to so many tokens, or to what the model takes.
        methods: as of `compare`.
        device: where both models run.
        progress: called after each forward pass with a name and the number of all passes.

    Raises:
        ValueError: fewer than three texts, or no such device.
        LLMInt8Error: one of the two is not a checkpoint, or they do not belong together.

    """
    usable_device(device)
    resolved, origin = resolve(checkpoint, kind="int8"), resolve(source, kind="source")
    lines = [line.strip() for line in read_text(text).splitlines()]
    opened = open_local(origin.path)
    tokenizer = tokenizer_beside(opened.beside, origin.path)
    pooling = read_pooling(opened.beside)
    config, _ = reference_class(opened)
    model = load(resolved.path, device=device, dtype=torch.float32)
    reference = load_model(opened, config, type(model), device)
    limits = [window, pooling.longest, longest_text(config, reference)]
    batches = _batches(tokenizer, dict.fromkeys(filter(None, lines)), tokens, min(filter(None, limits)))
    layers = int8_layers(model)
    modes = modes_of(model.config.quantization_config, methods, layers.values())
    ways = METHODS if methods else ()
    passes = len(batches) * (1 + len(ways) + len(modes))

    def embed(body: Any, name: str) -> Tensor:
        return _embed(body, batches, pooling, lambda: progress(name, passes))

    searching = {layer for layer in layers.values() if layer.outliers == "dynamic"}
    counted = not methods and starts_counting(model)
    expected = embed(reference.base_model, "")
    found: dict[str, Tensor] = {}
    simulation = Simulation(reference, layers if methods else ())
    for method in ways:
        with simulation.applied(method):
            found[method.name] = embed(reference.base_model, method.name)
    for label, mode in modes.items():
        run_in_mode(layers.values(), searching, mode)
        name = f"{resolved.name}: {label}"
        found[name] = embed(model.base_model, name)
    return EmbeddingComparison(
        len(expected),
        sum(batch.numel() for batch in batches),
        pooling,
        len(layers),
        stored_columns(layers.values()),
        beyond_calibration(model) if counted else None,
        distances(expected, found),
    )


def distances(expected: Tensor, found: Mapping[str, Tensor]) -> list[Distance]:
    """Compare embeddings [texts, D] with those of the reference, by the name to report.

    Raises:
        LLMInt8Error: those of the reference are not finite.

    """
    if not bool(expected.isfinite().all()):
        raise SourceError("the reference gives embeddings that are not finite; there is nothing to compare with")
    reference = torch.nn.functional.normalize(expected.double())
    cosines, nearest = _pairs(reference)
    measured = []
    for name, embeddings in found.items():
        normalized = torch.nn.functional.normalize(embeddings.double())
        same = (normalized * reference).sum(1)
        others, nearest_now = _pairs(normalized)
        spearman = float(torch.corrcoef(torch.stack([_ranks(cosines), _ranks(others)]))[0, 1])
        share = float((nearest == nearest_now).double().mean())
        measured.append(Distance(name, float(same.mean()), float(same.min()), spearman, share))
    return measured


def _pairs(normalized: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines of all pairs, float64 [texts (texts - 1) / 2], and for each text the number of its nearest."""
    cosines = normalized @ normalized.t()
    count = len(cosines)
    first, second = torch.triu_indices(count, count, 1)
    return cosines[first, second], cosines.fill_diagonal_(-torch.inf).argmax(1)


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, float64; equal ones share the mean of theirs."""
    ordered = values.sort().values
    smaller, not_larger = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (smaller + not_larger + 1).double() / 2


def _batches(tokenizer: Any, lines: Iterable[str], tokens: int, longest: int) -> list[Tensor]:
    """Return token ids int64 [texts, length] of texts from the beginning, those of one length together."""
    by_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    taken = texts = 0
    for line in lines:
        ids = tokenizer(line, truncation=True, max_length=longest, verbose=False)["input_ids"]
        if taken + len(ids) > tokens:
            break
        by_length[len(ids)].append(ids)
        taken, texts = taken + len(ids), texts + bool(ids)
    if texts < _FEWEST:
        raise ValueError(f"the text has {texts} lines within {tokens} tokens, at least {_FEWEST} texts are needed")
    return [
        torch.tensor(rows[start : start + _BATCH])
        for length, rows in sorted(by_length.items())
        if length
        for start in range(0, len(rows), _BATCH)
    ]


@torch.no_grad()
def _embed(body: Any, batches: list[Tensor], pooling: Pooling, passed: Callable[[], None]) -> Tensor:
    """Return the embeddings [texts, D] of all batches, on the CPU."""
    found = []
    for batch in batches:
        found.append(pooling(body(input_ids=batch.to(body.device))[0].float()).cpu())
        passed()
    return torch.cat(found)
