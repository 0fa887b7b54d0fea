"""The methods of Table 1 of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), simulated from the 16-bit model.

A linear layer computes `x W^T` with x [M, K] and W [N, K]. A `Method` says how both become int8: which numbers share
one scale (`granularity`), whether the range is symmetric (`kind`), and whether the outlier dimensions are taken out
first (`decomposition`). The table is the product of these three.

The arithmetic is that of real int8 kernels: int8 times int8 is summed exactly, and scales are applied to the sum. What
is simulated is only that the 16-bit weights are at hand: they are quantized when a layer is reached, for all methods
that run together, and forgotten then. Methods run together as rows of a batch, each on the same tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.converter.model.build import is_linear
from llmint8.formats import LLMInt8Error
from llmint8.kernels.linear import int8_product
from llmint8.kernels.reference import Activation, QuantizedRows, dynamic_outlier_dims, quantize_rows

Granularity = Literal["tensor", "row", "vector"]

THRESHOLD = 6.0  # alpha in the paper, section 3.2


@dataclass(frozen=True)
class Method:
    """A row of Table 1.

    Attributes:
        granularity: what shares one scale. `tensor` (section 2.1): all of x, that is the input of the layer in one
            forward pass, and all of W. `row` (Khudia et al. 2021, as the paper compares with it): each row of x, and
            all of W. `vector` (section 3.1): each row of x, and each row of W, which is an output.
        kind: how x and W are both rounded (section 2.1). `absmax`: q = round(127 x / max|x|). `zeropoint`:
            q = round(x / s) + z with s = (max - min) / 254 and z = round(-127 - min / s), the range widened to
            contain 0; the product is that of (q_x - z_x) and (q_W - z_W).
        decomposition: whether the dimensions of x that hold any |x| >= 6.0 in this call are multiplied in floating
            point with the original columns of W (section 3.2). They then count as 0 for the scales of x. The scales
            of W span all columns, as those of bitsandbytes do.

    """

    granularity: Granularity
    kind: Activation
    decomposition: bool

    @property
    def name(self) -> str:
        """The name in Table 1; `vector-wise + decomposition` is what it calls LLM.int8()."""
        how = "" if self.granularity == "tensor" else f" {self.granularity}-wise"
        return f"{self.kind}{how}{' + decomposition' if self.decomposition else ''}"


_ROUNDINGS: tuple[tuple[Granularity, Activation], ...] = (
    ("tensor", "absmax"),
    ("tensor", "zeropoint"),
    ("row", "absmax"),
    ("vector", "absmax"),
    ("vector", "zeropoint"),
)
METHODS = tuple(Method(*rounding, decomposition) for decomposition in (False, True) for rounding in _ROUNDINGS)


class NotRowsError(LLMInt8Error):
    """A layer's input is not one row of the batch after another, as that of an expert is not."""


class Simulation:
    """A 16-bit model whose linear layers can be made to compute as a `Method` says."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Take the model, with weights in float32, and the names of the layers.

        Raises:
            LLMInt8Error: a name is not that of a linear layer.

        """
        modules = dict(model.named_modules())
        self._layers: dict[str, Any] = {}
        for name in names:
            if name not in modules or not is_linear(modules[name]):
                raise LLMInt8Error(f"{name}: int8 in the checkpoint, but no linear layer of the reference model")
            self._layers[name] = modules[name]

    @contextmanager
    def applied(self, *methods: Method | None) -> Iterator[None]:
        """Let the layers compute each row of a batch as its method says, None as they are; afterwards as before.

        With one method the batch is one call, whatever its shape.

        Raises:
            NotRowsError: in a forward pass with several methods, a layer cannot tell the rows apart.

        """
        try:
            for name, layer in self._layers.items():
                layer.forward = partial(self._forward, name, methods)
            yield
        finally:
            for layer in self._layers.values():
                vars(layer).pop("forward", None)

    @torch.no_grad()
    def _forward(self, name: str, methods: Sequence[Method | None], x: Tensor) -> Tensor:
        layer = self._layers[name]
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        quantized: dict[tuple[bool, Activation], QuantizedRows] = {}
        found = []
        for method, row in zip(methods, parted_rows(name, x, len(methods)), strict=True):
            if method is None:
                found.append(type(layer).forward(layer, row))
                continue
            key = (method.granularity == "vector", method.kind)
            if key not in quantized:
                quantized[key] = _quantize(weight, *key)
            out = _product(row, weight, quantized[key], method)
            found.append(out if layer.bias is None else out.add_(layer.bias))
        return torch.cat(found).reshape(*x.shape[:-1], len(weight))


def parted_rows(name: str, x: Tensor, count: int) -> Sequence[Tensor]:
    """Part an input [..., K] into `count` matrices [M, K], one for each row of the batch."""
    matrix = x.reshape(-1, x.shape[-1])
    if count == 1:
        return [matrix]
    # Some models flatten batch and positions. What experts get is flat, too, and of some positions only.
    flat = x.dim() == 2 and len(re.findall(r"\.\d+(?=\.|$)", name)) < 2
    if not (x.shape[0] == count and x.dim() > 2) and not (flat and len(x) % count == 0):
        raise NotRowsError(f"{name}: an input {list(x.shape)} is not {count} rows")
    return matrix.chunk(count)


def _product(x: Tensor, weight: Tensor, quantized_weight: QuantizedRows, method: Method) -> Tensor:
    """Return x @ weight.T, float32 [M, N], with the weight [N, K] and what it became in int8."""
    if not len(x):  # an expert that no token was sent to
        return x.new_zeros(0, len(weight))
    dims = dynamic_outlier_dims(x, THRESHOLD) if method.decomposition else x.new_empty(0, dtype=torch.int64)
    kept = x.index_fill(1, dims, 0)
    out = _int8_product(_quantize(kept, method.granularity != "tensor", method.kind), quantized_weight)
    return out + x[:, dims] @ weight[:, dims].t() if len(dims) else out


def _quantize(matrix: Tensor, by_row: bool, kind: Activation) -> QuantizedRows:
    """Quantize a matrix with a scale for each row, or with one, which is [1, 1], for all of it."""
    no_dims = torch.empty(0, dtype=torch.int64, device=matrix.device)
    rows = quantize_rows(matrix if by_row else matrix.reshape(1, -1), no_dims, kind)
    return rows._replace(values=rows.values.reshape(matrix.shape).contiguous())


def _int8_product(x: QuantizedRows, weight: QuantizedRows) -> Tensor:
    """Return `(q_x - z_x) (q_W - z_W)^T s_x s_W`, multiplied out so that int8 is multiplied with int8."""
    product = int8_product(x.values, weight.values)
    if x.zero_point is not None and weight.zero_point is not None:
        # In int64, as the four terms are each far larger than what is left of them.
        z_x, z_w = x.zero_point.long(), weight.zero_point.long().t()
        product = product - z_x * weight.values.sum(1) - z_w * x.values.sum(1)[:, None]
        product += x.values.shape[1] * z_x * z_w
    return product.float() * x.scale * weight.scale.t()
