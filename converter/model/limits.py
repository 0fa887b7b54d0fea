"""What a config.json may ask for, and how long a text it allows. It comes from strangers, and transformers obeys it.

A model is built on the meta device, where tensors take no memory; modules do, and so do the buffers that are filled
with real values afterwards. Both are bounded by what the checkpoint holds. Some keys have a meaning for transformers
that a checkpoint has no business with: they name code to fetch, or take the place of the config's own methods.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module

from llmint8.formats import SourceError

MAX_COUNT = 100_000
# Every tensor has a module, most modules have one or more tensors or stand around modules that have.
_MODULES_PER_TENSOR, _MODULES_ANYWAY = 16, 10_000
MAX_BUFFER_BYTES = 4 << 30
_COUNT = re.compile(r"(layers?|blocks?|experts|depths?|heads?|labels)$")
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_text_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_sequence_length",
)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config that asks for more layers, heads or labels than any model has, for code, or for other methods.

    Args:
        config: the object in config.json; the objects under keys such as `text_config` are looked at too.
        where: the file, for the message.

    Raises:
        SourceError: naming the key and its value.

    """
    for key, value in config.items():
        if key.startswith("__") or callable(getattr(transformers.PreTrainedConfig, key, None)):
            raise SourceError(f"{where}: {key[:80]!r} is not a setting but a part of the program; remove it")
        if type(value) is int and value > MAX_COUNT and _COUNT.search(key):
            raise SourceError(f"{where}: {key} is {value}, at most {MAX_COUNT} are allowed")
        names = list(value.values()) if isinstance(value, dict) else [value]
        if key.strip("_").removesuffix("_internal") in _KERNEL_KEYS and any("/" in str(name) for name in names):
            raise SourceError(f"{where}: {key} is {str(value)[:80]!r}, which names code on the Hub; remove it")
        if isinstance(value, dict) and key.endswith("config"):
            check_config(value, where)
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise SourceError(f"{where}: architectures is {str(architectures)[:80]!r}, expected a list of class names")


@contextmanager
def bounded_modules(tensor_count: int) -> Iterator[None]:
    """End the building of a model that has far more modules than the checkpoint has tensors. Raises SourceError."""
    limit = _MODULES_ANYWAY + _MODULES_PER_TENSOR * tensor_count
    count = 0

    def registered(*args: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise SourceError(
                f"config.json: asks for more than {limit} modules, with {tensor_count} tensors to fill them"
            )

    hooks = [
        torch_module.register_module_module_registration_hook(registered),
        torch_module.register_module_parameter_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_buffers(model: nn.Module) -> None:
    """Refuse a model whose buffers, such as masks and position tables, would fill the memory. Raises SourceError."""
    size = sum(buffer.nbytes for buffer in model.buffers() if buffer.device == torch.device("meta"))
    if size > MAX_BUFFER_BYTES:
        raise SourceError(f"{type(model).__name__} would need {size / 1e9:.1f} GB for buffers; check its config")


def longest_text(config: Any, model: Any | None) -> int | None:
    """Return how many tokens a row may have, or None where nothing says it.

    Positions that begin behind the index of padding, as those of RoBERTa do, are fewer than the config says.
    """
    found = [n for key in _LENGTHS if isinstance(n := getattr(config.get_text_config(), key, None), int) and n > 0]
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "pos" in name.rpartition(".")[2]:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)
