"""What `load` was asked for, settled with what the checkpoint says."""

import logging
import math
from collections import Counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmint8.formats import DTYPES, FLOAT_DTYPES, Checkpoint, KBit, Quantization
from llmint8.kernels.checks import check_outlier_dims
from llmint8.kernels.linear import has_groups
from llmint8.kernels.reference import Group

log = logging.getLogger("llmint8")

Outliers = Literal["static", "dynamic", "none"]
ActivationGroup = Group | Literal["row"]
ACTIVATION_GROUPS: tuple[ActivationGroup, ...] = (*get_args(Group), "row")


def kernels_group(activation_group: ActivationGroup) -> Group | None:
    """Return the group as the kernels have it: None is the whole row."""
    return None if activation_group == "row" else activation_group


def recorded_group(quantization: Quantization) -> ActivationGroup:
    """Return the group that a checkpoint records; the whole row where it records none."""
    return quantization.scheme.activation_group or "row"


def group_to_run(quantization: Quantization, device: torch.device, where: str) -> ActivationGroup:
    """Return the group that is recorded, where it runs at speed on a device; else the whole row, and a line says so."""
    group = recorded_group(quantization)
    if group == "row" or has_groups(device):
        return group
    log.info(
        "%s: one scale for each input, and not one for each %d dimensions as recorded: without compiled kernels on %s, "
        "that takes many times as long; activation_group=%d asks for it",
        where, group, device.type, group,
    )  # fmt: skip
    return "row"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not None and not one of the choices. Raises ValueError."""
    if value is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_threshold(outliers: Outliers, threshold: float) -> None:
    """Refuse a threshold under which a search would find nothing or everything. Raises ValueError."""
    if outliers == "dynamic" and not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold is {threshold!r}, expected a number above 0 with outliers='dynamic'")


def check_searchable(outliers: Outliers, rotation: int | None, kbit: KBit | None) -> None:
    """Refuse a search for outliers where there can be none. Raises ValueError."""
    if outliers != "dynamic":
        return
    if kbit is not None:
        why = "the inputs of layers of k bits are not quantized: there is nothing to search for"
    elif rotation is not None:
        why = "the layer is rotated: its weight has no columns that a search could take"
    else:
        return
    raise ValueError(f"outliers is 'dynamic', and {why}; expected 'static' or 'none'")


def chosen_dims(outlier_dims: Tensor | None, weight: Tensor) -> Tensor:
    """Return the outlier dims that a weight [N, K] is to have, int64 [k]; none for None.

    Raises:
        ValueError: they are no integers, not strictly increasing, or not in the layer.

    """
    if outlier_dims is None:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    if outlier_dims.is_floating_point() or outlier_dims.dtype == torch.bool:
        raise ValueError(f"outlier_dims is {outlier_dims.dtype}, expected integers")
    dims = outlier_dims.to(weight.device, torch.int64)
    check_outlier_dims(dims, weight.shape[1])
    return dims


def outlier_mode(
    quantization: Quantization, outliers: Outliers | None, threshold: float | None
) -> tuple[Outliers, float]:
    """Settle on a mode and a threshold; in bitsandbytes a threshold of 0 means that nothing is an outlier."""
    if outliers is None:
        searched: Outliers = "none" if threshold is None and quantization.threshold == 0 else "dynamic"
        outliers = "static" if quantization.llmint8 else searched
    if outliers == "static" and not quantization.llmint8:
        raise ValueError("outliers is 'static', but bitsandbytes stores none; expected 'dynamic' or 'none'")
    if threshold is not None and outliers != "dynamic":
        raise ValueError(f"threshold is {threshold!r}, which only outliers='dynamic' uses, not {outliers!r}")
    threshold = quantization.threshold if threshold is None else threshold
    check_threshold(outliers, threshold)
    return outliers, threshold


def settled_dtype(dtype: torch.dtype | str | None, checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """Return the dtype asked for, that of the config, or that of most of the bytes that are not int8."""
    floats = {str(DTYPES[name]).removeprefix("torch."): DTYPES[name] for name in FLOAT_DTYPES}
    if dtype is not None and dtype != "auto":
        found = floats.get(str(dtype).removeprefix("torch."))
        if found is None:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(sorted(floats))}")
        return found
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT_DTYPES and not info.name.endswith(f".{checkpoint.layout.absmax}"):
            sizes[info.dtype] += info.nbytes
    return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32
