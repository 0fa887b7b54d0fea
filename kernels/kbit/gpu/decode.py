"""The product for up to 2 rows: no tensor cores, the levels are multiplied where they were looked up.

A program computes BLOCK_N outputs of every row, over a part of K. Its threads divide K among themselves: each has whole
words of the codes in its registers, multiplies what they stand for by x in float32, and by the absmax of the block when
its share of a block is added up. So nothing is rounded but the sums, in float32, and in 16 bit the levels of 6 bits and
more to float16. Weights do not move between threads, as tensor cores would have it: with 4 bits that would take longer
than to look them up. What takes longest is asked for first: the next words and absmax are on their way while a
step is multiplied.
"""

import triton
import triton.language as tl

from .codes import CHUNK, codes_of, load_absmax, load_levels, load_words, look_up, width_of

_OUTLIER_STEP = tl.constexpr(32)


@triton.jit
def _times_four(out, levels, x_row, k, K, stride_xk, WHOLE_K: tl.constexpr):
    """Add the products of four neighbours [BLOCK_N, W, 2, 2] with x at k and on, k being [W]: [BLOCK_N, W]."""
    even, odd = tl.split(levels)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    fours = (first, second, third, fourth)
    for number in tl.static_range(4):
        pointers = x_row + (k + number) * tl.cast(stride_xk, tl.int64)
        # Elements of their own and not a vector: so they come to the threads that need them.
        x = tl.load(pointers) if WHOLE_K else tl.load(pointers, mask=k + number < K, other=0.0)
        out = tl.fma(fours[number].to(tl.float32), x.to(tl.float32)[None, :], out)
    return out


@triton.jit
def _by_field(levels, fields: tl.constexpr):
    """Take apart what `codes_of` joined: a tuple of [BLOCK_N, W, 2, 2], one for each field."""
    if fields == 1:
        return (levels,)
    elif fields == 2:
        return tl.split(levels)
    else:
        even, odd = tl.split(levels)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _load_scales(absmax_rows, k, G, BLOCK: tl.constexpr, parts: tl.constexpr):
    """Load the absmax of words that begin at k, [W], in one block or in two: two of [BLOCK_N, W], or the same twice."""
    first = load_absmax(absmax_rows, k[None, :], G, BLOCK)
    return first, load_absmax(absmax_rows, (k + 32)[None, :], G, BLOCK) if parts == 2 else first


@triton.jit(do_not_specialize=["M"])
def kbit_decode_kernel(
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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """Compute columns `program_id(0) * BLOCK_N` and on, over part `program_id(1)` of K; see `kbit_matmul_kernel`."""
    width: tl.constexpr = width_of(BITS)
    fields: tl.constexpr = 8 // width
    # Where a chunk has two blocks, fields are of one or the other, and of 8 bits words.
    parts: tl.constexpr = 2 if BLOCK == 32 and fields > 1 else 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the last row is read again.
    column = tl.minimum(n, N - 1).to(tl.int64)
    word_rows = (words_ptr + column * (C * (2 * BITS)))[:, None]
    absmax_rows = (absmax_ptr + column * G)[:, None]
    place = tl.arange(0, CHUNKS * 2 * width)
    chunk, word = place // (2 * width), place % (2 * width)
    k = chunk * CHUNK + 4 * word

    levels = load_levels(levels_ptr, BITS, x_ptr.dtype.element_ty != tl.float32)
    first, end = 0, C
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(C, CHUNKS), SPLIT_K) * CHUNKS
        first = tl.program_id(1) * length
        end = tl.minimum(first + length, C)
    wide, two, one = load_words(word_rows, tl.minimum(first + chunk, C - 1)[None, :], word[None, :], BITS)
    absmax = _load_scales(absmax_rows, k + first * CHUNK, G, BLOCK, parts)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, CHUNKS * 2 * width], tl.float32),)  # noqa: RUF005
    for start in range(first, end, CHUNKS):
        codes = codes_of(wide, two, one, BITS)
        then = start + CHUNKS
        wide, two, one = load_words(word_rows, tl.minimum(then + chunk, C - 1)[None, :], word[None, :], BITS)
        found = _by_field(look_up(levels, codes), fields)
        added = ()
        for row in tl.static_range(ROWS):
            x_row = x_ptr + tl.minimum(row, M - 1) * tl.cast(stride_xm, tl.int64)
            total = sums[row]
            for part in tl.static_range(parts):
                of_part = tl.zeros([BLOCK_N, CHUNKS * 2 * width], tl.float32)
                for field in tl.static_range(part * fields // parts, (part + 1) * fields // parts):
                    at = k + (start * CHUNK + 8 * width * field)
                    of_part = _times_four(of_part, found[field], x_row, at, K, stride_xk, WHOLE_K)
                total = tl.fma(of_part, absmax[part].to(tl.float32), total)
            added = added + (total,)  # noqa: RUF005
        sums = added
        absmax = _load_scales(absmax_rows, k + then * CHUNK, G, BLOCK, parts)

    for row in tl.static_range(ROWS):
        out = tl.sum(sums[row], 1)
        # A branch within a branch: what is not there is decided when the kernel is compiled.
        if columns_ptr is not None:  # noqa: SIM102
            if tl.program_id(1) == 0:
                x_row = x_ptr + tl.minimum(row, M - 1) * tl.cast(stride_xm, tl.int64)
                out += _outliers(x_row, columns_ptr + column * outliers, dims_ptr, outliers, stride_xk)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column).to(tl.float32)
        place = (tl.program_id(1) * tl.cast(M, tl.int64) + row) * N + n
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=(row < M) & (n < N))


@triton.jit
def _outliers(x_row, column_rows, dims_ptr, outliers, stride_xk):
    """Multiply a row of x by the outlier columns, given pointers [BLOCK_N] to the rows of these: [BLOCK_N]."""
    sums = tl.zeros([column_rows.shape[0], _OUTLIER_STEP], tl.float32)
    for first in range(0, outliers, _OUTLIER_STEP):
        index = first + tl.arange(0, _OUTLIER_STEP)
        present = index < outliers
        dim = tl.load(dims_ptr + index, mask=present, other=0).to(tl.int64)
        x = tl.load(x_row + dim * stride_xk, mask=present, other=0.0).to(tl.float32)
        columns = tl.load(column_rows[:, None] + index[None, :], mask=present[None, :], other=0.0)
        sums = tl.fma(columns.to(tl.float32), x[None, :], sums)
    return tl.sum(sums, 1)
