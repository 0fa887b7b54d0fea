"""The model that a source config describes, without its weights, through transformers."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D

from llmint8.formats import SourceError, read_json
from llmint8.formats.files import CONFIG_NAME

from .limits import check_buffers, check_config

log = logging.getLogger("llmint8")


def load_config(path: Path, trust_remote_code: bool = False) -> Any | None:
    """Return the PreTrainedConfig of a directory, or None when transformers does not know the model type.

    Args:
        path: the directory.
        trust_remote_code: run the code that the directory holds, where config.json names it under `auto_map`. The
            config then keeps `auto_map`; without, it has none, and nothing that gets it can run code.

    Raises:
        SourceError: transformers knows the type, and refuses the values; or they are refused before it sees them.

    """
    file = path / CONFIG_NAME
    raw = read_json(file)
    check_config(raw, file)
    code = own_code(raw, file) if trust_remote_code else {}
    model_type = raw.get("model_type")
    if not (isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING) and "AutoConfig" not in code:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each config class raises what it likes
        raise SourceError(f"{file}: not a valid {model_type} config: {first_line(error)}") from None
    # It would name another index of weights, one that has not been checked.
    config.__dict__.pop("transformers_weights", None)
    config.__dict__.pop("auto_map", None)
    if trust_remote_code:
        config.auto_map = code
    return config


def is_trusted(config: Any) -> bool:
    """Tell whether the config was loaded with the permission to run the checkpoint's own code."""
    return getattr(config, "auto_map", None) is not None


def own_code(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return transformers' auto class -> `module.Class` in the directory, as `auto_map` in config.json has it.

    Raises:
        SourceError: it is something else, or names code elsewhere.

    """
    code = config.get("auto_map") or {}
    if not isinstance(code, dict):
        raise SourceError(f"{file}: auto_map is {str(code)[:80]!r}, expected an object")
    for name, reference in code.items():
        if name.startswith("AutoTokenizer"):
            continue
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            raise SourceError(
                f"{file}: auto_map[{name[:80]!r}] is {str(reference)[:80]!r}, expected module.Class of a file beside it"
            )
    return {name: reference for name, reference in code.items() if not name.startswith("AutoTokenizer")}


def model_class(config: Any) -> Any | None:
    """Return the class that the config's `architectures` names; the causal LM of its type where it names none.

    None where transformers has no such class: then the architecture is somebody's own code, which is loaded only if
    the config was loaded with `trust_remote_code`.
    """
    named = str(config.architectures[0]) if config.architectures else None
    for name, reference in (getattr(config, "auto_map", None) or {}).items():
        if reference.endswith(f".{named}") or (named is None and name == "AutoModelForCausalLM"):
            return get_class_from_dynamic_module(reference, config._name_or_path, local_files_only=True)
    if named is None:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    found = getattr(transformers, named, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def meta_model(config: Any) -> Any | None:
    """Build the model on the meta device: every module and shape, no memory. None where transformers has no class.

    Raises:
        SourceError: the class cannot be built from these values.

    """
    try:
        cls = model_class(config)
        if cls is None:
            return None
        with torch.device("meta"):
            model = cls._from_config(config)
        check_buffers(model)
    except SourceError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise SourceError(f"config.json: {config.architectures} cannot be built from it: {first_line(error)}") from None
    return model


class Head(NamedTuple):
    """A model's output head: the name of its module, and of the parameter it shares its weight with, or None."""

    module: str
    tied_to: str | None


def own_head(config: Any | None, model: Any | None) -> tuple[Any, Any, Head]:
    """Return config and model with a head that has a weight of its own, and what it was in this model.

    Raises:
        SourceError: there is no head, or the model is not the same when its head is not tied to the embedding.

    """
    head: Any = None if model is None else model.get_output_embeddings()
    modules = {} if model is None else dict(model.named_modules())
    name = next((name for name, module in modules.items() if module is head), None)
    if config is None or model is None or name is None or not is_linear(head):
        raise SourceError("--quantize-head: transformers knows no plain linear output head here; leave it out")
    ties, tied_to = model.all_tied_weights_keys, None
    if pair := next((set(pair) for pair in ties.items() if f"{name}.weight" in pair), None):
        (tied_to,) = pair - {f"{name}.weight"}
        config = copy.deepcopy(config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        model = meta_model(config)
        # Encoders with decoders share one embedding among more than two, and T5 computes otherwise when it is not tied.
        if len(ties) > 1 or config.is_encoder_decoder or model is None or model.all_tied_weights_keys:
            raise SourceError(f"--quantize-head: {config.model_type} cannot do without its tied head; leave it out")
    if weights_used_directly(meta_model(config), [name], or_its_dtype=True):
        raise SourceError(f"--quantize-head: {config.model_type} uses the weight of {name} itself; leave it out")
    return config, model, Head(name, tied_to)


def weights_used_directly(model: Any, layers: Iterable[str], or_its_dtype: bool = False) -> set[str]:
    """Return the linear layers whose weight the model's own code takes, as Mamba does with that of `dt_proj`.

    Such a weight must stay what it is. The model runs once on the meta device, which takes no memory and no weights;
    where that is not possible, nothing is known and nothing is returned.

    Args:
        model: a transformers model on the meta device; used up by this.
        layers: names of linear modules in it.
        or_its_dtype: return those too of which the code looks at the weight's dtype. Within blocks it does so with
            int8 in mind; what it casts to the dtype of a head's weight would become int8.

    """
    weights = {}
    for name in layers:
        module = model.get_submodule(name)
        weights[id(module.weight)] = name
        out_features = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        module.forward = lambda x, n=out_features: x.new_empty(*x.shape[:-1], n)
    watch = _WeightWatch(weights, or_its_dtype)
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        with torch.inference_mode(), watch:
            model.eval()(**text_inputs(model, tokens))
    except Exception as error:  # whatever the model's code raises without data
        log.debug("%s does not run on the meta device: %s", type(model).__name__, error)
    return watch.used


class _WeightWatch(TorchFunctionMode):
    """Notes which of some parameters an operation is given; reading an attribute does not count, but `dtype` may."""

    def __init__(self, weights: dict[int, str], dtype_counts: bool) -> None:
        super().__init__()
        self._weights, self._dtype_counts = weights, dtype_counts
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(func, "__name__", "") == "__get__"
        if not attribute or (self._dtype_counts and func.__self__ is Tensor.dtype):
            leaves = tree_leaves((args, kwargs))
            self.used.update(self._weights[id(leaf)] for leaf in leaves if id(leaf) in self._weights)
        return func(*args, **(kwargs or {}))


def text_inputs(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments with which a model of text takes token ids [rows, length]; decoders get the same ones."""
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


def first_line(error: Exception) -> str:
    """Return an error's type and what it says, in one line of bounded length."""
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device when tensors can be put there. Raises ValueError."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more. Subclasses may use their weight in other ways."""
    return type(module) in (nn.Linear, Conv1D)
