"""What a layer is run with: a weight laid out for one device."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .reference import Activation, Int8Weight


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedWeight(ABC):
    """A weight laid out for one device, with all that is computed once; none of its tensors is written to.

    Another format of weights, or another device, is another class of this kind.

    Attributes:
        in_features: K.
        out_features: N.
        values: the int8 values, in the layout that is read.
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
        """Return the values, int8 [N, K], bit for bit; a copy if their layout is another."""
        return self.values

    @abstractmethod
    def stored(self) -> Int8Weight:
        """Return the weight as it was stored, its absmax to a unit in the last place, without outliers it searches."""

    @abstractmethod
    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer for x [M, K] in float16, bfloat16 or float32: [M, N] in its dtype."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceWeight(PreparedWeight):
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
