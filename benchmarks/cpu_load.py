"""Time how long an int8 checkpoint takes until it is ready on the CPU, against what cannot be left out.

    python benchmarks/cpu_load.py CHECKPOINT [--threads N]

`read` is reading every byte of the weight files, `pack` laying out the weights that the CPU kernels pack, and `load`
is `runtime.load`. They take turns in one process, with the files in the page cache; medians of three turns, printed and
written to `results/cpu_load-INSTRUCTIONS.json`. Where layers are compiled nothing is packed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmint8 import runtime
from llmint8.formats import Checkpoint, open_checkpoint
from llmint8.kernels.cpu import native, product

ROUNDS = 3


def read(checkpoint: Checkpoint) -> None:
    """Read the files, through one buffer."""
    buffer = bytearray(64 << 20)
    for name in checkpoint.files:
        with (checkpoint.path / name).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def pack_seconds(checkpoint: Checkpoint) -> float:
    """Pack the weights as the loader does, without the reading of them."""
    seconds = 0.0
    for record in checkpoint.records:
        weight = checkpoint.read(f"{record}.weight")
        start = time.perf_counter()
        if not native.kinds() and product.packable(weight):
            product.pack(weight)
        seconds += time.perf_counter() - start
    return seconds


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.checkpoint)
    runtime.load(arguments.checkpoint)  # late imports, and the files into the page cache
    turns: dict[str, list[float]] = {"read": [], "pack": [], "load": []}
    for _ in range(ROUNDS):
        turns["read"].append(seconds(lambda: read(checkpoint)))
        turns["pack"].append(pack_seconds(checkpoint))
        turns["load"].append(seconds(lambda: runtime.load(arguments.checkpoint)))
    row = {name: round(statistics.median(values), 3) for name, values in turns.items()}
    size = sum((checkpoint.path / name).stat().st_size for name in checkpoint.files)
    ratio = row["load"] / (row["read"] + row["pack"])
    print(f"{size / 1e9:.2f} GB: read {row['read']:.2f} s, pack {row['pack']:.2f} s, load {row['load']:.2f} s")
    print(f"load / (read + pack): {ratio:.2f}")
    result = {"date": time.strftime("%Y-%m-%d"), "threads": arguments.threads, "bytes": size, "seconds": row}
    file = Path(__file__).parent / "results" / f"cpu_load-{native.kinds()[0] if native.kinds() else 'none'}.json"
    file.write_text(json.dumps({**result, "ratio": round(ratio, 2)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
