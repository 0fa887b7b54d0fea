"""Run an int8 checkpoint: `load` gives the ordinary transformers model with quantized layers in it."""

from typing import TYPE_CHECKING

from llmint8.converter.on_demand import importer

if TYPE_CHECKING:
    from .layers.kbit import KBitLinear as KBitLinear
    from .layers.layer import Int8Linear as Int8Linear
    from .layers.misses import OutlierMisses as OutlierMisses
    from .layers.misses import outlier_misses as outlier_misses
    from .model.dequantize import dequantize as dequantize
    from .model.load import load as load
    from .model.on_the_fly import Int8Config as Int8Config
    from .model.on_the_fly import quantize as quantize
    from .model.settings import configure as configure

_HOMES = {
    "Int8Config": "model.on_the_fly",
    "Int8Linear": "layers.layer",
    "KBitLinear": "layers.kbit",
    "OutlierMisses": "layers.misses",
    "configure": "model.settings",
    "dequantize": "model.dequantize",
    "load": "model.load",
    "outlier_misses": "layers.misses",
    "quantize": "model.on_the_fly",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = importer(__name__, _HOMES)
