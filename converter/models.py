"""The model that a source config describes, without its weights, through transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import SourceError, read_json


def load_config(path: Path) -> Any | None:
    """Return the PreTrainedConfig of a directory, or None when transformers does not know the model type.

    Raises:
        SourceError: transformers knows the type, and refuses the values.

    """
    model_type = read_json(path / "config.json").get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each config class raises what it likes
        raise SourceError(f"{path / 'config.json'}: not a valid {model_type} config: {_first_line(error)}") from None


def model_class(config: Any) -> Any | None:
    """Return the class that the config's `architectures` names; the causal LM of its type where it names none."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def meta_model(config: Any) -> Any | None:
    """Build the model on the meta device: every module and shape, no memory. None where transformers has no class.

    Raises:
        SourceError: the class cannot be built from these values.

    """
    cls = model_class(config)
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            return cls._from_config(config)
    except Exception as error:  # the model's code may raise anything
        raise SourceError(f"config.json: {cls.__name__} cannot be built from it: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more. Subclasses may use their weight in other ways."""
    return type(module) in (nn.Linear, Conv1D)
