"""A pytest plugin: products of float matrices on the CPU add in another order than this processor's libraries do.

What is rounded in another order on another processor (AMX, AVX-512, AVX2, Arm) is so here too, and differently for
every shape and layout: a test that compares the bits of two such sums fails. Sums that are exact, as those of int8
values in float32 blocks, stay exact. Replaced are `mm`, `addmm` and `bmm`, which linear layers and eager attention come
down to; products with a vector, fused attention and compiled code stay as they are.

    PYTHONPATH=soak python -m pytest -p other_sums tests/test_reference.py
"""

import zlib

import numpy as np
import torch
from torch import Tensor

_PARTS = 3
_LIBRARY = torch.library.Library("aten", "IMPL")


def _product(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """Add [M, K] times [K, N] to `start`, or to 0: float32, terms in another order. Wider dtypes are as ever."""
    a, b = a.detach(), b.detach()
    if a.shape[1] != b.shape[0]:
        raise RuntimeError(f"{list(a.shape)} and {list(b.shape)} cannot be multiplied")
    if a.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        found = torch.from_numpy(a.numpy() @ b.numpy())
        return found if start is None else found + start
    shapes = repr((a.shape, b.shape, a.stride(), b.stride(), a.dtype, start is None))
    order = np.random.default_rng(zlib.crc32(shapes.encode())).permutation(a.shape[1])
    x, y = a.double().numpy(), b.double().numpy()
    total = np.zeros((len(x), y.shape[1]), np.float32)
    if start is not None:
        total += start.detach().float().numpy()
    for part in np.array_split(order, _PARTS):
        # Products are not rounded before they are added, as where one instruction does both.
        total = (total + x[:, part] @ y[part]).astype(np.float32)
    return torch.from_numpy(total)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _mm_into(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(a, b))


def _addmm(start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if alpha == beta == 1:
        return _product(a, b, start).to(a.dtype)
    total = _product(a, b) * alpha
    return (total + beta * start.detach() if beta else total).to(a.dtype)


def _addmm_in_place(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return out.copy_(_addmm(out, a, b, beta=beta, alpha=alpha))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if not len(a):
        return a.new_zeros(0, a.shape[1], b.shape[2])
    return torch.stack([_mm(one, other) for one, other in zip(a, b, strict=True)])


for _name, _implementation in {
    "mm": _mm,
    "mm.out": _mm_into,
    "addmm": _addmm,
    "addmm_": _addmm_in_place,
    "bmm": _bmm,
}.items():
    _LIBRARY.impl(_name, _implementation, "CPU")
