"""How much one program computes: a table, by architecture, dtype of x, N and M.

`tiles.json` beside this module is the table. An entry holds for layers up to its N and calls of up to its M rows; null
means any. Of the entries that fit, the smallest M counts, and then the smallest N. A GPU without entries takes those of
the nearest lower architecture, and where there are none those of `any`, which are small enough for every GPU. They were
chosen by compiling (registers, shared memory) and by arithmetic; none was measured yet.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...gpu.tiles import gpu_of

# What has fewer rows than a product of tensor cores is a tile of `decode.py`, for as many rows as it has.
DECODE_ROWS = 2


class KBitTile(NamedTuple):
    """The shape of the work of one program, and how Triton is to compile it."""

    block_m: int
    block_n: int
    chunks: int  # of 64 dimensions, in one step of K
    group_m: int  # tiles along M that run next to each other, sharing rows of the weight in the L2 cache
    num_warps: int
    num_stages: int
    split_k: int  # programs among which K is divided


class Entry(NamedTuple):
    """An entry of the table; None means any."""

    architecture: str
    float32: bool | None  # x in float32, which tensor cores do not multiply
    n: int | None
    m: int | None
    tile: KBitTile


@functools.cache
def shipped_table() -> list[Entry]:
    """Return the table."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return [
        Entry(row["architecture"], row["float32"], row["N"], row["M"], KBitTile(*(row[f] for f in KBitTile._fields)))
        for row in rows
    ]


@functools.cache
def _choose(architecture: str, float32: bool, m: int, n: int) -> KBitTile:
    names = {entry.architecture for entry in shipped_table()}
    number = _number(architecture)
    lower = [name for name in names if name == architecture or 0 < _number(name) <= number]
    name = max(lower, key=_number, default="any")

    def fits(entry: Entry) -> bool:
        alike = entry.architecture == name and entry.float32 in (None, float32)
        return alike and n <= (entry.n or n) and m <= (entry.m or m)

    fitting = [entry for entry in shipped_table() if fits(entry)]
    return min(fitting, key=lambda entry: (entry.m or math.inf, entry.n or math.inf)).tile


def _number(architecture: str) -> int:
    """Return 90 for `sm_90`, and 0 for what is not NVIDIA's."""
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits != architecture and digits.isdigit() else 0


def choose_tile(device: torch.device, dtype: torch.dtype, m: int, n: int) -> KBitTile:
    """Return the tile for a call of M rows in `dtype` of a layer with N outputs on a device."""
    # One look-up serves all M up to the next power of two.
    most_rows = 1 << (min(max(m, 1), 8192) - 1).bit_length()
    return _choose(gpu_of(device).architecture, dtype == torch.float32, most_rows, n)
