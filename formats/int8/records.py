"""A quantized linear layer as it stands in the files: its record (spec.md, "Tensors")."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..containers.tensors import FLOAT_DTYPES, TensorInfo
from ..errors import CheckpointError
from .quantization import Quantization
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


def check_record(path: Path, tensors: Mapping[str, TensorInfo], name: str, quantization: Quantization) -> Int8Record:
    """Return the record of a layer that has its tensors. Raises CheckpointError: E09, one is not as it should be."""
    weight = tensors[f"{name}.weight"]
    where = f"{path / weight.file}: {name}"
    if len(weight.shape) != 2:
        raise CheckpointError("E09", f"{where}.weight: shape {list(weight.shape)}, expected [out, in]")
    scheme = quantization.scheme_of(name)
    out_features, in_features = weight.shape
    if scheme.kbit is not None:
        try:
            in_features = quantization.width_of(name, in_features)
        except ValueError as error:
            raise CheckpointError("E09", f"{where}.weight: {error}") from None
    most = MAX_IN_FEATURES if quantization.llmint8 else MAX_IN_FEATURES_OF_BITSANDBYTES
    if scheme.kbit is None and in_features > most:
        raise CheckpointError("E09", f"{where}.weight: {in_features} columns, at most {most} add up in 32 bits")
    dims, columns = tensors.get(f"{name}.outlier_dims"), tensors.get(f"{name}.outlier_weight")
    count = None if dims is None else (dims.shape[-1] if dims.shape else 0)
    outlier_dtype = "F32" if columns is None else columns.dtype
    expected = quantization.layout.record_specs(name, out_features, in_features, count or 0, outlier_dtype, scheme)
    for spec in expected:
        info = tensors.get(spec.name)
        if info is not None and (info.dtype, info.shape) != (spec.dtype, spec.shape):
            raise CheckpointError(
                "E09",
                f"{path / info.file}: {info.name}: is {info.dtype} {list(info.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}",
            )
    if outlier_dtype not in FLOAT_DTYPES:
        raise CheckpointError("E09", f"{where}.outlier_weight: is {outlier_dtype}, expected F16, BF16 or F32")
    if count is not None and count > in_features:
        raise CheckpointError("E09", f"{where}.outlier_dims: {count} of them for {in_features} dimensions")
    bias = tensors.get(f"{name}.bias")
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or bias.shape != (out_features,)):
        raise CheckpointError("E09", f"{where}.bias: is {bias.dtype} {list(bias.shape)}, expected [{out_features}]")
    return Int8Record(name, out_features, in_features, count, bias is not None, scheme)
