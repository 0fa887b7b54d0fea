"""Weights that the model's own code takes, outside of their layers.

Two ways lead to them, and both are taken. The model runs on the meta device, which takes no memory and no weights; that
shows what a helper in some other place does, in the branches that are run. And the code of its modules is read: what it
says of `self.proj.weight` counts whether that branch is run or not. Of code that cannot be read, and that no run
reaches, nothing is known.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from ..machine import same_random_numbers
from .inputs import runs
from .mentions import weights_mentioned

log = logging.getLogger("llmint8")


def weights_used_directly(model: Any, layers: Iterable[str], or_its_dtype: bool = False) -> set[str]:
    """Return the linear layers whose weight the model's own code takes, as Mamba does with that of `dt_proj`.

    Such a weight must stay what it is. So must one whose dtype something is cast to, which would become int8: the code
    of modules is looked through for that, but what has int8 in mind may look at the dtype.

    Args:
        model: a transformers model on the meta device; used up by this.
        layers: names of linear modules in it.
        or_its_dtype: return those too of which any code that runs looks at the weight's dtype.

    """
    names = list(layers)
    used = weights_mentioned(model.eval(), names)
    weights = {}
    for name in names:
        module = model.get_submodule(name)
        weights[id(module.weight)] = name
        out_features = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        module.forward = lambda x, n=out_features: x.new_empty(*x.shape[:-1], n)
    watch = _WeightWatch(weights, or_its_dtype)
    finished = set()
    for run in runs(model, torch.zeros(1, 8, dtype=torch.long, device="meta")):
        if run.what in finished:
            continue
        try:
            with same_random_numbers(), torch.inference_mode(), watch:
                (model if run.method == "forward" else getattr(model, run.method))(**run.arguments)
            finished.add(run.what)
        except Exception as error:  # whatever the model's code raises without data
            log.debug("%s does not run on the meta device: %s: %s", type(model).__name__, run.what, error)
    return used | watch.used


class _WeightWatch(TorchFunctionMode):
    """Notes which of some parameters an operation is given; reading an attribute does not count, but `dtype` may."""

    def __init__(self, weights: dict[int, str], dtype_counts: bool) -> None:
        super().__init__()
        self._weights, self._dtype_counts = weights, dtype_counts
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(func, "__name__", "") == "__get__"
        if not attribute or (self._dtype_counts and func.__self__ is Tensor.dtype):
            leaves = tree_leaves((args, kwargs))
            self.used.update(self._weights[id(leaf)] for leaf in leaves if id(leaf) in self._weights)
        return func(*args, **(kwargs or {}))
