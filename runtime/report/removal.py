"""What a model is worth when dimensions of its hidden state are set to zero, as in the LLM.int8() paper, section 4.1.

The int8 model runs on one text: as it is, with some dimensions zeroed at the inputs of the layers that read the hidden
state, and with as many other dimensions, drawn at random with a fixed seed, several times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmint8.converter.calibration.text import load_calibration
from llmint8.converter.calibration.tokenizer import load_tokenizer
from llmint8.converter.model.config import is_trusted, load_config
from llmint8.converter.model.names import module_names
from llmint8.formats import LLMInt8Error

from ..model.load import load

_TOKENS = 512
_DRAWS = 10
_SEED = 0
# Positions whose logits are widened at a time.
_POSITIONS = 64


class Quality(NamedTuple):
    """How sure a model is and how well it predicts: mean largest softmax probability, and perplexity."""

    top1_probability: float
    perplexity: float


@dataclass(frozen=True)
class Removal:
    """The model as it is, without some dims, and without as many random ones (the mean of several draws).

    `random` is None where there are not so many other dims.
    """

    dims: list[int]
    text: str
    tokens: int
    draws: int
    intact: Quality
    without: Quality
    random: Quality | None


class CannotRunError(LLMInt8Error):
    """The model cannot be measured; the message says why and is a clause without a full stop."""


def measure_removal(
    path: Path,
    layers: Sequence[str],
    dims: Sequence[int],
    width: int,
    text: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Removal:
    """Run the int8 model with and without some dimensions.

    Args:
        path: the checkpoint's directory.
        layers: the int8 layers that read the hidden state, by their names in the checkpoint.
        dims: the dimensions to zero at their inputs.
        width: of these inputs.
        text: what to run on, a file; None for the text in the package.
        progress: called after each forward pass with how many are done, of how many.

    Raises:
        CannotRunError: there is no tokenizer, the model does not predict the next token, or its code fails.
        SourceError: the text cannot be read, or is empty.

    """
    config = load_config(path)
    if config is None:
        raise CannotRunError("transformers does not know the model type")
    tokenizer, why = load_tokenizer(path, is_trusted(config), "the checkpoint")
    if tokenizer is None:
        raise CannotRunError(f"{why}, so no text can be shown to the model")
    calibration = load_calibration(path, config, text, _TOKENS)
    rows = calibration.tokens
    if rows.shape[1] < 2:
        raise CannotRunError("the text is too short: a model is measured on what follows a token")
    try:
        model: Any = load(path, dtype=torch.float32)
        if config.is_encoder_decoder or not model.can_generate():
            raise CannotRunError(f"{type(model).__name__} does not predict the next token of a text")
        modules = _modules(model, layers)
        if not modules:
            raise CannotRunError("transformers fuses the layers concerned when it loads them")
        runs = [[], list(dims), *_random_dims(width, dims)]
        found = []
        for number, chosen in enumerate(runs, start=1):
            with _zeroed(modules, chosen):
                found.append(_quality(model, rows))
            progress(number, len(runs))
    except CannotRunError:
        raise
    except Exception as error:  # the model's code may raise anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CannotRunError(f"running it failed ({type(error).__name__}: {reason})") from error
    draws = found[2:]
    mean = Quality(*(sum(values) / len(draws) for values in zip(*draws, strict=True))) if draws else None
    name = calibration.provenance["text"]
    return Removal(list(dims), name, rows.numel(), len(draws), found[0], found[1], mean)


def _modules(model: Any, layers: Sequence[str]) -> list[nn.Module]:
    names = module_names(model, [f"{layer}.weight" for layer in layers])
    return [model.get_submodule(name.removesuffix(".weight")) for name in names.values()]


def _random_dims(width: int, dims: Sequence[int]) -> list[list[int]]:
    """Draw from the dims that are not to be removed anyway."""
    others = torch.tensor(sorted(set(range(width)) - set(dims)))
    if len(others) < len(dims):
        return []
    generator = torch.Generator().manual_seed(_SEED)
    draws = [torch.randperm(len(others), generator=generator)[: len(dims)] for _ in range(_DRAWS)]
    return [others[draw].tolist() for draw in draws]


@contextmanager
def _zeroed(modules: Sequence[nn.Module], dims: Sequence[int]) -> Iterator[None]:
    """Zero dimensions of what the modules take, for the time of the context."""
    index = torch.tensor(dims, dtype=torch.int64)

    def zero(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].index_fill(-1, index.to(args[0].device), 0), *args[1:])

    handles = [module.register_forward_pre_hook(zero) for module in modules if len(dims)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quality(model: Any, rows: Tensor) -> Quality:
    top1, loss, positions = 0.0, 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1]
        targets = row[1:].to(logits.device)
        for start in range(0, len(logits), _POSITIONS):
            log_p = logits[start : start + _POSITIONS].float().log_softmax(1)
            top1 += float(log_p.amax(1).exp().sum(dtype=torch.float64))
            loss -= float(log_p.gather(1, targets[start : start + _POSITIONS, None]).sum(dtype=torch.float64))
        positions += len(targets)
    return Quality(top1 / positions, float(torch.tensor(loss / positions, dtype=torch.float64).exp()))
