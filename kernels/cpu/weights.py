"""Weights on the CPU, quantized and added up by compiled functions, `csrc/weight.c`, each in one pass over memory."""

import functools
from ctypes import CDLL, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ..reference import Rotation
from . import native

# What is copied at a time where a weight is not contiguous.
_BLOCK_ELEMENTS = 1 << 19
# A thread for so many elements: fewer are done before another has woken up.
_ELEMENTS_PER_THREAD = 1 << 18


@functools.cache
def _functions() -> CDLL:
    library = native.compiled()
    assert not isinstance(library, str)
    library.llmint8_quantize_weight.argtypes = (*[c_void_p] * 4, *[c_int64] * 2, *[c_int32] * 3)
    library.llmint8_row_sums.argtypes = (*[c_void_p] * 2, *[c_int64] * 3, *[c_int32] * 2)
    library.llmint8_rotate.argtypes = (c_void_p, *[c_int64] * 2, *[c_int32] * 2)
    return library


def quantize_weight(
    weight: Tensor, rotation: Rotation | None = None, kind: native.Kind | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row of a weight as `reference.quantize_weight` does, to the bit.

    Args:
        weight: float16, bfloat16 or float32 [N, K] on the CPU, any strides.
        rotation: rotate it first.
        kind: the instructions; those of the layer by default.

    """
    values = torch.empty(weight.shape, dtype=torch.int8, device="cpu")  # whatever the device is where it is called
    absmax = torch.empty(len(weight), dtype=torch.float32, device="cpu")
    step = max(1, len(weight)) if weight.is_contiguous() else max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    how = native.DTYPES[weight.dtype], native.KINDS[kind or native.kinds()[0]]
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].contiguous()
        threads = _threads(rows)
        wide = None if rotation is None else torch.empty(threads, rows.shape[1], dtype=torch.float32, device="cpu")
        to = values[start:].data_ptr(), absmax[start:].data_ptr(), None if wide is None else wide.data_ptr()
        _functions().llmint8_quantize_weight(rows.data_ptr(), *to, *rows.shape, *how, threads)
    return values, absmax


def rotate(x: Tensor, kind: native.Kind | None = None) -> Tensor:
    """Rotate float [M, K] on the CPU, of any dtype and strides, as `reference.rotate` does, to the bit."""
    rotated = torch.empty(x.shape, dtype=torch.float32, device="cpu").copy_(x)
    number = native.KINDS[kind or native.kinds()[0]]
    _functions().llmint8_rotate(rotated.data_ptr(), *rotated.shape, number, _threads(rotated))
    return rotated


def row_sums(values: Tensor, group: int | None = None, kind: native.Kind | None = None) -> Tensor:
    """Add up the rows of int8 [N, K] on the CPU.

    Args:
        values: of any strides.
        group: the sums are of so many columns each, at most 256; the last group may be smaller.
        kind: as above.

    Returns:
        int32 [N, 1], or int16 [N, ceil(K / group)].

    """
    values = values.contiguous()
    n, k = values.shape
    groups, dtype = (1, torch.int32) if group is None else (-(-k // group), torch.int16)
    sums = torch.empty(n, groups, dtype=dtype, device="cpu")
    number = native.KINDS[kind or native.kinds()[0]]
    _functions().llmint8_row_sums(values.data_ptr(), sums.data_ptr(), n, k, group or 0, number, _threads(values))
    return sums


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // _ELEMENTS_PER_THREAD))
