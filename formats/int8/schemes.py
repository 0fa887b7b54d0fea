"""How a layer's weight and its inputs are coded: what a scheme says (spec.md, sections 7 and 18)."""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Activation = Literal["absmax", "zeropoint"]
Group = Literal[64, 128, 256]
Rotation = Literal[64]
Lookup = Literal["only", "too"]
DataType = Literal["int", "float", "dynamic", "quantile", "nf4"]

BITS = range(3, 9)
BLOCKS = tuple(2**power for power in range(5, 13))
# Codes are packed in chunks of so many, the last of a row filled up.
_CHUNK = 64


@dataclass(frozen=True)
class KBit:
    """A weight of k bits an element, whose inputs stay in floating point.

    Attributes:
        bits: k, 3 to 8.
        data_type: what its levels are.
        block: elements of a row that share an absmax, 32 to 4096; None is the whole row.

    """

    bits: int
    data_type: DataType
    block: int | None

    def __post_init__(self) -> None:
        """Refuse what there is not. Raises ValueError."""
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"{str(self.bits)[:80]} bits, expected 3 to 8")
        if self.data_type not in get_args(DataType):
            raise ValueError(f"data type {str(self.data_type)[:80]!r}, expected one of {', '.join(get_args(DataType))}")
        if self.data_type == "nf4" and self.bits != 4:
            raise ValueError(f"data type 'nf4' with {self.bits} bits, expected 4")
        if self.block is not None and (type(self.block) is not int or self.block not in BLOCKS):
            raise ValueError(f"block size {str(self.block)[:80]}, expected a power of two from 32 to 4096, or the row")

    @property
    def name(self) -> str:
        """What a writer calls it."""
        data_type = self.data_type.removesuffix(str(self.bits))
        return f"{data_type}{self.bits}-" + ("row" if self.block is None else f"block{self.block}")

    @property
    def has_codebook(self) -> bool:
        """Whether each layer has levels of its own."""
        return self.data_type == "quantile"

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of a row of K codes."""
        return -(-in_features // _CHUNK) * _CHUNK // 8 * self.bits

    def most_features(self, row_bytes: int) -> int | None:
        """Return how many codes a row of so many bytes can hold; None where no row has so many."""
        chunks, rest = divmod(row_bytes, _CHUNK // 8 * self.bits)
        return None if rest else chunks * _CHUNK

    def blocks(self, in_features: int) -> int:
        """Return how many blocks make up a row of K elements, at least one."""
        return 1 if self.block is None else max(1, -(-in_features // self.block))


@dataclass(frozen=True)
class Scheme:
    """One way to code a layer: the weight int8 by row, and inputs in int8 too; or a weight of k bits alone.

    Attributes:
        activation: how inputs are quantized, `absmax` or `zeropoint`.
        activation_group: dimensions of an input that share a scale; None is all of them.
        rotation: of how many dimensions are the blocks in which weight and input are rotated; None where they are not.
        lookup: whether rows of the weight are looked up by their numbers: it is an embedding then, and with `too` the
            output head tied to it multiplies by it, as any layer. None for layers.
        kbit: how the weight is coded, where it is not int8 by row. What is said of inputs and rotation is nothing then.

    """

    activation: Activation = "absmax"
    activation_group: Group | None = None
    rotation: Rotation | None = None
    lookup: Lookup | None = None
    kbit: KBit | None = None

    def __post_init__(self) -> None:
        """Refuse what two names would be for. Raises ValueError."""
        if self.lookup == "only" and self.kbit == KBit(8, "int", None):
            raise ValueError("an embedding of 8 bits, data type 'int', by row, expected that it is int8")

    @property
    def name(self) -> str:
        """What a writer calls it."""
        rotated = "int8" if self.rotation is None else f"int8-hadamard{self.rotation}"
        coded = rotated if self.kbit is None else self.kbit.name
        return coded + {None: "", "only": "-embedding", "too": "-tied"}[self.lookup]

    def to_dict(self) -> dict[str, Any]:
        """Return the object that goes into config.json of format 2."""
        multiplies, inputs = self.lookup != "only", f"int8-{self.activation}" if self.kbit is None else "16-bit"
        kbit = self.kbit
        return {
            "bits": 8 if kbit is None else kbit.bits,
            "data_type": "int" if kbit is None else kbit.data_type,
            "group": None if kbit is None else kbit.block,
            "rotation": None if self.rotation is None else {"kind": "hadamard", "block": self.rotation},
            "inputs": inputs if multiplies else None,
            "input_group": self.activation_group if multiplies else None,
            **({} if self.lookup is None else {"lookup": True}),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> "Scheme":
        """Read the object in config.json. Raises ValueError: this program computes no such scheme."""
        if not isinstance(raw, dict):
            raise ValueError(f"is {str(raw)[:80]!r}, expected an object")
        ways = get_args(Activation), (None, *get_args(Group)), (None, *get_args(Rotation)), (None, *get_args(Lookup))
        every = [cls(*values) for values in itertools.product(*ways)]
        for lookup in (None, *get_args(Lookup)):
            with contextlib.suppress(ValueError):  # no such weight, or one that is an embedding by another name
                kbit = KBit(raw.get("bits"), raw.get("data_type"), raw.get("group"))  # type: ignore[arg-type]
                every.append(cls(lookup=lookup, kbit=kbit))
        for scheme in every:
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
