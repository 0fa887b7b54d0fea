"""How a loaded model runs, said in one line, changed with one call; and casts, which transformers would refuse."""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmint8.converter.words import activations
from llmint8.kernels.reference import Activation

from ..layers.arguments import ActivationGroup, Outliers, check_searchable, check_threshold, kernels_group
from ..layers.layer import Int8Linear
from ..layers.linear import QuantizedLinear
from ..parallel.cut import cut_layers

log = logging.getLogger("llmint8")


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
