"""The machine it runs on: its devices, and its memory."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU = torch.device("cpu")


def return_freed_memory() -> None:
    """Give freed memory back to the system where the C library, glibc, would keep it.

    Layers come and go in sizes that do not fill each other's gaps: without this, memory grows with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device when tensors can be put there. Raises ValueError."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None


@contextmanager
def same_random_numbers(device: torch.device = _CPU, seed: int = 0) -> Iterator[None]:
    """Let torch draw the same random numbers every time, on the CPU and on a device, and leave the caller its own."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        # Not torch.manual_seed: it would seed further GPUs, whose state nobody gives back.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[gpu.index] for gpu in cuda)):
            generator.manual_seed(seed)
        yield
