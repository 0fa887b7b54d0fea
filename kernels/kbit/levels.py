"""The levels of k bits, 3 to 8: what a code stands for, times the absmax of its block.

They are the data types of "The case for 4-bit precision" (Dettmers & Zettlemoyer 2022, arXiv 2212.09720, section 2),
and NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Every one has 0 among its levels, which lie in [-1, 1] and
rise; code c stands for level c. All are the same to the bit on every machine: quotients of small numbers, or constants.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

DataType = Literal["int", "float", "dynamic", "quantile", "nf4"]
BITS = range(3, 9)

# Exponent bits of `float`, for each number of bits (appendix of 2212.09720).
_EXPONENT_BITS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
# Quantiles of the normal distribution, 8 of the upper half and 7 of the lower, over the largest (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.69619289, -0.52507304, -0.39491749, -0.28444136, -0.18477344, -0.09104999, 0.0,
    0.07958033, 0.16093017, 0.24611229, 0.33791519, 0.44070980, 0.56261697, 0.72295673, 1.0,
)  # fmt: skip
# What the levels of `quantile` are found from: so many weights, evenly spread over the layer.
_SAMPLE = 1 << 20


def check_levels(data_type: str, bits: int) -> None:
    """Check that there is such a data type of so many bits. Raises ValueError."""
    if data_type not in get_args(DataType):
        raise ValueError(f"data type {data_type!r}, expected one of {', '.join(get_args(DataType))}")
    if bits not in BITS:
        raise ValueError(f"{bits} bits, expected 3 to 8")
    if data_type == "nf4" and bits != 4:
        raise ValueError(f"data type 'nf4' with {bits} bits, it has 4")


def levels_of(data_type: DataType, bits: int) -> Tensor:
    """Return the levels of a data type that has the same in every layer, float32 [2 ** bits]; not of `quantile`.

    Where it has fewer, the last one stands there more than once, and no code but the first of it is used.

    Raises:
        ValueError: there is no such data type of so many bits, or its levels are those of a layer.

    """
    check_levels(data_type, bits)
    if data_type == "quantile":
        raise ValueError("the levels of data type 'quantile' are found for each layer")
    made = list(_NF4) if data_type == "nf4" else {"int": _int, "float": _float, "dynamic": _dynamic}[data_type](bits)
    made += [1.0] * (2**bits - len(made))
    return torch.tensor(made, dtype=torch.float64).float()


def _int(bits: int) -> list[float]:
    """Return -1 to 1 in equal steps, as many below 0 as above."""
    most = 2 ** (bits - 1) - 1
    return [number / most for number in range(-most, most + 1)]


def _float(bits: int) -> list[float]:
    """Return floating point numbers without infinity and NaN, with subnormal ones, over the largest."""
    exponent_bits = _EXPONENT_BITS[bits]
    steps = 2 ** (bits - 1 - exponent_bits)
    positive = [step / steps for step in range(steps)]
    positive += [2.0 ** (e - 1) * (1 + step / steps) for e in range(1, 2**exponent_bits) for step in range(steps)]
    return _of_both_signs([number / positive[-1] for number in positive[1:]])


def _dynamic(bits: int) -> list[float]:
    """Return the numbers of a dynamic exponent: each zero before the indicator bit is a tenth.

    The bits that follow divide 0.1 to 1 evenly, and stand for the middles of these parts; 1 is a level of its own.
    """
    positive = []
    for exponent in range(bits - 1):
        parts = 2**exponent
        middles = [0.1 + 0.9 * (2 * part + 1) / (2 * parts) for part in range(parts)]
        positive += [middle / 10.0 ** (bits - 2 - exponent) for middle in middles]
    return [*_of_both_signs(positive), 1.0]


def _of_both_signs(positive: list[float]) -> list[float]:
    return [*(-number for number in reversed(positive)), 0.0, *positive]


def sample_step(count: int) -> int:
    """Return at which distance lie those of so many weights that the levels of `quantile` are found from."""
    return max(1, -(-count // _SAMPLE))


def quantiles(values: Tensor, bits: int) -> Tensor:
    """Return the levels of `quantile` for a layer: quantiles of its weights.

    As those of NF4: 2^(k-1) of the upper half, one fewer of the lower, at equal distances between the middle and
    `1 - (1 / 2^k + 1 / (2^k - 1)) / 2`; each half over its largest, and 0. The middles between 2^k + 1 quantiles of
    2212.09720, section 2, have a second level beside 0 and none near 1: their loss is larger (docs/accuracy.md).

    Args:
        values: float [N, K], weights over the absmax of their block, in [-1, 1].
        bits: k.

    Returns:
        float32 [2 ** bits], rising, each exact in float16, which is how they are stored.

    """
    flat = values.float().flatten() if values.numel() else torch.zeros(1, device=values.device)
    sample = flat[:: sample_step(len(flat))].sort().values.double()
    half, last = 2 ** (bits - 1), len(sample) - 1

    def tail(count: int, sign: int) -> Tensor:
        """Return so many levels on one side of 0, from the largest."""
        outermost = (1 / (2 * half) + 1 / (2 * half - 1)) / 2
        at = outermost + (0.5 - outermost) * torch.arange(count, dtype=torch.float64, device=flat.device) / count
        places = last * (at if sign < 0 else 1 - at)
        low = places.long()
        found = (sign * sample[low].lerp(sample[(low + 1).clamp(max=last)], places - low)).clamp(min=0)
        return sign * (found / found[0] if found[0] > 0 else at.flip(0) / at[-1])

    levels = torch.cat([tail(half, 1), tail(half - 1, -1), sample.new_zeros(1)])
    return levels.sort().values.half().float()
