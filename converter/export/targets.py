"""The forms that a checkpoint can be exported in: what a layer becomes, and what config.json says of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import BITSANDBYTES, TensorSpec
from llmint8.formats.int8.quantization import BITSANDBYTES_THRESHOLD
from llmint8.kernels.weights import quantize_weight

from .layers import Layer

Blocks = Iterable[Tensor]


@dataclass(frozen=True)
class Target:
    """A form.

    Attributes:
        specs: the tensors that an int8 layer becomes.
        blocks: for each of them, its rows.
        quantization: from the names of the modules left in 16 bit what `quantization_config` says; None for none.

    """

    specs: Callable[[Layer], list[TensorSpec]]
    blocks: Callable[[Layer], Iterator[tuple[str, Blocks]]]
    quantization: Callable[[Sequence[str]], Mapping[str, Any]] | None


def _plain_int8(layer: Layer) -> tuple[Blocks, Tensor]:
    """Return int8 values and absmax of a weight that is not rotated: those that are stored, or others made of it."""
    if layer.record.scheme.rotation is None and layer.record.scheme.kbit is None:
        return layer.values(), layer.absmax()
    quantized = [quantize_weight(block) for block in layer.restored()]
    return [values for values, _ in quantized], torch.cat([absmax for _, absmax in quantized])


def _of_float(layer: Layer) -> list[TensorSpec]:
    return [layer.weight]


def _float_blocks(layer: Layer) -> Iterator[tuple[str, Blocks]]:
    yield layer.weight.name, layer.original()


def _of_bitsandbytes(layer: Layer) -> list[TensorSpec]:
    return BITSANDBYTES.weight_specs(layer.name, layer.record.out_features, layer.record.in_features)


def _bitsandbytes_blocks(layer: Layer) -> Iterator[tuple[str, Blocks]]:
    values, absmax = _plain_int8(layer)
    yield f"{layer.name}.weight", values
    yield f"{layer.name}.SCB", [absmax]
    yield f"{layer.name}.weight_format", [torch.zeros((), dtype=torch.uint8)]


def _bitsandbytes_config(skipped: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": BITSANDBYTES_THRESHOLD,
        "llm_int8_skip_modules": [*skipped],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _of_compressed_tensors(layer: Layer) -> list[TensorSpec]:
    n, k = layer.record.out_features, layer.record.in_features
    return [TensorSpec(f"{layer.name}.weight", "I8", (n, k)), TensorSpec(f"{layer.name}.weight_scale", "F32", (n, 1))]


def _compressed_tensors_blocks(layer: Layer) -> Iterator[tuple[str, Blocks]]:
    values, absmax = _plain_int8(layer)
    yield f"{layer.name}.weight", values
    yield f"{layer.name}.weight_scale", [(absmax / 127)[:, None]]


def _compressed_tensors_config(skipped: Sequence[str]) -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [*skipped],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
    }


FLOAT16 = Target(_of_float, _float_blocks, None)
# One file and not a directory of tensors by the names of the checkpoint: `gguf.py` writes it.
GGUF = Target(_of_float, _float_blocks, None)
TARGETS = {
    "bitsandbytes": Target(_of_bitsandbytes, _bitsandbytes_blocks, _bitsandbytes_config),
    "compressed-tensors": Target(_of_compressed_tensors, _compressed_tensors_blocks, _compressed_tensors_config),
    "float16": FLOAT16,
    "gguf": GGUF,
}
