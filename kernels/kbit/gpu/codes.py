"""What the kernels read: words of packed codes, four codes in four bytes, and the absmax of blocks.

Of the widest plane (`packing.py`), `wide` bits, a chunk of 64 codes has `2 wide` words of 32 bits, and each of their
`8 / wide` fields has four codes: byte b of word w holds in field f that of code `4 w + b + 8 wide f`. A plane of v bits
has 2 v words for these, so word w finds its own in word `w % 2 v`, fields `w // 2 v` further up; shifted by that, the
same shift serves all planes. So one shift and one mask for each plane give four codes, in the order of K.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(64)
_LONGEST = 1 << 30


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

    @property
    def chunks(self) -> int:
        """C."""
        return self.words.shape[1] // (2 * self.bits)

    @property
    def kernel_block(self) -> int:
        """The block as the kernels have it, a power of two: a row that has one absmax is shorter than any."""
        return _LONGEST if self.block is None or self.absmax.shape[1] == 1 else self.block


@triton.constexpr_function
def width_of(bits):
    """Return the bits of the widest plane."""
    return 8 if bits == 8 else 4 if bits >= 4 else 2


@triton.jit
def load_words(rows, chunk, word, BITS: tl.constexpr):
    """Load words of each plane, given pointers to rows and, for each place, its chunk and its word of the widest plane.

    The three broadcast against each other. Where there is no plane of two bits, or of one, the first comes again.
    """
    width: tl.constexpr = width_of(BITS)
    first = rows + chunk * (2 * BITS)
    wide = tl.load(first + word)
    two, one = wide, wide
    if BITS == 6 or BITS == 7:
        two = tl.load(first + 2 * width + word % 4) >> 2 * (word // 4)
    if BITS % 2 == 1:
        one = tl.load(first + (2 * BITS - 2) + word % 2) >> word // 2
    return wide, two, one


@triton.jit
def _field(wide, two, one, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of one field, each byte of int32 words as an int32: [..., 2, 2], the two bits of its number."""
    width: tl.constexpr = width_of(BITS)
    codes = wide
    if width < 8:
        codes = (wide >> width * FIELD) & (0x01010101 * ((1 << width) - 1))
    if BITS == 6 or BITS == 7:
        codes |= ((two >> width * FIELD) & 0x03030303) << width
    if BITS % 2 == 1:
        codes |= ((one >> width * FIELD) & 0x01010101) << (BITS - 1)
    even = tl.join(codes & 255, (codes >> 16) & 255)
    odd = tl.join((codes >> 8) & 255, (codes >> 24) & 255)
    return tl.join(even, odd)


@triton.jit
def codes_of(wide, two, one, BITS: tl.constexpr):
    """Return the codes of words: [..., 2, 2], their bytes, and then [2] for two fields and [2, 2] for four.

    What is joined lies one beside the other in a thread's registers, and nothing moves.
    """
    fields: tl.constexpr = 8 // width_of(BITS)
    codes = _field(wide, two, one, 0, BITS)
    if fields == 2:
        codes = tl.join(codes, _field(wide, two, one, 1, BITS))
    elif fields == 4:
        even = tl.join(codes, _field(wide, two, one, 2, BITS))
        codes = tl.join(even, tl.join(_field(wide, two, one, 1, BITS), _field(wide, two, one, 3, BITS)))
    return codes


@triton.jit
def load_levels(levels_ptr, BITS: tl.constexpr, HALF: tl.constexpr):
    """Load the levels: float32, or float16 where HALF allows it and there are more than shared memory has banks, 32."""
    levels = tl.load(levels_ptr + tl.arange(0, 1 << BITS))
    if HALF and BITS > 5:
        levels = levels.to(tl.float16)
    return levels


@triton.jit
def look_up(levels, codes):
    """Return the levels of codes, through shared memory."""
    return tl.reshape(tl.gather(levels, tl.reshape(codes, [codes.numel]), 0), codes.shape)


@triton.jit
def load_absmax(rows, place, G, BLOCK: tl.constexpr):
    """Load the absmax at places of K, given pointers to its rows; beyond the edge the last one is read again."""
    return tl.load(rows + tl.minimum(place // BLOCK, G - 1))
