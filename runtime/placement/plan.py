"""What a model takes, and which GPUs hold it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .blocks import unit_of
from .cache import activation_bytes, most_tokens
from .gpus import COMMON, Gpu, card
from .parts import KINDS
from .sized import Sized
from .split import Share, Unit, split

# More of them are not looked for: a set of 16 is two machines of eight.
MOST_GPUS = 16
_LONGEST = 1 << 24


@dataclass(frozen=True)
class Plan:
    """A model that is to run with so many tokens of context, and so many texts at a time."""

    sized: Sized
    context: int
    batch: int

    @property
    def cache(self) -> dict[str, int]:
        """Bytes of keys and values of each block."""
        known = self.sized.cache
        return {} if known is None else known.taken(self.context, self.batch)

    @cached_property
    def activations(self) -> int:
        """Bytes of activations, on each GPU."""
        return activation_bytes(self.sized.model, self.sized.parts, self.context, self.batch)

    @cached_property
    def longest(self) -> int | None:
        """Tokens that the model allows; None where nothing says it."""
        return most_tokens(self.sized.model)

    def taken(self, int8: bool) -> int:
        """Return the bytes of all weights in GPU memory."""
        return sum(part.taken(int8) for part in self.sized.parts)

    @property
    def on_disk(self) -> int:
        """Bytes of the tensors of the int8 checkpoint."""
        made = sum(part.int8.prepared for part in self.sized.parts if part.int8 is not None)
        return self.taken(True) - made + sum(part.twice for part in self.sized.parts)

    @property
    def notices(self) -> list[str]:
        """What to tell of this context."""
        found = []
        if self.longest is not None and self.context > self.longest:
            found.append(f"the model allows {self.longest:,} tokens, and not {self.context:,}")
        if self.sized.cache is None:
            found.append(
                "its config does not say what keys and values, or states in their place, take: none are counted"
            )
        return found

    def by_kind(self) -> list[dict[str, Any]]:
        """Return the bytes in 16 bit and in int8 of each kind of tensor, and in int8 of what belongs to the layers."""
        found: list[dict[str, Any]] = []
        for kind, what in KINDS.items():
            parts = [part for part in self.sized.parts if part.kind == kind]
            layers = [part.int8 for part in parts if part.int8 is not None]
            if not parts:
                continue
            other = sum(part.stored for part in parts if part.int8 is None)
            values = sum(layer.values for layer in layers) + other
            found.append({"what": what, "half": sum(part.half for part in parts), "int8": values})
            if layers:
                columns, scales = sum(layer.columns for layer in layers), sum(layer.scales for layer in layers)
                prepared = sum(layer.prepared for layer in layers)
                found.append({"what": "- outlier columns", "half": 0, "int8": columns})
                found.append({"what": "- scales of rows", "half": 0, "int8": scales})
                found.append({"what": "- prepared on loading", "half": 0, "int8": prepared})
        return found

    def units(self, int8: bool) -> list[Unit]:
        """Return what is placed as a whole, in the order of the model; what is tied behind what it is tied to."""
        weights: Counter[str] = Counter()
        for part in self.sized.parts:
            if not part.twice:
                weights[unit_of(part.place)] += part.taken(int8)
        tied: dict[str, list[str]] = {}
        for name, origin in getattr(self.sized.model, "all_tied_weights_keys", {}).items():
            if unit_of(name) not in weights:
                tied.setdefault(unit_of(origin), []).append(unit_of(name))
        cache, units = self.cache, []
        for name, nbytes in weights.items():
            units.append(Unit(name, nbytes, cache.get(name, 0)))
            units += [Unit(other, 0, 0) for other in tied.get(name, ())]
        return units

    def split(self, gpus: Sequence[Gpu], int8: bool) -> list[Share]:
        """Return what each GPU of a machine holds."""
        return split(self.units(int8), gpus, self.activations)

    def fits(self, gpus: Sequence[Gpu], int8: bool) -> bool:
        """Tell whether a machine holds the model."""
        return all(share.free >= 0 for share in self.split(gpus, int8))

    def longest_context(self, gpus: Sequence[Gpu], int8: bool) -> int:
        """Return the longest context with which a machine holds the model, no longer than it allows; 0 for none."""
        fits, fails = 0, min(self.longest or _LONGEST, _LONGEST) + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            found = Plan(self.sized, middle, self.batch).fits(gpus, int8)
            fits, fails = (middle, fails) if found else (fits, middle)
        return fits

    def smallest(self, gpu: Gpu, int8: bool) -> int | None:
        """Return how many GPUs of a kind hold the model; None where it takes more than are looked for."""
        total = self.taken(int8) + sum(self.cache.values())
        room = gpu.memory - gpu.reserved - self.activations
        least = -(-total // room) if room > 0 else MOST_GPUS + 1
        return next((n for n in range(max(1, least), MOST_GPUS + 1) if self.fits([gpu] * n, int8)), None)

    def smallest_sets(self) -> list[dict[str, Any]]:
        """Return for each kind of common GPU how many hold the model, in int8 and in 16 bit."""
        found = []
        for sold_as, names in COMMON:
            gpu = min((card(name) for name in names), key=lambda one: one.memory)
            counts = {"int8": self.smallest(gpu, True), "half": self.smallest(gpu, False)}
            found.append({"gb": sold_as, "gpus": list(names), "memory": gpu.memory, **counts})
        return found
