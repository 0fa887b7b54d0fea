"""A quantized linear layer as it stands in the files: its record, and the tensors of one (spec.md, "Tensors")."""

from dataclasses import dataclass

from ..containers.tensors import TensorSpec

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


def int8_specs(name: str, out_features: int, in_features: int) -> list[TensorSpec]:
    """Return the tensors of a record that bitsandbytes knows, as they stand in a file; its bias excepted."""
    return [
        TensorSpec(f"{name}.weight", "I8", (out_features, in_features)),
        TensorSpec(f"{name}.SCB", "F32", (out_features,)),
        TensorSpec(f"{name}.weight_format", "U8", ()),
    ]


def outlier_specs(name: str, out_features: int, outlier_count: int, outlier_dtype: str) -> list[TensorSpec]:
    """Return the tensors of a record that hold its outlier columns, as they stand in a file."""
    return [
        TensorSpec(f"{name}.outlier_dims", "I32", (outlier_count,)),
        TensorSpec(f"{name}.outlier_weight", outlier_dtype, (out_features, outlier_count)),
    ]


def record_specs(
    name: str, out_features: int, in_features: int, outlier_count: int, outlier_dtype: str
) -> list[TensorSpec]:
    """Return all tensors of a record as they stand in a file, its bias excepted."""
    return int8_specs(name, out_features, in_features) + outlier_specs(name, out_features, outlier_count, outlier_dtype)
