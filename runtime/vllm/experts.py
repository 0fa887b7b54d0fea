"""The experts of a mixture in int8 in vLLM, as format 2 has them: a record for each matrix of each expert.

vLLM calls the two products of all experts `w13` (gate and up, or up alone) and `w2` (down), and finds the tensors of a
rank by these names. What runs is `kernels/experts.py`: on a GPU all experts of a product in two launches, elsewhere one
after the other. On the CPU vLLM compiles what is inside a mixture, where shapes depend on the tokens; so it is an
operator of its own, which compilers leave alone.

Declined, in one line when the model is built: experts with a bias, and activations with limits of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from llmint8.formats import Layout, LLMInt8Error
from llmint8.kernels.experts import PreparedExperts, prepare_experts
from llmint8.kernels.reference import Int8Weight

from .shards import How, of_inputs

Place = Callable[[Tensor, Tensor, str], None]
# By the name of the layer: an operator takes tensors and strings.
_layers: WeakValueDictionary[str, Any] = WeakValueDictionary()


class Int8ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What vLLM's experts call for their weights.

    Attributes:
        name: of the experts in vLLM.
        layout: what tensors are called in the checkpoint.
        most: the most outlier columns that a matrix of `w13` and of `w2` has.
        hows: how they are multiplied.

    """

    def __init__(self, layer: Any, name: str, layout: Layout, most: Mapping[str, int], hows: Mapping[str, How]) -> None:
        """Take what the checkpoint says of all experts. Raises LLMInt8Error: they are of a kind that is declined."""
        moe = layer.moe_config
        super().__init__(moe)
        self.name, self.layout, self.most, self.hows = name, layout, most, hows
        if moe.has_bias or (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta) != (None, None, None):
            raise LLMInt8Error(f"{name}: int8 experts with a bias or a limit are not for vLLM; take runtime.load")
        if layer.apply_router_weight_on_input:
            raise LLMInt8Error(f"{name}: int8 experts whose inputs are weighted are not for vLLM; take runtime.load")
        _layers[name] = layer

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: it is for vLLM's own kernels."""
        return

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Make the tensors of this rank, to be loaded."""
        inner, rank = intermediate_size_per_partition, self.moe.tp_rank
        own = slice(rank * inner, (rank + 1) * inner)  # of what is between the products

        def add(stem: str, name: str, data: Tensor, place: Place) -> None:
            def loader(
                param: Tensor,
                loaded_weight: Tensor,
                weight_name: str,
                shard_id: str,
                expert_id: int,
                return_success: bool = False,
            ) -> bool | None:
                here = layer._map_global_expert_id_to_local_expert_id(expert_id)
                if here != -1:
                    place(param.data[here], loaded_weight, shard_id)
                return here != -1 if return_success else None

            parameter = nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = loader  # type: ignore[attr-defined]
            layer.register_parameter(f"{stem}_{name}", parameter)

        def rows(data: Tensor, loaded: Tensor, shard: str) -> None:
            start = inner if shard == "w3" else 0
            part, loaded = (data, loaded) if shard == "w2" else (data[start : start + inner], loaded[own])
            part[(..., slice(loaded.shape[1])) if loaded.ndim == 2 else ...] = loaded

        def values(data: Tensor, loaded: Tensor, shard: str) -> None:
            rows(data, loaded[:, own] if shard == "w2" else loaded, shard)

        def dims(data: Tensor, loaded: Tensor, shard: str) -> None:
            part = data[1 if shard == "w3" else 0]
            part[0], part[1 : 1 + len(loaded)] = len(loaded), loaded

        for stem, n, k in (("w13", self._parts * inner, hidden_size), ("w2", hidden_size, inner)):
            most, parts = self.most[stem], self._parts if stem == "w13" else 1
            add(stem, "weight", torch.empty(num_experts, n, k, dtype=torch.int8), values)
            add(stem, self.layout.absmax, torch.empty(num_experts, n, dtype=torch.float32), rows)
            # How many, and then which.
            add(stem, "outlier_dims", torch.zeros(num_experts, parts, 1 + most, dtype=torch.int32), dims)
            add(stem, "outlier_weight", torch.zeros(num_experts, n, most, dtype=params_dtype), rows)

    @property
    def _parts(self) -> int:
        return 2 if self.moe.is_act_and_mul else 1

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepare the experts of this rank, and give up the tensors that were loaded."""
        inner = layer.intermediate_size_per_partition
        try:
            layer.int8_up = self._prepared(layer, "w13", 0, layer.w13_weight.shape[2])
            layer.int8_down = self._prepared(layer, "w2", self.moe.tp_rank * inner, self.moe.tp_size * inner)
        except ValueError as error:
            raise LLMInt8Error(f"{self.name}: {error}") from None
        for stem in ("w13", "w2"):
            for name in ("weight", self.layout.absmax, "outlier_dims", "outlier_weight"):
                delattr(layer, f"{stem}_{name}")

    def _prepared(self, layer: Any, stem: str, start: int, inputs: int) -> list[PreparedExperts]:
        """Return the products of `w13` or `w2`: one where gate and up have the same outlier dims in every expert."""
        names = ("weight", self.layout.absmax, "outlier_weight", "outlier_dims")
        values, absmax, columns, dims = (getattr(layer, f"{stem}_{name}").data for name in names)
        parts = 1 if bool((dims == dims[:, :1]).all()) else dims.shape[1]
        size, how = values.shape[1] // parts, self.hows[stem]
        products = []
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            weights = []
            for expert, (count, *_) in enumerate(dims[:, part].tolist()):
                outliers = dims[expert, part, 1 : 1 + count], columns[expert, rows, :count]
                own = values[expert, rows], absmax[expert, rows], *outliers
                weight = Int8Weight(*own, group=how.group, rotation=how.rotation)
                weights.append(of_inputs(weight, start, inputs))
            products.append(prepare_experts(weights))
        return products

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return [T, H], the weighted sum of what its experts make of each token; x is [T, H], the others [T, R]."""
        made: Tensor = _experts(x, topk_weights, topk_ids, self.name)
        return made


@torch.library.custom_op("llmint8::vllm_experts", mutates_args=())
def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    layer = _layers[name]
    activation = layer.quant_method.hows["w13"].activation
    of_row = topk_ids.flatten().long()
    if layer.expert_map is not None:
        of_row = layer.expert_map[of_row].long()  # -1 for those of other ranks, which give 0
    up = torch.cat([experts.linear(x, of_row, activation) for experts in layer.int8_up], 1)
    inner = up.new_empty(len(up), layer.intermediate_size_per_partition)
    apply_moe_activation(layer.activation, inner, up)
    (down,) = layer.int8_down
    out = down.linear(inner, of_row, activation).view(*topk_ids.shape, -1)
    weighted: Tensor = (out * topk_weights[..., None]).sum(1)
    return weighted.to(x.dtype)


@_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
