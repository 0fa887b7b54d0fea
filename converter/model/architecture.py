"""Which class of transformers the tensors of a checkpoint fill: the one that a loader will need all parameters of.

`architectures` in config.json may name a class that transformers does not have, or a head that is in no file: many
sentence encoders are the body alone under the config of a masked language model. transformers fills what it misses with
random numbers and says so in a log. `missing.py` finds what a class misses; here the class is chosen by it.
"""

import copy
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import Source, SourceError

from ..words import count, first_line
from .build import base_classes, built, is_named, model_class, other_classes
from .limits import bounded_modules
from .missing import IN_PART, missing_parameters, spared_notice
from .names import fused_parameters, module_names, without_prefix

log = logging.getLogger("llmint8")

Shapes = Mapping[str, tuple[int, ...]]

# What wrappers of modules write into the names of tensors, and what to do about it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile adds it; save what it was made of (`model._orig_mod`)",
    "_checkpoint_wrapped_module.": "activation checkpointing adds it; save the model with save_pretrained",
    "_fsdp_wrapped_module.": "FSDP adds it; save its full state dict (`get_model_state_dict`)",
    "base_model.model.": "PEFT adds it; save `model.merge_and_unload()`",
    "base_layer.": "PEFT adds it; save `model.merge_and_unload()`",
    "module.": "DistributedDataParallel adds it; save `model.module`",
}
_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, _WRAPPERS))})")


def settle_class(config: Any, source: Source) -> tuple[Any | None, list[str]]:
    """Return the config with the class in `architectures` that the tensors fill, and what to tell the user.

    The class is the one that is named, or transformers' choice where it has none of that name; where its head is in no
    file, the model without a head, as `AutoModel` takes it. The config is None where no class can be told: then the
    model is somebody's own, of which transformers knows no more than the type.

    Raises:
        SourceError: the class that is named has parameters that no tensor fills, or cannot be built.

    """
    cls = model_class(config)
    if cls is None:
        return None, []
    shapes = {name: info.shape for name, info in source.tensors.items()}
    named = str(config.architectures[0]) if config.architectures else None
    known = is_named(config, cls)
    missing = _missing(cls, config, shapes)
    if missing:
        bodies = [body for body in base_classes(config) if body is not cls]
        body = next((body for body in bodies if not _missing(body, config, shapes)), None)
        if body is not None and _is_torn(cls, body, config, shapes, missing):
            body = None
        if body is None and not known:
            return None, []
        if body is None:
            raise _incomplete(cls, config, source, missing)
        cls = body
    if not known:
        why = f"transformers has no {named}: taken for its {cls.__name__}"
    elif missing:
        why = f"{_counted(missing)} in no file: taken for a {cls.__name__}, which is all there"
    spared = spared_notice(built(cls, config), shapes)
    if cls.__name__ == named:
        return config, spared
    config = copy.deepcopy(config)
    config.architectures = [cls.__name__]
    return config, [*([f"{why}; the result's config.json says so"] if missing or not known else []), *spared]


def linear_elsewhere(model: Any, leftover: Collection[str]) -> list[str]:
    """Return the linear layers that other classes of a model's type would have, by their names in a model without head.

    Some loaders take a class of their own choice, whatever config.json says, and bitsandbytes has to be told of every
    linear layer in it that is not int8.

    Args:
        model: a transformers model on the meta device.
        leftover: names of tensors that it has no place for. Layers count whose weight is among them, or is tied to
            another: all others would have no weight at all.

    """
    if not leftover and model.base_model is not model:
        return []
    found = set()
    for cls in other_classes(model):
        try:
            with bounded_modules(len(model.state_dict())):
                other = built(cls, copy.deepcopy(model.config))
        except SourceError as error:  # not every class can be built from every config of its type
            log.debug("%s", error)
            continue
        ties = other.all_tied_weights_keys
        weights = {*module_names(other, leftover).values(), *ties.keys(), *ties.values()}
        linear = [name for name, module in other.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        found |= {without_prefix(other, name) for name in linear if f"{name}.weight" in weights}
    return sorted(found - {without_prefix(model, name) for name, _ in model.named_modules()})


def _counted(missing: list[str]) -> str:
    more = count(len(missing) - 1, "parameter more", "parameters more")
    return f"{missing[0]} and {more} are" if missing[1:] else f"{missing[0]} is"


def _missing(cls: Any, config: Any, shapes: Shapes) -> list[str]:
    """Return what transformers would have to make up of what the class needs; see `missing_parameters`."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return missing_parameters(cls, config, tensors)
    except SourceError:
        raise
    except Exception as error:  # its own code or the model's; what is fused of tensors may not go together
        return _unmade(cls, config, shapes, error)


def _is_torn(cls: Any, body: Any, config: Any, shapes: Shapes, missing: list[str]) -> bool:
    """Tell whether a part of the class that the body has not is there in part: then it is damaged, and not left out.

    Of what `AutoModel` has, a part is an encoder or a decoder; of a head it is a single module.
    """
    whole = built(cls, config)
    own = {*module_names(whole, shapes).values(), *fused_parameters(whole, shapes)} - whole.all_tied_weights_keys.keys()
    base, smaller = (built(one, config).state_dict() for one in (base_classes(config)[0], body))
    gone = {without_prefix(whole, name.removesuffix(IN_PART)) for name in missing}
    left_out = {without_prefix(whole, name) for name in own} - gone - smaller.keys()
    if left_out and {name.partition(".")[0] for name in gone} & {name.partition(".")[0] for name in smaller}:
        return True  # the body itself lacks something that the rest, which is there, needs
    parts = [
        {name.partition(".")[0] if name in base else name.rpartition(".")[0] for name in n} for n in (gone, left_out)
    ]
    return bool(parts[0] & parts[1])


def _unmade(cls: Any, config: Any, shapes: Shapes, error: Exception) -> list[str]:
    """Return the parameters that cannot be made of their tensors, after transformers gave up.

    Where all of them can be made, what it could not do is do without data; nothing is known then.
    """
    log.debug("%s does not load on the meta device: %s", cls.__name__, first_line(error))
    with bounded_modules(len(shapes)):
        model = built(cls, config)
    targets = model.state_dict()
    found = []
    for name, parameter in fused_parameters(model, shapes).items():
        try:
            made = parameter.build(lambda tensor: torch.empty(shapes[tensor], device="meta"), model).shape
        except Exception:
            made = None
        if made != targets[name].shape:
            found.append(name + IN_PART)
    return found


def _incomplete(cls: Any, config: Any, source: Source, missing: list[str]) -> SourceError:
    where = f"{source.path}: {_counted(missing)} in no file, and {cls.__name__} needs {'them' if missing[1:] else 'it'}"
    model = built(cls, config)
    known = module_names(model, source.tensors)
    wrapped = {_WRAPPED.sub("", name): name for name in source.tensors if name not in known and _WRAPPED.search(name)}
    found = [wrapped[name] for name in module_names(model, wrapped)]
    if not found:
        return SourceError(f"{where}; is the checkpoint whole?")
    tensor = found[0]
    wrapper = _WRAPPED.findall(tensor)[0]
    file = source.path / source.tensors[tensor].file
    return SourceError(f"{where}. {file}: {tensor}: has {wrapper!r} in its name: {_WRAPPERS[wrapper]}")
