"""An int8 layer in vLLM: the tensors it is loaded into, and what they become.

vLLM makes the tensors before it loads, gives each rank its part of what the files hold, and stacks matrices into merged
layers. It does so by an attribute of a tensor, `output_dim` or `input_dim`, which tells along what it is divided. What
it has no word for, outlier dims, is loaded here: those of each matrix, and whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.model_executor.layers.linear import LinearMethodBase

from llmint8.formats import Layout, LLMInt8Error

from .shards import How, Int8Rows, Matrix, joined, of_inputs

Loader = Callable[..., None]
# What vLLM calls the matrices of attention in a merged layer; those of others have numbers.
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class Int8LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What a linear layer of vLLM calls for its weight.

    Attributes:
        name: of the layer.
        layout: what its tensors are called in the checkpoint.
        counts: the number of outlier columns of each of its matrices.
        hows: how each of them is multiplied.

    """

    def __init__(self, name: str, layout: Layout, counts: Sequence[int], hows: Sequence[How]) -> None:
        """Take what the checkpoint says of the matrices that are merged, in their order."""
        self.name, self.layout, self.counts, self.hows = name, layout, counts, hows

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Loader,
        **_: Any,
    ) -> None:
        """Make the tensors of this rank, to be loaded."""
        n, k, most = sum(output_partition_sizes), input_size_per_partition, max(self.counts)
        sizes = output_partition_sizes
        if len(self.counts) == 1:  # merged in the checkpoint already, if at all, with outliers in common
            sizes = [n]
        if len(sizes) != len(self.counts):
            raise LLMInt8Error(f"{self.name}: {len(sizes)} matrices in vLLM, {len(self.counts)} in the checkpoint")
        layer.int8_sizes, layer.int8_inputs = sizes, input_size

        def add(name: str, data: Tensor, loader: Loader, **dims: int) -> None:
            parameter = nn.Parameter(data, requires_grad=False)
            vars(parameter).update(weight_loader=loader, **dims)
            layer.register_parameter(name, parameter)

        values = torch.empty(n, k, dtype=torch.int8)
        add("weight", values, _as_stored(weight_loader), output_dim=0, input_dim=1)
        add(self.layout.absmax, torch.empty(n, dtype=torch.float32), weight_loader, output_dim=0)
        if self.layout.weight_format:
            add("weight_format", torch.zeros((), dtype=torch.uint8), lambda *_: None)
        dims = torch.arange(most, dtype=torch.int32).repeat(len(sizes), 1)
        add("outlier_dims", dims, _load_dims)
        columns = torch.empty(n, most, dtype=params_dtype)
        add("outlier_weight", columns, _padded(weight_loader), output_dim=0)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the tensors out for the operators, and give up those that are not needed any more."""
        absmax, dims = getattr(layer, self.layout.absmax).data, layer.outlier_dims.data
        matrices = [
            Matrix(rows, own[:count], how)
            for rows, own, count, how in zip(layer.int8_sizes, dims, self.counts, self.hows, strict=True)
        ]
        first = 0 if layer.weight.shape[1] == layer.int8_inputs else layer.tp_rank * layer.weight.shape[1]
        products = joined(layer.weight.data, absmax, layer.outlier_weight.data, matrices)
        layer.int8_rows, layer.int8_products = [], nn.ModuleList()
        try:
            for rows, weight, activation in products:
                layer.int8_rows.append(rows)
                layer.int8_products.append(Int8Rows(of_inputs(weight, first, layer.int8_inputs), activation))
        except ValueError as error:
            raise LLMInt8Error(f"{self.name}: {error}") from None
        for name in (*self.layout.weight_suffixes()[1:], "outlier_dims", "outlier_weight"):
            delattr(layer, name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer for x [..., K]: [..., N] in its dtype."""
        inputs = x.reshape(-1, x.shape[-1])
        made = [
            product(inputs, None if bias is None else bias[rows])
            for rows, product in zip(layer.int8_rows, layer.int8_products, strict=True)
        ]
        out = made[0] if len(made) == 1 else torch.cat(made, 1)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _as_stored(load: Loader) -> Loader:
    """Undo what vLLM does to weights of GPT-2 and its kind: 16-bit ones are stored [in, out], int8 ones never are."""

    def loader(parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
        transposed = not loaded.is_contiguous() and loaded.t().is_contiguous()
        load(parameter, loaded.t() if transposed else loaded, *shard)

    return loader


def _padded(load: Loader) -> Loader:
    """Load columns into the first of those that there is room for."""

    def loader(parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
        load(parameter, pad(loaded, (0, parameter.shape[1] - loaded.shape[1])), *shard)

    return loader


def _load_dims(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
    """Load the outlier dims of one matrix into its row; without a shard, those of all that are in one tensor."""
    row = slice(None) if shard is None else _ATTENTION.get(shard, shard)
    parameter.data[row, ..., : len(loaded)] = loaded
