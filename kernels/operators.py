"""The layer as one PyTorch operator, `torch.ops.llmint8.int8_linear`, so that compilers and CUDA graphs take it whole.

On a GPU it is one or two launches of Triton kernels (`gpu/linear.py`). With outliers searched in the call,
`torch.ops.llmint8.dynamic_int8_linear`, two more come before (`gpu/outlier_search.py`). Nothing in them waits for the
GPU, and shapes do not depend on values. On the CPU they are the reference. They have no gradient.

Triton is imported by the first call on a GPU. Where there is none (CUDA on Windows) the reference runs there, too, and
a warning says so.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference

# `Library` dispatches in a fraction of the time that `torch.library.custom_op` takes.
_LIBRARY = torch.library.Library("llmint8", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "int8_linear(Tensor x, Tensor weight, Tensor weight_absmax, Tensor outlier_dims, Tensor outlier_weight, "
    "Tensor? bias, Tensor? weight_row_sum, bool zeropoint) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "dynamic_int8_linear(Tensor x, Tensor weight, Tensor weight_absmax, Tensor? bias, Tensor? weight_row_sum, "
    "float threshold, bool zeropoint) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _reference(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    weight_row_sum: Tensor | None,
    zeropoint: bool,
) -> Tensor:
    activation: reference.Activation = "zeropoint" if zeropoint else "absmax"
    return reference.int8_linear(x, weight, weight_absmax, outlier_dims, outlier_weight, bias, activation)


def _gpu(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    weight_row_sum: Tensor | None,
    zeropoint: bool,
) -> Tensor:
    if not _has_triton():
        return _reference(x, weight, weight_absmax, outlier_dims, outlier_weight, bias, weight_row_sum, zeropoint)
    from .gpu.linear import int8_linear

    # Triton launches on the current device, which need not be that of the layer.
    with torch.cuda.device(x.device):
        return int8_linear(
            x, weight, weight_absmax, outlier_dims, outlier_weight, bias, weight_row_sum, zeropoint=zeropoint
        )


def _dynamic_reference(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    weight_row_sum: Tensor | None,
    threshold: float,
    zeropoint: bool,
) -> Tensor:
    activation: reference.Activation = "zeropoint" if zeropoint else "absmax"
    return reference.dynamic_int8_linear(x, weight, weight_absmax, threshold, bias, activation)


def _dynamic_gpu(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    weight_row_sum: Tensor | None,
    threshold: float,
    zeropoint: bool,
) -> Tensor:
    if not _has_triton():
        return _dynamic_reference(x, weight, weight_absmax, bias, weight_row_sum, threshold, zeropoint)
    from .gpu.linear import int8_linear
    from .gpu.outlier_search import search

    with torch.cuda.device(x.device):
        found = search(x, threshold)
        return int8_linear(x, weight, weight_absmax, found, weight[:, :0], bias, weight_row_sum, zeropoint=zeropoint)


def _fake(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logging.getLogger("llmint8").warning(
            "Triton is not installed: int8 layers run as plain PyTorch operations on this GPU, many times slower"
        )
    return found


_LIBRARY.impl("int8_linear", _reference, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("dynamic_int8_linear", _dynamic_reference, "CPU")  # type: ignore[no-untyped-call]
# The key of AMD's GPUs, too.
_LIBRARY.impl("int8_linear", _gpu, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("dynamic_int8_linear", _dynamic_gpu, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmint8::int8_linear", _fake, lib=_LIBRARY)
torch.library.register_fake("llmint8::dynamic_int8_linear", _fake, lib=_LIBRARY)
int8_linear: Callable[..., Tensor] = torch.ops.llmint8.int8_linear.default
dynamic_int8_linear: Callable[..., Tensor] = torch.ops.llmint8.dynamic_int8_linear.default
