"""What a model's own code computes when it is built, in a model that was loaded.

transformers builds on the meta device and gives buffers that are in no file memory that nobody wrote to. Its own models
write there what belongs there; the code of others counts on what it computed when it was built.
"""

import copy
import logging
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from llmint8.converter.model.buffers import model_with_buffers, nobodys_buffers

from .layer import Int8Linear

log = logging.getLogger("llmint8")


def fill_computed(model: Any, stored: AbstractSet[str]) -> None:
    """Give a loaded model its computed buffers, and what else it computed on the meta device.

    Args:
        model: a transformers model.
        stored: names of the parameters and buffers that come from a file.

    Raises:
        SourceError: the model cannot be built once more.

    """
    built = model_with_buffers(copy.deepcopy(model.config))
    modules = dict(built.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            # What became int8 has buffers of its own, which are all stored.
            if name in modules and not isinstance(module, Int8Linear):
                _fill(
                    module, modules[name], {key for key in module._buffers if f"{name}.{key}".lstrip(".") not in stored}
                )
    if nobodys := [name for name in nobodys_buffers(built) if name not in stored]:
        log.warning(
            "%d buffers of the model have no values, %s among them: they are in no file and its code computes none; "
            "they are full of NaN",
            len(nobodys),
            nobodys[0],
        )


def _fill(module: nn.Module, built: nn.Module, missing: set[str]) -> None:
    for name in missing & built._buffers.keys():
        buffer, value = module._buffers[name], built._buffers[name]
        if buffer is not None and value is not None and not buffer.is_meta:
            buffer.copy_(value)
    for name, attribute in vars(module).items():
        if isinstance(attribute, Tensor) and attribute.is_meta:
            setattr(module, name, vars(built)[name])
