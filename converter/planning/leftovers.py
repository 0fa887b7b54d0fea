"""What of a source stays as it is though it may be matrices, and what without a model may be a layer or not."""

import re
from collections.abc import Collection, Sequence
from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import Source, TensorInfo

from ..model.names import converted_names
from ..words import count, size

# What is not a plain linear layer, by the names in use: all that is known without a linear module in a model.
NOT_LINEAR = re.compile(r"emb|wte|wpe|head|norm|ln_|router|gate$|position|shared$|classifier|score|conv|lora")
MIN_FEATURES = 32


def leftovers(
    source: Source, model: Any, mapped: dict[str, str], quantized: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the matrices that the model has no place for, and notices that say how much stays as it is.

    Args:
        source: the opened source checkpoint.
        model: a transformers model on the meta device.
        mapped: from `module_names`.
        quantized: tensors of experts that are quantized all the same.

    """
    unmapped = [info for name, info in source.tensors.items() if name not in mapped and name not in quantized]
    matrices = [info for info in unmapped if _is_layer(info)]
    made = converted_names(model, [info.name for info in matrices])
    bare = [info for info in _bare_matrices(source, model, mapped) if info.name not in quantized]
    fused = [info for info in matrices if info.name in made] + bare
    # The experts of Mixtral and others are matrices in the file, and stacks in the model.
    experts = [info for info in fused if len(info.shape) > 2 or "expert" in info.name or made.get(info.name, 0) > 2]
    of_experts = {info.name for info in experts}  # there may be tens of thousands
    name = type(model).__name__
    foreign = [info for info in matrices if info.name not in made]
    notices = [
        *_experts_stay(source, experts),
        *_stay([info for info in fused if info.name not in of_experts], "", f"{name} has no linear layer of that name"),
        *_stay(foreign, "", f"{name} has no place for that"),
    ]
    return [info.name for info in foreign], notices


def _is_layer(info: TensorInfo) -> bool:
    return (info.name.endswith(".weight") and len(info.shape) == 2) or (len(info.shape) > 2 and _is_matrix(info))


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


def _experts_stay(source: Source, experts: Sequence[TensorInfo]) -> list[str]:
    share = sum(info.nbytes for info in experts) / max(1, sum(info.nbytes for info in source.tensors.values()))
    why = "the model has them in stacks, and no linear layers for them"
    return _stay(experts, " of experts", f"{why}; they are {share:.0%} of it, which --format 2 halves")


def _stay(left: Sequence[TensorInfo], what: str, why: str) -> list[str]:
    if not left:
        return []
    number = sum(prod(info.shape[:-2]) for info in left)
    nbytes = size(sum(info.nbytes for info in left))
    among, stay = (" among them", "stay as they are") if len(left) > 1 else ("", "stays as it is")
    return [f"{count(number, 'matrix', 'matrices')}{what} ({nbytes}, {left[0].name}{among}) {stay}: {why}"]


def doubtful_notices(source: Source, doubtful: Sequence[str]) -> list[str]:
    """Say how much stays as it is because without a model nobody can tell what it is; `doubtful` names modules."""
    infos = [source.tensors[f"{name}.weight"] for name in doubtful]
    return _stay(infos, "", "without the model nothing tells a layer from a head here; --only takes it")


def reason_to_doubt(info: TensorInfo, vocabularies: set[int]) -> str | None:
    """Return why a matrix may be no layer of a block but a head, for a model that nobody knows; None where it is one.

    Args:
        info: the matrix.
        vocabularies: the sizes of vocabularies that the config names.

    """
    if info.shape[0] in vocabularies:
        return "as many rows as the vocabulary: perhaps a head"
    return None if re.search(r"\.\d+\.", f".{info.name}") else "in no numbered block: perhaps a head"
