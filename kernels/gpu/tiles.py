"""Which tile of the output one program of the product computes: a table by architecture, N, K and M.

`tiles.json` beside this module is the table that ships; rows that `llmint8 bench --tune` measured on this machine stand
in the user's cache and come first. A row with N and K holds for just that layer. A row with K null holds for layers up
to its N, and every row for calls of up to M rows; null means any. Of the rows that fit, the closest counts; an
architecture without rows takes those of `any`, which are small enough for every GPU. No choice changes the int32 sums.
"""

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A product on tensor cores has that many rows at least; smaller tiles are those of `decode.py`.
TENSOR_CORE_ROWS = 16


class Tile(NamedTuple):
    """The shape of one program's work, and how Triton is to compile it.

    A `block_m` of 1, 2 or 4 is a tile of `decode.py`, which has no use for group_m, num_stages, tma and split_k.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int  # tiles along M that run next to each other, sharing columns of the weight in the L2 cache
    num_warps: int
    num_stages: int
    tma: bool  # load through the copy engine (sm_90 and later) where the layer's alignment allows it
    split_k: int = 1  # programs among which K is divided


class Row(NamedTuple):
    """A row of the table; None means any."""

    architecture: str
    n: int | None
    k: int | None
    m: int | None
    tile: Tile


def aligned(weight: torch.Tensor) -> bool:
    """Tell whether rows of int8 [N, K], themselves contiguous, begin and end at multiples of 16 bytes."""
    k = weight.shape[1]
    return k > 0 and not (k % 16 or weight.stride(0) % 16 or weight.data_ptr() % 16)


def cache_path() -> Path:
    """Return where the rows measured on this machine stand."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmint8" / "tiles.json"


def read_rows(text: str) -> list[Row]:
    """Read a table.

    Raises:
        ValueError: text that is not such a table.

    """
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError("not a list")
        rows = [
            Row(entry["architecture"], entry["N"], entry["K"], entry["M"], Tile(*(entry[key] for key in Tile._fields)))
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a table of tiles: {error!r}") from None
    for row in rows:
        sizes = (*row.tile[:6], row.tile.split_k)
        limits = [limit for limit in (row.n, row.k, row.m) if limit is not None]
        if not all(type(size) is int and size > 0 for size in (*sizes, *limits)) or type(row.tile.tma) is not bool:
            raise ValueError(f"not a tile: {row}")
        # What Triton's products of int8 blocks need; blocks and warps are powers of two.
        powers = (*sizes[:3], row.tile.num_warps)
        columns = TENSOR_CORE_ROWS if row.tile.block_m >= TENSOR_CORE_ROWS else 8
        if any(size & (size - 1) for size in powers) or sizes[0] == 8 or sizes[1] < columns or sizes[2] < 32:
            raise ValueError(f"not a tile: {row}")
    return rows


def write_rows(rows: list[Row]) -> str:
    """Return a table as `read_rows` reads it, one row a line."""
    entries = [
        json.dumps({"architecture": row.architecture, "N": row.n, "K": row.k, "M": row.m} | row.tile._asdict())
        for row in rows
    ]
    return "[\n  " + ",\n  ".join(entries) + "\n]\n"


def shipped_rows() -> list[Row]:
    """Return the table that ships."""
    return read_rows(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@functools.cache
def cached_rows() -> list[Row]:
    """Return the rows measured on this machine; a file that cannot be read counts as none, with a warning."""
    path = cache_path()
    try:
        return read_rows(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logging.getLogger("llmint8").warning("%s is not used: %s; `llmint8 bench --tune` writes a new one", path, error)
        return []


def closest(rows: list[Row], m: int, n: int, k: int) -> Tile | None:
    """Return the tile of the row that fits the call best: its own layer first, then the smallest N, then M."""

    def distance(row: Row) -> tuple[bool, float, float]:
        return row.k is None, row.n or math.inf, row.m or math.inf

    # A tile of `decode.py` computes so many rows and no more.
    rows = [row for row in rows if row.tile.block_m >= min(m, TENSOR_CORE_ROWS)]
    own = [row for row in rows if (row.n, row.k) == (n, k)]
    fitting = own or [row for row in rows if row.k is None and n <= (row.n or n)]
    # Beyond the largest call that was measured its tile is the best guess.
    within = [row for row in fitting if m <= (row.m or m)]
    if within:
        return min(within, key=distance).tile
    return max(fitting, key=lambda row: row.m or 0).tile if fitting else None


@functools.cache
def _table(architecture: str) -> list[Row]:
    """Return the rows for an architecture; those of this machine hide those that ship for the same layer and M."""
    found = {(row.n, row.k, row.m): row for row in shipped_rows() if row.architecture == architecture}
    found |= {(row.n, row.k, row.m): row for row in cached_rows() if row.architecture == architecture}
    return list(found.values())


@functools.cache
def _choose(architecture: str, m: int, n: int, k: int) -> Tile:
    tile = closest(_table(architecture), m, n, k) or closest(_table("any"), m, n, k)
    assert tile is not None, "the rows of `any` fit every call"
    return tile


def choose_tile(device: torch.device, m: int, n: int, k: int) -> Tile:
    """Return the tile for the product of [M, K] and [N, K] on a device."""
    # The table ends at 8192 rows; below, one look-up serves all M up to the next power of two.
    return _choose(architecture(device), 1 << (min(max(m, 1), 8192) - 1).bit_length(), n, k)


def forget() -> None:
    """Read the tables again at the next call, after one of the files has changed."""
    cached_rows.cache_clear()
    _table.cache_clear()
    _choose.cache_clear()


@functools.cache
def architecture(device: torch.device) -> str:
    """Return `sm_90` and the like; AMD's name of the architecture; `any` for what is no GPU."""
    if device.type != "cuda":
        return "any"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
