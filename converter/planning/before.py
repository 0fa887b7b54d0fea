"""Which layer of a source is before which, for proxy quantization: the one whose weights make its inputs."""

from itertools import groupby
from typing import Any

from transformers.pytorch_utils import Conv1D

from llmint8.formats import Source

from ..model.experts import ExpertMatrix, in_order
from ..outliers.proxy import Linear, layers_before
from .selected import SelectedLayer, Selection

_LAST = "down_proj"  # of an expert; see `experts.projections`


def kv_heads(config: Any | None) -> int | None:
    """Return how many heads of keys and values a model has, where its config says it."""
    found = None if config is None else getattr(config.get_text_config(), "num_key_value_heads", None)
    return found if type(found) is int and found > 0 else None


def weights_before(source: Source, model: Any | None, selection: Selection) -> dict[str, SelectedLayer]:
    """Return layer to quantize -> the one before it, which may be one that is left alone; see `proxy.py`.

    Of an expert's last matrix that is the one of its first projection that is not the gate. Experts are before no
    other layer: what goes on from them is a sum over experts.
    """
    heads = None if model is None else kv_heads(model.config)
    every = _linears(source, model, selection)
    module_of, experts = selection.module_of, selection.experts
    order = list(every)
    if model is not None:
        name_of = {module_of[name]: name for name in every}
        order = [name_of[module] for module in in_order(model, name_of, experts.values())]
    dense = [every[name] for name in order if name not in experts]
    before = layers_before(list(map(_linear, dense)), heads)
    for _, together in groupby((experts[name] for name in order if name in experts), lambda matrix: matrix.experts):
        matrices = list(together)
        ahead = [every[name] for name in order[: order.index(matrices[0].name)] if name not in experts]
        first = layers_before(list(map(_linear, [*ahead, every[matrices[0].name]])), heads).get(matrices[0].name)
        before |= _inside(matrices, first, every)
    return {name: every[other] for name, other in before.items() if name in selection.layers}


def _inside(matrices: list[ExpertMatrix], first: str | None, every: dict[str, SelectedLayer]) -> dict[str, str]:
    """Return matrix -> the one before it, for a module of experts with the layer `first` before all of it."""
    found = {} if first is None else {one.name: first for one in matrices if one.projection != _LAST}
    # Gate and up are parts 0 and 1; where they are one matrix, nothing tells its rows apart.
    ups = {one.expert: one.name for one in sorted(matrices, key=lambda one: one.part) if one.projection != _LAST}
    lasts = {one.name: ups[one.expert] for one in matrices if one.projection == _LAST and one.expert in ups}
    return found | {n: up for n, up in lasts.items() if every[up].out_features == every[n].in_features}


def _linears(source: Source, model: Any | None, selection: Selection) -> dict[str, SelectedLayer]:
    """Return all linear layers that are tensors of their own, quantized or not."""
    found = {}
    for name, module in selection.module_of.items():
        info = source.tensors.get(f"{name}.weight")
        if name in selection.layers:
            found[name] = selection.layers[name]
        elif info is not None and len(info.shape) == 2:
            transposed = model is not None and isinstance(model.get_submodule(module), Conv1D)
            found[name] = SelectedLayer(name, info, transposed)
    return found


def _linear(layer: SelectedLayer) -> Linear:
    return Linear(layer.name, layer.out_features, layer.in_features)
