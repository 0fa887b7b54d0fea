"""What a model misses in the tensors of a checkpoint, and what of it need not be there.

transformers is let to load the model on the meta device, where no tensor has any data, and asked what it missed: that
knows of tied weights, of fused and split ones. Not needed are parameters that the model's own code computes, those
that only a mask brings into use, and the pooler of a model that can be built without one. transformers would fill the
last two with random numbers.
"""

import inspect
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..machine import same_random_numbers
from .buffers import computed_parameters
from .build import quiet_transformers
from .limits import bounded_modules
from .names import fused_parameters, module_names, parameter_tensors

_POOLER = "pooler"
# Pre-training makes the masks itself, and some decoders of it put the token everywhere.
_MASKED = re.compile(r"(^|\.)(masked_spec_embed|embeddings\.mask_token)$")
_MASKING_CLASSES = ("ForPreTraining", "ForMaskedImageModeling")
IN_PART = " (a part of it)"


def missing_parameters(cls: Any, config: Any, tensors: Mapping[str, Tensor], **options: Any) -> list[str]:
    """Return parameters and persistent buffers that a class needs and no tensor fills, in the model's order.

    Those of another shape are among them where they are made of several tensors: the others are held against the model
    elsewhere. May raise whatever transformers and the model's code raise.

    Args:
        cls: a class of transformers.
        config: its config.
        tensors: name -> tensor on the meta device.
        options: further arguments of `from_pretrained`.

    """
    # What it misses needs no values here; some models take long to compute them.
    probe: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "_initialize_missing_keys": lambda *_: None})
    with quiet_transformers(logging.CRITICAL), same_random_numbers(), bounded_modules(len(tensors)):
        model, info = probe.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=torch.float32,
            device_map={"": torch.device("meta")},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    own = set(module_names(model, tensors).values())
    in_part = {key[0] for key in info["mismatched_keys"] if key[0] not in own}
    missing = [name for name in model.state_dict() if name in info["missing_keys"] | in_part]
    spared = _spared(model, [name for name in missing if name not in in_part])
    return [name + IN_PART * (name in in_part) for name in missing if name not in spared]


def fill_missing(model: Any, missing: Collection[str]) -> tuple[list[str], str | None]:
    """Give a loaded model what it misses and can do without, the same in every process.

    What is computed gets the values that the model's code computes, what only masks use gets zeros, and a pooler goes.

    Returns:
        The parameters that it cannot do without, and what to tell the user of the others, or None.

    """
    spared = _spared(model, missing)
    with torch.no_grad():
        for name, value in spared.items():
            if not _in_pooler(name):
                model.get_parameter(name).copy_(torch.zeros(()) if value is None else value)
    said = [f"{name} is zero, and only masks use it" for name in spared if _MASKED.search(name)]
    if without_pooler(model, spared):
        said.append(f"there is no pooler in {type(model).__name__}, whose pooler_output is None")
    notice = f"in no file, and not needed: {'; '.join(said)}" if said else None
    return [name for name in missing if name not in spared], notice


def without_pooler(model: Any, missing: Collection[str]) -> bool:
    """Take the pooler out of a model that can be built without, where all of it is missing; tell whether it is."""
    found = _has_spare_pooler(model, missing)
    if found:
        model.pooler = None
    return found


def spared_notice(model: Any, tensor_names: Collection[str]) -> list[str]:
    """Say what no tensor fills and the model can do without, but for what it computes itself."""
    spare = [name for name in model.state_dict() if _in_pooler(name) or _MASKED.search(name)]
    if not spare:  # names are not looked up for nothing: that takes long for tens of thousands of experts
        return []
    filled = parameter_tensors(model, tensor_names).keys() | fused_parameters(model, tensor_names).keys()
    names = _unneeded(model, [name for name in spare if name not in filled])
    said = ", ".join(dict.fromkeys(_POOLER if _in_pooler(name) else name for name in names))
    how = "runtime.load makes nothing up, and stock transformers fills it with random numbers"
    return [f"{said}: in no file, and {type(model).__name__} can do without; {how}"] if said else []


def _unneeded(model: Any, missing: Collection[str]) -> list[str]:
    pooler, masking = _has_spare_pooler(model, missing), type(model).__name__.endswith(_MASKING_CLASSES)
    return [name for name in missing if (pooler and _in_pooler(name)) or (not masking and _MASKED.search(name))]


def _spared(model: Any, missing: Collection[str]) -> dict[str, Tensor | None]:
    """Return those of the missing parameters that need not be there, with their values where they are computed."""
    found: dict[str, Tensor | None] = dict.fromkeys(_unneeded(model, missing))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return found | computed_parameters(model, [name for name in missing if name in parameters and name not in found])


def _in_pooler(name: str) -> bool:
    return name.startswith(f"{_POOLER}.")


def _has_spare_pooler(model: Any, missing: Collection[str]) -> bool:
    """Tell whether all of a pooler is missing that is the model's own output, and not what a classifier takes."""
    pooler = getattr(model, _POOLER, None)
    if not isinstance(pooler, torch.nn.Module) or not _can_go(type(model)):
        return False
    names = {f"{_POOLER}.{name}" for name in pooler.state_dict()}
    return bool(names) and names <= set(missing)


def _can_go(cls: type) -> bool:
    return any(
        "add_pooling_layer" in inspect.signature(one.__init__).parameters  # type: ignore[misc]
        for one in cls.__mro__
        if "__init__" in vars(one) and one is not object
    )
