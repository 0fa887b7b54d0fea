"""The state of a model on several processes, whole again on the first of them, to be saved."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..layers.experts import Int8Experts
from .cut import cut_layers, whole_tensors


def is_cut(model: nn.Module) -> bool:
    """Tell whether several processes hold a model together."""
    return bool(cut_layers(model) or _dealt_out(model))


def is_first() -> bool:
    """Tell whether this process is the one that writes files."""
    return dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until all processes are here."""
    dist.barrier()


def whole_state(model: Any) -> dict[str, Tensor]:
    """Return the state of the whole model on the first process; all of them call it.

    One layer is whole at a time on the others, which return what transformers has cut, as `DTensor`: it puts these
    together by itself.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name in _tied(model):
        state.pop(name, None)
    first = is_first()
    for name, (layer, cut) in cut_layers(model).items():
        for key, tensor in whole_tensors(layer, cut).items():
            if first:
                state[f"{name}.{key}"] = tensor.cpu()
    inside = tuple(f"{name}." for name in _dealt_out(model))
    own = {key: tensor for key, tensor in state.items() if key.startswith(inside) and not isinstance(tensor, DTensor)}
    for source in range(1, dist.get_world_size()) if inside else ():
        state |= _sent(own, source)
    return state if first else {key: tensor for key, tensor in state.items() if isinstance(tensor, DTensor)}


def _dealt_out(model: nn.Module) -> list[str]:
    """Return the modules of experts of which each process has some."""
    return [name for name, module in model.named_modules() if _has_some(module)]


def _tied(model: Any) -> list[str]:
    """Return the names under which a cut parameter is there once more: whole, the two would be two."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: parameters.get(origin) for name, origin in model.all_tied_weights_keys.items()}
    return [name for name, one in tied.items() if isinstance(one, DTensor) and one is parameters.get(name)]


def _has_some(module: nn.Module) -> bool:
    return isinstance(module, Int8Experts) and module.first_expert is not None


def _sent(own: dict[str, Tensor], source: int) -> dict[str, Tensor]:
    """Send the tensors of one process to the first, where they are returned."""
    rank = dist.get_rank()
    said: list[Any] = [[(key, tensor.shape, tensor.dtype) for key, tensor in own.items()]]
    dist.broadcast_object_list(said, src=source)
    found: dict[str, Tensor] = {}
    device = next(iter(own.values())).device
    for key, shape, dtype in said[0]:
        if rank == source:
            dist.send(own[key].contiguous(), dst=0)
        elif rank == 0:
            tensor = own[next(iter(own))].new_empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, src=source)
            found[key] = tensor.cpu()
    return found
