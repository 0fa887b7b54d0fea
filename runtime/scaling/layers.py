"""What schemes make of the weight of a layer: rounded to nearest or by GPTQ, with or without columns in 16 bit.

GPTQ needs the layer's inputs for a text to calibrate with. It is the one in the package, which the model in 16 bit
reads beside the schemes. Proxy quantization needs how the weights of the layer before spread; of each that is kept.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmint8.converter.calibration.gptq import Correlations
from llmint8.converter.coding import KBitGrid
from llmint8.converter.outliers.proxy import Linear, deviations, layers_before, proxy_dims
from llmint8.converter.planning.before import kv_heads
from llmint8.converter.planning.plan import ConversionPlan
from llmint8.converter.planning.selected import SelectedLayer
from llmint8.formats import SourceError
from llmint8.kernels.kbit.reference import dequantize_codes, quantize_weight

from .schemes import Scheme


def before(plan: ConversionPlan, order: Sequence[str]) -> dict[str, str]:
    """Return layer -> the layer that makes its inputs, where there is one, by the names of modules in their order."""
    layers = {plan.selection.module_of[name]: layer for name, layer in plan.selection.multiplied.items()}
    linears = [Linear(name, layers[name].out_features, layers[name].in_features) for name in order]
    return layers_before(linears, kv_heads(plan.config))


class Weights:
    """Simulates schemes, layer by layer as a pass reaches them."""

    def __init__(self, plan: ConversionPlan, layers: Mapping[str, SelectedLayer], order: Sequence[str]) -> None:
        """Take the layers by the names of their modules, and the order in which they are expected."""
        self._plan, self._layers = plan, layers
        self._before, self._heads = before(plan, order), kv_heads(plan.config)
        self._spread: dict[str, Tensor] = {}
        self._last: tuple[Tensor, tuple[int, ...], Correlations] | None = None

    def see(self, name: str, weight: Tensor) -> None:
        """Remember how the weights of a layer spread."""
        if name not in self._spread:
            self._spread[name] = deviations([weight])

    def simulated(self, name: str, scheme: Scheme, weight: Tensor, x: Tensor, calibration: Tensor) -> Tensor:
        """Return what a scheme makes of a weight [N, K]: itself, or float32 [N, K].

        Args:
            name: of the layer.
            scheme: what to make of it.
            weight: as stored.
            x: what the model passes around; layers share an input when this is the same object.
            calibration: rows of inputs to calibrate GPTQ with, float32 [T, K].

        Raises:
            SourceError: no absmax holds a weight.

        """
        if scheme.data_type is None:
            return weight
        codes, absmax, levels = quantize_weight(weight, scheme.bits, scheme.data_type, scheme.block)
        if not bool(absmax.isfinite().all()):
            tensor = self._layers[name].weight
            raise SourceError(
                f"{self._plan.source.path / tensor.file}: {tensor.name}: has values beyond 65504 or NaN, which no "
                "absmax in 16 bit holds; it cannot be quantized"
            )
        kept = self._kept(name, scheme, weight.shape[1])
        if scheme.rounding == "gptq":
            grid = KBitGrid(absmax, levels, scheme.block, scheme.data_type == "quantile")
            codes = self._correlations(x, kept, calibration).round(weight.float(), grid)
        found = dequantize_codes(codes, absmax, levels, scheme.block)
        found[:, kept] = weight[:, kept].float()
        return found

    def _kept(self, name: str, scheme: Scheme, in_features: int) -> Tensor:
        """Return the columns that stay in 16 bit, int64."""
        spread = self._spread.get(self._before.get(name, ""))
        if not scheme.proxy or spread is None:
            return torch.empty(0, dtype=torch.int64)
        return proxy_dims(spread, in_features, scheme.proxy, self._heads)

    def _correlations(self, x: Tensor, kept: Tensor, calibration: Tensor) -> Correlations:
        dims = tuple(kept.tolist())
        if self._last is None or self._last[0] is not x or self._last[1] != dims:
            self._last = None  # what is in it is large
            self._last = x, dims, Correlations(calibration.index_fill(1, kept.to(calibration.device), 0))
        return self._last[2]
