"""The product with a weight of k bits in Triton: codes become numbers in registers, tensor cores multiply them.

A program computes one tile [BLOCK_M, BLOCK_N] of the output. It reads the codes as they are stored (`packing.py`), some
chunks of 64 of each row in a step. Planes are read in words of 32 bits, so of four codes in four bytes: one shift and
one mask give a field of them, the fields of narrower planes are put above, and each byte is then a code. What they
stand for is looked up in shared memory, where up to 32 levels in float32, or 64 in float16, lie in banks of their own.
A level times the absmax of its block is computed in float32, rounded to the dtype of x, and multiplied by it with sums
in float32. So an element of the weight is wrong by one rounding of that dtype, and by one of its level to float16 where
it has 6 bits and more; in float16, which is coarse below 6e-5, that is 3e-8 at least.

x in float32 is multiplied in float32, without tensor cores: TF32 would leave it 11 bits. No level is rounded then.

Outlier columns come behind, in the dtype of x: what is stored of them is what the codes do not have.

For few rows several programs divide K, and a second launch adds up their sums in their order, so no atomics: the same
call gives the same bits. Beyond K inputs are 0, so what the last chunk is filled with does not count.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.launch import Launch, ceil_div
from ...gpu.matmul import tile_of
from .tiles import KBitTile

# Outlier columns in one step, the fewest that tensor cores multiply.
_OUTLIER_STEP = tl.constexpr(16)
# Of the programs that add up parts: outputs for each.
_SUM_BLOCK = 512


class Operands(NamedTuple):
    """What the kernels read of a weight; see `linear.py`.

    Attributes:
        words: int32 [N, 2 k C], the codes of C chunks.
        absmax: float16 [N, G].
        levels: float32 [2 ** k].
        outlier_dims: int32 [c].
        columns: float [N, c].
        bias: float [N] or None.
        in_features: K.
        block: how many elements share an absmax; None is the row.

    """

    words: Tensor
    absmax: Tensor
    levels: Tensor
    outlier_dims: Tensor
    columns: Tensor
    bias: Tensor | None
    in_features: int
    block: int | None

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return len(self.levels).bit_length() - 1


@triton.jit
def _bytes(words):
    """Give each byte of int32 words [A, B, C] an int32 of its own: [A, B, C, 4]."""
    even = tl.join(words & 255, (words >> 16) & 255)
    odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
    # Joined in that order they lie one beside the other in a thread's registers, and nothing moves.
    return tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1], words.shape[2], 4])


@triton.jit
def load_codes(rows, chunk, BITS: tl.constexpr):
    """Load the codes of some chunks, given pointers [N] to the rows' words: int32 [N * chunks * 64], in their order.

    Of the widest plane, WIDE bits, a chunk has WORDS words of FIELDS fields: byte b of word w holds in field f that of
    code `4 w + b + 4 WORDS f`. A plane of v bits has 2 v words for these, so word w finds its code in word `w % 2 v`,
    fields `w // 2 v` further; from there on the same shift serves all planes.
    """
    WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    WORDS: tl.constexpr = 2 * WIDE
    word = tl.arange(0, WORDS)
    first = rows[:, None, None] + chunk[None, :, None] * (2 * BITS)
    wide = tl.load(first + word[None, None, :])
    if BITS >= 6 and BITS < 8:
        two = tl.load(first + WORDS + (word % 4)[None, None, :]) >> (2 * (word // 4))[None, None, :]
    if BITS % 2 == 1:
        one = tl.load(first + (2 * BITS - 2) + (word % 2)[None, None, :]) >> (word // 2)[None, None, :]
    fields = ()
    for field in tl.static_range(8 // WIDE):
        codes = wide
        if WIDE == 4:
            codes = (wide >> 4 * field) & 0x0F0F0F0F
        elif WIDE == 2:
            codes = (wide >> 2 * field) & 0x03030303
        if BITS >= 6 and BITS < 8:
            codes |= ((two >> 4 * field) & 0x03030303) << 4
        if BITS % 2 == 1:
            codes |= ((one >> WIDE * field) & 0x01010101) << (BITS - 1)
        fields = fields + (_bytes(codes),)  # noqa: RUF005
    if WIDE == 8:
        ordered = fields[0]
    elif WIDE == 4:
        ordered = tl.permute(tl.join(fields[0], fields[1]), [0, 1, 4, 2, 3])
    else:
        joined = tl.join(tl.join(fields[0], fields[2]), tl.join(fields[1], fields[3]))
        ordered = tl.permute(tl.reshape(joined, [wide.shape[0], wide.shape[1], WORDS, 4, 4]), [0, 1, 4, 2, 3])
    return tl.reshape(ordered, [ordered.numel])


@triton.jit
def _load_scales(absmax_rows, chunk, G, BLOCK: tl.constexpr):
    """Load the absmax of the blocks of some chunks, given pointers [N] to its rows: [N, chunks, blocks in a chunk]."""
    PARTS: tl.constexpr = 2 if BLOCK == 32 else 1
    # Beyond the edge the last one is read again.
    place = tl.minimum((chunk[:, None] * 64 + 32 * tl.arange(0, PARTS)[None, :]) // BLOCK, G - 1)
    return tl.load(absmax_rows[:, None, None] + place[None, :, :])


@triton.jit
def _add_outliers(out, x_rows, columns_ptr, dims_ptr, column, outliers, stride_xk, dtype, PRECISION: tl.constexpr):
    """Add the products with the outlier columns."""
    first = 0
    # Not a `for`: that would be pipelined, with buffers in shared memory for steps that are rarely more than a few.
    while first < outliers:
        index = first + tl.arange(0, _OUTLIER_STEP)
        present = (index < outliers)[None, :]
        dim = tl.load(dims_ptr + index, mask=index < outliers, other=0).to(tl.int64)
        x = tl.load(x_rows[:, None] + (dim * stride_xk)[None, :], mask=present, other=0.0)  # [BLOCK_M, STEP]
        columns = tl.load(columns_ptr + column.to(tl.int64)[:, None] * outliers + index[None, :], mask=present, other=0.0)
        columns = columns.to(x.dtype).to(dtype)  # [BLOCK_N, STEP]
        out = tl.dot(x.to(dtype), tl.trans(columns), out, input_precision=PRECISION)
        first += _OUTLIER_STEP
    return out


@triton.jit(do_not_specialize=["M"])
def kbit_matmul_kernel(
    x_ptr,
    words_ptr,
    out_ptr,
    absmax_ptr,
    levels_ptr,
    dims_ptr,
    columns_ptr,
    bias_ptr,
    M,
    N,
    K,
    C,
    G,
    outliers,
    stride_xm,
    stride_xk,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Compute tile `program_id(0)`, over part `program_id(1)` of K; the pointers to what a layer lacks are None.

    BLOCK is 0 where a row has one absmax. Where programs share K each has a matrix of its own in the output.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the last rows are read again.
    row, column = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    x_rows = x_ptr + row.to(tl.int64) * stride_xm
    word_rows = words_ptr + column.to(tl.int64) * (C * (2 * BITS))
    absmax_rows = absmax_ptr + column.to(tl.int64) * G
    levels = tl.load(levels_ptr + tl.arange(0, 1 << BITS))
    if BITS >= 6 and x_ptr.dtype.element_ty != tl.float32:
        levels = levels.to(tl.float16)
    dtype: tl.constexpr = tl.float32 if FLOAT32 else x_ptr.dtype.element_ty
    precision: tl.constexpr = "ieee"

    first, end = 0, C
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(C, CHUNKS), SPLIT_K) * CHUNKS
        first = tl.program_id(1) * length
        end = tl.minimum(first + length, C)
    k = tl.arange(0, CHUNKS * 64)
    x_pointers = x_rows[:, None] + k[None, :] * tl.cast(stride_xk, tl.int64)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK > 0:
        next_scales = _load_scales(absmax_rows, first + tl.arange(0, CHUNKS), G, BLOCK)
    for start in range(first, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        if WHOLE_K:
            # The empty places of a small tile are not read: for few rows that would be most of the traffic.
            x = tl.load(x_pointers + start * 64 * tl.cast(stride_xk, tl.int64), mask=(m < M)[:, None], other=0.0)
        else:
            chunk = tl.minimum(chunk, C - 1)
            inside = (m < M)[:, None] & (k < K - start * 64)[None, :]
            x = tl.load(x_pointers + start * 64 * tl.cast(stride_xk, tl.int64), mask=inside, other=0.0)
        weight = tl.gather(levels, load_codes(word_rows, chunk, BITS), 0)
        if BLOCK > 0:
            # On its way while the step before is multiplied: what is not copied to shared memory is not pipelined.
            scales = next_scales
            next_scales = _load_scales(absmax_rows, start + CHUNKS + tl.arange(0, CHUNKS), G, BLOCK)
            PARTS: tl.constexpr = scales.shape[2]
            weight = tl.reshape(weight, [BLOCK_N, CHUNKS, PARTS, 64 // PARTS]).to(tl.float32)
            weight *= scales.to(tl.float32)[:, :, :, None]
        weight = tl.reshape(weight, [BLOCK_N, CHUNKS * 64]).to(x.dtype).to(dtype)
        out = tl.dot(x.to(dtype), tl.trans(weight), out, input_precision=precision)
    if BLOCK == 0:
        out *= tl.load(absmax_rows).to(tl.float32)[None, :]

    if columns_ptr is not None:
        if tl.program_id(1) == 0:
            out = _add_outliers(
                out, x_rows, columns_ptr, dims_ptr, column, outliers, stride_xk, dtype, precision
            )  # fmt: skip
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    place = (tl.program_id(1) * tl.cast(M, tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["size"])
def kbit_sum_kernel(parts_ptr, out_ptr, bias_ptr, size, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the sums over the parts of K, float32 [SPLIT_K, size], and the bias: [size]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT_K):
        out += tl.load(parts_ptr + part * tl.cast(size, tl.int64) + place, mask=place < size, other=0.0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + place % N).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=place < size)


def kbit_matmul(weight: Operands, dtype: torch.dtype, tile: KBitTile) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """Return what runs a layer for x [M, K] in `dtype`, and its strides; a layer of some rows, of some columns."""
    n, k, bits = len(weight.words), weight.in_features, weight.bits
    chunks, groups = weight.words.shape[1] // (2 * bits), weight.absmax.shape[1]
    split_k = min(tile.split_k, ceil_div(chunks, tile.chunks))
    count = len(weight.outlier_dims)
    dims, columns = (weight.outlier_dims, weight.columns) if count else (None, None)
    launch = Launch(
        kbit_matmul_kernel,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        BITS=bits,
        BLOCK=0 if groups == 1 else weight.block,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        CHUNKS=tile.chunks,
        GROUP_M=tile.group_m,
        SPLIT_K=split_k,
        WHOLE_K=k % (64 * tile.chunks) == 0,
        # On the CPU this is Triton's interpreter, whose bfloat16 product is garbage.
        FLOAT32=dtype == torch.float32 or (weight.words.device.type == "cpu" and dtype == torch.bfloat16),
    )
    add = Launch(kbit_sum_kernel, num_warps=4, SPLIT_K=split_k, BLOCK=_SUM_BLOCK)
    tiles_n, bias = ceil_div(n, tile.block_n), weight.bias

    def run(x: Tensor, strides: tuple[int, int]) -> Tensor:
        m = len(x)
        out = x.new_empty(m, n)
        parts = out if split_k == 1 else x.new_empty(split_k, m, n, dtype=torch.float32)
        launch(
            (ceil_div(m, tile.block_m) * tiles_n, split_k, 1),
            x,
            weight.words,
            parts,
            weight.absmax,
            weight.levels,
            dims,
            columns,
            bias if split_k == 1 else None,
            m,
            n,
            k,
            chunks,
            groups,
            count,
            *strides,
        )
        if split_k > 1:
            add((ceil_div(m * n, _SUM_BLOCK), 1, 1), parts, out, bias, m * n, n)
        return out

    return run
