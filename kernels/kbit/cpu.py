"""The layer of 3 to 8 bits on the CPU as compiled functions, `../cpu/csrc/kbit.c`, where they were built.

The codes are read as they are stored. x is multiplied by their levels as integers of 16 bits, and what that loses is
said in the C file. Where there are many rows and the processor has a faster product in floating point, rows of the
weight are dequantized, some at a time in the cache, and PyTorch multiplies by them: in bfloat16 if that is the dtype of
x, or in float32, on AVX2. Which it is depends on the number of rows; within either, a row does not depend on others.

An instruction set is believed when it has multiplied the largest values there are, as in `cpu/native.py`, whose library
this is a part of.
"""

import ctypes
import functools
import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..cpu.native import DTYPES, Addresses, Layout, compiled
from .levels import BITS, levels_of
from .operands import KBitOperands
from .packing import pack
from .reference import blocks

Kind = Literal["AVX512-VBMI", "AVX2"]

# The numbers are those of `kbit.c`, the order is that of preference.
KINDS: dict[Kind, int] = {"AVX512-VBMI": 1, "AVX2": 0}
_VERSION = 1
# What is dequantized at a time: 4 MB in float32.
_STEP_ELEMENTS = 1 << 20
# A thread for so many products, or elements: fewer are done before another has woken up.
_PER_THREAD = 1 << 17
# From so many rows on PyTorch's product pays for the dequantization.
_MANY_ROWS = 24


class _Weight(ctypes.Structure):
    """`KBit` in `kbit.c`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "block", "groups", "outliers")),
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "levels", "dims", "columns", "bias")),
        *((name, ctypes.c_int32) for name in ("bits", "bias_type")),
    )


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Load it; or say why it cannot be used."""
    library = compiled()
    if isinstance(library, str):
        return library
    if getattr(library, "llmint8_kbit_version", int)() != _VERSION:
        return "the compiled layer is one of another version"
    library.llmint8_kbit_linear.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int32] * 3)
    sizes = ctypes.c_int64, ctypes.c_int64
    library.llmint8_kbit_dequantize.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_void_p, *[ctypes.c_int32] * 3)
    return library


@functools.cache
def kinds() -> list[Kind]:
    """Return the instruction sets that can be used here, the best one first."""
    library = _library()
    if isinstance(library, str):
        return []
    supported = library.llmint8_supported()
    there = {"AVX512-VBMI": supported >> 3 & library.llmint8_kbit_features() & 1, "AVX2": supported >> 1 & 1}
    with _disable_current_modes():  # with numbers, whatever stands for tensors where it is asked first
        return [kind for kind in KINDS if there[kind] and _is_exact(kind)]


def why_not() -> str:
    """Say why `kinds` is empty."""
    library = _library()
    if isinstance(library, str):
        return library
    if not library.llmint8_supported() >> 1 & 1:
        return "the compiled layer of 3 to 8 bits needs AVX2"
    return "the compiled layer got sums wrong on this processor"


@functools.cache
def _multiplies_bfloat16() -> bool:
    library = _library()
    return not isinstance(library, str) and bool(library.llmint8_kbit_features() >> 1 & 1)


def _is_exact(kind: Kind) -> bool:
    """Tell whether it keeps the largest sums, for every number of bits, and dequantizes all levels."""
    none = torch.empty(0, dtype=torch.int32, device="cpu"), torch.empty(4, 0, dtype=torch.float32, device="cpu")
    for bits, block, even in itertools.product(BITS, (32, 64, None), (False, True)):
        count = 2**bits
        # Levels that integers of 16 bits hold, the largest at both ends; or those that are not looked up.
        levels = torch.arange(count, dtype=torch.float64, device="cpu").mul_(2 / (count - 1)).sub_(1)
        whole = levels_of("int", bits).double().cpu() * 16383 if even else levels.mul_(16383).round_()
        codes = torch.zeros(4, 448, dtype=torch.uint8, device="cpu")
        codes[1::2] = count - 1
        codes[2:, :256] = torch.arange(256, device="cpu") % count
        absmax = torch.full((4, blocks(448, block)[0]), 16383.0, device="cpu").half()  # 16384 in float16
        operands = pack(codes, bits), absmax, (whole / 16383).float(), *none, None, 448, block
        layer = CpuKBit(KBitOperands(*operands))
        expected = whole[codes.int()] * (16384 / 16383)
        x = torch.full((7, 448), 1 - 2.0**-24, dtype=torch.float32, device="cpu")  # of which the integers are 2**14
        found = [layer.run(x, kind, 1), layer.dequantize(0, torch.empty_like(expected, dtype=torch.float32), kind, 1)]
        for got, wanted in zip(found, (expected.sum(1).expand(7, 4), expected), strict=True):
            if not bool((got.double() - wanted).abs().max() <= 2.0**-20 * expected.abs().sum(1).max()):
                return False
    return True


def _tell(operands: KBitOperands, addresses: Addresses) -> _Weight:
    packed, _, _, dims, _, bias, k, block = operands
    count, width = blocks(k, block)
    types = operands.bits, 0 if bias is None else DTYPES[bias.dtype]
    return _Weight(len(packed), k, width, count, len(dims), *addresses, *types)


class CpuKBit:
    """A weight laid out for the library."""

    def __init__(self, operands: KBitOperands, layout: Layout | None = None) -> None:
        """Take the weight, on the CPU; `layout` is what another one of the same tensors was told of them."""
        # Asked for in every call, where `len` of a tensor takes longer than an attribute.
        self._shape = operands.packed.shape[0], operands.in_features
        if layout is None:
            bias = operands.bias
            operands = operands._replace(
                packed=operands.packed.contiguous(),
                absmax=operands.absmax.contiguous(),
                levels=operands.levels.contiguous(),
                outlier_dims=operands.outlier_dims.int().contiguous(),
                columns=operands.columns.float().contiguous(),
                bias=None if bias is None else (bias.float() if bias.dtype == torch.float64 else bias).contiguous(),
            )
        self.operands = operands
        self.layout = layout or Layout(_tell)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer for x [M, K] in float16, bfloat16 or float32: [M, N] in its dtype."""
        (n, k), m = self._shape, x.shape[0]
        if not m or not n or not k:
            out = x.new_zeros(m, n)
            return out if self.operands.bias is None else out + self.operands.bias.to(x.dtype)
        kind = kinds()[0]
        if m >= _MANY_ROWS:
            if x.dtype == torch.bfloat16 and _multiplies_bfloat16():
                return self.run_dequantized(x, torch.bfloat16, kind, torch.get_num_threads())
            if kind == "AVX2":
                return self.run_dequantized(x, torch.float32, kind, torch.get_num_threads())
        return self.run(x, kind, max(1, min(torch.get_num_threads(), m * n * k // _PER_THREAD)))

    def run(self, x: Tensor, kind: Kind, threads: int) -> Tensor:
        """Multiply integers with one instruction set, for x as in a call, but neither M nor N nor K 0.

        Raises:
            MemoryError: there is not enough for the integers of x.
            ValueError: outlier dims are not in the layer, or do not rise.

        """
        library = _library()
        assert not isinstance(library, str)
        x, m = x.contiguous(), x.shape[0]
        out = x.new_empty(m, self._shape[0])
        weight, dtype = ctypes.byref(self.layout.of(self.operands)), DTYPES[x.dtype]
        self._check(library.llmint8_kbit_linear(weight, x.data_ptr(), out.data_ptr(), m, dtype, KINDS[kind], threads))
        return out

    def run_dequantized(self, x: Tensor, dtype: torch.dtype, kind: Kind, threads: int) -> Tensor:
        """Multiply by rows of the weight in float32 or bfloat16, for x as in a call, but neither M nor N nor K 0."""
        n, k = self._shape
        inside, out = x.to(dtype), torch.empty(len(x), n, dtype=dtype, device="cpu")
        bias = self.operands.bias
        step = max(1, min(n, _STEP_ELEMENTS // k))
        # One for all steps: memory that is new from the system costs more than what is done in it.
        block = torch.empty(step, k, dtype=dtype, device="cpu")
        for start in range(0, n, step):
            part = self.dequantize(start, block[: n - start], kind, threads)
            rows = slice(start, start + len(part))
            if bias is None:
                torch.mm(inside, part.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows].to(dtype), inside, part.t(), out=out[:, rows])
        return out.to(x.dtype)

    def dequantize(self, start: int, out: Tensor, kind: Kind, threads: int) -> Tensor:
        """Dequantize rows from `start` on, with their columns, to float32 or bfloat16 [any, K], and return it."""
        library, weight = _library(), ctypes.byref(self.layout.of(self.operands))
        assert not isinstance(library, str)
        threads = max(1, min(threads, out.numel() // _PER_THREAD))
        how = DTYPES[out.dtype], KINDS[kind], threads
        self._check(library.llmint8_kbit_dequantize(weight, start, len(out), out.data_ptr(), *how))
        return out

    def _check(self, status: int) -> None:
        if status == 2:
            dims = str(self.operands.outlier_dims.tolist())[:80]
            raise ValueError(f"outlier_dims is {dims}, expected rising numbers from 0 to {self._shape[1] - 1}")
        if status:
            raise MemoryError(f"layer of {self.operands.bits} bits: no memory for x of {self._shape[1]} values")
