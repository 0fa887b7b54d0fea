"""How transformers cuts linear layers, taught to do it to int8 ones: a style of ours for each of its own.

transformers' plan names a style for each layer. Its own styles cut parameters only, replicate the bias and take it away
in each call, and know of no outlier columns. Ours let them cut what is loaded, settle what else belongs to a process
(`cut.py`), and put hooks on the layer: the layer itself is a smaller one and knows nothing of the others. A layer that
is not int8 is left to the style of transformers.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _AllReduceBackward, _AllReduceForward

from ..layers.layer import Int8Linear
from .cut import Cut, cut_of, plan_cut

_PREFIX = "llmint8_"


class CutStyle:
    """A style of ours, in the place of one of transformers' (`TensorParallelLayer`)."""

    def __init__(
        self,
        plain: Any,
        by: Literal["outputs", "inputs"],
        *,
        matrices: int = 1,
        enter: Callable[[Tensor, Cut], Tensor] | None = None,
        leave: Callable[[Tensor, Cut], Tensor] | None = None,
    ) -> None:
        """Take transformers' style, what is cut, and what is done to inputs [..., K] and outputs [..., N]."""
        self._plain, self._by, self._matrices = plain, by, matrices
        self._enter, self._leave = enter, leave

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        """Let transformers refuse what it cannot cut."""
        self._plain.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Let transformers read a part of one parameter only, and settle which part of an int8 layer it is."""
        if isinstance(module, Int8Linear) and param == "weight":
            plan_cut(module, self._by, self._matrices, mesh)
        self._plain.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> None:
        """Let a layer take part in what all processes compute."""
        if not isinstance(module, Int8Linear):
            self._plain.install_forward(module, mesh)
            return
        if self._enter is not None:
            module.register_forward_pre_hook(_Entering(self._enter))
        if self._leave is not None:
            module.register_forward_hook(_Leaving(self._leave))


class _Entering:
    def __init__(self, change: Callable[[Tensor, Cut], Tensor]) -> None:
        self._change = change

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        cut = cut_of(layer)
        assert cut is not None
        return self._change(arguments[0], cut)


class _Leaving:
    def __init__(self, change: Callable[[Tensor, Cut], Tensor]) -> None:
        self._change = change

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        cut = cut_of(layer)
        assert cut is not None
        return self._change(output, cut)


def _shared(x: Tensor, cut: Cut) -> Tensor:
    """Add up the gradients of an input that all processes have."""
    made: Tensor = _AllReduceBackward.apply(x, cut.mesh.get_group())
    return made


def _own_part(x: Tensor, cut: Cut) -> Tensor:
    (piece,) = cut.pieces
    return _shared(x, cut)[..., piece.start : piece.stop]


def _added(y: Tensor, cut: Cut) -> Tensor:
    made: Tensor = _AllReduceForward.apply(y.contiguous(), cut.mesh.get_group())
    return made


def _gathered(y: Tensor, cut: Cut) -> Tensor:
    shape = torch.Size((*y.shape[:-1], cut.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        y.contiguous(), cut.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
    ).full_tensor()


# Inside of experts nothing is added up: their module does it with what all of them have computed.
_STYLES: dict[str, tuple[str, Literal["outputs", "inputs"], dict[str, Any]]] = {
    "colwise": ("colwise", "outputs", {"enter": _shared}),
    "colwise_gather_output": ("colwise_gather_output", "outputs", {"enter": _shared, "leave": _gathered}),
    "rowwise": ("rowwise", "inputs", {"leave": _added}),
    "rowwise_split_input": ("rowwise_split_input", "inputs", {"enter": _own_part, "leave": _added}),
    "expert_colwise": ("colwise", "outputs", {}),
    "expert_packed_colwise": ("packed_colwise", "outputs", {"matrices": 2}),
    "expert_rowwise": ("rowwise", "inputs", {}),
}
_SAME = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
# They leave the parameters of a layer alone.
UNCUT = frozenset({"all_reduce", "mla_kv_a_proj", "replicate", "replicated_with_grad_allreduce"})

for _name, (_plain, _by, _how) in _STYLES.items():
    ALL_PARALLEL_STYLES.register(_PREFIX + _name, CutStyle(ALL_PARALLEL_STYLES[_plain], _by, **_how))


def ours(style: str) -> str | None:
    """Return our style in the place of one of transformers', or None where there is none."""
    name = _SAME.get(style, style)
    return _PREFIX + name if name in _STYLES else None


def of_experts(style: str, parts: int) -> str | None:
    """Return our style for the layers of a projection that is made of so many, or None where there is none."""
    name = f"expert_{'colwise' if style == 'packed_colwise' and parts > 1 else style}"
    return _PREFIX + name if name in _STYLES else None
