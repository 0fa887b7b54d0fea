"""The experts of a mixture in int8, in the place of the model's own module of stacks.

Each matrix of each expert is an `Int8Linear` or a `KBitLinear`, under the name that its tensors have in the checkpoint:
so they are loaded, saved, prepared, configured and counted as all layers are, and adapters are put on them. On CUDA all
int8 experts of a projection are multiplied in two launches (`kernels/experts.py`), which read the layers' weights as
one stack; elsewhere, of k bits, and where a gradient is wanted or an adapter stands in the place of a layer, expert by
expert.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmint8.converter.model.experts import (
    ExpertMatrix,
    expert_by_expert,
    projections,
    run_experts,
    side_by_side,
)
from llmint8.formats import LLMInt8Error
from llmint8.kernels.experts import PreparedExperts, prepare_experts
from llmint8.kernels.operators import has_triton

from .layer import Int8Linear
from .linear import QuantizedLinear


class Int8Experts(nn.Module):
    """Experts of a mixture; called as the module that it replaces.

    Attributes:
        num_experts, has_gate, has_bias, ...: as of that module, and all else that its activation reads.
        first_expert: the number of the first, where several processes have some each; None where all are here.

    """

    num_experts: int
    first_expert: int | None = None
    has_bias: bool
    has_gate: bool

    def __init__(self, experts: Any) -> None:
        """Take the place of a module of transformers' experts interface; layers are added by `add`."""
        super().__init__()
        self._kind = type(experts)
        stacks = projections(experts)
        vars(self).update({key: value for key, value in vars(experts).items() if key not in vars(self)})
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in stacks:
                self.register_parameter(name, parameter)
        for name, module in experts.named_children():
            self.add_module(name, module)
        self._places: dict[tuple[str, int], list[tuple[nn.Module, str]]] = defaultdict(list)
        self._prepared: dict[tuple[str, int], tuple[PreparedExperts, list[Any]]] = {}

    def add(self, matrix: ExpertMatrix, layer: QuantizedLinear) -> None:
        """Add the layer of one matrix; those of a projection in the order of their parts."""
        holder: nn.Module = self
        *path, name = matrix.inside.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]  # type: ignore[assignment]
        holder.add_module(name, layer)
        self._places[matrix.projection, matrix.expert - (self.first_expert or 0)].append((holder, name))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        found: Tensor = self._kind._apply_gate(self, gate_up)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, H], the weighted sum of what its experts make of each token.

        Args:
            hidden_states: [T, H].
            top_k_index: int [T, R], the experts of each token.
            top_k_weights: [T, R].

        """
        layers = {key: self.layers_of(*key) for key in self._places}
        wants_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
        grouped = self._is_grouped(hidden_states) and not wants_gradient
        if grouped and all(type(layer) is Int8Linear for parts in layers.values() for layer in parts):
            return run_experts(self, self._multiply_rows, hidden_states, top_k_index, top_k_weights)
        multiply = expert_by_expert(layers, self.num_experts)
        return run_experts(self, multiply, hidden_states, top_k_index, top_k_weights)

    @staticmethod
    def _is_grouped(x: Tensor) -> bool:
        """Tell whether all experts are multiplied at once: where to wait for the GPU would cost more."""
        return x.is_cuda and has_triton()

    def layers_of(self, projection: str, expert: int) -> list[Any]:
        """Return the layers of an expert, or what an adapter has put in their places."""
        return [holder._modules[name] for holder, name in self._places[projection, expert]]

    def _multiply_rows(self, projection: str, x: Tensor, of_row: Tensor) -> Tensor:
        first = self.layers_of(projection, 0)
        parts, activation = range(len(first)), first[0].activation
        return side_by_side([self._prepared_part(projection, part).linear(x, of_row, activation) for part in parts])

    def _prepared_part(self, projection: str, part: int) -> PreparedExperts:
        """Return the weights of one matrix of all experts, made anew when they were moved or changed."""
        layers: list[Int8Linear] = [self.layers_of(projection, one)[part] for one in range(self.num_experts)]
        prepared, made_from = self._prepared.get((projection, part), (None, []))
        here = [layer.prepared for layer in layers]
        if prepared is None or any(one is not other for one, other in zip(here, made_from, strict=True)):
            prepared = prepare_experts([layer.stored() for layer in layers])
            stack = () if prepared.values is None else prepared.values
            for layer, values in zip(layers, stack, strict=False):
                layer.weight = nn.Parameter(values, requires_grad=False)  # the stack is the only copy
                layer.prepare()
            self._prepared[projection, part] = prepared, [layer.prepared for layer in layers]
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along; what is prepared belongs to this machine."""
        return vars(self) | {"_prepared": {}}

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        return f"num_experts={self.num_experts}"


def replace_experts(model: Any, matrices: list[ExpertMatrix], layer_of: Mapping[str, QuantizedLinear]) -> None:
    """Put experts in int8 into the place of the modules that the matrices belong to.

    Args:
        model: on the meta device.
        matrices: of whole modules.
        layer_of: name of a matrix in the checkpoint -> its layer.

    Raises:
        LLMInt8Error: some matrices of a module are int8 in the checkpoint, and others are not.

    """
    made: dict[str, Int8Experts] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.part):
        if matrix.name not in layer_of:
            raise LLMInt8Error(
                f"{matrix.name}: not int8 in the checkpoint, as other experts of {type(model).__name__} are"
            )
        if matrix.experts not in made:
            made[matrix.experts] = Int8Experts(model.get_submodule(matrix.experts))
        made[matrix.experts].add(matrix, layer_of[matrix.name])
    for name, experts in made.items():
        model.set_submodule(name, experts.train(model.get_submodule(name).training))
