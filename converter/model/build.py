"""The model that a source config describes, without its weights, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D

from llmint8.formats import SourceError

from .errors import first_line
from .limits import check_buffers


def model_class(config: Any) -> Any | None:
    """Return the class that the config's `architectures` names; the causal LM of its type where it names none.

    None where transformers has no such class: then the architecture is somebody's own code, which is loaded only if
    the config was loaded with `trust_remote_code`.
    """
    named = str(config.architectures[0]) if config.architectures else None
    for name, reference in (getattr(config, "auto_map", None) or {}).items():
        if reference.endswith(f".{named}") or (named is None and name == "AutoModelForCausalLM"):
            return get_class_from_dynamic_module(reference, config._name_or_path, local_files_only=True)
    if named is None:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    found = getattr(transformers, named, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def meta_model(config: Any) -> Any | None:
    """Build the model on the meta device: every module and shape, no memory. None where transformers has no class.

    Raises:
        SourceError: the class cannot be built from these values.

    """
    with building(config):
        cls = model_class(config)
        if cls is None:
            return None
        with torch.device("meta"):
            model = cls._from_config(config)
        check_buffers(model)
    return model


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Turn whatever the code of a model raises while it is built into a SourceError."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise SourceError(f"config.json: {config.architectures} cannot be built from it: {first_line(error)}") from None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more. Subclasses may use their weight in other ways."""
    return type(module) in (nn.Linear, Conv1D)
