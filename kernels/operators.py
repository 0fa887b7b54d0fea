"""The layer as one PyTorch operator, `torch.ops.llmint8.int8_linear`, so that compilers and CUDA graphs take it whole.

On a GPU it is one or two launches of Triton kernels (`gpu/linear.py`). With outliers searched in the call,
`torch.ops.llmint8.dynamic_int8_linear`, two more come before. Nothing in them waits for the GPU, and shapes do not
depend on values. On the CPU they are the compiled layer (`cpu/native.py`) or, where there is none, what the CPU's other
weights run (`cpu/linear.py`). They have no gradient of their own; `gradient.py` has it.

Called eagerly, a weight passes the operator by: its dispatch takes as long as the rest of a call.
Without Triton (CUDA on Windows) there is no such weight, and the operator runs the reference.
"""

import functools
import importlib.util
import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from . import reference
from .checks import check_operands, check_rows, is_watched
from .cpu import checked, native
from .cpu.linear import CpuWeight
from .gpu.tiles import gpu_of, table_for
from .operands import Operands
from .prepared import PreparedInt8
from .reference import Activation, Group, Int8Weight, Rotation
from .weights import row_sums

# `Library` dispatches in a fraction of the time that `torch.library.custom_op` takes.
_LIBRARY = torch.library.Library("llmint8", "FRAGMENT")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor weight, Tensor scale, Tensor row_sum"
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"int8_linear(Tensor x, {_WEIGHT}, Tensor outlier_dims, Tensor outlier_weight, Tensor? bias, int? group, "
    "int? rotation, bool zeropoint) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"dynamic_int8_linear(Tensor x, {_WEIGHT}, Tensor? bias, float threshold, int? group, bool zeropoint) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


Run = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class OperatorWeight(PreparedInt8):
    """A weight laid out for the operators, and what runs it eagerly."""

    operands: Operands
    run: Run

    @classmethod
    def prepare(cls, weight: Int8Weight) -> Self:
        """Lay out a weight on its device."""
        operands = Operands.prepare(weight, row_sums)
        n, k = operands.values.shape
        runs_on, run = cls._runner(operands)
        return cls(
            in_features=k,
            out_features=n,
            values=operands.values,
            bias=operands.bias,
            runs_on=runs_on,
            operands=operands,
            run=run,
        )

    def stored(self) -> Int8Weight:
        """Return the weight; see `PreparedWeight`."""
        return self.operands.stored()

    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer; see `PreparedWeight`."""
        zeropoint = activation == "zeropoint"
        if torch.compiler.is_compiling() or is_watched(x):
            weight, scale, row_sum, dims, columns, bias, threshold, group, rotation = self.operands
            if threshold is None:
                return int8_linear(x, weight, scale, row_sum, dims, columns, bias, group, rotation, zeropoint)
            return dynamic_int8_linear(x, weight, scale, row_sum, bias, threshold, group, zeropoint)
        return self.run(x, zeropoint)

    @staticmethod
    @abstractmethod
    def _runner(operands: Operands) -> tuple[str, Run]:
        """Return what runs a weight, and its name for people."""


class GpuWeight(OperatorWeight):
    """One for the kernels of `gpu/`."""

    @staticmethod
    def _runner(operands: Operands) -> tuple[str, Run]:
        from .gpu.linear import GpuLinear

        gpu = gpu_of(operands.device)
        tiles = table_for(gpu)[0]
        own = "" if tiles == gpu.architecture else f" with the tiles of {tiles}"
        return f"Triton on {gpu.architecture}{own}", GpuLinear(operands)


class NativeWeight(OperatorWeight):
    """One for the compiled layer of `cpu/`, where `native.kinds` is not empty."""

    @staticmethod
    def _runner(operands: Operands) -> tuple[str, Run]:
        return f"{native.kinds()[0]} on the CPU", native.NativeLinear(operands)


@functools.cache
def has_triton() -> bool:
    """Tell whether the kernels of `gpu/` can run; where they cannot, a warning says so once."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logging.getLogger("llmint8").warning(
            "Triton is not installed: int8 layers run as plain PyTorch operations on this GPU, many times slower"
        )
    return found


def _run(x: Tensor, operands: Operands, zeropoint: bool) -> Tensor:
    activation: Activation = "zeropoint" if zeropoint else "absmax"
    if operands.device.type == "cpu":
        if native.kinds():
            return native.NativeLinear(operands)(x, zeropoint)
        return CpuWeight.of_operands(operands).linear(x, activation)
    if not has_triton():
        return reference.int8_linear(x, operands.stored(), activation)
    from .gpu.linear import GpuLinear

    return GpuLinear(operands)(x, zeropoint)


def _shaped(x: Tensor, operands: Operands, zeropoint: bool) -> Tensor:
    return x.new_empty(x.shape[0], operands.values.shape[0])


# An operator and what stands for it while a graph is made differ in what they run, and not in what they check.
def _int8_linear(run: Callable[[Tensor, Operands, bool], Tensor]) -> Callable[..., Tensor]:
    def operator(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        row_sum: Tensor,
        outlier_dims: Tensor,
        outlier_weight: Tensor,
        bias: Tensor | None,
        group: Group | None,
        rotation: Rotation | None,
        zeropoint: bool,
    ) -> Tensor:
        check_operands(x, weight, scale, row_sum, bias, group, outlier_dims, outlier_weight, rotation)
        operands = Operands(weight, scale, row_sum, outlier_dims, outlier_weight, bias, None, group, rotation)
        return run(x, operands, zeropoint)

    return operator


def _dynamic_int8_linear(run: Callable[[Tensor, Operands, bool], Tensor]) -> Callable[..., Tensor]:
    def operator(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        row_sum: Tensor,
        bias: Tensor | None,
        threshold: float,
        group: Group | None,
        zeropoint: bool,
    ) -> Tensor:
        check_operands(x, weight, scale, row_sum, bias, group)
        nothing = weight.new_empty(0, dtype=torch.int32), scale.new_empty(weight.shape[0], 0)
        return run(x, Operands(weight, scale, row_sum, *nothing, bias, threshold, group, None), zeropoint)

    return operator


_checked_int8_linear = _int8_linear(_run)


def _int8_linear_on_cpu(x: Tensor, *arguments: Any) -> Tensor:
    group, rotation, zeropoint = arguments[6:]
    operands = Operands._make((*arguments[:6], None, group, rotation))
    if layout := checked.layout_of(operands):
        check_rows(x, operands.values.shape[1], operands.device)
        return native.NativeLinear(operands, layout)(x, zeropoint)
    out = _checked_int8_linear(x, *arguments)
    if native.kinds():
        checked.remember(operands, native.NativeLinear(operands))
    return out


for _name, _operator in {"int8_linear": _int8_linear, "dynamic_int8_linear": _dynamic_int8_linear}.items():
    # CUDA is the key of AMD's GPUs, too.
    _LIBRARY.impl(_name, _operator(_run), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"llmint8::{_name}", _operator(_shaped), lib=_LIBRARY)
_LIBRARY.impl("int8_linear", _int8_linear_on_cpu, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("dynamic_int8_linear", _dynamic_int8_linear(_run), "CPU")  # type: ignore[no-untyped-call]
int8_linear: Callable[..., Tensor] = torch.ops.llmint8.int8_linear.default
dynamic_int8_linear: Callable[..., Tensor] = torch.ops.llmint8.dynamic_int8_linear.default
