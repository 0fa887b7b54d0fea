"""Which tile of the output one program of a kernel computes: a table by kernel, architecture, N, K and M.

`tiles.json` beside this module is the table that ships; entries that `llmint8 bench --tune` measured on this machine
stand in the user's cache and come first. An entry with N and K holds for just that layer. One with K null holds for
layers up to its N, and every entry for calls of up to M rows; null means any. Of the entries that fit, the closest
counts. A GPU without entries takes those of the nearest lower architecture that fit its shared memory, and where there
are none those of `any`, which are small enough for every GPU. No choice changes the int32 sums.
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
MOST_SHARED_BYTES = 227 * 1024  # of one program, on every GPU that there is


class DecodeTile(NamedTuple):
    """The shape of the work of one program of `decode.py`, which takes up to `block_m` rows, and no more."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


class MatmulTile(NamedTuple):
    """The shape of the work of one program of `matmul.py`, and how Triton is to compile it."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int  # tiles along M that run next to each other, sharing columns of the weight in the L2 cache
    num_warps: int
    num_stages: int
    tma: bool = False  # load through the copy engine (sm_90 and later) where the layer's alignment allows it
    split_k: int = 1  # programs among which K is divided

    @property
    def shared_bytes(self) -> int:
        """The most shared memory that it takes: its blocks of x and the weight for every stage, and a little."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k + 1024


Tile = DecodeTile | MatmulTile
KERNELS: dict[str, type[Tile]] = {"decode": DecodeTile, "matmul": MatmulTile}


class Entry(NamedTuple):
    """An entry of the table; None means any."""

    architecture: str
    n: int | None
    k: int | None
    m: int | None
    tile: Tile

    @property
    def kernel(self) -> str:
        """The name of the kernel in the table."""
        return next(name for name, kind in KERNELS.items() if isinstance(self.tile, kind))


def cache_path() -> Path | None:
    """Return where the entries measured on this machine stand; None for a user without a home."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "llmint8" / "tiles.json"
    try:
        return Path.home() / ".cache" / "llmint8" / "tiles.json"
    except RuntimeError:
        return None


def read_table(text: str) -> list[Entry]:
    """Read a table.

    Raises:
        ValueError: text that is not such a table.

    """
    try:
        table = json.loads(text)
        if not isinstance(table, list):
            raise TypeError("not a list")
        entries = []
        for row in table:
            kind = KERNELS[row["kernel"]]
            tile = kind(*(row[key] for key in kind._fields))
            entries.append(Entry(row["architecture"], row["N"], row["K"], row["M"], tile))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a table of tiles: {error!r}") from None
    for entry in entries:
        _check(entry)
    return entries


def _check(entry: Entry) -> None:
    tile = entry.tile
    sizes = tile._asdict()
    switch = sizes.pop("tma", False)
    limits = [limit for limit in (entry.n, entry.k, entry.m) if limit is not None]
    right = type(switch) is bool and all(type(size) is int and size > 0 for size in (*sizes.values(), *limits))
    right = right and type(entry.architecture) is str
    # What Triton's products of int8 blocks need; blocks and warps are powers of two.
    powers = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
    rows = {DecodeTile: (1, 2, 4), MatmulTile: (16, 32, 64, 128, 256)}[type(tile)]
    columns = 8 if isinstance(tile, DecodeTile) else TENSOR_CORE_ROWS
    if not right or any(size & (size - 1) for size in powers):
        raise ValueError(f"not a tile: {entry}")
    if tile.block_m not in rows or not columns <= tile.block_n <= 256 or tile.block_k < 32 or tile.num_warps > 32:
        raise ValueError(f"not a tile: {entry}")
    if isinstance(tile, MatmulTile):
        # The copy engine takes boxes of up to 256; sums over parts of K are kept for every row.
        divided = tile.split_k > 1 and (entry.m is None or entry.m > 1024 or tile.split_k > 64)
        if divided or (tile.tma and tile.block_k > 256) or tile.shared_bytes > MOST_SHARED_BYTES:
            raise ValueError(f"not a tile: {entry}")


def write_table(entries: list[Entry]) -> str:
    """Return a table as `read_table` reads it, one entry a line."""
    rows = [
        {"kernel": entry.kernel, "architecture": entry.architecture, "N": entry.n, "K": entry.k, "M": entry.m}
        | entry.tile._asdict()
        for entry in entries
    ]
    return "[\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n]\n"


def shipped_table() -> list[Entry]:
    """Return the table that ships."""
    return read_table(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@functools.cache
def cached_table() -> list[Entry]:
    """Return what was measured on this machine; a file that cannot be read counts as empty, with a warning."""
    path = cache_path()
    try:
        return read_table(path.read_text(encoding="utf-8")) if path else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logging.getLogger("llmint8").warning("%s is not used: %s; `llmint8 bench --tune` writes a new one", path, error)
        return []


def closest(entries: list[Entry], m: int, n: int, k: int) -> Tile | None:
    """Return the tile of the entry that fits the call best: its own layer first, then the smallest N, then M."""

    def distance(entry: Entry) -> tuple[bool, float, float]:
        return entry.k is None, entry.n or math.inf, entry.m or math.inf

    entries = [entry for entry in entries if not isinstance(entry.tile, DecodeTile) or m <= entry.tile.block_m]
    own = [entry for entry in entries if (entry.n, entry.k) == (n, k)]
    fitting = own or [entry for entry in entries if entry.k is None and n <= (entry.n or n)]
    # Beyond the largest call that was measured its tile is the best guess.
    within = [entry for entry in fitting if m <= (entry.m or m)]
    if within:
        return min(within, key=distance).tile
    return max(fitting, key=lambda entry: entry.m or 0).tile if fitting else None


class Gpu(NamedTuple):
    """What the choice of a tile depends on."""

    architecture: str  # `sm_90` and the like; AMD's name; `any` for what is no GPU
    shared_bytes: int = MOST_SHARED_BYTES  # that one program may have


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what is known of a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Gpu("any")
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Gpu(str(properties.gcnArchName).partition(":")[0])
    shared = getattr(properties, "shared_memory_per_block_optin", MOST_SHARED_BYTES)
    return Gpu(f"sm_{properties.major}{properties.minor}", shared)


@functools.cache
def table_for(gpu: Gpu) -> tuple[str, list[Entry]]:
    """Return the architecture whose tiles a GPU takes, and its entries, with what was measured on this machine."""
    shipped = [entry for entry in shipped_table() if _fits(entry.tile, gpu)]
    number = _number(gpu.architecture)
    # Without tiles of so many rows, calls of up to 16 rows would take larger ones, which add in another order.
    names = {e.architecture for e in shipped if isinstance(e.tile, MatmulTile) and e.tile.block_m == TENSOR_CORE_ROWS}
    lower = [name for name in names if name == gpu.architecture or 0 < _number(name) < number]
    name = max(lower, key=_number, default="any")
    entries = [entry for entry in shipped if entry.architecture == name]
    entries += [entry for entry in cached_table() if entry.architecture == gpu.architecture]
    # Of two for the same layer and M, that of this machine counts.
    return name, list({(entry.kernel, entry.n, entry.k, entry.m): entry for entry in entries}.values())


def _number(architecture: str) -> int:
    """Return 90 for `sm_90`, and 0 for what is not NVIDIA's."""
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits != architecture and digits.isdigit() else 0


def _fits(tile: Tile, gpu: Gpu) -> bool:
    return isinstance(tile, DecodeTile) or tile.shared_bytes <= gpu.shared_bytes


@functools.cache
def _choose(gpu: Gpu, m: int, n: int, k: int, decode: bool) -> Tile:
    def usable(entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if decode or isinstance(entry.tile, MatmulTile)]

    tile = closest(usable(table_for(gpu)[1]), m, n, k) or closest(usable(table_for(Gpu("any"))[1]), m, n, k)
    assert tile is not None, "the entries of `any` fit every call"
    return tile


def choose_tile(device: torch.device, m: int, n: int, k: int, decode: bool = True) -> Tile:
    """Return the tile for a call of M rows of a layer [N, K] on a device; without `decode`, one of `matmul.py`."""
    # The table ends at 8192 rows; below, one look-up serves all M up to the next power of two.
    return _choose(gpu_of(device), 1 << (min(max(m, 1), 8192) - 1).bit_length(), n, k, decode)


def forget() -> None:
    """Read the tables again for the weights that are prepared from now on, after one of the files has changed."""
    cached_table.cache_clear()
    table_for.cache_clear()
    _choose.cache_clear()
