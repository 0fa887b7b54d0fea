"""What a layer is run with: a weight laid out for one device."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from . import reference
from .reference import Activation, Int8Weight


class StoredWeight(Protocol):
    """A quantized weight as it is stored, of whatever format: a dataclass of tensors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def values(self) -> Tensor:
        """What is stored for the weight: int8 [N, K], or packed codes."""

    @property
    def absmax(self) -> Tensor:
        """The absmax of each row, float32 [N], or of each block of a row, float16 [N, G]."""

    @property
    def outlier_dims(self) -> Tensor:
        """The dimensions of the columns that are stored as they were, integer [k]."""

    @property
    def outlier_weight(self) -> Tensor:
        """These columns, float [N, k]."""

    @property
    def bias(self) -> Tensor | None:
        """Float [N], or None."""

    def rows(self, chosen: Tensor) -> Self:
        """Return the weight of these rows alone, integer [M], as they are looked up: without a bias."""

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [N, K], outlier columns as they were."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedWeight(ABC):
    """A weight laid out for one device, with all that is computed once; none of its tensors is written to.

    Another format of weights, or another device, is another class of this kind.

    Attributes:
        in_features: K.
        out_features: N.
        values: the int8 values, or the packed codes, in the layout that is read.
        bias: float [N] or None, the tensor that was given: what is written into it counts.
        runs_on: what computes it, for people.

    """

    in_features: int
    out_features: int
    values: Tensor
    bias: Tensor | None
    runs_on: str

    @property
    def device(self) -> torch.device:
        """Where it is, and x has to be."""
        return self.values.device

    def unpack(self) -> Tensor:
        """Return the values, int8 [N, K] or packed codes, bit for bit; a copy if their layout is another."""
        return self.values

    @abstractmethod
    def stored(self) -> StoredWeight:
        """Return the weight as it was stored, its absmax to a unit in the last place, without outliers it searches."""

    @abstractmethod
    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer for x [M, K] in float16, bfloat16 or float32: [M, N] in its dtype.

        `activation` is nothing of weights whose inputs stay in floating point.
        """

    @abstractmethod
    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to x, [M, K], of one with respect to the output, [M, N]; in its dtype."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedInt8(PreparedWeight):
    """A weight in int8, laid out for one device."""

    @abstractmethod
    def stored(self) -> Int8Weight:
        """Return the weight; see `PreparedWeight`."""

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Run the operator of `gradient.py`; see `PreparedWeight`."""
        weight = self.stored()
        found: Tensor = torch.ops.llmint8.int8_linear_gradient(
            gradient, weight.values, weight.absmax, weight.outlier_dims, weight.outlier_weight, weight.rotation
        )
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceWeight(PreparedInt8):
    """A weight as it is stored, for devices without kernels of their own."""

    weight: Int8Weight

    @classmethod
    def prepare(cls, weight: Int8Weight) -> "ReferenceWeight":
        """Take a weight on any device."""
        n, k = weight.values.shape
        runs_on = f"plain PyTorch on {weight.values.device.type}"
        return cls(
            in_features=k, out_features=n, values=weight.values, bias=weight.bias, runs_on=runs_on, weight=weight
        )

    def stored(self) -> Int8Weight:
        """Return the weight; see `PreparedWeight`."""
        return self.weight.without_uncounted()

    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer; see `PreparedWeight`."""
        return reference.int8_linear(x, self.weight, activation)
