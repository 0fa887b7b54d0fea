"""The layouts of int8 that bitsandbytes had for Turing and Ampere, put back into rows.

Until 0.45 a model that had run on such a GPU was saved as the GPU's integer product wanted its weight (cuBLASLt calls
them COL4_4R2_8C and COL32_2R_4R4): in tiles of 8 or 32 rows and 32 columns, tiles below each other first, with zeros
where a weight has fewer rows. `weight_format` is a number; 0.43.0 wrote it as a word.
"""

import torch
from torch import Tensor

ROWS = "row"
# By their numbers; col32 was for inputs alone.
NAMES = (ROWS, "col32", "col_turing", "col_ampere")
TILE_ROWS = {"col_turing": 8, "col_ampere": 32}
_TILE_COLUMNS = 32


def layout_name(value: Tensor) -> str:
    """Return the name of a layout from what is stored of it: its number, or its name in bytes; all else as text."""
    if value.ndim == 1 and value.dtype in (torch.uint8, torch.int8) and len(value) > 1:
        return bytes(value.to(torch.uint8).tolist()).rstrip(b"\0").decode("ascii", "replace")
    number = int(value) if value.numel() == 1 else -1
    return NAMES[number] if 0 <= number < len(NAMES) else str(number)


def has_tiles(shape: tuple[int, ...], rows: int, layout: str) -> bool:
    """Tell whether a stored shape is that of so many rows in tiles, filled up to whole ones."""
    height = TILE_ROWS.get(layout)
    return height is not None and shape[0] == -(-rows // height) * height and shape[1] % _TILE_COLUMNS == 0


def untiled(stored: Tensor, rows: int, layout: str) -> Tensor:
    """Return the first rows [rows, K] of int8 values in tiles [N, K], of which `has_tiles` is true."""
    height = TILE_ROWS[layout]
    down, across = stored.shape[0] // height, stored.shape[1] // _TILE_COLUMNS
    row, column = torch.arange(height)[:, None], torch.arange(_TILE_COLUMNS)[None]
    if layout == "col_turing":
        # Even rows and then odd ones; of each four columns by four rows, eight times.
        place = (row % 2) * 128 + (column // 4) * 16 + (row // 2) * 4 + column % 4
    else:
        # Pairs of rows, four of them eight rows apart, and then the next pairs.
        place = (((row % 8) // 2 * 4 + row // 8) * 2 + row % 2) * _TILE_COLUMNS + column
    tiles = stored.reshape(across, down, height * _TILE_COLUMNS)[:, :, place.reshape(-1)]
    whole = tiles.reshape(across, down, height, _TILE_COLUMNS).permute(1, 2, 0, 3)
    return whole.reshape(stored.shape)[:rows].contiguous()
