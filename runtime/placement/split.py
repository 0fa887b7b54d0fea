"""A model split over GPUs by layers: blocks whole and in order, as accelerate's `device_map` has it.

What comes first in the model, the embedding, is on the first GPU, and what comes last, the head, on the last; but a
head that shares its weight with the embedding is where that is. All GPUs are filled to the same part of what they have
for the model, as nearly as whole blocks allow: where this split does not fit, no other in this order does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .gpus import Gpu

# Halvings of the interval in which the filling is looked for: as fine as a float.
_STEPS = 50


@dataclass(frozen=True)
class Unit:
    """What is placed as a whole: a block, or a module outside of them. Bytes of its weights, and of its cache."""

    name: str
    weights: int
    cache: int


@dataclass
class Share:
    """What one GPU holds; sizes are bytes.

    Attributes:
        gpu: which it is.
        activations: what it needs for those.
        units: what it holds, in order.

    """

    gpu: Gpu
    activations: int
    units: list[Unit] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Bytes of weights."""
        return sum(unit.weights for unit in self.units)

    @property
    def cache(self) -> int:
        """Bytes of keys and values."""
        return sum(unit.cache for unit in self.units)

    @property
    def free(self) -> int:
        """Bytes that are left; below 0 where they do not do."""
        return self.room - self.weights - self.cache

    @property
    def room(self) -> int:
        """Bytes that there are for weights and cache."""
        return self.gpu.memory - self.gpu.reserved - self.activations


def split(units: Sequence[Unit], gpus: Iterable[Gpu], activations: int) -> list[Share]:
    """Return what each GPU holds; where it does not fit, with the least that is missing.

    Args:
        units: in the order of the model.
        gpus: at least one, in the order in which layers are put there.
        activations: what each needs for them.

    """
    gpus = list(gpus)
    room = [Share(gpu, activations).room for gpu in gpus]
    total = sum(unit.weights + unit.cache for unit in units)
    # Filled to this part of its room even the smallest would hold all; a GPU without room holds nothing.
    low, high = 0.0, total / max(1, min((one for one in room if one > 0), default=1)) + 1
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(units, gpus, activations, middle) else (middle, high)
    found = _filled(units, gpus, activations, high)
    return found or [Share(gpus[0], activations, list(units)), *(Share(gpu, activations) for gpu in gpus[1:])]


def _filled(units: Sequence[Unit], gpus: Sequence[Gpu], activations: int, part: float) -> list[Share] | None:
    """Return the split with each GPU filled to a part of its room at most; None where something is left then."""
    shares, place = [], 0
    for gpu in gpus:
        share = Share(gpu, activations)
        left = part * share.room
        while place < len(units) and (taken := units[place].weights + units[place].cache) <= left:
            share.units.append(units[place])
            left -= taken
            place += 1
        shares.append(share)
    return shares if place == len(units) else None
