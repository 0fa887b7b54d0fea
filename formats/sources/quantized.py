"""Whether a checkpoint is quantized: its tensors say so, and config.json may be wrong.

What was merged, or dequantized, into 16 bit often keeps the `quantization_config` of the model it was made of.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..containers.tensors import TensorInfo
from ..disk.names import CONFIG_NAME, LEGACY_QUANTIZATION_NAME
from ..disk.reading import read_json
from ..errors import SourceError

# What bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8 and MXFP4 checkpoints store beside packed weights.
_PARTS = re.compile(
    r"(^|\.)(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state\..*|qweight|qzeros|g_idx|scales|"
    r"weight_(packed|scale|scale_inv|scale_2|zero_point|shape|global_scale)|input_scale|\w+_(blocks|scales))$"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def stored_quantization(path: Path, config: Mapping[str, Any]) -> Any:
    """Return the `quantization_config` of a directory, of config.json or beside it; None where there is none."""
    found = config.get("quantization_config")
    if found is None and (path / LEGACY_QUANTIZATION_NAME).exists():
        found = read_json(path / LEGACY_QUANTIZATION_NAME)
    return found


def already_quantized(where: object, quantization: Any) -> SourceError:
    """Return the error for a source that is quantized."""
    return SourceError(
        f"{where}: this model is already quantized{_method(quantization)}; convert the original 16-bit checkpoint "
        "instead"
    )


def check_quantization(
    path: Path, quantization: Any, tensors: Mapping[str, TensorInfo], dequantized: int = 0
) -> list[str]:
    """Return the notice for a `quantization_config`: that weights are dequantized, or that none is quantized.

    Args:
        path: the source.
        quantization: what its config says.
        tensors: as they are read.
        dequantized: how many of them are stored in 8 bits, and read as the floats that they stand for.

    Raises:
        SourceError: one is quantized in a way that is not known.

    """
    if quantization is None and not dequantized:
        return []
    if any(_is_part(info) for info in tensors.values()):
        raise already_quantized(path / CONFIG_NAME, quantization)
    if dequantized:
        return [
            f"{dequantized} weights of the source are quantized ({method_of(quantization)}), and are read as the "
            "float32 weights that they stand for; what that rounding has cost stays, and int8 comes on top"
        ]
    return [
        f"quantization_config{_method(quantization)} in {CONFIG_NAME} is left out: no tensor is quantized, as after "
        "a merge"
    ]


def _is_part(info: TensorInfo) -> bool:
    packed = info.name.endswith(".weight") and info.dtype not in _FLOATS
    return packed or info.dtype.startswith("F8") or bool(_PARTS.search(info.name))


def method_of(quantization: Any) -> str:
    """Say how a source is quantized: the method that its config names, and the format where there are several."""
    named = quantization if isinstance(quantization, dict) else {}
    parts = (named.get("quant_method"), named.get("format"))
    return " ".join(str(part)[:80] for part in parts if isinstance(part, str)) or "8 bit"


def _method(quantization: Any) -> str:
    """Return the method in parentheses, after a space; nothing where none is named."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return f" ({str(method)[:80]})" if method else ""
