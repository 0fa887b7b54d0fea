"""OPT-6.7B, Llama-3-8B and OPT-30B with random weights, made on a device in seconds, in 16 bit or quantized at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from gpu_linear import bitsandbytes_layer
from torch import Tensor, nn

from llmint8.converter.model.build import is_linear
from llmint8.runtime import Int8Linear

OUTLIERS = 16


def opt(hidden: int, layers: int, heads: int) -> transformers.OPTConfig:
    """Return the config of an OPT."""
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    return transformers.OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)


CONFIGS = {
    "OPT-6.7B": opt(4096, 32, 32),
    "Llama-3-8B": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "OPT-30B": opt(7168, 48, 56),
}


def outlier_dims(features: int) -> Tensor:
    """Return the dimensions that are outliers in a hidden state of so many, int64 [16]."""
    return torch.arange(OUTLIERS) * (features // OUTLIERS)


def ours(linear: nn.Linear) -> nn.Module:
    """Quantize a layer as the converter's defaults do."""
    layer = Int8Linear.from_linear(linear, outlier_dims(linear.in_features))
    layer.configure(activation="zeropoint", activation_group=128)
    return layer


def bitsandbytes(linear: nn.Linear) -> nn.Module:
    """Quantize a layer with bitsandbytes; `runner` sets the threshold."""
    layer: nn.Module = bitsandbytes_layer(linear.weight.data, linear.bias, 6.0)
    return layer


CONVERSIONS: dict[str, Callable[[nn.Linear], nn.Module] | None] = {"fp16": None, "ours": ours, "bnb": bitsandbytes}


def shape_of(config: Any) -> Any:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


@torch.no_grad()
def build(config: Any, kind: str, device: torch.device) -> Any:
    """Make a model of random weights, the same for every kind; one layer at a time is on the device in 16 bit."""
    model, convert = shape_of(config), CONVERSIONS[kind]
    torch.manual_seed(0)
    for name in [name for name, _ in model.named_modules()]:  # names: modules would keep the 16-bit weights alive
        module = model.get_submodule(name)
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        if "Norm" in type(module).__name__:
            module.weight[outlier_dims(len(module.weight)).to(device)] = 10
        if convert and is_linear(module) and module is not model.get_output_embeddings():
            model.set_submodule(name, convert(module))
    model.tie_weights()
    return model


def companies(config: Any, kinds: list[str], room: float) -> Iterator[list[str]]:
    """Yield the kinds of a model that are on the device together: as many as have weights of `room` bytes, or one."""
    weights, company, size = sum(each.nbytes for each in shape_of(config).parameters()), [], 0.0
    for kind in kinds:
        more = weights if kind == "fp16" else 0.6 * weights  # embeddings and head stay in 16 bit
        if company and size + more > room:
            yield company
            company, size = [], 0.0
        company, size = [*company, kind], size + more
    yield company
