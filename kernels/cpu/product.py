"""The int8 product on the CPU, and weights laid out for it.

It is the first of these that the machine computes exactly, chosen before the first call:

- `packed`: oneDNN's quantized linear layer, on a weight that `pack` has laid out for it. Large weights only: a call
  costs 15 us more than `_int_mm`, and a small weight has less than that to gain. Every other weight takes the next.
- `int_mm`: `torch._int_mm` on the weight as it is, [N, K]. Fastest for one row of x; for more it lays the weight
  out anew in every call.
- `reference`: floating point in exact blocks, where neither is right or worth it. oneDNN without VNNI or AMX
  instructions saturates in 16 bits without a word, so both are tried on the largest sums there are. On processors
  without AVX-512 PyTorch does not ask it, and computes `_int_mm` number by number.
"""

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import reference

Product = Literal["packed", "int_mm", "reference"]
# Measured: with 2048 x 2048, four rows of x take a quarter of the time; one row takes 20 us more when the weight is in
# the cache, and 20 % less when it comes from memory.
_PACK_ELEMENTS = 1 << 22
# Here and below the device is named, as callers may be in a `with torch.device("meta")`.
_ONE = torch.ones(1, device="cpu")
_ZERO = torch.zeros(1, dtype=torch.int64, device="cpu")


def unpacked_product() -> Product:
    """Return the product for a weight as it is on this machine."""
    # There it is exact, and a loop of scalars: nine times as long as the reference for 32 rows, as long for one.
    scalar = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return "int_mm" if not scalar and _is_exact("int_mm") else "reference"


@functools.cache
def _is_exact(product: Literal["packed", "int_mm"]) -> bool:
    """Tell whether a product keeps the largest sums, in a single row as well as in several."""
    with _disable_current_modes():  # with numbers, whatever stands for tensors where it is asked first
        return _keeps_largest(product)


def _keeps_largest(product: Literal["packed", "int_mm"]) -> bool:
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
    unpacked: Tensor = torch.ops.llmint8.unpack(weight)
    return unpacked


def _packed_product(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    # VNNI multiplies unsigned by signed, so x goes in with 128 added, which oneDNN takes off again in its int32 sums.
    # The kernel it has for signed x takes a thousand times as long.
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x.view(torch.uint8) ^ 128, 1.0, 128, packed, _ONE, _ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


# Operators of their own, because torch.compile takes no packed weight apart. Defined this way they cost 3 us a call,
# as `custom_op` 10.
torch.library.define("llmint8::unpack", "(Tensor packed) -> Tensor")
torch.library.impl("llmint8::unpack", "default", lambda packed: packed.to_dense().t().contiguous())
torch.library.define("llmint8::packed_product", "(Tensor x, Tensor packed, int out_features) -> Tensor")
torch.library.impl("llmint8::packed_product", "default", _packed_product)


@torch.library.register_fake("llmint8::unpack")  # type: ignore[untyped-decorator]
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape[1], packed.shape[0], dtype=torch.int8, layout=torch.strided)


@torch.library.register_fake("llmint8::packed_product")  # type: ignore[untyped-decorator]
def _(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=torch.float32)


def multiply(x: Tensor, weight: Tensor, out_features: int, product: Product) -> Tensor:
    """Multiply int8 [M, K], contiguous, by a weight laid out for one of the products: [M, N].

    The sums are int32, or float32, rounded once, if the weight is packed. A tensor does not know that it is under
    torch.compile.
    """
    if product == "packed":
        packed: Tensor = torch.ops.llmint8.packed_product(x, weight, out_features)
        return packed
    # torch 2.13's _int_mm returns garbage for K = 1.
    if product == "reference" or x.shape[1] < 2 or not out_features:
        return reference.int8_product(x, weight)
    return torch._int_mm(x, weight.t())


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed: int32 [M, N]."""
    return multiply(x, weight, len(weight), unpacked_product())
