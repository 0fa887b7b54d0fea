"""Times of GPU work that can be compared with each other.

Each variant is a list of calls that do the same with different weights, enough of them that no weight is still in the
L2 cache when its turn comes again. A variant is captured in a CUDA graph and replayed, so that the host's time does not
count; what cannot be captured is called as it is. The variants take turns, round after round, so that clocks and
neighbours touch all alike.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
ROUNDS = 7
# Of one variant in one round: long against the clock's steps, short enough that the GPU does not heat up between two.
_ROUND_US = 4000.0
# In one graph: the start of a graph takes as long as a small kernel.
_GRAPH_CALLS = 16


class Timing(NamedTuple):
    """Microseconds for one call."""

    median: float
    p10: float
    p90: float


def weight_copies(nbytes: int, device: torch.device) -> int:
    """Return how many weights of `nbytes` exceed the L2 cache four times, and 2 at least."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(4 * cache / nbytes))


def interleaved(variants: Mapping[str, Sequence[Call]], eager: Collection[str] = ()) -> dict[str, Timing]:
    """Time the variants against each other on the current GPU.

    Args:
        variants: name -> the calls that make up one pass; all are called in order.
        eager: the names of those that are not captured in a CUDA graph.

    """
    longer = {name: [*calls] * max(1, _GRAPH_CALLS // len(calls)) for name, calls in variants.items()}
    # One pool for all graphs: their results are not used, and a tuner captures dozens.
    pool = torch.cuda.graph_pool_handle()
    passes = {name: _pass(calls, None if name in eager else pool) for name, calls in longer.items()}
    repeats = {name: max(1, round(_ROUND_US / _elapsed_us(run, 1))) for name, run in passes.items()}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, run in passes.items():
            elapsed = _elapsed_us(run, repeats[name])
            times[name].append(elapsed / (repeats[name] * len(longer[name])))
    return {name: summary(found) for name, found in times.items()}


def summary(times: Sequence[float]) -> Timing:
    """Return the median, and the tenth and ninetieth percentile."""
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    return Timing(*quantiles.tolist())


def _pass(calls: Sequence[Call], pool: Any) -> Call:
    def run() -> None:
        for call in calls:
            call()

    run()  # compiles kernels and fills the allocator's cache, neither of which may happen in a capture
    torch.cuda.synchronize()
    if pool is None:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    graph.replay()
    return graph.replay


def _elapsed_us(run: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000
