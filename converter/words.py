"""Sizes, numbers, precisions and errors as they are printed: `7.2 kB`, `1 layer`, `2 layers`, `16 bit`."""

import re
from collections.abc import Iterable, Sequence

_UNITS = ((1, "bytes", 0), (10**3, "kB", 1), (10**6, "MB", 1), (10**9, "GB", 2), (10**12, "TB", 2))
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)


def size(nbytes: float) -> str:
    """Write a number of bytes with its unit."""
    return sizes([nbytes])


def sizes(nbytes: Iterable[float]) -> str:
    """Write the smallest and the largest of several numbers of bytes, in one unit; or the one there is."""
    numbers = list(nbytes)
    # What would be written as 1000 of a unit is 1 of the next.
    fitting = (found for found in _UNITS if round(max(numbers) / found[0], found[2]) < 1000)
    unit, name, digits = next(fitting, _UNITS[-1])
    low, high = (f"{number / unit:.{digits}f}" for number in (min(numbers), max(numbers)))
    if unit == 1 and high == "1":
        name = "byte"
    return f"{low} {name}" if low == high else f"{low} to {high} {name}"


def duration(seconds: float) -> str:
    """Write a time with its unit, as nobody knows it more closely: `40 s`, `25 min`, `3.5 h`."""
    if round(seconds) < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if round(seconds / 60) < 100 else f"{seconds / 3600:.1f} h"


def count(number: int, noun: str, plural: str = "") -> str:
    """Write a number of things; their plural ends with an `s` where none is given."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def precision(dtypes: Iterable[str]) -> str:
    """Say what safetensors' names of dtypes are, of what is not quantized: `16 bit` or `float32`, or both."""
    found = {"float32" if dtype == "F32" else "16 bit" for dtype in dtypes}
    return " and ".join(sorted(found)) or "16 bit"


def activations(kind: str, group: int | None) -> str:
    """Say how inputs are quantized: `zeropoint`, or `zeropoint in groups of 128`."""
    return kind if group is None else f"{kind} in groups of {group}"


def kbit_in_words(bits: int, data_type: str, block: int | None) -> str:
    """Say how a weight of k bits is coded: `4 bits (float, blocks of 64)`."""
    return f"{bits} bits ({data_type}, {'one block a row' if block is None else f'blocks of {block}'})"


def inputs_in_words(kbit: object | None, activation: str, group: int | None) -> str:
    """Say how inputs are multiplied, of layers of k bits or in int8."""
    return activations(activation, group) if kbit is None else "in floating point, as they are"


def written(name: str) -> str:
    """Return a file's name as it can be written down: what is not UTF-8 becomes `?`."""
    return name.encode(errors="replace").decode()


def first_line(error: Exception) -> str:
    """Return an error's type and what it says, in one line of bounded length."""
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__


def parse_size(size: str | int) -> int:
    """Return the bytes that a size such as `500MB` means; a number is that of bytes. Raises ValueError."""
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"size {size!r}, expected a number and a unit such as 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def rounded(values: Sequence[float]) -> list[float]:
    """Round to four significant digits: the manifest holds hundreds of these per layer."""
    return [float(f"{value:.4g}") for value in values]
