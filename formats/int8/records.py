"""A quantized linear layer as it stands in the files: its record (spec.md, "Tensors")."""

from dataclasses import dataclass

from .schemes import Scheme

# Sums of so many products of an int8 input and weight fit 32 bits: 127 * 127 each, and 127 * 128 where -128 may occur.
MAX_IN_FEATURES = 133_144
MAX_IN_FEATURES_OF_BITSANDBYTES = 132_104


@dataclass(frozen=True)
class Int8Record:
    """One quantized linear layer. `outlier_count` is None where bitsandbytes wrote it and no outliers are stored."""

    name: str
    out_features: int
    in_features: int
    outlier_count: int | None
    has_bias: bool
    scheme: Scheme
