"""The config of a checkpoint, through transformers: values checked, and no code unless it is trusted."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from llmint8.formats import SourceError, read_json
from llmint8.formats.disk.names import CONFIG_NAME

from ..words import first_line
from .limits import check_config


def load_config(path: Path, trust_remote_code: bool = False) -> Any | None:
    """Return the PreTrainedConfig of a directory.

    None where transformers does not know the model type, or where the class is one of the checkpoint's own code, which
    may compute something else than transformers' models of that type with the same parameters.

    Args:
        path: the directory.
        trust_remote_code: run the code that the directory holds, where config.json names it under `auto_map`. The
            config then keeps `auto_map`; without, it has none, and nothing that gets it can run code.

    Raises:
        SourceError: transformers knows the type, and refuses the values; or they are refused before it sees them.

    """
    file = path / CONFIG_NAME
    raw = read_json(file)
    check_config(raw, file)
    code = own_code(raw, file) if trust_remote_code else {}
    model_type = raw.get("model_type")
    if not (isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING) and "AutoConfig" not in code:
        return None
    if not trust_remote_code and _is_own_class(raw):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each config class raises what it likes
        raise SourceError(f"{file}: not a valid {model_type} config: {first_line(error)}") from None
    # It would name another index of weights, one that has not been checked.
    config.__dict__.pop("transformers_weights", None)
    # The source's is stale, or it would have been refused; that of an int8 checkpoint is read by the formats room.
    config.__dict__.pop("quantization_config", None)
    config.__dict__.pop("auto_map", None)
    if trust_remote_code:
        config.auto_map = code
    return config


def _is_own_class(raw: Mapping[str, Any]) -> bool:
    """Tell whether the class that a config names is code beside it, and none of transformers'."""
    named, code = raw.get("architectures") or [None], raw.get("auto_map")
    references = (
        [reference for reference in code.values() if isinstance(reference, str)] if isinstance(code, dict) else []
    )
    own = any(reference.endswith(f".{named[0]}") for reference in references)
    return own and not hasattr(transformers, named[0])


def is_trusted(config: Any) -> bool:
    """Tell whether the config was loaded with the permission to run the checkpoint's own code."""
    return getattr(config, "auto_map", None) is not None


def own_code(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return transformers' auto class -> `module.Class` in the directory, as `auto_map` in config.json has it.

    Raises:
        SourceError: it is something else, or names code elsewhere.

    """
    code = config.get("auto_map") or {}
    if not isinstance(code, dict):
        raise SourceError(f"{file}: auto_map is {str(code)[:80]!r}, expected an object")
    for name, reference in code.items():
        if name.startswith("AutoTokenizer"):
            continue
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            raise SourceError(
                f"{file}: auto_map[{name[:80]!r}] is {str(reference)[:80]!r}, expected module.Class of a file beside it"
            )
    return {name: reference for name, reference in code.items() if not name.startswith("AutoTokenizer")}


def in_float32(config: Any) -> Any:
    """Return a config whose model computes its buffers in float32, as the pass does all else: float16 may overflow."""
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PreTrainedConfig):
            part.dtype = torch.float32
    return config
