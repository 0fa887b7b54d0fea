"""The quantized linear layer on the CPU: plain torch operators around one int8 product.

The product is the first of these that the machine computes exactly, chosen before the first call:

- `packed`: oneDNN's quantized linear layer, on a weight that `pack` has laid out for it. Large weights only: a call
  costs 15 us more than `_int_mm`, and a small weight has less than that to gain. Every other weight takes the next.
- `int_mm`: `torch._int_mm` on the weight as it is, [N, K]. Fastest for one row of x; for more it lays the weight
  out anew in every call.
- `reference`: floating point in exact blocks, where neither is right. Without VNNI or AMX instructions (AVX2, and
  AVX-512 before 2019) both saturate in 16 bits without a word, so they are tried on the largest sums there are.

Everything around the product is written for two readers. Run eagerly, operators work in place and on so many rows
at a time that what they pass on stays in the cache. Under `torch.compile` all of it fuses into loops before and
after the product.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.reference import Activation, QuantizedRows

Product = Literal["packed", "int_mm", "reference"]

# Measured: with 2048 x 2048, four rows of x take a quarter of the time; one row takes 20 us more when the weight is in
# the cache, and 20 % less when it comes from memory.
_PACK_ELEMENTS = 1 << 22
# How much of x, and of the output, is worked on at a time: 1 MB and 8 MB in float32.
_QUANTIZE_ELEMENTS = 1 << 18
_OUTPUT_ELEMENTS = 1 << 21
# The smallest normal float32: under the scale of a row, so that a row of zeros is not divided by zero.
_TINY = 2.0**-126

# Here and below the device is named, as callers may be in a `with torch.device("meta")`.
_ONE = torch.ones(1, device="cpu")
_ZERO = torch.zeros(1, dtype=torch.int64, device="cpu")


def unpacked_product() -> Product:
    """Return the product for a weight as it is on this machine."""
    return "int_mm" if _is_exact("int_mm") else "reference"


@functools.cache
def _is_exact(product: Literal["packed", "int_mm"]) -> bool:
    """Tell whether a product keeps the largest sums, in a single row as well as in several."""
    weight = torch.full((64, 512), 127, dtype=torch.int8, device="cpu")
    weight[::2] = -127
    for rows in (1, 32):
        x = torch.full((rows, 512), 127, dtype=torch.int8, device="cpu")
        expected = (x.long() @ weight.long().t()).to(torch.int32)
        try:
            found = torch._int_mm(x, weight.t()) if product == "int_mm" else _packed_product(x, pack(weight), 64)
        except RuntimeError:  # built without oneDNN, or for a processor that has no such product
            return False
        if not torch.equal(found.to(torch.int32), expected):
            return False
    return True


def packable(weight: Tensor) -> bool:
    """Tell whether packing a weight, int8 [N, K] on any device, makes products on this machine faster."""
    return weight.device.type == "cpu" and weight.numel() >= _PACK_ELEMENTS and _is_exact("packed")


def pack(weight: Tensor) -> Tensor:
    """Lay out a weight, int8 [N, K], for the product: opaque memory of the same size, of shape [K, N]."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def unpack(weight: Tensor) -> Tensor:
    """Return int8 [N, K] for what `pack` returned, bit for bit."""
    return weight.to_dense().t().contiguous()


def _packed_product(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    # VNNI multiplies unsigned by signed, so x goes in with 128 added, which oneDNN takes off again in its int32 sums.
    # The kernel it has for signed x takes a thousand times as long.
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x.view(torch.uint8) ^ 128, 1.0, 128, packed, _ONE, _ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


# An operator of its own, because torch.compile takes no packed weight apart. Defined this way it costs 3 us a call,
# as `custom_op` 10.
torch.library.define("llmint8::packed_product", "(Tensor x, Tensor packed, int out_features) -> Tensor")
torch.library.impl("llmint8::packed_product", "default", _packed_product)


@torch.library.register_fake("llmint8::packed_product")  # type: ignore[untyped-decorator]
def _(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=torch.float32)


def packed_product(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """Multiply int8 [M, K], contiguous, by what `pack` returned: float32 [M, N], the int32 sums rounded once."""
    product: Tensor = torch.ops.llmint8.packed_product(x, packed, out_features)
    return product


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed: int32 [M, N]."""
    # torch 2.13's _int_mm returns garbage for K = 1.
    if x.shape[1] < 2 or _unpacked_product() == "reference":
        return reference.int8_product(x, weight)
    return torch._int_mm(x, weight.t())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unpacked_product() -> Product:
    return unpacked_product()  # one that torch.compile does not look into


def quantize_rows(x: Tensor, outlier_dims: Tensor, activation: Activation) -> QuantizedRows:
    """As `reference.quantize_rows`, to the bit, for x [M, K] with K > 0; scale and zero point are [M, 1].

    Only a scale below 2**-126 differs: it is 2**-126.
    """
    kept = x.index_fill(1, outlier_dims.long(), 0).float() if outlier_dims.numel() else x.to(torch.float32, copy=True)
    low, high = kept.amin(1, True), kept.amax(1, True)
    if activation == "absmax":
        absmax = torch.maximum(high, low.neg_()).clamp_(min=_TINY)
        values = kept.mul_(127).div_(absmax).round_()
        return QuantizedRows(values.to(torch.int8), absmax / 127, None)
    if not outlier_dims.numel():  # with outliers there is a zero in every row
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = high.sub_(low).div_(254).clamp_(min=_TINY)
    zero_point = torch.rsub(low.div_(scale), -127).round_()
    values = kept.div_(scale).round_().add_(zero_point).clamp_(-127, 127)
    return QuantizedRows(values.to(torch.int8), scale, zero_point)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    weight_row_sum: Tensor | None,
    packed: bool,
) -> Tensor:
    """As `reference.int8_linear`, for neither K nor N 0, and a weight that may be packed.

    The integers are the same. The floating-point sums after them may be rounded in another order, which changes the
    result by a few units in the last place of float32.

    Args:
        weight_row_sum: int32 [N]; None computes it here. `absmax` has no use for it.
        packed: whether `pack` returned the weight. A tensor does not know it under torch.compile.

    """
    out_features = len(weight_absmax)

    def product(values: Tensor) -> Tensor:
        return packed_product(values, weight, out_features) if packed else int8_product(values, weight)

    if weight_row_sum is None and activation == "zeropoint":
        weight_row_sum = product(torch.ones(1, x.shape[1], dtype=torch.int8, device="cpu"))[0]
    row_sum = None if weight_row_sum is None else weight_row_sum.float()
    column_scale = weight_absmax / 127
    columns = outlier_weight.float().t()

    # In place from here on: what is large enough to be new memory from the system costs more than all the arithmetic.
    def block(x: Tensor) -> Tensor:
        values, scale, zero_point = quantize_in_blocks(x, outlier_dims, activation)
        out = product(values).float()
        if zero_point is not None and row_sum is not None:
            out = out.addcmul_(zero_point, row_sum, value=-1)
        out = out.mul_(scale).mul_(column_scale)
        if outlier_dims.numel():
            out = out.addmm_(x.index_select(1, outlier_dims).float(), columns)
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    step = _rows_at_a_time(_OUTPUT_ELEMENTS // out_features)
    if step is None or len(x) <= step:
        return block(x)
    return torch.cat([block(rows) for rows in torch.split(x, step)])


def quantize_in_blocks(x: Tensor, outlier_dims: Tensor, activation: Activation) -> QuantizedRows:
    """As `quantize_rows`, so many rows at a time that they stay in the cache."""
    step = _rows_at_a_time(_QUANTIZE_ELEMENTS // x.shape[1])
    if step is None or len(x) <= step:
        return quantize_rows(x, outlier_dims, activation)
    blocks = [quantize_rows(rows, outlier_dims, activation) for rows in torch.split(x, step)]
    values, scales, zero_points = zip(*blocks, strict=True)
    return QuantizedRows(torch.cat(values), torch.cat(scales), None if None in zero_points else torch.cat(zero_points))


def _rows_at_a_time(wanted: int) -> int | None:
    """Return how many rows make a block; None, all of them, for torch.compile, which makes blocks of its own."""
    return None if torch.compiler.is_compiling() else max(1, wanted)
