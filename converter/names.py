"""Tensor names in a checkpoint against parameter names in a model.

They differ: old checkpoints lack a prefix (`h.0.attn.c_attn` in GPT-2), are from before a renaming, or store parts
of what is one fused parameter today. transformers applies its rules when it loads; here they are asked, so that a
tensor is known by the module it will end up in.
"""

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def module_names(model: Any, tensor_names: Iterable[str]) -> dict[str, str]:
    """Return tensor name -> parameter or buffer name in `model`, for the tensors that are loaded as they are.

    Left out are tensors the model has no place for, and those that transformers fuses, splits or permutes.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    targets = model.state_dict()
    found = {}
    for name in tensor_names:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        if renamed not in targets and name in targets:
            renamed, converter = name, None
        if renamed in targets and converter is None:
            found[name] = renamed
    return found


def parameter_tensors(model: Any, tensor_names: Iterable[str]) -> dict[str, str]:
    """Return the inverse of `module_names`: parameter or buffer name -> tensor name, tied parameters included."""
    tensor_of = {parameter: tensor for tensor, parameter in module_names(model, tensor_names).items()}
    for tied, origin in model.all_tied_weights_keys.items():
        for one, other in ((tied, origin), (origin, tied)):
            if one not in tensor_of and other in tensor_of:
                tensor_of[one] = tensor_of[other]
    return tensor_of
