"""What of a source stays as it is though it may be matrices, and what a model needs that is in no file."""

import re
from collections.abc import Set as AbstractSet
from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import Source, TensorInfo

from ..words import count, size

# What is not a plain linear layer, by the names in use: all that is known without a linear module in a model.
NOT_LINEAR = re.compile(r"emb|wte|wpe|head|norm|ln_|router|gate$|position|shared$|classifier|score|conv|lora")
MIN_FEATURES = 32


def leftover_notices(source: Source, model: Any, mapped: dict[str, str], tied: AbstractSet[str]) -> list[str]:
    """Say how much stays in 16 bit because the model has no linear layer for it, and which parameters are in no file.

    Args:
        source: the opened source checkpoint.
        model: a transformers model on the meta device.
        mapped: from `module_names`.
        tied: parameters that are made of others.

    """
    unmapped = [info for name, info in source.tensors.items() if name not in mapped]
    fused = [info for info in unmapped if info.name.endswith(".weight") and len(info.shape) == 2]
    fused += [info for info in unmapped if len(info.shape) > 2 and _is_matrix(info)]
    notices = _matrices_notice(fused + _bare_matrices(source, model, mapped))
    return notices if fused else notices + _missing_notice(model, {*mapped.values(), *tied})


def _bare_matrices(source: Source, model: Any, mapped: dict[str, str]) -> list[TensorInfo]:
    """Return the matrices, and stacks of them, that are parameters of modules of the model's own, as experts may be."""
    found = []
    for tensor, parameter in mapped.items():
        module = model.get_submodule(parameter.rpartition(".")[0])
        known = isinstance(module, nn.Linear | nn.Embedding | Conv1D) or type(module).__module__.startswith("torch.nn")
        if not known and _is_matrix(source.tensors[tensor]):
            found.append(source.tensors[tensor])
    return found


def _is_matrix(info: TensorInfo) -> bool:
    """Tell whether a tensor may be a matrix of a layer, or a stack of them, by its name and shape."""
    name = info.name.lower().removesuffix(".weight")
    large = len(info.shape) > 1 and info.shape[0] > 1 and min(info.shape[-2:]) >= MIN_FEATURES
    return large and not name.endswith("bias") and not NOT_LINEAR.search(name)


def _matrices_notice(left: list[TensorInfo]) -> list[str]:
    """Say how much stays in 16 bit because the model has no linear layer for it, as for experts."""
    if not left:
        return []
    number, nbytes = sum(prod(info.shape[:-2]) for info in left), sum(info.nbytes for info in left)
    named, stay = f"{left[0].name} among them", "stay as they are"
    if number == 1:
        named, stay = left[0].name, "stays as it is"
    return [
        f"{count(number, 'matrix', 'matrices')} ({size(nbytes)}, {named}) {stay}: "
        "the model has no linear layer of that name (fused experts, for example)"
    ]


def _missing_notice(model: Any, loaded: set[str]) -> list[str]:
    """Name parameters that no tensor of the source is loaded into."""
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in loaded and name not in tied and not any(pattern.search(name) for pattern in ignored)
    ]
    if not missing:
        return []
    return [
        f"{count(len(missing), 'parameter')} of the model {'are' if len(missing) > 1 else 'is'} in no file, "
        f"{missing[0]}{' among them' if len(missing) > 1 else ''}; "
        "is the checkpoint whole? transformers fills them with random numbers"
    ]
