"""Run an int8 checkpoint: `load` gives the ordinary transformers model with `Int8Linear` layers in it."""

from .layer import Int8Linear
from .load import load
from .misses import OutlierMisses, outlier_misses

__all__ = ["Int8Linear", "OutlierMisses", "load", "outlier_misses"]
