"""Run an int8 checkpoint: `load` gives the ordinary transformers model with `Int8Linear` layers in it."""

from .layer import Int8Linear
from .load import load

__all__ = ["Int8Linear", "load"]
