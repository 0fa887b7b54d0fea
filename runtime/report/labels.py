"""What layers are called in pictures: the block they are in, and what tells them apart within it.

A block is the outermost numbered module of a name, `model.layers.11` of `model.layers.11.mlp.up_proj`; layers outside
of blocks go by their whole names. Within a block a layer is called by as many of the last parts of its name as no other
layer of that block ends with: `up_proj`, but `attention.output.dense` beside `intermediate.dense`. Of a list of more
than three modules, such as experts, the numbers are left out: what they have in common is one kind.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_FEW = 3


def block_of(name: str) -> str:
    """Return the block a layer is in, or an empty string."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


def layer_kinds(names: Iterable[str]) -> dict[str, str]:
    """Return what tells each layer apart from the others in its block; of one outside of blocks its name."""
    names = list(names)
    long = _long_lists(names)
    paths = {name: _path(name, long) for name in names}
    ending: dict[tuple[str, tuple[str, ...]], set[tuple[str, ...]]] = defaultdict(set)  # in a block, with these parts
    for name, path in paths.items():
        for start in range(len(path)):
            ending[block_of(name), path[start:]].add(path)
    shared = {parts for (block, parts), found in ending.items() if block and len(found) > 1}
    return {name: _kind(path, shared) if block_of(name) else name for name, path in paths.items()}


def _long_lists(names: Sequence[str]) -> set[str]:
    """Return the names of lists inside of blocks that have more than a few modules."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in re.finditer(r"\.(\d+)(?=\.|$)", name):
            if match.start() > len(block_of(name)) > 0:
                numbers[name[: match.start()]].add(match[1])
    return {prefix for prefix, found in numbers.items() if len(found) > _FEW}


def _path(name: str, long: set[str]) -> tuple[str, ...]:
    """Return the parts of a name within its block; `*` for a number of a long list."""
    parts = name.split(".")
    inside = len(block_of(name).split(".")) if block_of(name) else 0
    return tuple("*" if ".".join(parts[:i]) in long else parts[i] for i in range(inside, len(parts)))


def _kind(path: tuple[str, ...], shared: set[tuple[str, ...]]) -> str:
    for start in range(len(path) - 1, 0, -1):
        if path[start:] not in shared and not path[start].isdecimal() and path[start] != "*":
            return ".".join(path[start:])
    return ".".join(path)


def joined(kinds: Iterable[str]) -> str:
    """Name several kinds: `q_proj, k_proj`; `self_attn: q_proj, k_proj` where all begin alike."""
    kinds = list(dict.fromkeys(kinds))
    parents = {kind.rpartition(".")[0] for kind in kinds}
    if len(kinds) > 1 and len(parents) == 1 and (parent := parents.pop()):
        return f"{parent}: {', '.join(kind.rpartition('.')[2] for kind in kinds)}"
    return ", ".join(kinds)
