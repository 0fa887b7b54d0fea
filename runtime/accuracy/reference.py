"""The 16-bit checkpoint that an int8 one is compared with: the class of its model, the model, and its tokenizer."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_peft_available

from llmint8.converter.calibration.tokenizer import load_tokenizer
from llmint8.converter.model.build import model_class, quiet_transformers
from llmint8.converter.model.config import load_config
from llmint8.converter.model.limits import bounded_modules
from llmint8.formats import LLMInt8Error, Source, SourceError
from llmint8.formats.disk.names import ADAPTER_CONFIG_NAME


def tokenizer_beside(folder: Path, path: Path) -> Any:
    """Return the tokenizer in a folder; a checkpoint that has none is called `path`. Raises SourceError."""
    tokenizer, why = load_tokenizer(folder)
    if tokenizer is None:
        raise SourceError(f"{path}: {why}, so no text can be shown to it")
    return tokenizer


def check_window(window: int, config: Any, path: Path) -> None:
    """Check how many tokens a model will be shown at a time. Raises ValueError: it was made for fewer."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if window > longest:
        raise ValueError(f"a window of {window} tokens is too long: {path} was made for {longest} positions")


def reference_class(source: Source) -> tuple[Any, Any]:
    """Return the config and the class of the model of a 16-bit checkpoint.

    Raises:
        LLMInt8Error: transformers does not know the model, or would load an adapter into it.

    """
    path = source.path
    if (adapter := path / ADAPTER_CONFIG_NAME).exists() and is_peft_available():
        raise LLMInt8Error(
            f"{adapter}: an adapter, which transformers would load into the model that the "
            "checkpoint was made from; move it to another directory"
        )
    config = load_config(source.beside)
    cls = None if config is None else model_class(config)
    if config is None or cls is None:
        named = {key: source.config.get(key) for key in ("model_type", "architectures")}
        raise LLMInt8Error(f"{path / 'config.json'}: {named} is no model that transformers has")
    return config, cls


def load_model(source: Source, config: Any, cls: Any, device: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load a 16-bit checkpoint as a model of its class, in eval mode; with `auto` in the dtype that it has.

    Raises:
        SourceError, CorruptFileError: the checkpoint is not complete, or a file is broken.

    """
    with quiet_transformers(), bounded_modules(len(source.tensors)):
        # What transformers does not read itself it is given.
        given = source.made is not None or source.quantized
        weights = {name: source.read(name) for name in source.tensors} if given else None
        model, info = cls.from_pretrained(
            source.path if weights is None else None,
            state_dict=weights,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise SourceError(f"{source.path}: {missing[0]}: missing, {cls.__name__} needs it")
    return model.to(device)
