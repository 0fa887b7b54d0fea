"""How a loaded model runs: its config, a line that says so, a call that changes it; and casts transformers refuses."""

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmint8.converter.words import activations
from llmint8.formats import BITSANDBYTES, NATIVE, Int8Record, Layout, LLMInt8Error, Manifest, Scheme
from llmint8.kernels.reference import Activation

from ..layers.arguments import ActivationGroup, Outliers, check_searchable, check_threshold, kernels_group
from ..layers.kbit import KBitLinear
from ..layers.layer import Int8Linear
from ..layers.linear import QuantizedLinear
from ..parallel.cut import cut_layers
from ..parallel.plan import Parallel

log = logging.getLogger("llmint8")

QUANT_METHOD = "llmint8"


@register_quantization_config(QUANT_METHOD)
class LoadedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a loaded model carries as `config.quantization_config`; it is saved as the checkpoint had it."""

    def __init__(
        self,
        records: list[Int8Record],
        shapes: dict[str, tuple[int, ...]],
        stored: dict[str, Any],
        outliers: Outliers,
        threshold: float,
        activation: Activation,
        activation_group: ActivationGroup,
        layout: Layout = BITSANDBYTES,
        searched: frozenset[str] = frozenset(),
        manifest: Manifest | None = None,
        parallel: Parallel | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        """Take the int8 layers, the shape of every tensor, config.json's `quantization_config`, and how to run.

        `searched` names the layers that search their outliers whatever the others do; `parallel` says how the model is
        spread over several processes.
        """
        self.records = records
        self.shapes = shapes
        self.stored = stored
        self.outliers = outliers
        self.threshold = threshold
        self.activation = activation
        self.activation_group = activation_group
        self.layout = layout
        self.searched = searched
        self.manifest = manifest
        self.parallel = parallel
        self.provenance: bytes | None = None  # what is kept of it for a model that is saved
        self.quant_method = quant_method

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Take what `load` has put together. Raises LLMInt8Error for what stands in a config.json of format 2."""
        if "records" not in config_dict:
            raise LLMInt8Error("an int8 checkpoint of llmint8, format 2: load it with llmint8.runtime.load(path)")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` for config.json, under which the saved tensors load again."""
        return copy.deepcopy(self.stored)

    def layer(
        self,
        name: str,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: bool,
        outlier_count: int | None,
        dtype: torch.dtype | None,
    ) -> QuantizedLinear:
        """Make a layer without tensors that will run as is said here.

        Args:
            name: of the layer in the checkpoint.
            scheme: how its weight is coded.
            shape: K and N.
            bias: whether it has one.
            outlier_count: how many columns are stored; None where the checkpoint's format has none.
            dtype: of what is in floating point.

        """
        arguments = *shape, bias, outlier_count
        where: dict[str, Any] = {"layout": self.layout, "device": "meta", "dtype": dtype}
        if scheme.kbit is not None:
            return KBitLinear(*arguments, kbit=scheme.kbit, outliers=self.outliers, **where)
        return Int8Linear(*arguments, rotation=scheme.rotation, **(self.settings(name) | where))

    def settings(self, name: str) -> dict[str, Any]:
        """Return how an int8 layer runs, by its name in the checkpoint."""
        return {
            "outliers": "dynamic" if name in self.searched else self.outliers,
            "threshold": self.threshold,
            "activation": self.activation,
            "activation_group": self.activation_group,
        }

    @property
    def source(self) -> str:
        """What the checkpoint was converted from, where it says so."""
        return self.block.get("source", {}).get("name") or "its source"

    @property
    def block(self) -> dict[str, Any]:
        """What llmint8 says in it: of format 1 a part, of format 2 all; nothing where bitsandbytes wrote it."""
        return self.stored if self.layout == NATIVE else self.stored.get("llmint8") or {}


def configure(
    model: nn.Module,
    *,
    outliers: Outliers | None = None,
    threshold: float | None = None,
    activation: Activation | None = None,
    activation_group: ActivationGroup | None = None,
) -> None:
    """Change how all int8 layers of a model run; None leaves a setting as it is. All of them change, or none.

    Args:
        model: from `runtime.load` or `runtime.quantize`; it may be wrapped.
        outliers, threshold, activation, activation_group: as of `runtime.load`.

    Raises:
        ValueError: there are no int8 layers; a value is not valid; `static` where nothing is stored, `dynamic` where
            layers are rotated; or a threshold where no layer searches.

    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no quantized layers; expected a model from runtime.load")
    of_inputs = {"threshold": threshold, "activation": activation, "activation_group": activation_group}
    given = [name for name, value in of_inputs.items() if value is not None]
    if given and all(layer.kbit is not None for layer in layers):
        raise ValueError(f"{given[0]} is {of_inputs[given[0]]!r}, and the inputs of these layers are not quantized")
    # Checked for all of them first.
    for layer in layers:
        mode = outliers or layer.outliers
        check_searchable(mode, layer.rotation, layer.kbit)
        if isinstance(layer, Int8Linear):
            check_threshold(mode, layer.threshold if threshold is None else threshold)
        if outliers == "static" and layer.outlier_dims is None:
            raise ValueError(f"{layer.name}: outliers is 'static', but it stores none; expected 'dynamic' or 'none'")
    if threshold is not None and not any((outliers or layer.outliers) == "dynamic" for layer in layers):
        raise ValueError(f"threshold is {threshold!r}, which only outliers='dynamic' uses")
    settings: dict[str, Any] = {
        "outliers": outliers,
        "threshold": threshold,
        "activation": activation,
        "activation_group": activation_group,
    }
    for layer in layers:
        layer.configure(**settings)


def log_summary(model: Any) -> None:
    """Say in one line how a model runs."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    config = model.config.quantization_config
    mode = f"dynamic (|x| >= {config.threshold:g})" if config.outliers == "dynamic" else config.outliers
    paths = Counter("offloaded" if layer.prepared is None else layer.prepared.runs_on for layer in layers)
    kernels = "".join(f", {count} x {path}" for path, count in paths.items())
    if searching := sum(layer.outliers == "dynamic" for layer in layers) if config.outliers == "static" else 0:
        mode += f" (but in {searching} that were not calibrated: dynamic, |x| >= {config.threshold:g})"
    how = activations(config.activation, kernels_group(config.activation_group))
    kernels += f", {cut} cut" if (cut := len(cut_layers(model))) else ""
    kinds = Counter("Int8Linear" if layer.kbit is None else "KBitLinear" for layer in layers)
    counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    inputs = f", activation {how}" if "Int8Linear" in kinds else ""
    log.info("%s layers, outliers %s%s%s", counts, mode, inputs, kernels)


def let_cast(is_ours: Callable[[Any], bool]) -> None:
    """Let `half()` and `float()` cast what is not int8 in models of which `is_ours` is true; others as ever."""
    for name in ("half", "float"):
        setattr(PreTrainedModel, name, _casting(name, getattr(PreTrainedModel, name), is_ours))


def _casting(name: str, refuses: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(refuses)
    def cast(self: Any, *arguments: Any) -> Any:
        return getattr(nn.Module, name)(self) if is_ours(self) else refuses(self, *arguments)

    return cast
