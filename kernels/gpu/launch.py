"""Launch a Triton kernel without asking Triton in every call which of its compiled forms is meant.

`kernel[grid](...)` looks at every argument to find the form that was compiled for its dtype, its alignment and its
value, if that is 1; in Python that takes longer than a small layer on the GPU. Who launches the same kernel again and
again knows all of it beforehand, and keeps a `Launch` for each form.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HIP = torch.version.hip is not None
# Every path rounds alike, whatever Triton's default is.
FP_FUSION = False


class Launch:
    """A kernel with its compile-time arguments, which are those behind the others in its signature.

    All calls have to have arguments of the same dtypes and alignments on one device. Integers that a kernel does not
    name in `do_not_specialize` have to stay 1, or a multiple of 16, or neither.
    """

    def __init__(self, kernel: Any, num_warps: int, num_stages: int | None = None, **constants: Any) -> None:
        """Compile nothing yet."""
        options = {"num_warps": num_warps, "enable_fp_fusion": FP_FUSION}
        self._kernel = kernel
        self._constants = constants
        self._options = options if num_stages is None else options | {"num_stages": num_stages}
        self._compiled: Any = None
        self._values: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream of the current device; the first call compiles."""
        if self._compiled is None:
            # The values first: another thread may come in between.
            self._values = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            # The interpreter returns nothing, and is asked again in every call.
            self._compiled = self._kernel[grid](*arguments, **self._constants, **self._options)
        else:
            self._compiled[grid](*arguments, *self._values)


def kind_of(x: Tensor, out_features: int) -> tuple[tuple[int, int], Any]:
    """Return the strides of x [M, K], and what else a launch depends on: all that Triton tells apart, and about M.

    That is the same for M up to a power of two, for x and an output [M, N] in its dtype.
    """
    if x.is_contiguous():
        # The stride of a single row may be anything.
        strides, layout = (x.shape[1], 1), None
    else:
        strides = x.stride(0), x.stride(1)
        layout = tuple((stride == 1, stride % 16 == 0, stride >= 1 << 31) for stride in strides)
    kind = (len(x) - 1).bit_length(), x.dtype, layout, x.data_ptr() % 16 == 0
    return strides, (kind, _small(x, out_features) if _HIP else None)


def _small(x: Tensor, out_features: int) -> tuple[bool, bool]:
    """Tell what AMD's compiler counts on, too: that x, and the output, have less than 2 GB."""
    limit = 1 << 31
    return x.untyped_storage().nbytes() < limit, len(x) * out_features * x.element_size() < limit


def on_its_device(plan: Callable[[Tensor, tuple[int, int]], Tensor], x: Tensor, strides: tuple[int, int]) -> Tensor:
    """Run what launches, with the device of x as the current one, on which Triton launches."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return plan(x, strides)
    with torch.cuda.device(device):
        return plan(x, strides)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
