"""Forward passes through a model whose weights are never in memory together.

The parameters stand on the meta device. A linear layer that is to be converted hands its input and its weight to the
caller and computes its output in blocks of rows. Every other operation that takes a parameter gets the tensor read
from the source in its place, for that one operation: a torch function mode sees them all, so it does not matter how a
model's code comes by its weights. The next linear weight is read ahead in a thread.

Activations are float32. The output head is not run unless it is to be converted: nothing after it matters here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..model.buffers import computed_parameters, fill_computed
from ..model.experts import ExpertMatrix, expert_by_expert, run_experts
from ..model.missing import without_pooler
from ..model.names import FusedParameter
from ..planning.selected import SelectedLayer
from .reading_ahead import Read, ReadAhead


class LinearCall(NamedTuple):
    """What a linear layer does when it is reached; tensors are on the device of the pass."""

    name: str
    x: Tensor  # its input [..., K], the object that the model passes around
    rows: Tensor  # the same, float32 [M, K]
    weight: Tensor | None  # [N, K] as stored; None where the output was known
    out: Tensor  # its output without bias, float32 [M, N]


OnLinear = Callable[[LinearCall], None]
# A layer's name, its input [..., K], the same as rows float32 [M, K], its weight [N, K] -> float32 [M, N] without bias.
Multiply = Callable[[str, Tensor, Tensor, Tensor], Tensor]

# Attributes of a parameter that are a tensor.
_VIEWS = (Tensor.T, Tensor.H, Tensor.mT, Tensor.mH, Tensor.data)
# How much of a weight is widened to float32 at a time.
_BLOCK_ELEMENTS = 1 << 22


@contextmanager
def streamed(
    model: Any,
    tensor_of: Mapping[str, str],
    fused: Mapping[str, FusedParameter],
    layers: Mapping[str, str],
    experts: Mapping[str, Sequence[tuple[ExpertMatrix, SelectedLayer]]],
    outputs: Mapping[str, Callable[[], Tensor]],
    read: Read,
    on_linear: OnLinear,
    device: torch.device,
    multiply: Multiply = lambda name, x, rows, weight: blockwise_linear(rows, weight),
) -> Iterator[Callable[[str | Callable[..., Any], Mapping[str, Any]], None]]:
    """Return what calls a method of the model, or a function that does, with `on_linear` for each layer any rows reach.

    The method may raise whatever the model's code raises, when it needs a weight that the source has not, or does with
    a parameter what cannot be done on the meta device. Layers reached before that have been handed on.

    Args:
        model: a transformers model on the meta device; used up by the pass, but its buffers have their values then.
        tensor_of: parameter or buffer name in the model -> tensor name in the source.
        fused: parameter name in the model -> how it is made of several tensors.
        layers: module name in the model -> tensor name of its weight, in the order expected.
        experts: module name in the model -> all of its matrices, each with its layer.
        outputs: module name in the model -> what loads the output of its first call in an earlier run, float32 [M, N]
            without bias; the weight is then not read for it.
        read: returns a tensor of the source, on the CPU; for the weights of `layers` it is called in a thread.
        on_linear: takes what each layer saw, call by call.
        device: where the pass runs.
        multiply: computes the output of a layer; the product with its weight by default.

    """
    model.eval()
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):  # parts of a model may have one of their own
            module.config.use_cache = False  # keys and values of all layers would outlive them
    without_pooler(model, model.state_dict().keys() - tensor_of.keys() - fused.keys())
    _fill_buffers(model, tensor_of, read, device)
    with ReadAhead(read, [weight for name, weight in layers.items() if name not in outputs]) as ahead:
        for name, weight in layers.items():
            bias = tensor_of.get(f"{name}.bias")
            module = model.get_submodule(name)
            transposed = isinstance(module, Conv1D)
            out_features: Any = module.nf if isinstance(module, Conv1D) else module.out_features
            what = name, out_features, transposed, weight, bias, outputs.get(name)
            module.forward = _StreamedLinear(*what, ahead.get, on_linear, device, multiply)
        for name, matrices in experts.items():
            of_experts = defaultdict(list)
            for matrix, layer in sorted(matrices, key=lambda one: one[0].part):
                own = matrix.module, layer.out_features, layer.transposed, layer.weight.name, None
                streamed_one = _StreamedLinear(*own, outputs.get(matrix.module), read, on_linear, device, multiply)
                of_experts[matrix.projection, matrix.expert].append(streamed_one)
            module = model.get_submodule(name)
            module.forward = partial(run_experts, module, expert_by_expert(of_experts, module.num_experts))
        head = model.get_output_embeddings()
        # What some models call so is the embedding, which they need.
        if head is not None and not isinstance(head, nn.Embedding):
            head.forward = _first_logits(head.forward if isinstance(head.forward, _StreamedLinear) else None)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others hand parameters to operators that no mode sees
        parameters: dict[int, Callable[[], Tensor]] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        computed = computed_parameters(
            model, [name for name, _ in named if name not in tensor_of.keys() | fused.keys()]
        )
        for name, parameter in named:
            if name in tensor_of:
                parameters[id(parameter)] = partial(read, tensor_of[name])
            elif name in fused:
                parameters[id(parameter)] = partial(fused[name].build, read, model)
            elif name in computed:
                parameters[id(parameter)] = partial(computed.__getitem__, name)
        # Some models make parameters outside of the meta device: memory that nobody wrote to.
        missing = {id(parameter) for _, parameter in named} - parameters.keys()

        def call(method: str | Callable[..., Any], arguments: Mapping[str, Any]) -> None:
            with torch.inference_mode(), _SourceParameters(parameters, missing, device):
                called = model if method == "forward" else method if callable(method) else getattr(model, method)
                called(**arguments)

        yield call


def _first_logits(head: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """Return the forward of a head that gives one logit for each token: those of a vocabulary outweigh all else."""
    return lambda x: x[..., :1] if head is None else head(x)[..., :1].clone()


class _StreamedLinear:
    """The forward of a linear layer whose weight is read when it is called."""

    def __init__(
        self,
        name: str,
        out_features: int,
        transposed: bool,
        weight: str,
        bias: str | None,
        known: Callable[[], Tensor] | None,
        read: Read,
        on_linear: OnLinear,
        device: torch.device,
        multiply: Multiply,
    ) -> None:
        self._name, self._weight, self._bias, self._known = name, weight, bias, known
        self._out_features, self._transposed = out_features, transposed
        self._read, self._on_linear, self._device, self._multiply = read, on_linear, device, multiply

    def __call__(self, x: Tensor) -> Tensor:
        # Everything below has real tensors; the mode would only slow it down.
        with torch._C.DisableTorchFunction():
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):  # an expert without a token: nothing to learn, and no reason to read its weight
            return rows.new_empty(*x.shape[:-1], self._out_features)
        if self._known is not None:
            weight, out = None, self._known().to(self._device)
            self._known = None  # of the first call only
        else:
            weight = self._read(self._weight).to(self._device)
            weight = weight.t() if self._transposed else weight
            out = self._multiply(self._name, x, rows, weight)
        self._on_linear(LinearCall(self._name, x, rows, weight, out))
        if self._bias is not None:
            out += self._read(self._bias).to(self._device)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def blockwise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in float32 for x [M, K] and a weight [N, K] of any dtype, widening it block by block."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        out[:, rows] = x @ weight[rows].float().t()
    return out


class _SourceParameters(TorchFunctionMode):
    """Puts the source's tensors in the place of parameters on the meta device, one operation at a time."""

    def __init__(
        self, parameters: Mapping[int, Callable[[], Tensor]], missing: AbstractSet[int], device: torch.device
    ) -> None:
        super().__init__()
        self._parameters, self._missing, self._device = parameters, missing, device
        # Code that loops over experts asks for the same parameters again and again.
        self._recent: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute, such as `weight.dtype`
            if id(args[0]) in self._parameters:
                if func.__self__ is Tensor.device:
                    return self._device
                if func.__self__ is Tensor.dtype and args[0].is_floating_point():
                    return torch.float32
                if func.__self__ in _VIEWS:
                    return func(self._real(args[0]))
            return func(*args, **kwargs)
        # An embedding or a stack of experts may be as large as all else: they are not widened before being looked up.
        if func is functional.embedding:
            return func(args[0], self._real(args[1], widen=False), *args[2:], **kwargs).float()
        if func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            found = func(self._real(args[0], widen=False), *args[1:])
            return found.float() if found.is_floating_point() else found
        args, kwargs = tree_map(self._real, (args, kwargs))
        return func(*args, **kwargs)

    def _real(self, value: Any, widen: bool = True) -> Any:
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._parameters:
            if id(value) not in self._missing and not value.is_meta:  # made by the model's code on the way
                return value
            # Some operations take a tensor on the meta device without a word, and give whatever lies in memory.
            raise RuntimeError(f"a parameter of shape {list(value.shape)} is not in the checkpoint")
        tensor = self._recent.get(id(value))
        if tensor is None:
            tensor = self._parameters[id(value)]().to(self._device)
        if value.ndim > 2:
            self._recent = {**dict(list(self._recent.items())[-1:]), id(value): tensor}
        return tensor.float() if widen and tensor.is_floating_point() else tensor


def _fill_buffers(model: Any, tensor_of: Mapping[str, str], read: Read, device: torch.device) -> None:
    """Give every buffer its values: those in the source from there, the others computed by the model's own code."""
    fill_computed(model, tensor_of.keys())
    moved: dict[int, Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if id(buffer) not in moved:
            value = (read(tensor_of[name]) if name in tensor_of else buffer).to(device)
            moved[id(buffer)] = value.float() if value.is_floating_point() else value
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = moved[id(buffer)]
