"""The model that a source config describes, without its weights, through transformers."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("llmint8")


def load_config(path: Path) -> Any | None:
    """Return the PreTrainedConfig of a directory, or None when transformers does not know the model type."""
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        log.debug("transformers cannot build a config: %s", error)
        return None


def model_class(config: Any) -> Any | None:
    """Return the class that the config's `architectures` names; the causal LM of its type where it names none."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None


def meta_model(config: Any) -> nn.Module | None:
    """Build the model on the meta device: every module and shape, no memory. None where transformers has no class."""
    cls = model_class(config)
    if cls is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls._from_config(config)
    return model


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more. Subclasses may use their weight in other ways."""
    return type(module) in (nn.Linear, Conv1D)
