"""From a 16-bit source checkpoint to an int8 checkpoint."""

from typing import TYPE_CHECKING

from .on_demand import importer

if TYPE_CHECKING:
    from .conversion.convert import ConversionReport as ConversionReport
    from .conversion.convert import convert as convert
    from .conversion.convert import execute as execute
    from .hub.origin import Resolved as Resolved
    from .hub.resolve import resolve as resolve
    from .planning.options import Options as Options
    from .planning.plan import ConversionPlan as ConversionPlan
    from .planning.plan import make_plan as make_plan

_HOMES = {
    "ConversionPlan": "planning.plan",
    "ConversionReport": "conversion.convert",
    "Options": "planning.options",
    "Resolved": "hub.origin",
    "convert": "conversion.convert",
    "execute": "conversion.convert",
    "make_plan": "planning.plan",
    "resolve": "hub.resolve",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = importer(__name__, _HOMES)
