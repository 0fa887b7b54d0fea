"""Numbers in words, as messages have them."""


def gigabytes(nbytes: int) -> str:
    """Write a size with its unit."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 5e4 else f"{nbytes / 1e3:.1f} kB"


def counted(count: int, one: str, more: str) -> str:
    """Write a number with its noun."""
    return f"{count} {one if count == 1 else more}"
