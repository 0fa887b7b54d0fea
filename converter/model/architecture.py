"""Which class of transformers the tensors of a checkpoint fill: the one that a loader will need all parameters of.

`architectures` in config.json may name a class that transformers does not have, or a head that is in no file: many
sentence encoders are the body alone under the config of a masked language model. transformers fills what it misses with
random numbers and says so in a log. Here it is let to load the model on the meta device, where no tensor has any data,
and asked what it missed: that knows of tied weights, of fused and split ones, and of what a model computes itself.
"""

import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from llmint8.formats import Source, SourceError

from ..machine import same_random_numbers
from ..words import count
from .build import base_classes, built, model_class, other_classes
from .errors import first_line
from .limits import bounded_modules
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
_IN_PART = " (a part of it)"


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
    known = named in (None, cls.__name__)
    missing = _missing(cls, config, shapes)
    if missing:
        bodies = [body for body in base_classes(config) if body is not cls]
        body = next((body for body in bodies if not _missing(body, config, shapes)), None)
        if body is None and not known:
            return None, []
        if body is None:
            raise _incomplete(cls, config, source, missing)
        cls = body
    if not known:
        why = f"transformers has no {named}: taken for its {cls.__name__}"
    elif missing:
        why = f"{_counted(missing)} in no file: taken for a {cls.__name__}, which is all there"
    if cls.__name__ == named:
        return config, []
    config = copy.deepcopy(config)
    config.architectures = [cls.__name__]
    return config, [f"{why}; the result's config.json says so"] if missing or not known else []


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
    """Return parameters and persistent buffers that transformers would have to make up, and those of another shape.

    Those of another shape only where they are made of several tensors: the others are held against the model later.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    arguments = {"config": config, "state_dict": tensors, "dtype": torch.float32}
    # What it misses needs no values here; some models take long to compute them.
    probe: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "_initialize_missing_keys": lambda *_: None})
    try:
        with _silent(), same_random_numbers(), bounded_modules(len(shapes)):
            model, info = probe.from_pretrained(
                None,
                **arguments,
                device_map={"": torch.device("meta")},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SourceError:
        raise
    except Exception as error:  # its own code or the model's; what is fused of tensors may not go together
        return _unmade(cls, config, shapes, error)
    own = set(module_names(model, shapes).values())
    in_part = {key[0] for key in info["mismatched_keys"] if key[0] not in own}
    return [
        name + _IN_PART * (name in in_part) for name in model.state_dict() if name in info["missing_keys"] | in_part
    ]


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
            found.append(name + _IN_PART)
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


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from saying what is asked of it here anyway."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers.logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
