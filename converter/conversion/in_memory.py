"""What a conversion finds out, of a model in memory: by the same plan and the same pass; no checkpoint is written.

The tensors are known by the names under which `save_pretrained` would write them. The pass runs on a model of the same
class without weights, as always, and reads them where they are, so the model itself is not touched. Candidate columns
are put aside in a temporary directory.
"""

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmint8.formats import Quantization, SourceError, read_json, source_in_memory
from llmint8.formats.disk.names import CONFIG_NAME
from llmint8.formats.disk.small_files import small_files
from llmint8.formats.writing.journal import Journal

from ..calibration.batch import load_batch, record
from ..calibration.calibrator import Calibrator
from ..calibration.columns import Outliers, known_columns
from ..calibration.gptq import Round
from ..calibration.text import Calibration
from ..coding import Grid, round_to_nearest
from ..hub.origin import Resolved, is_repo_id
from ..model.build import quiet_transformers
from ..planning.options import Options
from ..planning.plan import ConversionPlan, plan_source
from ..planning.selected import SelectedLayer
from ..words import first_line
from .provenance import describe, identify

log = logging.getLogger("llmint8")


@dataclass(frozen=True)
class Found:
    """What is known of a model in memory, before anything is done to it.

    Attributes:
        plan: its layers, and the tensors of the model as a source.
        outliers: the columns chosen.
        rounded: layer -> codes [N, K], where they are not rounded to nearest.
        quantization: what config.json will say.
        source: what the manifest will say of where it came from.
        notices: for the user.

    """

    plan: ConversionPlan
    outliers: Outliers
    rounded: Mapping[str, Tensor]
    quantization: Quantization
    source: dict[str, Any]
    notices: list[str]


@contextmanager
def find_out(model: Any, options: Options, tokens: Tensor | None, tokenizer: Any) -> Iterator[Found]:
    """Choose the layers of a model and their outlier columns, which can be loaded until the context is left.

    Args:
        model: a transformers model in 16 bit or float32, all of it in memory.
        options: of the conversion; those of files do not count.
        tokens: int64 [rows, length], what to show to the model in place of a text.
        tokenizer: turns the text into tokens; None takes that of the directory or repo the model was loaded from.

    Raises:
        SourceError: it is no such model, or a layer's weight is not finite.
        ValueError: an option's value is not valid, or `tokens` are no token ids.

    """
    if not isinstance(model, PreTrainedModel):
        raise SourceError(
            f"{type(model).__name__}: not a transformers model; with PEFT, merge_and_unload() returns one"
        )
    if getattr(model, "is_quantized", False):
        raise SourceError(f"{type(model).__name__}: quantized already")
    with TemporaryDirectory(prefix="llmint8-", ignore_cleanup_errors=True) as folder:
        beside = TemporaryDirectory(dir=folder)
        _write_beside(model, tokenizer, Path(beside.name))
        origin = _origin(model, Path(folder) / "origin")
        config = read_json(Path(beside.name) / CONFIG_NAME)
        source = source_in_memory(type(model).__name__, config, _tensors(model), beside)
        plan = plan_source(source, origin, Path(folder), options)
        if plan.config is None or plan.config.architectures != [type(model).__name__]:
            raise SourceError(
                f"{type(model).__name__}: not a class of transformers that its tensors fill; save it, and convert the "
                "directory with llmint8-convert"
            )
        _check_finite(plan)
        yield from _found(plan, tokens, Path(folder))


def _found(plan: ConversionPlan, tokens: Tensor | None, folder: Path) -> Iterator[Found]:
    batch = (_of_ids(plan, tokens) if tokens is not None else load_batch(plan)) if plan.calibrated else None
    (notes := folder / "notes").mkdir()
    journal = Journal(notes, None)
    try:
        rounded: dict[str, Tensor] = {}

        def quantize(layer: SelectedLayer, weight: Tensor, rounding: Round | None) -> tuple[Tensor, Grid]:
            codes, grid = round_to_nearest(weight, plan.scheme_of(layer))
            if rounding is not None:
                codes = rounded[layer.name] = rounding(weight, grid)
            return codes, grid

        outliers, shown = known_columns(plan, at_once=True), {}
        if batch is not None:
            calibrator = Calibrator(plan, batch, torch.device(plan.options.device), journal)
            calibrator.run(plan.source.read, quantize, lambda layer: True)
            outliers, shown = calibrator.choose(), calibrator.shown
        calibration, said = record(plan, batch, shown, len(outliers.statistics))
        identity = {key: value for key, value in identify(plan).items() if key != "options"}
        notices = [*plan.selection.notices, *outliers.notices, *said]
        yield Found(plan, outliers, rounded, describe(plan, outliers.counts, calibration), identity, notices)
    finally:
        journal.close()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` would write, under the names that it gives them."""
    tensors = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model)))


def _origin(model: Any, folder: Path) -> Resolved:
    """Return where a model came from; a directory is known by its name, and here it is an empty one."""
    name = str(model.name_or_path)
    if (commit := _commit(model)) is not None:
        return Resolved(folder.parent, name, commit)
    called = folder / (Path(name).resolve().name if name else type(model).__name__)
    called.mkdir(parents=True)
    return Resolved(called)


def _commit(model: Any) -> str | None:
    """Return the commit of the repo that a model was loaded from; None where it was something else."""
    commit = getattr(model.config, "_commit_hash", None)
    return commit if commit and is_repo_id(str(model.name_or_path)) else None


def _write_beside(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what lies beside the weights of a checkpoint: the tokenizer and the config."""
    name, commit = str(model.name_or_path), _commit(model)
    if tokenizer is None and commit is None and name and Path(name).is_dir():
        for file in small_files(Path(name)):
            if file.parent == Path(name):
                shutil.copyfile(file, folder / file.name)
    with quiet_transformers(logging.ERROR):
        if tokenizer is None and commit is not None:
            tokenizer = _tokenizer_of(name, commit)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        config.save_pretrained(folder)


def _tokenizer_of(repo: str, commit: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(repo, revision=commit)
    except Exception as error:  # tokenizers raise whatever they like when a file is missing
        log.debug("no tokenizer: %s", first_line(error))
        return None


def _of_ids(plan: ConversionPlan, tokens: Tensor) -> Calibration:
    """Return token ids that somebody gave as what the pass shows."""
    vocabulary = getattr(plan.config.get_text_config(), "vocab_size", None) if plan.config is not None else None
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"calibration is {tokens.dtype} {list(tokens.shape)}, expected int64 token ids [rows, length]")
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(f"calibration has token ids from {low} to {high}, expected 0 to {(vocabulary or 0) - 1}")
    return Calibration(tokens, {"text": "token ids", "text_sha256": None, "tokens": tokens.numel()})


def _check_finite(plan: ConversionPlan) -> None:
    """Refuse what cannot be quantized before anything is changed."""
    for layer in plan.selection.layers.values():
        if not bool(plan.source.read(layer.weight.name).isfinite().all()):
            raise SourceError(
                f"{plan.source.path}: {layer.weight.name}: holds NaN or infinity; skip=[{layer.name!r}] leaves it"
            )
