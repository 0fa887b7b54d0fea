"""The class and the config of a checkpoint's model, and transformers' own way of loading it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from llmint8.converter.model.build import is_named, model_class, quiet_transformers
from llmint8.converter.model.config import is_trusted, load_config
from llmint8.converter.model.missing import missing_parameters as probe
from llmint8.converter.words import first_line
from llmint8.formats import DTYPES, Checkpoint, LLMInt8Error
from llmint8.formats.disk.names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from llmint8.formats.disk.small_files import small_files

from .quantizer import QUANT_METHOD  # from there, as it is known to transformers once it is imported


def config_and_class(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the config and the class of the model. Raises LLMInt8Error where there is none."""
    file = checkpoint.path / CONFIG_NAME
    if (adapter := checkpoint.path / ADAPTER_CONFIG_NAME).exists():
        # With peft installed, transformers would load what it names, from wherever that is.
        raise LLMInt8Error(f"{adapter}: an adapter; keep it in a directory of its own")
    small_files(checkpoint.path)  # transformers reads some of them, and follows any link
    config = load_config(checkpoint.path, trust_remote_code)
    cls = None if config is None else model_class(config)
    if config is None or not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        named = {key: checkpoint.config.get(key) for key in ("model_type", "architectures")}
        own = bool(checkpoint.config.get("auto_map")) and not trust_remote_code
        how = "; trust_remote_code=True runs the code beside it" if own else ""
        raise LLMInt8Error(f"{file}: {named} is no model that transformers has{how}")
    return config, cls


def from_pretrained(cls: Any, checkpoint: Checkpoint, config: Any, **options: Any) -> tuple[Any, list[str]]:
    """Let transformers load a model, and return with it the parameters that it would have filled with random values.

    Raises:
        LLMInt8Error: it cannot, for whatever reason.

    """
    path, layout = checkpoint.path, checkpoint.layout
    # Never in a config.json: whoever does not know the format must not find the files.
    config.transformers_weights = layout.single if checkpoint.files == [layout.single] else layout.index
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                path,
                config=config,
                **options,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=is_trusted(config),
                output_loading_info=True,
            )
    except LLMInt8Error as error:
        raise LLMInt8Error(f"{path}: {error}") from None
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and the model's code raise whatever they like
        raise LLMInt8Error(f"{path}: {cls.__name__} cannot be loaded: {first_line(error)}") from error
    for part in (config, model.config):
        vars(part).pop("transformers_weights", None)
    return model, sorted(info["missing_keys"])


def int8_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `quantization_config` with which transformers builds the layers; how they run is up to the caller."""
    stored = checkpoint.config.get("quantization_config")
    if not isinstance(stored, dict):  # the oldest checkpoints have it in a file of its own
        stored = {key: value for key, value in checkpoint.quantization.to_dict().items() if key != "llmint8"}
    return {
        "quant_method": QUANT_METHOD,
        "records": list(checkpoint.records.values()),
        "shapes": {name: info.shape for name, info in checkpoint.tensors.items()},
        "stored": stored,
        "layout": checkpoint.layout,
    }


def missing_parameters(checkpoint: Checkpoint) -> list[str] | None:
    """Return what `load` would miss, a line for each: parameters that no tensor fills, or why it does not load at all.

    Nothing is read but config.json: transformers loads tensors without data. None where the model is not one of
    transformers' own.
    """
    config = cls = None
    try:
        config = load_config(checkpoint.path)
        cls = None if config is None else model_class(config)
        if config is None or cls is None:
            return None
        how = {"outliers": "none", "threshold": 0.0, "activation": "absmax", "activation_group": "row"}
        config.quantization_config = {**int8_config(checkpoint), **how}
        tensors = {
            name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
            for name, info in checkpoint.tensors.items()
        }
        missing = _missing(cls, config, tensors)
    except LLMInt8Error as error:
        lost = [f"{checkpoint.path}: {error}"] if cls is not None else [str(error)]
    else:
        lost = [f"{checkpoint.path}: {name}: missing, {cls.__name__} needs it" for name in missing]
    # Of a name that transformers does not have it takes the class of the type that most models are: a guess.
    return lost if not lost or cls is None or is_named(config, cls) else None


def _missing(cls: Any, config: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    try:
        return probe(cls, config, tensors, use_safetensors=True, local_files_only=True)
    except LLMInt8Error:
        raise
    except Exception as error:  # transformers and the model's code raise whatever they like
        raise LLMInt8Error(f"{cls.__name__} cannot be loaded: {first_line(error)}") from error
