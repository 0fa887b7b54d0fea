"""The model that a source config describes, without its weights, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from llmint8.formats import SourceError

from ..machine import same_random_numbers
from ..words import first_line
from .limits import check_buffers

# What stock transformers makes of a model type when nothing else is known, the first that there is.
_CHOICES = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def model_class(config: Any) -> Any | None:
    """Return the class that the config's `architectures` names.

    Where it names none, or none that there is, the language model of the type as transformers' auto classes have it,
    or else the model without a head. None where transformers has no such class: then the architecture is somebody's own
    code, which is loaded only if the config was loaded with `trust_remote_code`.
    """
    named = str(config.architectures[0]) if config.architectures else None
    code = getattr(config, "auto_map", None) or {}
    for reference in code.values():
        if reference.endswith(f".{named}"):
            return _own_class(config, reference)
    found = getattr(transformers, named, None) if named is not None else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if reference := next((code[name] for name in _AUTO if name in code), None):
        return _own_class(config, reference)
    mappings = [getattr(transformers, f"MODEL_FOR_{choice}_MAPPING", {}) for choice in _CHOICES]
    chosen = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    return chosen or next(iter(base_classes(config)), None)


def is_named(config: Any, cls: Any) -> bool:
    """Tell whether a class is the one that `architectures` names, or any will do because it names none."""
    return not config.architectures or config.architectures[0] == cls.__name__


def base_classes(config: Any) -> list[Any]:
    """Return the classes without a head: `AutoModel`'s, and of one that has a decoder its encoder alone."""
    if reference := (getattr(config, "auto_map", None) or {}).get("AutoModel"):
        return [_own_class(config, reference)]
    found: list[Any] = []
    for mapping in (transformers.MODEL_MAPPING, transformers.MODEL_FOR_TEXT_ENCODING_MAPPING):
        classes = mapping.get(type(config), ())
        found += classes if isinstance(classes, tuple) else [classes]
    return list(dict.fromkeys(found))


def other_classes(model: Any) -> list[Any]:
    """Return transformers' other classes for the model's type: with every head there is, and with none."""
    names = [name for name in dir(transformers) if name.startswith("MODEL_") and name.endswith("MAPPING")]
    found: list[Any] = []
    for name in names:
        classes = getattr(transformers, name).get(type(model.config), ())
        found += classes if isinstance(classes, tuple) else [classes]
    return [cls for cls in dict.fromkeys(found) if cls is not type(model)]


def _own_class(config: Any, reference: str) -> Any:
    return get_class_from_dynamic_module(reference, config._name_or_path, local_files_only=True)


def meta_model(config: Any) -> Any | None:
    """Build the model on the meta device: every module and shape, no memory. None where transformers has no class.

    Raises:
        SourceError: the class cannot be built from these values.

    """
    with building(config):
        cls = model_class(config)
        return None if cls is None else built(cls, config)


def built(cls: Any, config: Any) -> Any:
    """Build a model of a class on the meta device. Raises what `meta_model` does."""
    with building(config):
        with torch.device("meta"):
            model = cls._from_config(config)
        check_buffers(model)
    return model


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Turn whatever the code of a model raises while it is built into a SourceError; what it draws, nobody misses."""
    try:
        with same_random_numbers():
            yield
    except SourceError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise SourceError(f"config.json: {config.architectures} cannot be built from it: {first_line(error)}") from None


@contextmanager
def quiet_transformers(level: int | None = None) -> Iterator[None]:
    """Keep transformers from drawing progress bars and, with a level of `logging`, from saying what is below that."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if level is not None:
        transformers_logging.set_verbosity(level)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more. Subclasses may use their weight in other ways."""
    return type(module) in (nn.Linear, Conv1D)
