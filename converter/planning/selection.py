"""Choose the linear layers to quantize, from the model's structure where transformers knows it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from llmint8.formats import FLOAT_DTYPES, Source, SourceError
from llmint8.formats.int8.records import MAX_IN_FEATURES

from ..model.architecture import linear_elsewhere
from ..model.build import is_linear, meta_model
from ..model.experts import ExpertMatrix, expert_matrices
from ..model.names import module_names
from ..model.own_use import weights_used_directly
from .head import Head
from .leftovers import MIN_FEATURES, NOT_LINEAR, doubtful_notices, leftovers, reason_to_doubt
from .selected import SelectedLayer, Selection, with_all_experts

_ROUTER = re.compile(r"(^|[._])router([._]|$)|(^|\.)(((shared_)?experts?_|moe_)?gate|gating)(\.|$)")


def select_layers(
    source: Source,
    model: Any | None,
    skip: Sequence[str],
    only: Sequence[str],
    head: Head | None = None,
    experts: bool = False,
    embedding: str | None = None,
) -> Selection:
    """Select from a model on the meta device, or by name and shape where `model` is None.

    Args:
        source: the opened source checkpoint.
        model: a transformers model on the meta device, or None.
        skip: regular expressions; a layer whose name matches one anywhere stays in 16 bit.
        only: regular expressions; where given, a layer must match one of them.
        head: the output head, to quantize it too; `model` is the one with a head of its own.
        experts: quantize the experts of mixtures too, where the model has them in stacks. What the source has in
            stacks are layers of parts of it; see `stacks`.
        embedding: the module that looks tokens up, to quantize it too; where `head` is tied to it, both at once.

    Raises:
        ValueError: not a regular expression, or a string in place of a list of them.
        SourceError: no layer is left, or a linear layer's weight is not a 16 or 32-bit float.

    """
    for option, patterns in (("--skip", skip), ("--only", only)):
        if isinstance(patterns, str):  # every letter of it would be one
            raise ValueError(f"{option} is the string {patterns!r}, expected a list: [{patterns!r}]")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{option} {pattern!r} is not a regular expression: {error}") from None
    notices: list[str] = []
    of_experts: dict[str, ExpertMatrix] = {}
    prefix, elsewhere = "", []
    if model is None:
        notices.append(
            f"{_unknown(source.config)}: linear layers were chosen by name and shape; --verbose lists the others"
            + ("; --trust-remote-code runs the code beside it" if source.config.get("auto_map") else "")
        )
        candidates, kept, module_of, doubtful = _candidates_by_name(source, only)
        notices += doubtful_notices(source, doubtful)
    else:
        mapped = module_names(model, source.tensors)
        candidates, kept, module_of = _candidates_of_model(source, model, mapped, head, embedding)
        of_experts = _expert_layers(source, model, candidates, module_of) if experts else {}
        foreign, more = leftovers(source, model, mapped, {matrix.tensor for matrix in of_experts.values()})
        notices += more
        prefix, elsewhere = f"{model.base_model_prefix}.", linear_elsewhere(model, foreign)
    layers = {}
    for name, layer in candidates.items():
        if any(re.search(pattern, name) for pattern in skip):
            kept[name] = "--skip"
        elif only and not any(re.search(pattern, name) for pattern in only):
            kept[name] = "not in --only"
        elif layer.in_features > MAX_IN_FEATURES:
            kept[name] = "more input features than sums in 32 bits can hold"
        elif layer.weight.dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{source.path / layer.weight.file}: {layer.weight.name} is {layer.weight.dtype}, "
                "expected F16, BF16 or F32; leave it as it is with --skip"
            )
        else:
            layers[name] = layer
    for name, why in with_all_experts(of_experts, kept).items():
        kept[name] = why
        del layers[name]
    if not layers:
        reasons = ", ".join(sorted(set(kept.values()))) or "the model has none"
        raise SourceError(f"{source.path}: no linear layer is left to quantize ({reasons})")
    of_experts = {name: matrix for name, matrix in of_experts.items() if name in layers}
    return Selection(layers, kept, module_of, notices, prefix, elsewhere, of_experts)


def _candidates_of_model(
    source: Source, model: Any, mapped: dict[str, str], head: Head | None, embedding: str | None
) -> tuple[dict[str, SelectedLayer], dict[str, str], dict[str, str]]:
    """Return the layers to quantize, those to keep with reasons, and checkpoint name -> module name for both."""
    _check_shapes(source, model, mapped)
    tensor_of = {parameter: tensor for tensor, parameter in mapped.items()}
    layers: dict[str, SelectedLayer] = {}
    kept: dict[str, str] = {}
    module_of: dict[str, str] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        is_head = head is not None and module_name == head.module
        if is_head and head is not None and embedding is not None and head.tied_to == f"{embedding}.weight":
            continue
        reason = None if is_head else _reason_to_keep(model, module_name)
        if not reason and not is_linear(module):
            # bitsandbytes does not replace these, and would take the int8 values for weights.
            reason = f"a {type(module).__name__}, not a plain Linear"
        tensor = tensor_of.get(f"{module_name}.weight")
        name = tensor.removesuffix(".weight") if tensor else module_name
        tied = is_head and tensor is None
        if head is not None and is_head and head.tied_to is not None:
            shared = _embedding(source, tensor_of, head.tied_to)
            tensor = tensor or shared
        module_of[name] = module_name
        if reason or tensor is None:
            # Without a tensor of its own it is made of others: what is in no file at all has been refused before.
            kept[name] = reason or "not stored as a tensor of its own"
            continue
        layers[name] = SelectedLayer(name, source.tensors[tensor], isinstance(module, Conv1D), tied)
    if embedding is not None:
        table = _table(source, tensor_of, embedding, head)
        layers[table.name], module_of[table.name] = table, embedding
        if table.lookup == "too" and head is not None:
            module_of[table.name] = head.module
    linear = {module_of[name]: name for name, layer in layers.items() if layer.lookup != "only"}
    used = weights_used_directly(meta_model(model.config), linear)
    for name in [name for module, name in linear.items() if module in used]:
        kept[name] = "its weight is used by the model's own code"
        del layers[name]
    return layers, kept, module_of


def _expert_layers(
    source: Source, model: Any, layers: dict[str, SelectedLayer], module_of: dict[str, str]
) -> dict[str, ExpertMatrix]:
    """Add the matrices of experts to the layers to quantize; return them by name."""
    matrices = expert_matrices(model, source.tensors)
    parts = {stack: source.parts(stack) for stack in dict.fromkeys(m.tensor for m in matrices if m.shared)}
    if not all(parts.values()):
        return {}
    for matrix in matrices:
        info = parts[matrix.tensor][matrix.expert] if matrix.shared else source.tensors[matrix.tensor]
        layers[matrix.name] = SelectedLayer(matrix.name, info, matrix.transposed)
        module_of[matrix.name] = matrix.module
    return {matrix.name: matrix for matrix in matrices}


def _embedding(source: Source, tensor_of: dict[str, str], parameter: str) -> str:
    """Return the tensor that stays 16 bit beside the head; without it the model would have no embedding."""
    if parameter not in tensor_of:
        raise SourceError(f"{source.path}: {parameter} is missing from the checkpoint; leave --quantize-head out")
    return tensor_of[parameter]


def _table(source: Source, tensor_of: dict[str, str], module: str, head: Head | None) -> SelectedLayer:
    """Return the embedding as a layer; the head where that is tied to it, which has then no layer of its own."""
    parameter, option = f"{module}.weight", "leave --quantize-embeddings out"
    tensor = tensor_of.get(parameter, "")
    if not tensor.endswith(".weight"):
        raise SourceError(f"{source.path}: {parameter} is no tensor of its own in the checkpoint; {option}")
    tied = head is not None and head.tied_to == parameter
    if tied and head is not None and (second := tensor_of.get(f"{head.module}.weight")):
        raise SourceError(f"{source.path}: {second} is there beside {tensor}, to which it is tied; {option}")
    name = tensor.removesuffix(".weight")
    return SelectedLayer(name, source.tensors[tensor], transposed=False, lookup="too" if tied else "only")


def _check_shapes(source: Source, model: Any, mapped: dict[str, str]) -> None:
    """Hold every tensor against the model: what the config asks for is then no larger than what the files hold."""
    targets = model.state_dict()
    for tensor, parameter in mapped.items():
        info, expected = source.tensors[tensor], tuple(targets[parameter].shape)
        if info.shape != expected:
            where = f"{source.path / info.file}: {tensor}"
            raise SourceError(f"{where} has shape {list(info.shape)}, the config asks for {list(expected)}")


def _reason_to_keep(model: Any, name: str) -> str | None:
    """Return why a linear layer stays in 16 bit, or None: heads, tied weights, fp32 modules, routers."""
    head = model.get_output_embeddings()
    if head is not None and model.get_submodule(name) is head:
        return "output head"
    tied = model.all_tied_weights_keys
    if f"{name}.weight" in {*tied.keys(), *tied.values()}:
        return "tied weight"
    if model.base_model is not model and not name.startswith(f"{model.base_model_prefix}."):
        return "output head"
    fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    if any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in fp32):
        return "kept in high precision by the model"
    return "router" if _ROUTER.search(name) else None


def _candidates_by_name(
    source: Source, only: Sequence[str]
) -> tuple[dict[str, SelectedLayer], dict[str, str], dict[str, str], list[str]]:
    """Return what `_candidates_of_model` does, and the names of those that are kept because they may be heads."""
    layers: dict[str, SelectedLayer] = {}
    kept: dict[str, str] = {}
    doubtful: list[str] = []
    vocabularies = _vocabularies(source.config)
    for tensor, info in source.tensors.items():
        name = tensor.removesuffix(".weight")
        if name == tensor or len(info.shape) != 2:
            continue
        if NOT_LINEAR.search(name.lower()) or min(info.shape) < MIN_FEATURES:
            kept[name] = "by its name or shape"
        elif (reason := reason_to_doubt(info, vocabularies)) and not any(re.search(one, name) for one in only):
            kept[name] = reason
            doubtful.append(name)
        else:
            layers[name] = SelectedLayer(name, info, transposed=False)
    return layers, kept, {name: name for name in [*layers, *kept]}, doubtful


def _unknown(config: Mapping[str, Any]) -> str:
    """Say what transformers does not know about a model."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type in CONFIG_MAPPING and architectures:
        others = "" if config.get("auto_map") else f", and these tensors fill no other of its {model_type!r} models"
        return f"transformers has no {architectures[0]}{others}"
    return f"transformers does not know the model type {model_type!r}"


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    """Return the sizes of vocabularies in a config and in the configs of its parts."""
    found = {value for key, value in config.items() if key.endswith("vocab_size") and type(value) is int}
    parts = [value for value in config.values() if isinstance(value, dict)]
    return found.union(*map(_vocabularies, parts))
