"""What `load` was asked for, and transformers' plan of how a model is cut, fitted to one with int8 layers.

The plan comes from transformers and names modules by patterns (`model.layers.*.mlp.up_proj`); where it has none, the
caller gives one. It is changed in four ways before transformers applies it: int8 layers get styles of ours; the
matrices of experts, which are layers here, get those of the stacks that the plan names; attention whose heads cannot
be dealt out evenly stays whole on every process; and so does an embedding in int8, with a head that is tied to it.
"""

import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from llmint8.converter.model.experts import ExpertMatrix
from llmint8.formats import LLMInt8Error

from ..layers.embedding import TiedHead
from ..layers.experts import Int8Experts
from ..layers.layer import Int8Linear

log = logging.getLogger("llmint8")


@dataclass
class Parallel:
    """A model on several processes, one part of it on each.

    Attributes:
        config: transformers' `DistributedConfig`, without the caller's own rules.
        rules: those.

    """

    config: Any
    rules: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.config.tp_size)

    def held(self, model: Any, matrices: list[ExpertMatrix]) -> list[ExpertMatrix]:
        """Return the matrices of the experts that this process has: all, where they are not dealt out.

        The module of the experts is told how many there are, and which is the first.

        Raises:
            LLMInt8Error: they cannot be dealt out evenly.

        """
        if self.config.ep_size == 1:
            return matrices
        rank, first = torch.distributed.get_rank(), {}
        for name in {matrix.experts for matrix in matrices}:
            module = model.get_submodule(name)
            if _pattern(name) in model.ep_plan:
                each, left = divmod(module.num_experts, self.size)
                if left:
                    what = f"{name}: {module.num_experts} experts cannot be dealt out evenly to {self.size} processes"
                    raise LLMInt8Error(f"{what}; start another number, or leave out ep_size")
                module.num_experts, module.first_expert = each, rank * each
                first[name] = range(rank * each, (rank + 1) * each)
        others = [m for m in matrices if m.experts in first and m.expert not in first[m.experts]]
        # Nothing to warn about: they are in the file, and belong to other processes.
        ignored: Any = model._keys_to_ignore_on_load_unexpected or ()
        names = {re.escape(f"{m.module}.") for m in others}
        model._keys_to_ignore_on_load_unexpected = {*ignored, *names}
        return [m for m in matrices if m.experts not in first or m.expert in first[m.experts]]

    def fit(self, model: Any) -> None:
        """Fit the plans of a model, whose int8 layers are in their places, to it.

        Raises:
            LLMInt8Error: there is no plan, the caller's names nothing in the model, or a style is not known.

        """
        plan: dict[str, str] = model.tp_plan
        names = {_pattern(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
        if unknown := sorted(self.rules.keys() - names):
            raise LLMInt8Error(f"tp_plan: {unknown[0]!r} names nothing in {type(model).__name__}")
        plan.update(self.rules)
        if not plan:
            raise LLMInt8Error(
                f"{type(model).__name__}: transformers has no plan of how to cut it; give one, as "
                "tp_plan={'model.layers.*.mlp.up_proj': 'colwise', 'model.layers.*.mlp.down_proj': 'rowwise'}, or load "
                "it with device_map"
            )
        _leave_whole(model, plan, self.size)
        _fit_experts(model, plan, model.ep_plan)
        for rule in plan.keys() - names:  # of layers that only other models of the class have
            del plan[rule]
        _take_our_styles(model, plan)


def settle(
    tp_plan: str | dict[str, str] | None, distributed_config: Any, device: object, device_map: object
) -> Parallel | None:
    """Return what is asked for, or None for one process.

    Raises:
        ValueError: arguments that are not valid, or exclude each other.
        LLMInt8Error: the transformers that is installed is too old for it.

    """
    if tp_plan is None and distributed_config is None:
        return None
    try:
        from transformers.distributed import DistributedConfig

        has_styles = find_spec("transformers.distributed.parallel_utils") is not None
    except ImportError:
        has_styles = False
    if not has_styles:
        raise LLMInt8Error("tp_plan needs a newer transformers, such as 5.23: pip install -U transformers")
    if tp_plan is not None and distributed_config is not None:
        raise ValueError("tp_plan and distributed_config are both given; DistributedConfig(tp_plan=...) has both")
    if device is not None or device_map is not None:
        raise ValueError("tp_plan puts each part on the device of its process; leave out device and device_map")
    if tp_plan is not None and tp_plan != "auto" and not isinstance(tp_plan, dict):
        raise ValueError(f"tp_plan is {tp_plan!r}, expected 'auto' or a dict of names and styles")
    asked = distributed_config or DistributedConfig(tp_plan=tp_plan)
    if asked.pp_size > 1 or asked.dp_size > 1:
        raise ValueError("distributed_config: only tp_size and ep_size may be more than 1")
    if asked.tp_size == 1:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            log.warning("One process, so nothing is cut; torchrun --nproc-per-node 2 starts two")
        return None
    rules = asked.tp_plan if isinstance(asked.tp_plan, dict) else {}
    config = DistributedConfig(**{**asked.to_dict(), "tp_plan": "auto"})
    return Parallel(config, rules)


def _pattern(name: str) -> str:
    """Return a name as plans have it, with stars in the place of numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _patterns(names: Any) -> dict[str, list[Any]]:
    """Return what the names stand for, by their patterns."""
    found: dict[str, list[Any]] = defaultdict(list)
    for name, value in names:
        found[_pattern(name)].append(value)
    return found


def _leave_whole(model: Any, plan: dict[str, str], size: int) -> None:
    """Take out of a plan the attention that cannot be cut by its heads, and int8 weights that are no linear layers."""
    uneven: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = [rule for rule in plan if rule.startswith(f"{_pattern(name)}.")]
        if "Attention" in type(module).__name__ and any(plan[rule] == "colwise" for rule in inside):
            config = getattr(module, "config", None) or model.config.get_text_config()
            keys = ("num_attention_heads", "num_key_value_heads")
            counts = {key: value for key in keys if isinstance(value := getattr(config, key, None), int)}
            if odd := {key: value for key, value in counts.items() if value % size}:
                uneven |= dict.fromkeys(inside, " and ".join(f"{key} = {value}" for key, value in odd.items()))
        weight = module._parameters.get("weight")
        linear = isinstance(module, Int8Linear) and not isinstance(module, TiedHead)
        if weight is not None and weight.dtype == torch.int8 and not linear:
            plan.pop(_pattern(name), None)
    for rule in uneven:
        plan.pop(rule, None)
    if uneven and torch.distributed.get_rank() == 0:
        said = next(iter(uneven.values()))
        log.warning("%s: %s on %d processes, so attention is whole on each", type(model).__name__, said, size)


def _fit_experts(model: Any, plan: dict[str, str], ep_plan: dict[str, str]) -> None:
    """Put the layers that experts are made of in the place of the stacks that the plans name."""
    from .styles import of_experts

    modules = _patterns((name, module) for name, module in model.named_modules() if hasattr(module, "num_experts"))
    for pattern, found in modules.items():
        experts = [module for module in found if isinstance(module, Int8Experts)]
        for projection in {projection for module in experts for projection, _ in module._places}:
            stack = f"{pattern}.{projection}"
            style = plan.get(stack)
            if len(experts) == len(found):
                plan.pop(stack, None)
                ep_plan.pop(stack, None)
            if style is None:
                continue
            for module in experts:
                of_one = [places for (key, _), places in module._places.items() if key == projection]
                made = of_experts(style, len(of_one[0]))
                if made is None:
                    raise LLMInt8Error(f"tp_plan: {stack}: no style {style!r} for experts in int8")
                layers = {id(holder._modules[name]) for places in of_one for holder, name in places}
                inside = {_pattern(name) for name, layer in module.named_modules() if id(layer) in layers}
                plan.update({f"{pattern}.{name}": made for name in inside})


def _take_our_styles(model: Any, plan: dict[str, str]) -> None:
    from .styles import UNCUT, ours

    layers = _patterns((name, module) for name, module in model.named_modules() if isinstance(module, Int8Linear))
    for rule, style in plan.items():
        made = ours(style)
        if made is not None:
            plan[rule] = made
        elif rule in layers and style not in UNCUT and not style.startswith("llmint8_"):
            raise LLMInt8Error(f"tp_plan: {layers[rule][0].name}: no style {style!r} for a layer in int8")
