"""How a layer's weight and its inputs are coded: what a scheme says (spec.md, sections 7 and 18)."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Activation = Literal["absmax", "zeropoint"]
Group = Literal[64, 128, 256]
Rotation = Literal[64]
Lookup = Literal["only", "too"]


@dataclass(frozen=True)
class Scheme:
    """One way to code a layer: the weight int8 by row, and inputs in int8 too.

    Attributes:
        activation: how inputs are quantized, `absmax` or `zeropoint`.
        activation_group: dimensions of an input that share a scale; None is all of them.
        rotation: of how many dimensions are the blocks in which weight and input are rotated; None where they are not.
        lookup: whether rows of the weight are looked up by their numbers: it is an embedding then, and with `too` the
            output head tied to it multiplies by it, as any layer. None for layers.

    """

    activation: Activation = "absmax"
    activation_group: Group | None = None
    rotation: Rotation | None = None
    lookup: Lookup | None = None

    @property
    def name(self) -> str:
        """What a writer calls it."""
        rotated = "int8" if self.rotation is None else f"int8-hadamard{self.rotation}"
        return rotated + {None: "", "only": "-embedding", "too": "-tied"}[self.lookup]

    def to_dict(self) -> dict[str, Any]:
        """Return the object that goes into config.json of format 2."""
        multiplies = self.lookup != "only"
        return {
            "bits": 8,
            "data_type": "int",
            "group": None,
            "rotation": None if self.rotation is None else {"kind": "hadamard", "block": self.rotation},
            "inputs": f"int8-{self.activation}" if multiplies else None,
            "input_group": self.activation_group if multiplies else None,
            **({} if self.lookup is None else {"lookup": True}),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> "Scheme":
        """Read the object in config.json. Raises ValueError: this program computes no such scheme."""
        if not isinstance(raw, dict):
            raise ValueError(f"is {str(raw)[:80]!r}, expected an object")
        ways = get_args(Activation), (None, *get_args(Group)), (None, *get_args(Rotation)), (None, *get_args(Lookup))
        every = itertools.product(*ways)
        for scheme in (cls(*values) for values in every):
            if _same(raw, scheme.to_dict()):
                return scheme
        raise ValueError(f"is {str(raw)[:200]}, which this program cannot compute; update llmint8")


def format_1(activation: str, group: Any) -> Scheme:
    """Return the scheme of all layers in format 1, from what its block says. Raises ValueError."""
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, expected 'absmax' or 'zeropoint'")
    if group is not None and (type(group) is not int or group not in get_args(Group)):
        raise ValueError(f"activation_group is {str(group)[:80]!r}, expected 64, 128, 256 or null")
    return Scheme(cast("Activation", activation), cast("Group | None", group))


def _same(one: Any, other: Any) -> bool:
    """Compare values from JSON with their types: 8.0 and true are no 8 and no 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)
