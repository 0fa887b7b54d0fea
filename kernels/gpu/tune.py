"""Find the fastest tile for a layer on this GPU, by trying."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from ..operands import Operands
from ..reference import Int8Weight
from .measure import interleaved, weight_copies
from .tiles import TENSOR_CORE_ROWS, DecodeTile, Entry, MatmulTile, Tile, gpu_of

# The M for which a tile is chosen; a call takes that of the next larger one.
TUNED_M = (1, 2, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OUTLIERS = 16
GROUP_M = 8
# BLOCK_N, BLOCK_K, num_warps of `decode.py`, for as many rows as it takes.
DECODE = [
    (8, 1024, 4),
    (16, 512, 4),
    (16, 1024, 4),
    (16, 1024, 8),
    (32, 512, 4),
    (32, 512, 8),
    (32, 1024, 8),
    (64, 512, 8),
]
DECODE_ROWS = 4
# BLOCK_M, BLOCK_N, BLOCK_K, num_warps. Few rows: the weight's bytes take the time, and many small programs fetch them.
FEW_ROWS = [
    (16, 16, 512, 1),
    (16, 32, 256, 2),
    (16, 32, 512, 2),
    (16, 64, 256, 4),
    (16, 128, 256, 4),
    (32, 64, 256, 4),
    (32, 128, 128, 4),
]
SPLITS = (1, 2, 4, 8)
# Hopper's own instruction needs 64 rows.
HOPPER = [
    (64, 64, 128, 4),
    (64, 64, 256, 4),
    (64, 128, 128, 4),
    (64, 128, 256, 4),
    (64, 256, 128, 4),
    (128, 64, 128, 4),
    (128, 128, 128, 4),
    (128, 128, 128, 8),
    (128, 256, 64, 8),
    (128, 256, 128, 8),
    (256, 128, 128, 8),
]
AMPERE = [
    (64, 64, 128, 4),
    (64, 128, 64, 4),
    (64, 128, 128, 4),
    (128, 64, 64, 4),
    (128, 128, 64, 8),
    (128, 128, 128, 8),
    (128, 256, 64, 8),
    (128, 256, 128, 8),
]


def candidates(m: int, capability: tuple[int, int]) -> list[Tile]:
    """Return the tiles worth trying for calls of M rows; some may not fit the GPU."""
    hopper = capability >= (9, 0)
    decode: list[Tile] = [
        DecodeTile(1 << (m - 1).bit_length(), block_n, block_k, num_warps)
        for block_n, block_k, num_warps in (DECODE if m <= DECODE_ROWS else ())
    ]
    return decode + [
        MatmulTile(block_m, block_n, block_k, GROUP_M, num_warps, num_stages, tma, split_k)
        for block_m, block_n, block_k, num_warps in (*FEW_ROWS, *(HOPPER if hopper else AMPERE))
        if _worth_trying(block_m, m)
        for num_stages in ((4, 5) if block_m < 64 else (3, 4))
        for tma in ((False, True) if hopper and block_m >= 64 else (False,))
        for split_k in (SPLITS if m <= 64 else (1,))
    ]


def _worth_trying(block_m: int, m: int) -> bool:
    if m <= TENSOR_CORE_ROWS:
        # These tiles all add the outlier columns in one order, so a row's result does not depend on the others.
        return block_m == TENSOR_CORE_ROWS
    # Far beyond M most of a tile is wasted; far below it the same weights are read again and again.
    return block_m <= max(m, 64) and m <= block_m * (4 if block_m < 64 else m)


def scattered_dims(count: int, in_features: int, device: torch.device) -> torch.Tensor:
    """Return outlier dims as layers have them, int32 [k]: all over the row, some of them neighbours."""
    random = torch.Generator().manual_seed(in_features)
    return torch.randperm(in_features, generator=random)[:count].sort().values.to(device, torch.int32)


def tune(device: torch.device, n: int, k: int, progress: Callable[[], None] = lambda: None) -> list[Entry]:
    """Return the fastest tile for each of `TUNED_M` and a layer [N, K], timed with 16 outliers and a zero point.

    Args:
        device: the current GPU.
        n: output features.
        k: input features.
        progress: called after each of `TUNED_M`.

    """
    from .linear import GpuLinear

    absmax = torch.rand(n, device=device)
    dims = scattered_dims(OUTLIERS, k, device)
    columns = torch.randn(n, len(dims), dtype=torch.float16, device=device)

    def operands() -> Operands:
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return Operands.prepare(Int8Weight(values, absmax, dims, columns))

    weights = [operands() for _ in range(weight_copies(n * k, device))]
    found = []
    for m in TUNED_M:
        x = torch.randn(m, k, dtype=torch.float16, device=device)

        # The whole layer, as a tile may save the launch that quantizes.
        def calls(tile: Tile, x: torch.Tensor = x) -> list[Callable[[], object]]:
            return [partial(GpuLinear(weight, tile), x, True) for weight in weights]

        fitting = [tile for tile in candidates(m, torch.cuda.get_device_capability(device)) if _fits(calls(tile)[0])]
        times = interleaved({str(tile): calls(tile) for tile in fitting})
        best = min(fitting, key=lambda tile: times[str(tile)].median)
        found.append(Entry(gpu_of(device).architecture, n, k, m, best))
        progress()
    return found


def _fits(call: Callable[[], object]) -> bool:
    """Compile and run a candidate once; Triton and the driver say in many ways that one does not fit."""
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        logging.getLogger("llmint8").debug("a tile is left out: %s", error)
        return False
    return True
