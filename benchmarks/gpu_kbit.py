"""Time layers of 3 to 8 bits on a GPU: against cuBLAS in bfloat16, our int8, bitsandbytes' 4 bits, and the memory.

Layers of OPT and Llama 3, for each number of rows M and of bits, in blocks of 64, `nf4` for 4 bits and `float` for the
others, without outlier columns and, with 4 bits, with 2 % of them; in bfloat16, with bias, on random data. How it is
measured is that of `gpu_linear.py`: CUDA graphs, weights rotated through four times the L2 cache, variants interleaved;
bitsandbytes is called as it is. The floor is the larger of the bytes (codes, absmax, x, output) by the copy bandwidth
of an H200, and of the operations by its measured bfloat16 rate.

Prints a table and merges its rows into `results/gpu_kbit-<device>.json`; `--models`, `--rows` and `--bits` divide the
work. Where llmint8 is not installed: PYTHONPATH=.typing.

    python benchmarks/gpu_kbit.py [--models OPT-6.7B,...] [--rows 1,16,...] [--bits 3,4,...]
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_linear import COPY_BANDWIDTH, INT8_RATE, MODELS, ROWS
from result_files import merge, result_file
from torch import Tensor

from llmint8.kernels import linear, reference
from llmint8.kernels.gpu import measure
from llmint8.kernels.gpu.tune import scattered_dims
from llmint8.kernels.kbit.gpu.linear import GpuKBitLinear
from llmint8.kernels.kbit.operands import KBitOperands
from llmint8.kernels.kbit.reference import from_float

BLOCK = 64
BITS = (3, 4, 5, 6, 7, 8)
KEYS = ("device", "model", "layer", "M", "N", "K", "bits")  # of a case; the rest was measured
BF16_RATE = INT8_RATE / 2


def floor_us(m: int, n: int, k: int, bits: int) -> float:
    """Return the least time in microseconds in which an H200 could do it."""
    nbytes = n * k * bits / 8 + 2 * n * k / BLOCK + 2 * m * k + 2 * m * n
    return 1e6 * max(nbytes / COPY_BANDWIDTH, 2 * m * n * k / BF16_RATE)


def variants(
    m: int, n: int, k: int, device: torch.device, widths: Sequence[int] = BITS
) -> tuple[dict[str, list[Callable[[], Any]]], set[str]]:
    """Return the calls of each variant, one for each copy of the weight, and which of them are not to be captured."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    bias = torch.randn(n, dtype=torch.bfloat16, device=device)
    copies = measure.weight_copies(n * k * min(widths) // 8, device)
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device=device) for _ in range(copies)]
    none, dims = scattered_dims(0, k, device), scattered_dims(max(1, k // 50), k, device)

    def ours(weight: Tensor, bits: int, dims: Tensor) -> Callable[[], Any]:
        made = from_float(weight, bits, "nf4" if bits == 4 else "float", BLOCK, dims, bias)
        layer = GpuKBitLinear(*KBitOperands.prepare(made))
        return lambda: layer(x)

    def int8(weight: Tensor) -> Callable[[], Any]:
        values, absmax = reference.quantize_weight(weight)
        prepared = linear.prepare(reference.Int8Weight(values, absmax, none, weight[:, none.long()], bias))
        return lambda: linear.int8_linear(x, prepared)

    found = {f"ours {bits}": [ours(weight, bits, none) for weight in weights] for bits in widths}
    if 4 in widths:
        found["ours 4 columns"] = [ours(weight, 4, dims) for weight in weights]
    found["bf16"] = [lambda w=weight: F.linear(x, w, bias) for weight in weights]
    found["int8"] = [int8(weight) for weight in weights]
    eager = set()
    if importlib.util.find_spec("bitsandbytes"):
        found["bnb"] = [bitsandbytes_call(x, weight, bias) for weight in weights]
        eager.add("bnb")
    # What a user without graphs sees: printed, and not part of the rows.
    first = f"ours {widths[0]}"
    found |= {f"eager {name}": found[name] for name in (first, "bf16")}
    return found, eager | {f"eager {first}", "eager bf16"}


def bitsandbytes_call(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    """Return a call of bitsandbytes' NF4 layer in blocks of 64."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)


def measured_rows(
    name: str, m: int, n: int, k: int, device: torch.device, widths: Sequence[int] = BITS
) -> list[dict[str, Any]]:
    """Time one shape; one row for each number of bits, for the caller to add model and layer."""
    calls, eager = variants(m, n, k, device, widths)
    with torch.no_grad():
        times = {variant: timing.median for variant, timing in measure.interleaved(calls, eager).items()}
    printed = [f"{variant} {times[variant]:.1f}" for variant in times if variant.startswith("eager")]
    print(f"M={m} N={n} K={k}: {', '.join(printed)} us", flush=True)
    others = {f"{other}_us": times.get(other) for other in ("bf16", "int8", "bnb")}
    return [
        {"device": name, "model": None, "layer": None, "M": m, "N": n, "K": k, "bits": bits}
        | {"ours_us": times[f"ours {bits}"], "columns_us": times.get(f"ours {bits} columns")}
        | others
        | {"floor_us": floor_us(m, n, k, bits)}
        for bits in widths
    ]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lay rows out for reading; times in microseconds, ratios of what was there."""
    line = "{:12}{:10}{:>6}{:>7}{:>7}{:>5}{:>9}{:>9}{:>9}{:>9}{:>11}{:>11}{:>9}"
    yield line.format(
        *("model", "layer", "M", "N", "K", "bits", "ours", "columns", "int8", "bf16"),
        *("bf16/ours", "ours/floor", "bnb/ours"),
    )
    for row in rows:
        ours, bnb = row["ours_us"], row["bnb_us"]
        case = (row[key] for key in KEYS[1:])
        times = (row[key] for key in ("ours_us", "columns_us", "int8_us", "bf16_us"))
        ratios = row["bf16_us"] / ours, ours / row["floor_us"], None if bnb is None else bnb / ours
        shown = ["-" if time is None else f"{time:.1f}" for time in times]
        yield line.format(*case, *shown, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))


def run(
    models: list[str], call_rows: list[int], widths: list[int], device: torch.device, name: str, file: Path
) -> list[dict[str, Any]]:
    """Measure the layers of the models; a shape that two of them share is measured once."""
    found: list[dict[str, Any]] = []
    known: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for model in models:
        for layer, (n, k) in MODELS[model].items():
            for m in call_rows:
                if (m, n, k) not in known:
                    known[m, n, k] = measured_rows(name, m, n, k, device, widths)
                found += [row | {"model": model, "layer": layer} for row in known[m, n, k]]
        merge(file, found, KEYS)
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="OPT-6.7B,Llama-3-8B", help=f"some of: {', '.join(MODELS)}; %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="M; %(default)s")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="%(default)s")
    options = parser.parse_args()
    models, widths = options.models.split(","), [int(bits) for bits in options.bits.split(",")]
    if unknown := set(models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if wrong := set(widths) - set(BITS):
        parser.error(f"no {', '.join(map(str, sorted(wrong)))} bits; there are {', '.join(map(str, BITS))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures a GPU")
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}", flush=True)
    file = result_file("gpu_kbit", name)
    for line in table(run(models, [int(m) for m in options.rows.split(",")], widths, device, name, file)):
        print(line)


if __name__ == "__main__":
    main()
