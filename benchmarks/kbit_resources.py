"""Compile the Triton kernels for weights of 3 to 8 bits for GPUs that are not there, and show what ptxas made of them.

Every tile of `kernels/kbit/gpu/tiles.json` is compiled for its architecture, for each number of bits, with outlier
columns and a bias, in blocks of 64; the tiles that one layer of a 7B model takes also in blocks of 32, by row, and for
bfloat16. Printed for each: registers, bytes spilled, shared memory, the instructions of the loop over K for each weight
of a thread, among them the look-ups in shared memory, and what is wrong with it, if anything. `--save` merges them into
`results/kbit_resources.json`. Needs Triton and its interpreter off, and no GPU.

    python benchmarks/kbit_resources.py [--architectures sm_90,...] [--bits 3,...] [--json] [--save]
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from kernel_resources import TARGETS, Nothing, Recorder, Resources, compile_one, resources
from result_files import merge

from llmint8.kernels.kbit.gpu import linear
from llmint8.kernels.kbit.gpu.tiles import DECODE_ROWS, KBitTile, _choose, shipped_table
from llmint8.kernels.kbit.packing import row_bytes
from llmint8.kernels.kbit.reference import blocks

FILE = Path(__file__).parent / "results" / "kbit_resources.json"
KEYS = ("architecture", "kernel")
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass
class KBitResources(Resources):
    """What one compiled kernel takes of the GPU, and of its time: `int8_instructions` are those of its tensor cores."""

    instructions: float  # for a weight, in the loop over K
    look_ups: float  # among them


def kbit_resources(
    architecture: str,
    tile: KBitTile,
    bits: int,
    block: int | None = 64,
    dtype: torch.dtype = torch.float16,
    outliers: int = 16,
    k: int = 4096,
    bias: bool = True,
) -> KBitResources:
    """Compile what multiplies for a layer with K inputs."""

    def empty(*shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    n, few = 4096, tile.block_m <= DECODE_ROWS
    kernel = "kbit_decode_kernel" if few else "kbit_matmul_kernel"
    recorder = Recorder(getattr(linear, kernel), architecture)
    with patch.object(linear, kernel, recorder), patch.object(linear, "kbit_sum_kernel", Nothing()):
        layer = linear.GpuKBitLinear(
            empty(n, row_bytes(k, bits), kind=torch.uint8),
            empty(n, blocks(k, block)[0], kind=torch.float16),
            empty(2**bits, kind=torch.float32),
            empty(outliers, kind=torch.int32),
            empty(n, outliers, kind=torch.float32),
            empty(n, kind=dtype) if bias else None,
            k,
            block,
            tile,
        )
        layer(empty(tile.block_m, k, kind=dtype))
    chunks = recorder.options["CHUNKS"]
    name = f"{bits} bits, {f'blocks of {block}' if block else 'by row'}, {DTYPES[dtype]}, "
    name += f"{tile.block_m}x{tile.block_n}x{64 * chunks}, {tile.num_warps} warps"
    name += ("" if few else f", {tile.num_stages} stages") + (", K divided" if tile.split_k > 1 else "")
    instruction = None
    if not few and dtype != torch.float32:
        # Hopper's own instruction needs 64 rows.
        instruction = "HGMMA" if architecture == "sm_90" and tile.block_m >= 64 else "HMMA"
    found = resources(recorder.compiled, architecture, name, instruction)
    counts = loop(recorder.compiled)
    weights = tile.block_n * chunks * 64 / (32 * tile.num_warps)
    per_weight = round(counts.total() / weights, 2), round(counts["LDS"] / weights, 2)
    return KBitResources(**asdict(found), instructions=per_weight[0], look_ups=per_weight[1])


def loop(compiled: Any) -> Counter[str]:
    """Return the instructions of the longest loop of a kernel, which is that over K, by their names."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    longest: list[str] = []
    for end, text in lines:
        back = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < end:
            inside = [text for at, text in lines if int(back[1], 16) <= at <= end]
            longest = max(longest, inside, key=len)
    # Without the predicate that may stand before it.
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in longest)


def jobs_of(architectures: list[str], widths: list[int]) -> list[partial[KBitResources]]:
    """Return what is to be compiled."""
    # Beyond two parts of K the kernel is the same.
    tiles = dict.fromkeys(
        (entry.architecture, entry.tile._replace(split_k=min(entry.tile.split_k, 2)), bool(entry.float32))
        for entry in shipped_table()
        if entry.architecture in architectures
    )
    jobs = []
    for architecture, tile, float32 in tiles:
        dtype = torch.float32 if float32 else torch.float16
        jobs += [partial(kbit_resources, architecture, tile, bits, 64, dtype) for bits in widths]
    for architecture in architectures:
        for m in (1, 2, 16, 2048):
            tile = _choose(architecture, False, m, 4096)
            for bits in widths:
                jobs += [
                    partial(kbit_resources, architecture, tile, bits, block, dtype)
                    for block, dtype in ((32, torch.float16), (None, torch.bfloat16))
                ]
        jobs += [
            partial(kbit_resources, architecture, _choose(architecture, True, 2, 4096), bits, 32, torch.float32)
            for bits in widths
        ]
    return jobs


def main() -> None:
    """Compile everything that ships, on every core."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architectures", default=",".join(TARGETS), help="some of: %(default)s")
    parser.add_argument("--bits", default="3,4,5,6,7,8", help="some of: %(default)s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help=f"merge into {FILE.name}")
    options = parser.parse_args()
    jobs = jobs_of(options.architectures.split(","), [int(bits) for bits in options.bits.split(",")])
    with ProcessPoolExecutor() as pool:
        found = [asdict(item) for item in pool.map(compile_one, jobs)]
    if options.save:
        merge(FILE, [{"triton": triton.__version__} | item for item in found], KEYS)
    if options.json:
        print(json.dumps(found))
        return
    print("| for | kernel | registers | spilled | shared memory | instructions | look-ups | |\n" + "|---" * 8 + "|")
    for item in found:
        wrong = ", ".join(item["problems"])
        print(
            f"| {item['architecture']} | {item['kernel']} | {item['registers']} | {item['spilled_bytes']} "
            f"| {item['shared_bytes']:,} | {item['instructions']} | {item['look_ups']} | {wrong} |"
        )


if __name__ == "__main__":
    main()
