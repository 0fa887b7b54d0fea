"""How long the host takes for one eager call of a layer on a GPU, measured without a GPU.

In place of Triton's driver stands one that has an H100 by name: kernels are compiled for it, and launching them does
nothing. Tensors are on the CPU, where PyTorch takes about as long to make one as on CUDA; what CUDA itself takes for a
launch (2 to 3 us) comes on top. Printed for each number of rows M: the microseconds of a call of `Int8Linear`, of the
prepared weight under it, and of `nn.Linear` on tensors so small that nothing but its call counts.

    python benchmarks/host_overhead.py [--rows 1,16,...]
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from llmint8.kernels.gpu.tiles import gpu_of
from llmint8.kernels.operators import GpuWeight
from llmint8.runtime import Int8Linear

N, K, OUTLIERS = 4096, 4096, 16
ROUNDS, CALLS = 31, 200


class StubDriver(GPUDriver):
    """What Triton asks of a driver, answered for a GPU that is not there."""

    def __init__(self) -> None:
        """Have device 0, of compute capability 9.0."""
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (0, 0, 0, 0, 1024), get_device_properties=lambda device: properties
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    @staticmethod
    def is_active() -> bool:
        """Tell that it is there."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", 90, 32)

    def _nothing(self, *arguments: Any) -> Any:
        raise NotImplementedError

    map_python_to_cpp_type = get_active_torch_device = get_benchmarker = _nothing
    get_device_interface = get_empty_cache_for_benchmark = clear_cache = _nothing


def gpu_layer(n: int, k: int) -> Int8Linear:
    """Return a layer that runs the kernels of a GPU, though its tensors are on the CPU."""
    dims = torch.arange(OUTLIERS) * (k // OUTLIERS)
    layer = Int8Linear.from_linear(nn.Linear(k, n, dtype=torch.float16), dims)
    layer.configure(activation="zeropoint")
    layer.prepared = GpuWeight.prepare(dataclasses.replace(layer.stored(), values=layer.unpacked_weight()))
    return layer


def microseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


@torch.no_grad()
def measure(m: int, n: int = N, k: int = K) -> dict[str, float]:
    """Return the microseconds of each call with M rows."""
    layer, x = gpu_layer(n, k), torch.randn(m, k, dtype=torch.float16)
    tiny, one = nn.Linear(1, 1), torch.zeros(1, 1)
    return {
        "Int8Linear": microseconds(lambda: layer(x)),
        "prepared weight": microseconds(lambda: layer.prepared.linear(x, "zeropoint")),
        "nn.Linear": microseconds(lambda: tiny(one)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 16, 64])
    arguments = parser.parse_args()
    triton.runtime.driver.set_active(StubDriver())
    gpu_of.cache_clear()
    torch.set_num_threads(1)
    for m in arguments.rows:
        print(f"M={m}:", ", ".join(f"{name} {value:.1f} us" for name, value in measure(m).items()), flush=True)


if __name__ == "__main__":
    main()
