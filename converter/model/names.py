"""Tensor names in a checkpoint against parameter names in a model.

They differ: old checkpoints lack a prefix (`h.0.attn.c_attn` in GPT-2), are from before a renaming, or store parts
of what is one fused parameter today. transformers applies its rules when it loads; here they are asked, so that a
tensor is known by the module it will end up in.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def _destinations(model: Any, tensor_names: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
    """Yield tensor name, the name transformers gives it, and the pattern and rule that fuses or splits it, or None."""
    # Of a loaded model, the rules are those that its quantizer has left.
    mapping = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    targets = model.state_dict()
    for name in tensor_names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        yield name, renamed, pattern, rule_of.get(pattern)


def module_names(model: Any, tensor_names: Iterable[str]) -> dict[str, str]:
    """Return tensor name -> parameter or buffer name in `model`, for the tensors that are loaded as they are.

    Left out are tensors the model has no place for, and those that transformers fuses, splits or permutes.
    """
    targets = model.state_dict()
    found = {}
    for name, renamed, pattern, _ in _destinations(model, tensor_names):
        if renamed not in targets and name in targets:
            found[name] = name
        elif renamed in targets and pattern is None:
            found[name] = renamed
    return found


class FusedParameter:
    """A parameter that transformers makes of tensors when it loads, as it stacks experts, or cuts q, k and v apart."""

    def __init__(self, name: str, converter: Any, first: str) -> None:
        """Take the parameter's name, the WeightConverter that makes it, and the first of all that it makes."""
        self._name, self._converter, self._first = name, converter, first
        self._parts: list[tuple[str, str]] = []  # tensor name, the converter's pattern that it matches

    @property
    def operations(self) -> list[Any]:
        """What transformers does to the parts, in order."""
        return list(self._converter.operations)

    @property
    def patterns(self) -> list[str]:
        """The patterns of the parts, in the order in which it takes them."""
        return list(self._converter.source_patterns)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Each part with the pattern that it matches."""
        return self._parts

    def add(self, tensor: str, pattern: str) -> None:
        """Add a tensor that is a part."""
        self._parts.append((tensor, pattern))

    def build(self, read: Callable[[str], Tensor], model: Any) -> Tensor:
        """Read the parts and let transformers put them together."""
        converter = copy.deepcopy(self._converter)
        for part, pattern in sorted(self._parts, key=lambda part: dot_natural_key(part[0])):
            converter.add_tensor(self._first, part, pattern, read(part))
        made = converter.convert(self._first, model=model, config=model.config)[self._name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


def fused_parameters(model: Any, tensor_names: Iterable[str]) -> dict[str, FusedParameter]:
    """Return parameter name -> how it is made, for those that are made of several tensors, or of a part of one."""
    targets = model.state_dict()
    fused: dict[str, FusedParameter] = {}
    for name, renamed, pattern, rule in _destinations(model, tensor_names):
        # transformers names what it makes by the first of the rule's targets.
        for target in rule.target_patterns if rule is not None and renamed in targets else ():
            made = renamed.replace(rule.target_patterns[0], target)
            if made in targets:
                fused.setdefault(made, FusedParameter(made, rule, renamed)).add(name, str(pattern))
    return fused


def without_prefix(model: Any, name: str) -> str:
    """Return the name that a module of a model has in the model without a head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def converted_names(model: Any, tensor_names: Iterable[str]) -> dict[str, int]:
    """Return tensor name -> dimensions of what it becomes, for tensors that transformers fuses, splits or permutes."""
    targets = model.state_dict()
    found = _destinations(model, tensor_names)
    return {name: targets[new].ndim for name, new, pattern, _ in found if pattern is not None and new in targets}


def parameter_tensors(model: Any, tensor_names: Iterable[str]) -> dict[str, str]:
    """Return the inverse of `module_names`: parameter or buffer name -> tensor name, tied parameters included."""
    tensor_of = {parameter: tensor for tensor, parameter in module_names(model, tensor_names).items()}
    for tied, origin in model.all_tied_weights_keys.items():
        for one, other in ((tied, origin), (origin, tied)):
            if one not in tensor_of and other in tensor_of:
                tensor_of[one] = tensor_of[other]
    return tensor_of
