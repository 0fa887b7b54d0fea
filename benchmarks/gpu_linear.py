"""Time the int8 layer on a GPU: against cuBLAS in float16, `torch._int_mm`, bitsandbytes, and what the memory allows.

Layers of OPT and Llama 3, for each number of rows M and 0, 16 and 64 outlier columns, with zero point and bias, in
float16, on random data. CUDA graphs, weights rotated through four times the L2 cache, variants interleaved
(`kernels/gpu/measure.py`); bitsandbytes waits for the GPU where it has a threshold and cannot be captured, so it is
called as it is. `_int_mm` is given quantized rows, and its epilogue (scales, bias) is eager. The floor is the larger of
bytes (N K + M K + 2 M N) by the copy bandwidth of an H200 and operations by twice its measured bfloat16 rate.

Prints a table and merges its rows into `results/gpu_linear-<device>.json`; `--models` and `--rows` divide the work.
Where llmint8 is not installed: PYTHONPATH=.typing.

    python benchmarks/gpu_linear.py [--models OPT-6.7B,...] [--rows 1,16,...]
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_files import merge, result_file
from torch import Tensor

from llmint8.kernels import linear, reference
from llmint8.kernels.gpu import measure
from llmint8.kernels.gpu.tune import scattered_dims

# Bytes a second of a copy, and int8 operations a second at best: twice what a bfloat16 product of 8192**3 reaches.
COPY_BANDWIDTH, INT8_RATE = 4.3e12, 2 * 790e12
OUTLIERS = (0, 16, 64)
ROWS = (1, 16, 64, 128, 512, 2048, 8192)
KEYS = ("device", "model", "layer", "M", "N", "K", "outliers")  # of a case; the rest was measured


def opt(hidden: int) -> dict[str, tuple[int, int]]:
    """Layer -> (N, K): q, k, v and the output projection, then the feed-forward layers."""
    return {"attention": (hidden, hidden), "fc1": (4 * hidden, hidden), "fc2": (hidden, 4 * hidden)}


def llama(hidden: int, key_value: int, inner: int) -> dict[str, tuple[int, int]]:
    """Layer -> (N, K); k and v are narrower than q and o, gate and up are alike."""
    return {"q, o": (hidden, hidden), "k, v": (key_value, hidden), "gate, up": (inner, hidden), "down": (hidden, inner)}


MODELS = {
    "OPT-6.7B": opt(4096),
    "OPT-13B": opt(5120),
    "OPT-30B": opt(7168),
    "OPT-66B": opt(9216),
    "OPT-175B": opt(12288),
    "Llama-3-8B": llama(4096, 1024, 14336),
    "Llama-3-70B": llama(8192, 1024, 28672),
    # Layers that share an input as one layer: what would be gained by joining them, against the sum of their times.
    "OPT-6.7B-joined": {"q, k, v": (3 * 4096, 4096)},
    "OPT-30B-joined": {"q, k, v": (3 * 7168, 7168)},
    "Llama-3-8B-joined": {"q, k, v": (4096 + 2 * 1024, 4096), "gate, up": (2 * 14336, 4096)},
}


def floor_us(m: int, n: int, k: int) -> float:
    """Return the least time in microseconds in which an H200 could do it."""
    return 1e6 * max((n * k + m * k + 2 * m * n) / COPY_BANDWIDTH, 2 * m * n * k / INT8_RATE)


def variants(m: int, n: int, k: int, device: torch.device) -> tuple[dict[str, list[Callable[[], Any]]], set[str]]:
    """Return the calls of each variant, one for each copy of the weight, and which of them cannot be captured."""
    from llmint8.kernels.gpu.quantize_rows import QuantizeRows

    x = torch.randn(m, k, dtype=torch.float16, device=device)
    bias = torch.randn(n, dtype=torch.float16, device=device)
    weights = [
        torch.randn(n, k, dtype=torch.float16, device=device) for _ in range(measure.weight_copies(n * k, device))
    ]
    quantized = [reference.quantize_weight(weight) for weight in weights]
    # Spread over the row, as outliers are, and large enough for bitsandbytes' threshold.
    dims = {count: scattered_dims(count, k, device) for count in OUTLIERS}
    x[:, dims[16].long()] *= 10

    def ours(copy: int, count: int, threshold: float | None = None) -> Callable[[], Any]:
        columns = weights[copy][:, dims[count].long()]
        prepared = linear.prepare(reference.Int8Weight(*quantized[copy], dims[count], columns, bias, threshold))
        return lambda: linear.int8_linear(x, prepared, "zeropoint")

    found = {f"ours {count}": [ours(i, count) for i in range(len(weights))] for count in OUTLIERS}
    for count in OUTLIERS:
        found[f"quantize {count}"] = [partial(QuantizeRows(k, dims[count], True), x, (k, 1))]
    found["fp16"] = [lambda w=weight: F.linear(x, w, bias) for weight in weights]
    if m > 16:  # `_int_mm` on CUDA takes no fewer
        rows = reference.quantize_rows(x, dims[0])
        found["int_mm"] = [lambda q=q, a=a: int_mm(rows, q, a, bias) for q, a in quantized]
    # Outliers searched in the call: printed, and not part of the rows.
    found["ours searched"] = [ours(i, 0, 6.0) for i in range(len(weights))]
    eager = set()
    if importlib.util.find_spec("bitsandbytes"):
        for name, threshold in (("bnb", 6.0), ("bnb0", 0.0)):
            layers = [bitsandbytes_layer(weight, bias, threshold) for weight in weights]
            found[name] = [lambda layer=layer: layer(x) for layer in layers]
            eager.add(name)
    # What a user without graphs sees: printed, and not part of the rows.
    found |= {f"eager {name}": found[name] for name in ("ours 16", "fp16")}
    return found, eager | {"eager ours 16", "eager fp16"}


def int_mm(rows: reference.QuantizedRows, weight: Tensor, absmax: Tensor, bias: Tensor) -> Tensor:
    """Multiply with cuBLAS in int8, and scale with what PyTorch has."""
    product = torch._int_mm(rows.values, weight.t()).float()
    return (product * rows.scale * (absmax / 127) + bias).half()


def bitsandbytes_layer(weight: Tensor, bias: Tensor | None, threshold: float) -> Any:
    """Return bitsandbytes' layer with the same weight, quantized where it is."""
    import bitsandbytes

    made, parameter = bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Int8Params
    n, k = weight.shape
    layer = made(k, n, bias is not None, has_fp16_weights=False, threshold=threshold, device="meta")
    values, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    layer.weight = parameter(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=absmax)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return layer


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """Return the GPU kernels that a call launches."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.no_grad(), torch.profiler.profile(activities=[activity]) as profile:
        call()
        torch.cuda.synchronize()
    return sorted({event.key for event in profile.key_averages()})


def measured_rows(name: str, m: int, n: int, k: int, device: torch.device) -> list[dict[str, Any]]:
    """Time one shape; one row for each number of outliers, for the caller to add model and layer."""
    calls, eager = variants(m, n, k, device)
    with torch.no_grad():
        times = {variant: timing.median for variant, timing in measure.interleaved(calls, eager).items()}
    rows = []
    for count in OUTLIERS:
        row = {"device": name, "model": None, "layer": None, "M": m, "N": n, "K": k, "outliers": count}
        row |= {"ours_us": times[f"ours {count}"], "quantize_us": times[f"quantize {count}"]}
        row |= {f"{other}_us": times.get(other) for other in ("fp16", "int_mm", "bnb", "bnb0")}
        rows.append(row | {"floor_us": floor_us(m, n, k)})
    printed = {"ours searched": "outliers searched", "eager ours 16": "eager ours", "eager fp16": "eager fp16"}
    print(
        f"M={m} N={n} K={k}:", ", ".join(f"{name} {times[key]:.1f}" for key, name in printed.items()), "us", flush=True
    )
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lay rows out for reading; times in microseconds, ratios of what was there."""

    def ratio(numerator: float | None, denominator: float) -> str:
        return "-" if numerator is None else f"{numerator / denominator:.2f}"

    head = ("model", "layer", "M", "N", "K", "outl.", "ours", "quant.", "fp16", "fp16/ours", "ours/floor", "bnb/ours")
    line = "{:12}{:10}{:>6}{:>7}{:>7}{:>6}{:>10}{:>9}{:>10}{:>10}{:>11}{:>9}"
    yield line.format(*head)
    for row in rows:
        ours = row["ours_us"]
        shape = (row[key] for key in ("model", "layer", "M", "N", "K", "outliers"))
        times = (f"{row[key]:.1f}" for key in ("ours_us", "quantize_us", "fp16_us"))
        ratios = ratio(row["fp16_us"], ours), ratio(ours, row["floor_us"]), ratio(row["bnb_us"], ours)
        yield line.format(*shape, *times, *ratios)


def run(models: list[str], call_rows: list[int], device: torch.device, name: str, file: Path) -> list[dict[str, Any]]:
    """Measure the layers of the models; a shape that two of them share is measured once."""
    found: list[dict[str, Any]] = []
    known: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for model in models:
        for layer, (n, k) in MODELS[model].items():
            for m in call_rows:
                if (m, n, k) not in known:
                    known[m, n, k] = measured_rows(name, m, n, k, device)
                found += [row | {"model": model, "layer": layer} for row in known[m, n, k]]
        merge(file, found, KEYS)
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="some of: %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="M; %(default)s")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures a GPU")
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}", flush=True)
    calls, _ = variants(512, 4096, 4096, device)
    for variant in ("ours 16", "fp16", "int_mm"):
        print(f"{variant}: {', '.join(kernel_names(calls[variant][0]))}", flush=True)
    file = result_file("gpu_linear", name)
    for line in table(run(models, [int(m) for m in options.rows.split(",")], device, name, file)):
        print(line)


if __name__ == "__main__":
    main()
