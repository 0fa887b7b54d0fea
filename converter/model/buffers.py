"""A model without its weights, but with all that its own code computes when it is built.

Rotary frequencies, masks and tables need not be in a checkpoint. On the meta device they have no values, and
transformers computes only those again that a model's `_init_weights` knows of; the code of others seldom has one. So
the model is built a second time: what became a parameter is made on the meta device again, all else on the CPU and for
real. Memory that nobody writes to is full of NaN, or of the largest integer: it must not pass for values.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils import deterministic
from torch.utils._device import _device_constructors

from llmint8.formats import SourceError

from ..machine import same_random_numbers
from .build import building, model_class
from .limits import MAX_BUFFER_BYTES

log = logging.getLogger("llmint8")

# Sinusoids for a hundred thousand positions take less.
_MOST_COMPUTED = 1 << 28


def model_with_buffers(config: Any) -> Any:
    """Build the model of a config: parameters on the meta device, buffers and what else it computes on the CPU.

    Raises:
        SourceError: the class cannot be built from these values, or computes more than memory should hold.

    """
    cls = model_class(config)
    assert cls is not None
    with building(config), _poisoned_memory(), torch.device("meta"):
        census = _Census()
        with census, _registered(census.see):
            cls._from_config(config)
        materials = _Materials(census.parameters())
        with materials, _registered(materials.to_meta):
            model = cls._from_config(config)
        _initialize(model)
    return model


def fill_computed(model: Any, stored: AbstractSet[str]) -> None:
    """Give a model its computed buffers, and what else it has on the meta device that is no parameter.

    transformers builds on the meta device. When it loads a model it gives buffers that are in no file memory that
    nobody wrote to, and its own models write there what belongs there; the code of others counts on what it computed.

    Args:
        model: a transformers model, loaded or on the meta device.
        stored: names of the parameters and buffers that come from a file.

    Raises:
        SourceError: as of `model_with_buffers`.

    """
    built = dict(model_with_buffers(copy.deepcopy(model.config)).named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in built:
                # What became an int8 layer has buffers of its own, too.
                own = module._buffers.keys() & built[name]._buffers.keys()
                missing = {key for key in own if f"{name}.{key}".lstrip(".") not in stored}
                _fill(module, built[name], missing)


def _fill(module: nn.Module, built: nn.Module, missing: set[str]) -> None:
    for name in missing:
        buffer, value = module._buffers[name], built._buffers[name]
        if buffer is None or value is None or buffer.is_meta:
            module._buffers[name] = value
        else:
            buffer.copy_(value)
    for name, attribute in vars(module).items():
        if isinstance(attribute, Tensor) and attribute.is_meta:
            setattr(module, name, vars(built)[name])


def computed_parameters(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of some parameters that the model's own code computes, float32 on the CPU, such as sinusoids.

    transformers initialises what is in no file. What it then writes twice the same, and is not one value throughout
    as the weights of norms are, was computed and not drawn.
    """
    found: dict[str, Tensor] = {}
    for owner, own in (name.rpartition(".")[::2] for name in names):
        module = model.get_submodule(owner)
        first, second = (_initialized(model, module, own, seed) for seed in (0, 1))
        if first is None or second is None or not first.equal(second) or bool((first == first.reshape(-1)[0]).all()):
            continue
        found[f"{owner}.{own}".lstrip(".")] = first.float()
    return found


def _initialized(model: Any, module: nn.Module, own: str, seed: int) -> Tensor | None:
    """Return a parameter as the model's code initialises it in a copy of its module, or None where it does not."""
    parameter = module._parameters[own]
    assert parameter is not None
    if type(module).__module__ == "torch.nn.modules.linear" or next(module.children(), None) is not None:
        return None  # what is large, and always drawn
    if not 0 < parameter.nbytes <= _MOST_COMPUTED:
        return None
    with _poisoned_memory(), same_random_numbers(seed=seed), torch.device("cpu"), torch.no_grad():
        fresh = copy.copy(module)
        fresh._parameters = {
            name: None if one is None else nn.Parameter(torch.empty_like(one, device="cpu"), one.requires_grad)
            for name, one in module._parameters.items()
        }
        try:
            model._init_weights(fresh)
        except Exception:  # code that looks at what has no values
            log.debug("_init_weights", exc_info=True)
            return None
    made = fresh._parameters[own]
    return None if made is None or bool(_is_poison(made).any()) else made.detach()


def nobodys_notice(model: nn.Module, stored: AbstractSet[str]) -> str | None:
    """Say which buffers, of those whose names are not among the stored ones, nobody ever wrote a value to."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.numel() and not buffer.is_meta]
    found = [name for name, buffer in buffers if name not in stored and bool(_is_poison(buffer).all())]
    if not found:
        return None
    return (
        f"{len(found)} buffers of the model seem to have no values, {found[0]} among them: they are in no file, and "
        "its code writes nothing into them"
    )


def _is_poison(buffer: Tensor) -> Tensor:
    if buffer.is_floating_point() or buffer.is_complex():
        return buffer.isnan()
    # Of two values none can be spared for it.
    return torch.zeros(()).bool() if buffer.dtype == torch.bool else buffer == torch.iinfo(buffer.dtype).max


class _Census(TorchFunctionMode):
    """Lists the tensors that a model makes while it is built, and finds those of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []
        self._large: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _device_constructors():
            self._made.append(result)
        if isinstance(result, Tensor) and result.is_meta and result.untyped_storage().nbytes() > MAX_BUFFER_BYTES:
            self._large.append(result)
        return result

    def see(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            self._parameters.append(parameter)

    def parameters(self) -> set[int]:
        """Return which of the tensors made became parameters. Raises SourceError where another is too large."""
        storages = {_storage(parameter) for parameter in self._parameters}
        for tensor in self._large:
            if _storage(tensor) not in storages:
                size = tensor.untyped_storage().nbytes() / 1e9
                raise SourceError(f"config.json: a tensor of {size:.1f} GB would be computed for it; check its values")
        return {number for number, tensor in enumerate(self._made) if _storage(tensor) in storages}


def _storage(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


class _Materials(TorchFunctionMode):
    """Makes what does not become a parameter for real, where the meta device is the default."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self._parameters = parameters
        self._numbers = count()
        self._replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and next(self._numbers) not in self._parameters:
            # With an empty tensor transformers asks for the default device; elsewhere it would fill parameters.
            asks = func is torch.tensor and args == ([],)
            if not asks and kwargs.get("device") is None:
                kwargs["device"] = "cpu"
        return func(*args, **kwargs)

    def to_meta(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Take a parameter that was computed from other tensors to the meta device, the same one every time."""
        if parameter is None or parameter.is_meta:
            return None
        _, replacement = self._replaced.setdefault(
            id(parameter), (parameter, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
        )
        return replacement


@contextmanager
def _registered(hook: Any) -> Iterator[None]:
    """Call a hook for every parameter that any module is given."""
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Have torch fill new memory with NaN or the largest integer, as it does in its deterministic mode."""
    settings: Any = deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(max(mode, 1))
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def _initialize(model: Any) -> None:
    """Let transformers write its own values, as it does after loading, and leave no buffer without any."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # computed from a parameter
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    try:
        with torch.device("cpu"):
            model.initialize_weights()
    except Exception:  # code that looks at parameters, which have no values; what was computed before stands
        log.debug("initialize_weights", exc_info=True)
