"""What the pictures have in common: axes of blocks, logarithmic axes with ordinary numbers, text that is only text."""

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

STYLE: dict[str, Any] = {"fontsize": 9, "color": "#333333"}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9a9a9a"
_LONGEST = 48


def plain(text: str) -> str:
    """Return text that matplotlib can show and takes for nothing else; of a long one the end, which tells most."""
    shown = "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
    return (shown if len(shown) <= _LONGEST else "..." + shown[3 - _LONGEST :]).replace("$", r"\$")


def number_blocks(axis: Any, blocks: Sequence[str]) -> None:
    """Let the x-axis, with a block at every whole number, show the blocks' own numbers, and part their stacks."""
    numbers = [block.rpartition(".")[2] for block in blocks]
    axis.set_xlim(-0.5, len(blocks) - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: numbers[int(x)] if x == int(x) and 0 <= x < len(numbers) else "")
    )
    stacks = [stack_of(block) for block in blocks]
    for place in range(1, len(stacks)):
        if stacks[place] != stacks[place - 1]:
            axis.axvline(place - 0.5, color="#555555", linewidth=1, linestyle=":")


def block_label(blocks: Sequence[str]) -> str:
    """Return the label of such an axis."""
    stacks = list(dict.fromkeys(stack_of(block) for block in blocks))
    if len(stacks) < 2:
        return "block, in the order in which they run"
    return "block of: " + " | ".join(plain(stack) for stack in stacks)


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis with ordinary numbers, with the more of them the less it spans."""
    low, high = sorted(axis.get_view_interval())
    span = high / max(low, 1e-12)
    subs = (1.0,) if span > 200 else (1.0, 2.0, 5.0) if span > 5 else (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def stack_of(block: str) -> str:
    """Return the list of modules that a block is one of."""
    return block.rpartition(".")[0]
