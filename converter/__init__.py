"""From a 16-bit source checkpoint to an int8 checkpoint."""

from .convert import ConversionReport, convert, execute
from .hub import Resolved, resolve
from .options import Options
from .plan import ConversionPlan, make_plan

__all__ = ["ConversionPlan", "ConversionReport", "Options", "Resolved", "convert", "execute", "make_plan", "resolve"]
