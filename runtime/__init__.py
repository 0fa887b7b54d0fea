"""Run an int8 checkpoint: `load` gives the ordinary transformers model with `Int8Linear` layers in it."""

from typing import TYPE_CHECKING

from llmint8.converter.on_demand import importer

if TYPE_CHECKING:
    from .model.layer import Int8Linear as Int8Linear
    from .model.load import load as load
    from .model.misses import OutlierMisses as OutlierMisses
    from .model.misses import outlier_misses as outlier_misses

_HOMES = {
    "Int8Linear": "model.layer",
    "OutlierMisses": "model.misses",
    "load": "model.load",
    "outlier_misses": "model.misses",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = importer(__name__, _HOMES)
