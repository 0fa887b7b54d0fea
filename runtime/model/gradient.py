"""The gradient of an int8 layer: there is none yet, and backward says so."""

from typing import Any

import torch
from torch import Tensor


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("there is no gradient through Int8Linear yet; run the model under torch.no_grad()")


def refuse_backward(out: Tensor, x: Tensor) -> Tensor:
    """Return `out`, in a graph that ends in an error where the gradient of x is asked for."""
    result: Tensor = _RefuseBackward.apply(out, x)  # type: ignore[no-untyped-call]
    return result
