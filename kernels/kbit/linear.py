"""The facade for weights of k bits: `prepare` picks what runs one, and `kbit_linear` is the call.

Under a compiler, and wherever somebody watches what is called, it is the PyTorch operator
`torch.ops.llmint8.kbit_linear`; eagerly a weight passes the operator by, as int8 weights do (`kernels/operators.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calling import call
from ..checks import COLUMNS, check_outlier_dims, check_rows, check_tensor, is_watched
from ..cpu import checked
from ..gpu.tiles import gpu_of
from ..operators import has_triton
from ..prepared import PreparedWeight
from ..reference import Activation
from . import cpu
from .gradient import input_gradient
from .operands import KBitOperands
from .packing import row_bytes
from .reference import KBitWeight, blocks, dequantize_rows

Run = Callable[[Tensor], Tensor]

# What is dequantized of a weight at a time: 8 MB in float32.
_STEP_ELEMENTS = 1 << 21

_LIBRARY = torch.library.Library("llmint8", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "kbit_linear(Tensor x, Tensor packed, Tensor absmax, Tensor levels, Tensor outlier_dims, Tensor columns, "
    "Tensor? bias, int in_features, int? block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedKBit(PreparedWeight):
    """A weight of k bits laid out for one device, and what runs it eagerly."""

    weight: KBitWeight
    operands: KBitOperands
    run: Run

    def stored(self) -> KBitWeight:
        """Return the weight; see `PreparedWeight`."""
        return self.weight

    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        """Run the layer; see `PreparedWeight`."""
        if torch.compiler.is_compiling() or is_watched(x):
            out: Tensor = torch.ops.llmint8.kbit_linear(x, *self.operands)
            return out
        return self.run(x)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Run the operator of `gradient.py`; see `PreparedWeight`."""
        return input_gradient(gradient, self.weight)


def prepare(weight: KBitWeight) -> PreparedKBit:
    """Check a weight and lay it out for the device it is on; its tensors are shared.

    Raises:
        ValueError: the weight is not what `KBitWeight` says.

    """
    check_weight(weight)
    operands = KBitOperands.prepare(weight)
    runs_on, run = _runner(operands)
    return PreparedKBit(
        in_features=weight.in_features,
        out_features=len(weight.packed),
        values=weight.packed,
        bias=operands.bias,
        runs_on=f"{weight.bits} bits: {runs_on}",
        weight=weight,
        operands=operands,
        run=run,
    )


def check_weight(weight: KBitWeight) -> None:
    """Check a weight, values of its outlier dims included, which waits for a GPU.

    Raises:
        ValueError: a tensor is not what `KBitWeight` says, or they do not fit each other.

    """
    dims, columns = weight.outlier_dims, weight.outlier_weight
    coded = weight.packed, weight.absmax, weight.levels
    _check_operands(*coded, dims, columns, weight.bias, weight.in_features, weight.block)
    # What stands for a tensor, in a graph that is made, has no values.
    if type(dims) is Tensor and not dims.is_meta and len(dims) and not torch.compiler.is_compiling():
        check_outlier_dims(dims, weight.in_features)


def kbit_linear(x: Tensor, weight: PreparedKBit) -> Tensor:
    """Compute `x @ dequantized(weight).T + bias`; see `reference.kbit_linear`.

    Args:
        x: float16, bfloat16 or float32 [..., K], on the weight's device; float64 is computed as float32. Under
            autocast it is cast first, as that of `nn.Linear`, but for float64.
        weight: from `prepare`.

    Returns:
        [..., N] in the dtype of x, or of autocast. Gradients flow to x, and to a bias that wants one.

    Raises:
        ValueError: x does not fit the weight.

    """
    return call(x, weight, "absmax")


def _runner(operands: KBitOperands) -> tuple[str, Run]:
    """Return what runs a weight, and its name for people."""
    device = operands.packed.device.type
    if device == "cpu" and cpu.kinds():
        return f"{cpu.kinds()[0]} on the CPU", cpu.CpuKBit(operands)
    if device == "cuda" and has_triton():
        from .gpu.linear import GpuKBitLinear

        gpu = gpu_of(operands.packed.device)
        return f"Triton on {gpu.architecture}", GpuKBitLinear(*operands)
    why = f" ({cpu.why_not()})" if device == "cpu" else ""
    return f"plain PyTorch on {device}{why}", functools.partial(plain_linear, weight=operands)


def plain_linear(x: Tensor, weight: KBitOperands) -> Tensor:
    """Run a layer for x [M, K] in plain torch, some rows of the weight at a time: [M, N] in the dtype of x."""
    coded, n = weight.coded, len(weight.packed)
    inside = x.float()
    out = torch.empty(len(x), n, device=x.device)
    step = max(1, _STEP_ELEMENTS // max(1, weight.in_features))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        torch.mm(inside, dequantize_rows(coded, rows).t(), out=out[:, rows])
    if weight.outlier_dims.numel():
        out += torch.mm(inside[:, weight.outlier_dims.long()], weight.columns.t(), out=torch.empty_like(out))
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)


def _check_operands(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    outlier_dims: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    in_features: int,
    block: int | None,
) -> None:
    device, bits = packed.device, levels.shape[0].bit_length() - 1 if levels.ndim else 0
    check_tensor("levels", levels, (torch.float32,), (2**bits,), device, contiguous=True)
    check_tensor("packed", packed, (torch.uint8,), (None, row_bytes(in_features, bits)), device)
    n = packed.shape[0]
    check_tensor("absmax", absmax, (torch.float16,), (n, blocks(in_features, block)[0]), device)
    check_tensor("outlier_dims", outlier_dims, (torch.int32, torch.int64), (None,), device)
    check_tensor("columns", columns, COLUMNS, (n, outlier_dims.shape[0]), device)
    if bias is not None:
        check_tensor("bias", bias, COLUMNS, (n,), device)


def _checked(x: Tensor, *arguments: Any) -> KBitOperands:
    _check_operands(*arguments)
    operands = KBitOperands(*arguments)
    check_rows(x, operands.in_features, operands.packed.device)
    return operands


def _run(x: Tensor, *arguments: Any) -> Tensor:
    return _runner(_checked(x, *arguments))[1](x)


def _run_on_cpu(x: Tensor, *arguments: Any) -> Tensor:
    operands = KBitOperands(*arguments)
    if layout := checked.layout_of(operands):
        check_rows(x, operands.in_features, operands.packed.device)
        return cpu.CpuKBit(operands, layout)(x)
    out = _run(x, *arguments)
    if cpu.kinds():
        checked.remember(operands, cpu.CpuKBit(operands))
    return out


def _shaped(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], _checked(x, *arguments).packed.shape[0])


_LIBRARY.impl("kbit_linear", _run_on_cpu, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("kbit_linear", _run, "CUDA")  # type: ignore[no-untyped-call] # the key of AMD's GPUs, too
torch.library.register_fake("llmint8::kbit_linear", _shaped, lib=_LIBRARY)
