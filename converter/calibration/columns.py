"""The columns that stay in 16 bit: those that were chosen, and those of proxy quantization, for which weights are read.

They need no pass; GPTQ wants to know of them in one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..outliers.proxy import deviations, proxy_dims
from ..planning.before import kv_heads
from ..planning.plan import ConversionPlan


def _no_columns(name: str) -> tuple[Tensor, Tensor]:
    raise KeyError(name)


@dataclass(frozen=True)
class Outliers:
    """The outlier columns chosen; none by default.

    `counts` has the calibrated layers only, `statistics` is for the manifest, `notices` are for the user, and `load`
    returns a layer's dims, int32 [k], and columns [N, k].
    """

    counts: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    load: Callable[[str], tuple[Tensor, Tensor]] = _no_columns


class ProxyColumns:
    """Finds the columns of each layer that has another before it; the deviations of each weight are found once."""

    def __init__(self, plan: ConversionPlan) -> None:
        """Take the plan of a conversion whose criterion is `proxy`."""
        self._plan, self._share = plan, plan.criterion.amount
        self._spread: dict[str, Tensor] = {}

    def dims(self, name: str) -> Tensor:
        """Return the dimensions of a layer's input that stay in 16 bit, int64 [k], rising."""
        before = self._plan.before.get(name)
        if before is None:
            return torch.empty(0, dtype=torch.int64)
        if before.name not in self._spread:
            self._spread[before.name] = deviations(before.read_rows(self._plan.source))
        in_features = self._plan.selection.layers[name].in_features
        return proxy_dims(self._spread[before.name], in_features, self._share, kv_heads(self._plan.config))

    def load(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the dims of a layer, int32 [k], and its columns [N, k]."""
        dims, blocks = self.dims(name), self._plan.selection.layers[name].read_rows(self._plan.source)
        return dims.int(), torch.cat([block[:, dims] for block in blocks])


def known_columns(plan: ConversionPlan, at_once: bool = False) -> Outliers:
    """Return the columns that are chosen without a pass: those of proxy quantization, or none.

    They are chosen when they are loaded, or `at_once`, as long as no weight has been released.
    """
    proxy = ProxyColumns(plan)
    for name in plan.before if at_once else ():
        proxy.dims(name)
    counts = {name: plan.columns_of(plan.selection.layers[name]) or 0 for name in plan.before}
    return Outliers(counts, load=proxy.load)
