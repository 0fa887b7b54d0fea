"""Blocks of a model by the names of its tensors: a split by layers never cuts through one."""

import re

# The name of a block ends with the first part that is a number: `model.layers.11` of `model.layers.11.mlp.up_proj`.
_BLOCK = re.compile(r"(.+?\.\d+)(?:\.|$)")


def block_of(name: str) -> str | None:
    """Return the block that a tensor or module is in; None for what is outside of the blocks."""
    block = _BLOCK.match(name)
    return block[1] if block else None


def unit_of(name: str) -> str:
    """Return what of a model is placed as a whole: the block that a tensor is in, or the module outside of them."""
    return block_of(name) or name.rpartition(".")[0] or name


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key by which `layers.2` comes before `layers.10`."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]
