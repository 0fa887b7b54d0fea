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

import triton
import triton.language as tl

from ...gpu.matmul import tile_of
from .codes import CHUNK, codes_of, load_absmax, load_levels, load_words, look_up, width_of

# Outlier columns in one step, the fewest that tensor cores multiply.
_OUTLIER_STEP = tl.constexpr(16)


@triton.jit
def _load_codes(rows, chunk, BITS: tl.constexpr):
    """Load the codes of some chunks, given pointers [N] to the rows' words: int32 [N, chunks * 64], in their order."""
    width: tl.constexpr = width_of(BITS)
    fields: tl.constexpr = 8 // width
    word = tl.arange(0, 2 * width)[None, None, :]
    wide, two, one = load_words(rows[:, None, None], chunk[None, :, None], word, BITS)
    codes = tl.reshape(codes_of(wide, two, one, BITS), [rows.shape[0], chunk.shape[0], 2 * width, 4, fields])
    return tl.reshape(tl.permute(codes, [0, 1, 4, 2, 3]), [rows.shape[0], chunk.shape[0] * CHUNK])


@triton.jit
def _load_scales(absmax_rows, chunk, G, BLOCK: tl.constexpr):
    """Load the absmax of the blocks of some chunks, given pointers [N] to its rows: [N, chunks, blocks in a chunk]."""
    parts: tl.constexpr = 2 if BLOCK == 32 else 1
    place = chunk[:, None] * CHUNK + CHUNK // parts * tl.arange(0, parts)[None, :]
    return load_absmax(absmax_rows[:, None, None], place[None, :, :], G, BLOCK)


@triton.jit
def _add_outliers(out, x_rows, columns_ptr, dims_ptr, column, outliers, stride_xk, dtype: tl.constexpr):
    """Add the products with the outlier columns."""
    first = 0
    # Not a `for`: that would be pipelined, with buffers in shared memory for steps that are rarely more than a few.
    while first < outliers:
        index = first + tl.arange(0, _OUTLIER_STEP)
        present = (index < outliers)[None, :]
        dim = tl.load(dims_ptr + index, mask=index < outliers, other=0).to(tl.int64)
        x = tl.load(x_rows[:, None] + (dim * stride_xk)[None, :], mask=present, other=0.0)  # [BLOCK_M, STEP]
        place = column.to(tl.int64)[:, None] * outliers + index[None, :]
        columns = tl.load(columns_ptr + place, mask=present, other=0.0)
        columns = columns.to(x.dtype).to(dtype)  # [BLOCK_N, STEP]
        out = tl.dot(x.to(dtype), tl.trans(columns), out, input_precision="ieee")
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

    Where programs share K each has a matrix of its own in the output.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the last rows are read again.
    row, column = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    x_rows = x_ptr + row.to(tl.int64) * stride_xm
    word_rows = words_ptr + column.to(tl.int64) * (C * (2 * BITS))
    absmax_rows = absmax_ptr + column.to(tl.int64) * G
    dtype: tl.constexpr = tl.float32 if FLOAT32 else x_ptr.dtype.element_ty

    levels = load_levels(levels_ptr, BITS, x_ptr.dtype.element_ty != tl.float32)
    first, end = 0, C
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(C, CHUNKS), SPLIT_K) * CHUNKS
        first = tl.program_id(1) * length
        end = tl.minimum(first + length, C)
    k = tl.arange(0, CHUNKS * CHUNK)
    x_pointers = x_rows[:, None] + k[None, :] * tl.cast(stride_xk, tl.int64)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    next_scales = _load_scales(absmax_rows, first + tl.arange(0, CHUNKS), G, BLOCK)
    for start in range(first, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        if WHOLE_K:
            # The empty places of a small tile are not read: for few rows that would be most of the traffic.
            x = tl.load(x_pointers + start * CHUNK * tl.cast(stride_xk, tl.int64), mask=(m < M)[:, None], other=0.0)
        else:
            chunk = tl.minimum(chunk, C - 1)
            inside = (m < M)[:, None] & (k < K - start * CHUNK)[None, :]
            x = tl.load(x_pointers + start * CHUNK * tl.cast(stride_xk, tl.int64), mask=inside, other=0.0)
        weight = look_up(levels, _load_codes(word_rows, chunk, BITS))
        # On its way while the step before is multiplied: what is not copied to shared memory is not pipelined.
        scales = next_scales
        next_scales = _load_scales(absmax_rows, start + CHUNKS + tl.arange(0, CHUNKS), G, BLOCK)
        block: tl.constexpr = CHUNK // scales.shape[2]
        weight = tl.reshape(weight, [BLOCK_N, CHUNKS, scales.shape[2], block]).to(tl.float32)
        weight *= scales.to(tl.float32)[:, :, :, None]
        weight = tl.reshape(weight, [BLOCK_N, CHUNKS * CHUNK]).to(x.dtype).to(dtype)
        out = tl.dot(x.to(dtype), tl.trans(weight), out, input_precision="ieee")

    # A branch within a branch: what is not there is decided when the kernel is compiled.
    if columns_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            out = _add_outliers(out, x_rows, columns_ptr, dims_ptr, column, outliers, stride_xk, dtype)
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
