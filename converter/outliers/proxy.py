"""Proxy quantization: columns that stay in 16 bit, chosen from the weights alone (arXiv 2212.09720, section 3).

The standard deviation of the weights that make a hidden unit stands for how large that unit will be: of the inputs of a
layer those stay in 16 bit whose weights in the layer before spread most. No calibration is needed, and no model code.

Which layer is the one before is known by names and shapes: of an output projection of attention the values, of which a
head of keys and values counts for every head that it serves; of the last matrix of an MLP the one that is not the gate;
of all others the closest layer before them with as many outputs as they have inputs, which adds to the same stream. Of
some layers there is none: of the first ones, and where queries, keys and values are one matrix.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_QUERIES_AND_KEYS = re.compile(r"(^|_)(q|k|query|key)(_proj|_lin|s)?$")
_VALUES = re.compile(r"(^|_)(v|value)(_proj|_lin|s)?$")
_FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)
_GATES = re.compile(r"gate|router")


class Linear(NamedTuple):
    """A linear layer of a model: its name, N and K."""

    name: str
    out_features: int
    in_features: int


def layers_before(linears: Sequence[Linear], kv_heads: int | None = None) -> dict[str, str]:
    """Return layer -> the layer before it, where there is one.

    Args:
        linears: all linear layers of a model, in its order.
        kv_heads: how many heads keys and values have, where they may be fewer than those of the queries.

    """
    found = {}
    for place, layer in enumerate(linears):
        for before in reversed(linears[:place]):
            own, other = layer.name.rpartition(".")[2], before.name.rpartition(".")[2]
            attends = any(kind.search(own) for kind in (_QUERIES_AND_KEYS, _VALUES, _FUSED))
            if _FUSED.search(other) and not attends and before is linears[place - 1]:
                break
            if any(kind.search(other) for kind in (_QUERIES_AND_KEYS, _FUSED, _GATES)):
                continue
            values = _VALUES.search(other) is not None
            served = layer.in_features // max(1, before.out_features) if values and kv_heads else 1
            if (values and attends) or before.out_features * served != layer.in_features:
                continue
            found[layer.name] = before.name
            break
    return found


def deviations(blocks: Iterable[Tensor]) -> Tensor:
    """Return the standard deviation of each row of a weight, float32 [N], from blocks of its rows [n, K]."""
    return torch.cat([block.float().std(1, correction=0).cpu() for block in blocks])


def proxy_count(in_features: int, share: float) -> int:
    """Return how many columns are a share of K, at least one."""
    return max(1, min(in_features, round(share * in_features)))


def proxy_dims(spread: Tensor, in_features: int, share: float, kv_heads: int | None = None) -> Tensor:
    """Return the columns that stay in 16 bit, int64 [k], rising.

    Args:
        spread: the deviations of the layer before, float32 [N]; where these are fewer than K, each head of keys and
            values serves several heads that follow each other.
        in_features: K.
        share: of the columns.
        kv_heads: how many heads of keys and values there are.

    """
    if len(spread) < in_features:
        heads = spread.view(kv_heads or 1, -1)
        spread = heads.repeat_interleave(in_features // len(spread), 0).flatten()
    return spread.argsort(descending=True, stable=True)[: proxy_count(in_features, share)].sort().values
