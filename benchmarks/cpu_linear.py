"""Time one linear layer on the CPU: ours, fp32, bf16, bitsandbytes int8 and torchao's dynamic int8 where importable.

Ours has a bias, 16 outlier columns and zeropoint activations in groups of 128, and every variant a bias; `row` is ours
with one scale for a row, `rotated` ours rotated, `plain` that with one scale without the compiled layer. In one
process, variants take turns, and the median of the turns counts. Every variant goes round as many copies of its weight
as take 128 MB, so that weights come from memory, as they do when a model runs. With `--busy` another process uses one
of the cores meanwhile. Printed, and written to `results/cpu_linear-INSTRUCTIONS.json`, so that one kind of machine
never replaces another: milliseconds.

    python benchmarks/cpu_linear.py [--threads N] [--busy] [--shape OUTxIN ...]
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmint8.kernels.cpu import native
from llmint8.kernels.cpu.linear import CpuWeight
from llmint8.kernels.reference import Rotation
from llmint8.runtime import Int8Linear
from llmint8.runtime.layers.arguments import ActivationGroup

ROUNDS = 7
SECONDS = 0.06  # of one variant in one round, at least one call
COLD_BYTES = 128e6
SHAPES = ["4096x4096", "2048x2048", "576x576", "1536x576", "16384x4096", "4096x16384"]
ROWS = (1, 4, 16, 32, 128, 512)


def ours(linear: nn.Linear, group: ActivationGroup = 128, rotation: Rotation | None = None) -> nn.Module:
    """Quantize with 16 outlier columns."""
    dims = torch.arange(0, linear.in_features, linear.in_features // 16)[:16]
    layer = Int8Linear.from_linear(linear, dims, rotation=rotation)
    layer.configure(activation="zeropoint", activation_group=group)
    return layer


def row(linear: nn.Linear) -> nn.Module:
    """Quantize as ours, with one scale for each row of x."""
    return ours(linear, "row")


def rotated(linear: nn.Linear) -> nn.Module:
    """Quantize as ours, rotated."""
    return ours(linear, rotation=64)


def plain(linear: nn.Linear) -> nn.Module:
    """Quantize as that, and run it as where there is no compiled layer."""
    layer = row(linear)
    layer.prepared = CpuWeight.prepare(layer.stored())  # type: ignore[assignment]
    return layer


def bitsandbytes(linear: nn.Linear) -> nn.Module:
    """Quantize as bitsandbytes does, with the paper's threshold."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # type: ignore[no-any-return]


def torchao(linear: nn.Linear) -> nn.Module:
    """Quantize as torchao does, with a scale for each row of x in every call."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


VARIANTS: dict[str, tuple[Callable[[nn.Linear], nn.Module], torch.dtype, int]] = {  # how, dtype of x, bytes per weight
    "ours": (ours, torch.bfloat16, 1),
    "row": (row, torch.bfloat16, 1),
    "rotated": (rotated, torch.bfloat16, 1),
    "plain": (plain, torch.bfloat16, 1),
    "bf16": (lambda linear: linear, torch.bfloat16, 2),
    "fp32": (lambda linear: linear.float(), torch.float32, 4),
    "bitsandbytes": (bitsandbytes, torch.bfloat16, 1),
    "torchao": (torchao, torch.bfloat16, 1),
}


def build(name: str, shape: tuple[int, int]) -> Callable[[Tensor], Any]:
    """Return a call that runs the copies of one variant in turn."""
    make, dtype, size = VARIANTS[name]
    copies = max(1, int(COLD_BYTES / (shape[0] * shape[1] * size)))
    layers = itertools.cycle([make(nn.Linear(shape[1], shape[0], dtype=torch.bfloat16)) for _ in range(copies)])
    return lambda x: next(layers)(x.to(dtype))


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < SECONDS:
                call()
                count += 1
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - start) / count * 1e3)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


@torch.no_grad()
def measure(shape: tuple[int, int], names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each M."""
    rows = []
    layers = {name: build(name, shape) for name in names}
    for m in ROWS:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {name: lambda f=layer, x=x: f(x) for name, layer in layers.items()}
        rows.append({"out": shape[0], "in": shape[1], "M": m, **medians(calls)})
        print_row(rows[-1], names)
    return rows


def print_row(row: dict[str, Any], names: list[str]) -> None:
    """Print times, and how many times the time of ours they are."""
    cells = [f"{name} {row[name]:.3f} ({row[name] / row['ours']:.2f}x)" for name in names]
    print(f"{row['out']} x {row['in']}  M={row['M']:<4}", *cells, sep="  ", flush=True)


@contextmanager
def another_process(wanted: bool) -> Iterator[None]:
    """Let a process use one core, if wanted."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--busy", action="store_true", help="let another process use one of the cores")
    parser.add_argument("--peers", action="store_true", help="time bitsandbytes and torchao too, which take long")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peers = ("bitsandbytes", "torchao")
    names = [n for n in VARIANTS if n not in peers or (arguments.peers and importlib.util.find_spec(n))]
    rows = []
    with another_process(arguments.busy):
        for shape in arguments.shape:
            out_features, in_features = map(int, shape.split("x"))
            rows += measure((out_features, in_features), names)
    machine = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    ).partition(": ")[2]
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "instructions": native.kinds()}
    result |= {"threads": arguments.threads, "another process": arguments.busy, "rows": rows}
    kind = native.kinds()[0] if native.kinds() else "none"
    file = Path(__file__).parent / "results" / f"cpu_linear-{kind}{'-busy' if arguments.busy else ''}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
