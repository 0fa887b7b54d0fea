"""Run an int8 checkpoint: `load` gives the ordinary transformers model with `Int8Linear` layers in it."""

from typing import TYPE_CHECKING

from llmint8.converter.on_demand import importer

if TYPE_CHECKING:
    from .layers.layer import Int8Linear as Int8Linear
    from .layers.misses import OutlierMisses as OutlierMisses
    from .layers.misses import outlier_misses as outlier_misses
    from .model.load import load as load

_HOMES = {
    "Int8Linear": "layers.layer",
    "OutlierMisses": "layers.misses",
    "load": "model.load",
    "outlier_misses": "layers.misses",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = importer(__name__, _HOMES)
