"""The experts of a mixture, which transformers 5 has as stacks of matrices: found in a model, named, and computed.

Modules that its experts interface knows (`use_experts_implementation`) say of themselves how they are laid out. A
source has a tensor for each matrix of each expert, as Mixtral does, or one for those of all experts, as gpt-oss does.
In an int8 checkpoint each matrix of each expert is a layer of its own (spec.md, section 17), named as its tensor; of a
tensor `T` of all experts they are `T.0`, `T.1` and so on.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from llmint8.kernels.routing import by_expert

from .names import fused_parameters, module_names

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts")
# What transformers does to tensors of single experts: stack them, and put gate and up side by side.
_STACKED = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert.

    Attributes:
        name: of the layer in the checkpoint.
        tensor: the source's tensor, its own or that of all experts.
        shared: whether it is that of all experts, [E, ...].
        transposed: whether it is stored [in, out].
        experts: name of the module of the experts, in the model.
        projection: of that module, `gate_up_proj`, `up_proj` or `down_proj`.
        part: which of several matrices it is whose outputs stand one behind the other in the projection.
        expert: its number.

    """

    name: str
    tensor: str
    shared: bool
    transposed: bool
    experts: str
    projection: str
    part: int
    expert: int

    @property
    def inside(self) -> str:
        """Where its layer is in the module of the experts, as transformers renames it on loading."""
        return f"{self.projection}.{self.expert}" if self.shared else f"{self.expert}.{self.name.rpartition('.')[2]}"

    @property
    def module(self) -> str:
        """Where its layer is in the model."""
        return f"{self.experts}.{self.inside}"


def projections(experts: Any) -> tuple[str, str]:
    """Return the names of the two projections of a module of experts."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def experts_of(model: Any) -> dict[str, Any]:
    """Return the modules of experts in a model by their names: those whose layout is known."""
    found = {}
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in _INTERFACE):
            stacks = [getattr(module, projection, None) for projection in projections(module)]
            if all(isinstance(stack, nn.Parameter) and stack.ndim == 3 for stack in stacks):
                found[name] = module
    return found


def expert_matrices(model: Any, tensor_names: Collection[str]) -> list[ExpertMatrix]:
    """Return the matrices of all experts, for modules of which all matrices are among the tensors.

    Args:
        model: a transformers model on the meta device.
        tensor_names: those of a source, or of an int8 checkpoint.

    """
    modules = experts_of(model)
    if not modules:
        return []
    # Of an int8 checkpoint, `T.3.weight` stands for a part of T.
    numbered = {match[1] for name in tensor_names if (match := re.fullmatch(r"(.*)\.\d+\.weight", name))}
    names = [*tensor_names, *(name for name in numbered if name not in tensor_names)]
    tensor_of = {parameter: tensor for tensor, parameter in module_names(model, names).items()}
    fused = fused_parameters(model, names)
    found: list[ExpertMatrix] = []
    for name, module in modules.items():
        of_module: list[ExpertMatrix] = []
        for projection in projections(module):
            parameter = f"{name}.{projection}"
            if parameter in tensor_of:
                of_module += _of_all(module, tensor_of[parameter], name, projection)
            elif parameter in fused:
                of_module += _of_each(module, fused[parameter], name, projection)
        if len({matrix.projection for matrix in of_module}) == 2:
            found += of_module
    return found


def in_order(model: Any, layers: Collection[str], matrices: Iterable[ExpertMatrix]) -> list[str]:
    """Return the names of layers as a model has them, those of experts where their module is."""
    inside: dict[str, list[str]] = defaultdict(list)
    for matrix in matrices:
        inside[matrix.experts].append(matrix.module)
    found: list[str] = []
    for name, _ in model.named_modules():
        found += [name] if name in layers else inside.get(name, [])
    return found


def _of_all(module: Any, tensor: str, experts: str, projection: str) -> Iterator[ExpertMatrix]:
    for expert in range(module.num_experts):
        yield ExpertMatrix(
            f"{tensor}.{expert}", tensor, True, module.is_transposed, experts, projection, part=0, expert=expert
        )


def _of_each(module: Any, fused: Any, experts: str, projection: str) -> list[ExpertMatrix]:
    """Return the matrices of tensors that transformers stacks; none where it does anything else with them."""
    if [type(operation).__name__ for operation in fused.operations] not in _STACKED or module.is_transposed:
        return []
    by_pattern = defaultdict(list)
    for tensor, pattern in fused.parts:
        by_pattern[pattern].append(tensor)
    found = []
    for part, pattern in enumerate(fused.patterns):
        tensors = sorted(by_pattern[pattern], key=dot_natural_key)
        if len(tensors) != module.num_experts or not all(tensor.endswith(".weight") for tensor in tensors):
            return []
        found += [
            ExpertMatrix(tensor.removesuffix(".weight"), tensor, False, False, experts, projection, part, expert)
            for expert, tensor in enumerate(tensors)
        ]
    return found


MultiplyRows = Callable[[str, Tensor, Tensor], Tensor]


def run_experts(experts: Any, multiply: MultiplyRows, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute what a module of experts does in transformers.

    Args:
        experts: the module, or what has taken its place: of its parameters it needs only the biases.
        multiply: computes one projection of all rows, without a bias: for its name, x [T or T * R, K] and the expert of
            each of the T * R rows.
        hidden: the tokens [T, H].
        index: int [T, R], the experts of each token; a number from `num_experts` on is that of none.
        weights: [T, R], what their outputs count.

    """
    if not len(hidden):
        return torch.zeros_like(hidden)
    of_row = index.reshape(-1)

    def projected(name: str, x: Tensor) -> Tensor:
        found = multiply(name, x, of_row)
        return found + getattr(experts, f"{name}_bias")[of_row % experts.num_experts] if experts.has_bias else found

    up, down = projections(experts)
    inner = projected(up, hidden)
    out = projected(down, experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner))
    # transformers up to 5.19 has no such experts.
    out = experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out
    out = out * weights.reshape(-1, 1)
    return out.view(*index.shape, -1).sum(1).to(hidden.dtype)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return what the parts of a projection have computed as one, [M, N] of parts that are [M, N1], [M, N2]..."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)


def expert_by_expert(
    matrices: Mapping[tuple[str, int], Sequence[Callable[[Tensor], Tensor]]], num_experts: int
) -> MultiplyRows:
    """Multiply rows expert by expert.

    Args:
        matrices: projection and number of an expert -> what computes each part for x [M, K]; all see the same tensor.
        num_experts: how many there are.

    """

    def multiply(projection: str, expert: int, x: Tensor) -> Tensor:
        return side_by_side([matrix(x) for matrix in matrices[projection, expert]])

    def multiply_rows(projection: str, x: Tensor, of_row: Tensor) -> Tensor:
        nothing = multiply(projection, 0, x[:0])
        out = nothing.new_zeros(len(of_row), nothing.shape[-1])
        for expert, rows, inputs in by_expert(x, of_row, num_experts):
            out[rows] = multiply(projection, expert, inputs)
        return out

    return multiply_rows
