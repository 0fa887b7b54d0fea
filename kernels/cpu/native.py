"""The layer on the CPU as one compiled function, `csrc/layer.c`, where llmint8 was installed with a C compiler.

It is a library without headers of Python or PyTorch, called with addresses; so one build does for all versions of
PyTorch. It is compiled with OpenMP and finds that of gcc where PyTorch has loaded it, so both share threads. What is
chosen here is the instruction set. None is trusted by name: before the first use each multiplies the largest values
there are, and one that gets it wrong is not used.
"""

import ctypes
import functools
import importlib.machinery
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..checks import padded_outliers
from ..operands import Operands
from ..reference import Group, Rotation, dynamic_outlier_dims, groups, rotate, row_sums

Kind = Literal["AVX2", "AVX-VNNI", "AVX512-VNNI", "AMX", "Arm dotprod"]

# The numbers are those of `layer.c`, the order is that of preference.
KINDS: dict[Kind, int] = {"AMX": 4, "AVX512-VNNI": 3, "AVX-VNNI": 2, "Arm dotprod": 5, "AVX2": 1}
_VERSION = 4
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Tiles pay from so many rows on; below, they are mostly empty.
_TILE_ROWS = 4
# A thread for so many products: fewer are done before another has woken up.
_PRODUCTS_PER_THREAD = 1 << 17


class _Weight(ctypes.Structure):
    """`Weight` in `layer.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "outliers", "padded", "group", "groups", "rotation")),
        *((name, ctypes.c_void_p) for name in ("values", "scale", "row_sum", "dims", "columns", "bias")),
        *((name, ctypes.c_int32) for name in ("columns_type", "bias_type")),
    )


@functools.cache
def compiled() -> ctypes.CDLL | str:
    """Load the library; or say why there is none."""
    path = Path(__file__).with_name("_layer" + importlib.machinery.EXTENSION_SUFFIXES[0])
    if not path.exists():
        return "the compiled layer was not built, which takes gcc 11 or clang 12 with OpenMP"
    try:
        library = ctypes.CDLL(str(path))
        version = library.llmint8_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if version != _VERSION:
        return f"{path.name} was compiled from another version"
    library.llmint8_linear.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int32] * 4)
    return library


@functools.cache
def kinds() -> list[Kind]:
    """Return the instruction sets that can be used here, the best one first."""
    library = compiled()
    if isinstance(library, str):
        return []
    supported = library.llmint8_supported()
    with _disable_current_modes():  # with numbers, whatever stands for tensors where it is asked first
        return [kind for kind, number in KINDS.items() if supported >> number & 1 and _is_exact(kind)]


def why_not() -> str:
    """Say why `kinds` is empty."""
    library = compiled()
    if isinstance(library, str):
        return library
    supported = library.llmint8_supported()
    if not supported & 1:
        return "the compiled layer has no kernels, which takes gcc 11 or clang 12, on x86 or on Arm with Linux"
    return "the compiled layer needs AVX2" if supported == 1 else "the compiled layer got sums wrong on this processor"


def _is_exact(kind: Kind) -> bool:
    """Tell whether it keeps the largest sums, for each of the ways it has: few rows and many, groups, and rotated."""
    values = torch.full((70, 520), 127, dtype=torch.int8, device="cpu")
    values[::2] = -127
    # Dtypes are named, as the default may be another.
    ones = torch.ones(70, dtype=torch.float32, device="cpu")
    none = torch.empty(0, dtype=torch.int32, device="cpu"), torch.empty(70, 0, dtype=torch.float32, device="cpu")
    wholes: tuple[Group | None, ...] = (None, 128)  # of which the last has 8 dimensions
    rotations: tuple[Rotation | None, ...] = (None, 64)
    for group, rotation, rows in itertools.product(wholes, rotations, (1, 5, 70)):
        layer = NativeLinear(Operands(values, ones, row_sums(values, group), *none, None, None, group, rotation))
        x = torch.full((rows, 520), 127.0, dtype=torch.float32, device="cpu")
        # Scales are 1, or 8 where blocks of 64 equal values become one of eight times their size: sums fit in float32.
        x[:, -8:] *= -1 if rotation is None else -8
        expected = rotate(x, rotation).double() @ values.double().t()
        if not torch.equal(layer.run(x, False, kind, 1).double(), expected):
            return False
    return True


Addresses = tuple[int | None, ...]


class Layout:
    """Where the tensors of a weight lie, as the library is told; it keeps none of them."""

    __slots__ = ("_addresses", "_made", "_tell")

    def __init__(self, tell: Callable[[Any, Addresses], ctypes.Structure]) -> None:
        """Begin with nothing known; `tell` makes the structure from operands and the addresses of their tensors."""
        self._addresses: Addresses = ()
        self._made: Any = None
        self._tell = tell

    def of(self, operands: tuple[Any, ...]) -> Any:
        """Return the structure for a weight, whose operands begin with six tensors, the last of them a bias or None.

        Their addresses are looked at: what processes share moves.
        """
        first, second, third, fourth, fifth, bias, *_ = operands
        addresses = (
            first.data_ptr(),
            second.data_ptr(),
            third.data_ptr(),
            fourth.data_ptr(),
            fifth.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        if addresses != self._addresses:
            self._made = self._tell(operands, addresses)
            self._addresses = addresses
        return self._made


def _tell(operands: Operands, addresses: Addresses) -> _Weight:
    values, _, _, dims, columns, bias, _, group, rotation = operands
    types = DTYPES[columns.dtype], 0 if bias is None else DTYPES[bias.dtype]
    count, width = groups(values.shape[1], group)
    return _Weight(*values.shape, len(dims), columns.shape[1], width, count, rotation or 0, *addresses, *types)


class NativeLinear:
    """A weight laid out for the library."""

    def __init__(self, operands: Operands, layout: Layout | None = None) -> None:
        """Take the weight, on the CPU; what is in float64 is copied to float32.

        `layout` is what another one of the same tensors, none in float64, was told of them.
        """
        if layout is None:
            bias, columns = operands.bias, operands.outlier_weight
            operands = operands._replace(
                bias=bias.float() if bias is not None and bias.dtype == torch.float64 else bias,
                outlier_weight=columns.float() if columns.dtype == torch.float64 else columns,
            )
        self.operands = operands
        self.layout = layout or Layout(_tell)

    def __call__(self, x: Tensor, zeropoint: bool) -> Tensor:
        """Run the layer for x [M, K] in float16, bfloat16 or float32: [M, N] in its dtype.

        The integers are those of the reference. Floating-point sums after them may be rounded in another order, which
        changes the result by a few units in the last place of float32.
        """
        (n, k), m = self.operands.values.shape, x.shape[0]
        if not m or not n or not k:
            out = x.new_zeros(m, n)
            return out if self.operands.bias is None else out + self.operands.bias.to(x.dtype)
        if self.operands.threshold is not None:
            return NativeLinear(self._with_outliers_of(x, self.operands.threshold))(x, zeropoint)
        found = kinds()
        kind = found[1] if found[0] == "AMX" and m < _TILE_ROWS else found[0]
        threads = max(1, min(torch.get_num_threads(), m * n * k // _PRODUCTS_PER_THREAD))
        return self.run(x, zeropoint, kind, threads)

    def run(self, x: Tensor, zeropoint: bool, kind: Kind, threads: int) -> Tensor:
        """Run it with one instruction set, for x as in a call, but neither M nor N nor K 0.

        Raises:
            MemoryError: there is not enough for the int8 values of x.
            ValueError: outlier dims are not in the layer.

        """
        library = compiled()
        assert not isinstance(library, str)
        x, m = x.contiguous(), x.shape[0]
        out = x.new_empty(m, self.operands.values.shape[0])
        weight, dtype = ctypes.byref(self.layout.of(self.operands)), DTYPES[x.dtype]
        status = library.llmint8_linear(weight, x.data_ptr(), out.data_ptr(), m, dtype, zeropoint, KINDS[kind], threads)
        if status == 2:
            dims = self.operands.outlier_dims.tolist()
            raise ValueError(f"outlier_dims is {str(dims)[:80]}, expected numbers from 0 to {x.shape[1] - 1}")
        if status:
            raise MemoryError(f"int8 layer: no memory for {m} rows of {x.shape[1]} values")
        return out

    def _with_outliers_of(self, x: Tensor, threshold: float) -> Operands:
        """Return the weight with the columns of the outliers in x, dequantized."""
        values, scale = self.operands.values, self.operands.scale
        dims = dynamic_outlier_dims(x, threshold)
        columns = x.new_zeros(len(values), padded_outliers(len(dims)), dtype=torch.float32)
        columns[:, : len(dims)] = values[:, dims].float() * scale[:, None]
        return self.operands._replace(outlier_dims=dims.int(), outlier_weight=columns, threshold=None)
