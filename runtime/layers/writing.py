"""What is written into the weight of an int8 layer: it is quantized again, and the log says what that cost.

Adapters are merged so: PEFT adds what was learned to `layer.weight.data`, takes it away again, or puts another weight
there. Rounding is done anew each time, so what was merged and taken out again is not the weight that was there before
to the bit, but for its outlier columns it is as far from it as one rounding.
"""

import logging
import re
from dataclasses import replace

import torch
from torch import Tensor

from llmint8.formats import LLMInt8Error
from llmint8.kernels.kbit.packing import pack
from llmint8.kernels.kbit.reference import KBitWeight, quantize_to
from llmint8.kernels.prepared import StoredWeight
from llmint8.kernels.reference import Int8Weight
from llmint8.kernels.weights import quantize_weight

from .float_weight import dequantized

log = logging.getLogger("llmint8")
_TOLD: set[str] = set()


def quantized_into(stored: StoredWeight, weight: Tensor, name: str) -> StoredWeight:
    """Return what a layer stores of another weight, with the outlier dims, and the rotation or the levels it has.

    Args:
        stored: what it stores now.
        weight: float [N, K], finite.
        name: of the layer, for people.

    Raises:
        LLMInt8Error: the weight has another shape, is not floating point, or not finite.

    """
    before = dequantized(stored, torch.float32)
    if weight.shape != before.shape or not weight.is_floating_point():
        expected = f"a float weight {list(before.shape)}"
        raise LLMInt8Error(f"{name}: {weight.dtype} {list(weight.shape)} written into its weight, expected {expected}")
    wanted = weight.detach().to(stored.values.device, torch.float32)
    written, absmax = _quantized(stored, wanted)
    if not bool(absmax.isfinite().all()):
        raise LLMInt8Error(f"{name}: what is written into its weight holds NaN or infinity; the layer is as it was")
    columns = wanted[:, stored.outlier_dims.long()].to(stored.outlier_weight.dtype)
    written = replace(written, outlier_weight=columns)
    _tell(name, wanted, before, dequantized(written, torch.float32))
    return written


def _quantized(stored: StoredWeight, weight: Tensor) -> tuple[StoredWeight, Tensor]:
    """Return what is stored with another weight, float32 [N, K], but for its columns; and the absmax."""
    if isinstance(stored, KBitWeight):
        codes, absmax = quantize_to(weight, stored.levels, stored.block)
        return replace(stored, packed=pack(codes, stored.bits), absmax=absmax), absmax
    assert isinstance(stored, Int8Weight)
    values, absmax = quantize_weight(weight, stored.rotation)
    return replace(stored, values=values, absmax=absmax), absmax


def _tell(name: str, wanted: Tensor, before: Tensor, after: Tensor) -> None:
    """Say how large the rounding is, and what was written, both relative to the weight (Frobenius norms)."""
    size = max(float(wanted.norm()), torch.finfo(torch.float32).tiny)
    change, rounding = 100 * float((wanted - before).norm()) / size, 100 * float((after - wanted).norm()) / size
    said = "%s: its weight was changed by %.2g %% and quantized again, which rounds off %.2g %%"
    log.info(said, name or "an int8 layer", change, rounding)
    # Of the layers of a model that have one name, one says it to everybody.
    names = re.sub(r"\d+", "*", name) or "int8 layers"
    if names not in _TOLD:
        _TOLD.add(names)
        log.warning(said + "; what others of this name lose is logged at level INFO", names, change, rounding)
