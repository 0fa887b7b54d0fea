"""A model in memory turned into a quantized one, layer by layer: the choice is the converter's, and so is the result.

First the calibrated pass runs, which reads the weights and leaves the model alone. Then each layer gives up its place
to a quantized one, and its weight is forgotten before the next is quantized: there is never more than one layer, or one
module of experts, in both. What is refused is refused before that, so the
model is then as it was.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmint8.converter.coding import round_to_nearest
from llmint8.converter.conversion.in_memory import Found, find_out
from llmint8.converter.machine import return_freed_memory
from llmint8.converter.outliers.criterion import parse_criterion
from llmint8.converter.planning.options import Options
from llmint8.converter.planning.selected import SelectedLayer
from llmint8.formats import Manifest

from ..layers.arguments import group_to_run
from ..layers.experts import replace_experts
from ..layers.linear import QuantizedLinear
from .calibration import Calibration, calibration_of
from .places import take_hook
from .quantizer import Int8Quantizer
from .settings import LoadedConfig, log_summary

log = logging.getLogger("llmint8")

ON_THE_FLY = "llmint8_on_the_fly"
# Of the converter's options, those that are not about files.
OPTIONS = (
    "bits",
    "block_size",
    "calibration_tokens",
    "data_type",
    "format",
    "only",
    "outliers",
    "rotate",
    "rounding",
    "skip",
)


def quantize(model: Any, calibration: Any = None, *, tokenizer: Any = None, **options: Any) -> Any:
    """Turn a transformers model in 16 bit or float32 into a quantized one, as `converter.convert` would do it.

    Args:
        model: all of it in memory, on whatever device; changed in place.
        calibration: what the model is shown, to see which columns have to stay in 16 bit: a text file or a directory as
            `llmint8-convert --calibration` takes them, or token ids, int64 [rows, length]. By default the text in the
            package.
        tokenizer: for the text; by default that of the directory or repo that the model was loaded from. Without one
            random tokens are shown, and a warning says so.
        options: `outliers`, `calibration_tokens`, `skip`, `only`, `format`, `rotate`, `rounding`, `bits`, `data_type`
            and `block_size`, as of `converter.convert`.

    Returns:
        The same model, as if `runtime.load` had loaded it from a checkpoint: it is saved as one.

    Raises:
        SourceError: it is no model of transformers, quantized already, offloaded, or a weight is not finite.
        ValueError: an option's value is not valid.

    """
    chosen = chosen_options(calibration, options, getattr(model, "device", "cpu"))
    tokens = calibration if isinstance(calibration, Tensor) else None
    with find_out(model, chosen, tokens, tokenizer) as found:
        for notice in found.notices:
            log.warning("%s", notice)
        config = _config(found, model.device)
        known = calibration_of(found.plan.selection.layers, found.outliers.statistics, config.searched)
        _replace(model, found, config, known)
        layers = {name: found.plan.selection.module_of[name] for name in found.plan.selection.layers}
        stacks = {f"{matrix.experts}.{matrix.projection}" for matrix in found.plan.selection.experts.values()}
    Int8Quantizer(config, pre_quantized=True).adopt(model, layers, stacks)
    if overflow := known.overflow(layers if model.dtype == torch.float16 else ()):
        log.warning("%s", overflow)
    log_summary(model)
    return model


def chosen_options(calibration: Any, options: dict[str, Any], device: torch.device | str) -> Options:
    """Return the converter's options. Raises ValueError: one that is not, or is about files, or has no valid value."""
    if others := sorted(options.keys() - set(OPTIONS)):
        raise ValueError(f"{others[0]}: no option of quantize, which takes {', '.join(OPTIONS)}")
    text = None if isinstance(calibration, Tensor) else calibration
    chosen = Options(calibration=text, device=device, **options)
    parse_criterion(chosen.outliers)
    return chosen


def _config(found: Found, device: torch.device) -> LoadedConfig:
    """Return what a loaded model would carry as its config."""
    said, layers = found.quantization, found.plan.selection.layers
    searches = said.criterion != "none" and said.layout.searches
    manifest = Manifest(said.format_version, said.producer, found.source, {}, dict(found.outliers.statistics))
    return LoadedConfig(
        [],
        {},
        said.to_dict(),
        "static",
        said.threshold,
        said.scheme.activation,
        group_to_run(said, device, type(found.plan.config).__name__),
        said.layout,
        frozenset(layers.keys() - found.outliers.counts.keys() if searches else ()),
        manifest,
    )


def _replace(model: Any, found: Found, config: LoadedConfig, known: Calibration) -> None:
    """Put quantized layers in their places, one after the other; of a module of experts all at once."""
    selection = found.plan.selection
    of_module: dict[str, list[str]] = defaultdict(list)
    for name, matrix in selection.experts.items():
        of_module[matrix.experts].append(name)
    for name, layer in selection.layers.items():
        if name in selection.experts:
            continue
        module = selection.module_of[name]
        linear = model.get_submodule(module)
        made = _made(found, config, known, layer, linear.bias).train(linear.training)
        model.set_submodule(module, made)
        take_hook(linear, made)
        del linear
        _forget(found, [layer])
    for names in of_module.values():
        made_of = {name: _made(found, config, known, selection.layers[name], None) for name in names}
        replace_experts(model, [selection.experts[name] for name in names], made_of)
        _forget(found, [selection.layers[name] for name in names])


def _forget(found: Found, layers: Iterable[SelectedLayer]) -> None:
    for layer in layers:
        matrix = found.plan.selection.experts.get(layer.name)
        if not layer.tied:
            found.plan.source.release(matrix.tensor if matrix is not None else layer.weight.name)
    return_freed_memory()


def _made(found: Found, config: LoadedConfig, known: Calibration, layer: SelectedLayer, bias: Any) -> QuantizedLinear:
    """Quantize one layer."""
    weight = found.plan.source.read(layer.weight.name)
    weight = weight.t() if layer.transposed else weight
    scheme, name = found.plan.scheme_of(layer), layer.name
    codes, grid = round_to_nearest(weight, scheme)
    dims, columns = torch.empty(0, dtype=torch.int32), weight.new_empty(len(weight), 0)
    if count := found.outliers.counts.get(name, 0):
        dims, columns = found.outliers.load(name)
    state = {
        "weight": grid.stored(found.rounded.get(name, codes)),
        **{end: tensor.to(weight.device) for end, tensor in grid.scales(config.layout).items()},
        "outlier_dims": dims.to(weight.device),
        "outlier_weight": columns.to(weight.device).contiguous(),
    }
    state |= {} if bias is None else {"bias": bias.detach().clone()}
    shape = layer.in_features, layer.out_features
    made = config.layer(name, scheme, shape, bias is not None, count, weight.dtype)
    made.name = found.plan.selection.module_of[name]
    made.load_state_dict(state, assign=True)
    made.kept_limit = known.limit(name, made)
    return made


@register_quantization_config(ON_THE_FLY)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(..., quantization_config=...)` of a 16-bit checkpoint is told, to quantize it."""

    def __init__(self, calibration: Any = None, *, tokenizer: Any = None, **options: Any) -> None:
        """Take what `runtime.quantize` takes beside the model. Raises ValueError: an option's value is not valid."""
        chosen_options(calibration, options, "cpu")
        self.quant_method = ON_THE_FLY
        self.calibration, self.tokenizer, self.options = calibration, tokenizer, options

    def to_dict(self) -> dict[str, Any]:
        """Return the options, for people; what is saved says what was made of them."""
        return {"quant_method": self.quant_method, **self.options}


@register_quantizer(ON_THE_FLY)
class OnTheFlyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Lets transformers load the model as it is, and quantizes it then."""

    requires_calibration = False
    quantization_config: Int8Config

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.remove_quantization_config(model)
        config = self.quantization_config
        model.eval()
        quantized: nn.Module = quantize(model, config.calibration, tokenizer=config.tokenizer, **config.options)
        return quantized

    def is_serializable(self) -> bool:
        """Tell that `save_pretrained` works; by then there is another quantizer."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that there is nothing to train before the model is quantized."""
        return False
