"""The experts of a mixture, each of which multiplies some of the rows: the facade, as `linear.py` is for layers.

On CUDA all experts are one launch that quantizes and one that multiplies, and nothing waits for the GPU
(`gpu/experts.py`). Elsewhere rows are sorted by expert, and each expert that has some runs as a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_input, check_weight
from .linear import prepare
from .operators import has_triton
from .prepared import PreparedWeight
from .reference import Activation, Int8Weight
from .routing import by_expert


class PreparedExperts(ABC):
    """The weights of experts, laid out for one device.

    Attributes:
        values: int8 [E, N, K] where they are one stack, a copy of those given; else None.

    """

    values: Tensor | None = None

    @abstractmethod
    def linear(self, x: Tensor, expert_of_row: Tensor, activation: Activation = "absmax") -> Tensor:
        """Multiply every row by the weight of its expert; see `reference.grouped_int8_linear`."""


def prepare_experts(weights: Sequence[Int8Weight]) -> PreparedExperts:
    """Check the weights of experts and lay them out for the device they are on.

    Raises:
        ValueError: a weight is not what `Int8Weight` says, has a threshold, or differs from the first in its shape,
            group, rotation, device or in whether it has a bias.

    """
    if not weights:
        raise ValueError("weights is empty, expected those of one expert at least")
    for expert, weight in enumerate(weights):
        check_weight(weight)
        if weight.threshold is not None:
            raise ValueError(f"expert {expert} has a threshold; outliers of experts are not searched in the call")
        if _kind(weight) != _kind(weights[0]):
            raise ValueError(f"expert {expert} is {_kind(weight)}, the first {_kind(weights[0])}; they have to agree")
    if weights[0].values.device.type == "cuda" and has_triton():
        return _GpuExperts(weights)
    return _Experts([prepare(weight) for weight in weights])


def _kind(weight: Int8Weight) -> tuple[object, ...]:
    shape, device = tuple(weight.values.shape), weight.values.device
    return shape, weight.outlier_weight.dtype, weight.group, weight.rotation, device, weight.bias is not None


def _check(x: Tensor, expert_of_row: Tensor, in_features: int, device: torch.device) -> None:
    check_input(x, in_features, device)
    of = expert_of_row
    whole = len(of) == 0 if len(x) == 0 else len(of) % len(x) == 0
    if of.ndim != 1 or not whole or of.is_floating_point() or of.device != device:
        raise ValueError(
            f"expert_of_row is {of.dtype} {list(of.shape)} on {of.device}, expected integers on {device}, as many for "
            f"each of the {len(x)} rows"
        )


@dataclass(frozen=True, eq=False)
class _Experts(PreparedExperts):
    layers: list[PreparedWeight]

    def linear(self, x: Tensor, expert_of_row: Tensor, activation: Activation = "absmax") -> Tensor:
        first = self.layers[0]
        _check(x, expert_of_row, first.in_features, first.device)
        out = x.new_zeros(len(expert_of_row), first.out_features)
        for expert, rows, inputs in by_expert(x, expert_of_row, len(self.layers)):
            out[rows] = self.layers[expert].linear(inputs, activation)
        return out


class _GpuExperts(PreparedExperts):
    def __init__(self, weights: Sequence[Int8Weight]) -> None:
        from .gpu.experts import GpuExperts

        self._run = GpuExperts(weights)
        self.values = self._run.values

    def linear(self, x: Tensor, expert_of_row: Tensor, activation: Activation = "absmax") -> Tensor:
        _check(x, expert_of_row, self._run.in_features, self._run.device)
        return self._run(x, expert_of_row, activation == "zeropoint")
