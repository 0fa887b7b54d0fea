"""The way back: a model in floating point in the place of an int8 one, layer by layer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.converter.machine import return_freed_memory
from llmint8.converter.model.build import built
from llmint8.converter.model.experts import projections
from llmint8.formats import LLMInt8Error

from ..layers.embedding import Int8Embedding, TiedHead
from ..layers.experts import Int8Experts
from ..layers.linear import QuantizedLinear
from ..parallel.state import is_cut
from .places import take_hook


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Turn the int8 layers of a model back into layers in floating point; `model.dequantize()` does the same.

    Stored outlier columns are those of the source, bit for bit; all other weights are what int8 has left of them. Each
    layer takes the place of its int8 one before the next is made.

    Args:
        model: from `runtime.load` or `runtime.quantize`; changed in place.
        dtype: of all parameters and buffers; by default they stay in theirs, and a layer takes that of its bias and
            outlier columns.

    Returns:
        The same model, which transformers trains and saves as any other.

    Raises:
        ValueError: it has no quantized layers.
        LLMInt8Error: some of them are offloaded, or have an adapter; or several processes hold the model.

    """
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__}: has no quantized layers; expected a model from runtime.load")
    return model.dequantize(dtype)


def replace_int8(model: Any, dtype: torch.dtype | None) -> None:
    """Put layers in floating point in the place of all int8 ones. Raises LLMInt8Error; see `dequantize`."""
    if is_cut(model):
        raise LLMInt8Error(f"{type(model).__name__}: several processes hold it; load it without tp_plan")
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear | Int8Embedding)]
    for name in layers:
        if name.endswith(".base_layer"):
            raise LLMInt8Error(f"{name}: an adapter is on it; merge_and_unload() takes it off")
        if model.get_submodule(name).is_meta:
            raise LLMInt8Error(f"{name}: offloaded, and has no numbers here; load the model without offloading")
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    plain = built(type(model), config)
    mixtures = [name for name, module in model.named_modules() if isinstance(module, Int8Experts)]
    for name in mixtures:
        module = model.get_submodule(name)
        model.set_submodule(name, _experts(plain.get_submodule(name), module, dtype).train(module.training))
    if mixtures:
        # It lacks the rules by which stacks are made of single experts, and taken apart where they are saved.
        vars(model).pop("_weight_conversions", None)
    heads = {name: module for name, module in model.named_modules() if isinstance(module, TiedHead)}
    inside = tuple(f"{name}." for name in mixtures)
    for name in layers:
        if name.startswith(inside) or name in heads:
            continue
        layer = model.get_submodule(name)
        made = _filled(plain.get_submodule(name), layer, dtype).train(layer.training)
        model.set_submodule(name, made)
        take_hook(layer, made)
        del layer
        return_freed_memory()
    for name, head in heads.items():  # behind the embeddings that they are tied to
        made = plain.get_submodule(name)
        made._parameters["weight"] = model.get_submodule(head.table.name)._parameters["weight"]
        model.set_submodule(name, made.train(head.training))
        take_hook(head, made)


def _filled(module: nn.Module, layer: QuantizedLinear | Int8Embedding, dtype: torch.dtype | None) -> nn.Module:
    """Fill the model's own module, which is on the meta device, with what an int8 layer stands for."""
    weight = layer.dequantize(dtype or layer.dtype)
    module._parameters["weight"] = nn.Parameter(weight.t().contiguous() if isinstance(module, Conv1D) else weight)
    bias = None if layer.bias is None else layer.bias.detach()
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias if dtype is None else bias.to(dtype))
    for name, buffer in layer.named_buffers(recurse=False):
        if name in module._buffers:  # the scale of an embedding
            module._buffers[name] = buffer
    return module


def _experts(module: Any, experts: Int8Experts, dtype: torch.dtype | None) -> Any:
    """Fill the model's own module of experts, which is on the meta device, with stacks."""

    def matrix(projection: str, expert: int) -> Tensor:
        parts = [layer.dequantize(dtype or layer.dtype) for layer in experts.layers_of(projection, expert)]
        whole = torch.cat(parts)
        return whole.t() if module.is_transposed else whole

    for projection in projections(module):
        stack = torch.stack([matrix(projection, expert) for expert in range(experts.num_experts)])
        module._parameters[projection] = nn.Parameter(stack)
    for own, theirs in (
        (module._parameters, experts._parameters),
        (module._buffers, experts._buffers),
        (module._modules, experts._modules),
    ):
        own.update({name: theirs[name] for name in own.keys() & theirs.keys()})
    return module
