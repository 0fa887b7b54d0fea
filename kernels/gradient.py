"""The gradient of a layer with respect to its input, and how autograd is told of it.

The weight is frozen, so that gradient is the product of the output's gradient and the dequantized weight; that of the
bias is a sum of rows. Neither needs x, and the weight is dequantized in the backward pass, some columns at a time: the
forward pass keeps nothing. It is the operator `torch.ops.llmint8.int8_linear_gradient`, for every device, so that a
compiler takes it whole. There is no second derivative, and no derivative in forward mode.
"""

from typing import Any

import torch
from torch import Tensor

from .prepared import PreparedWeight
from .reference import Activation, Int8Weight, Rotation, rotate

_LIBRARY = torch.library.Library("llmint8", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "int8_linear_gradient(Tensor gradient, Tensor weight, Tensor absmax, Tensor outlier_dims, Tensor outlier_weight, "
    "int? rotation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is dequantized of a weight at a time: 8 MB in float32. Columns, as their products need no sum over the blocks.
_BLOCK_ELEMENTS = 1 << 21
_BLOCK_COLUMNS = 64  # a whole number of rotated blocks, too


def linear_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """As `reference.linear_gradient`, [M, K] for a gradient [M, N]; in the dtype of the gradient, on a GPU inside, too.

    On the CPU it is float32 inside: many processors multiply 16-bit numbers at a fraction of the speed.
    """
    dtype = torch.float32 if gradient.device.type == "cpu" else gradient.dtype
    n, k = weight.values.shape
    scale = (weight.absmax / 127)[:, None]
    inside = gradient.to(dtype)
    out = inside.new_empty(len(gradient), k)
    step = max(1, _BLOCK_ELEMENTS // (max(1, n) * _BLOCK_COLUMNS)) * _BLOCK_COLUMNS
    for start in range(0, k, step):
        columns = slice(start, start + step)
        block = weight.values[:, columns].float().mul_(scale)
        torch.mm(inside, block.to(dtype), out=out[:, columns])  # autocast leaves alone what is told where to write
    if weight.rotation is not None:
        out = rotate(out, weight.rotation)
    if weight.outlier_dims.numel():
        exact = out.new_empty(len(gradient), len(weight.outlier_dims))
        torch.mm(inside.to(out.dtype), weight.outlier_weight.to(out.dtype), out=exact)
        out[:, weight.outlier_dims.long()] = exact
    return out.to(gradient.dtype)


def _gradient(
    gradient: Tensor,
    weight: Tensor,
    absmax: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    rotation: Rotation | None,
) -> Tensor:
    return linear_gradient(gradient, Int8Weight(weight, absmax, outlier_dims, outlier_weight, rotation=rotation))


def _shaped(gradient: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight.shape[1])


def no_second(ctx: Any, *gradients: Tensor) -> Any:
    """Refuse the second derivative: what autograd calls for an operator that is a gradient."""
    raise NotImplementedError("there is no second derivative through quantized layers")


_LIBRARY.impl("int8_linear_gradient", _gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmint8::int8_linear_gradient", _shaped, lib=_LIBRARY)
torch.library.register_autograd("llmint8::int8_linear_gradient", no_second, lib=_LIBRARY)


class _Linear(torch.autograd.Function):
    """A layer whose scales and rounding are no part of the graph: their gradients would be wrong."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: PreparedWeight, activation: Activation) -> Tensor:
        return weight.linear(x, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, bias, ctx.weight, _ = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.weight.input_gradient(gradient)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return of_x, of_bias, None, None


def differentiable(x: Tensor, weight: PreparedWeight, activation: Activation) -> Tensor:
    """Run a layer for x [M, K], and let gradients flow to x and to the bias, where they want any: [M, N]."""
    bias = weight.bias
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = _Linear.apply(x, bias, weight, activation)  # type: ignore[no-untyped-call]
        return out
    return weight.linear(x, activation)
