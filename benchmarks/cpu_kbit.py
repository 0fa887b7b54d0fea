"""Time one linear layer of 3 to 8 bits on the CPU, beside int8 and nn.Linear in bfloat16.

Layers have a bias and no outlier columns; those of k bits are in blocks of 64, of the data type that the converter
gives to so many, `int8` is ours with one scale for a row of inputs. As in `cpu_linear.py`, variants take turns in one
process, the median of the turns counts, and every variant goes round as many copies of its weight as come from memory.
Printed, and written to `results/cpu_kbit-INSTRUCTIONS.json`: milliseconds for x in bfloat16.

    python benchmarks/cpu_kbit.py [--threads N] [--shape OUTxIN ...] [--bits K ...] [--rows M ...]
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from cpu_linear import COLD_BYTES, medians
from torch import Tensor, nn

from llmint8.converter.planning.options import Options
from llmint8.kernels.kbit import cpu
from llmint8.kernels.kbit.levels import BITS
from llmint8.runtime import Int8Linear, KBitLinear

SHAPES = ["2048x2048", "5632x2048", "2048x5632", "4096x4096", "576x576"]
ROWS = (1, 4, 16, 32, 128, 512)


def layer(name: str, linear: nn.Linear) -> tuple[nn.Module, float]:
    """Return a variant of a layer, and the bits of one of its weights."""
    if name == "bf16":
        return linear, 16
    if name == "int8":
        found = Int8Linear.from_linear(linear, torch.empty(0, dtype=torch.int64))
        found.configure(activation="zeropoint", activation_group="row")
        return found, 8
    bits = int(name.removesuffix(" bits"))
    return KBitLinear.from_linear(linear, Options(format=2, bits=bits, block_size=64).kbit), bits + 0.25


def build(name: str, shape: tuple[int, int]) -> Callable[[Tensor], Any]:
    """Return a call that runs the copies of one variant in turn."""
    made, bits = layer(name, nn.Linear(shape[1], shape[0], dtype=torch.bfloat16))
    copies = max(1, int(COLD_BYTES / (shape[0] * shape[1] * bits / 8)))
    layers = itertools.cycle([made, *(deepcopy(made) for _ in range(copies - 1))])
    return lambda x: next(layers)(x)


@torch.no_grad()
def measure(shape: tuple[int, int], names: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """Return a row for each M."""
    layers, rows = {name: build(name, shape) for name in names}, []
    for m in counts:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {name: lambda f=run, x=x: f(x) for name, run in layers.items()}
        rows.append({"out": shape[0], "in": shape[1], "M": m, **medians(calls)})
        found = "  ".join(f"{name} {rows[-1][name]:.3f}" for name in names)
        print(f"{shape[0]} x {shape[1]}  M={m:<4}  {found}", flush=True)
    return rows


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ["int8", "bf16", *(f"{bits} bits" for bits in arguments.bits)]
    rows = []
    for shape in arguments.shape:
        out_features, in_features = map(int, shape.split("x"))
        rows += measure((out_features, in_features), names, arguments.rows)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "instructions": cpu.kinds(),
        "threads": arguments.threads,
        "rows": rows,
    }
    file = Path(__file__).parent / "results" / f"cpu_kbit-{cpu.kinds()[0] if cpu.kinds() else 'none'}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
