"""How a MAJOR version of the format lays a checkpoint out: what its files and the tensors of a layer are called."""

from dataclasses import dataclass

from ..containers.tensors import TensorSpec
from .schemes import Scheme

_INT8 = Scheme()


@dataclass(frozen=True)
class Layout:
    """The layout of one MAJOR version.

    Attributes:
        major: the version.
        method: `quant_method` in config.json.
        stem: how names of weight files begin.
        absmax: what a layer's absmax is called.
        weight_format: whether a layer has a tensor of this name, which bitsandbytes wants.
        searches: whether a layer for which no outlier columns were chosen searches them in every call.

    """

    major: int
    method: str
    stem: str
    absmax: str
    weight_format: bool
    searches: bool

    @property
    def single(self) -> str:
        """Name of the weight file where there is one."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """Name of the index where there are several."""
        return f"{self.single}.index.json"

    def shard_names(self, count: int) -> list[str]:
        """Return the names of so many weight files."""
        return [
            self.single if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            for number in range(1, count + 1)
        ]

    def weight_suffixes(self, scheme: Scheme = _INT8) -> list[str]:
        """What the tensors are called that are made of a layer's weight alone."""
        codebook = scheme.kbit is not None and scheme.kbit.has_codebook
        optional = {"weight_format": self.weight_format, "codebook": codebook}
        return ["weight", self.absmax, *(name for name, has in optional.items() if has)]

    @property
    def reserved_suffixes(self) -> list[str]:
        """What only tensors of a quantized layer are called; `weight` and `bias` are names of ordinary ones too."""
        return [*self.weight_suffixes()[1:], "outlier_dims", "outlier_weight"]

    def weight_specs(self, name: str, out_features: int, in_features: int, scheme: Scheme = _INT8) -> list[TensorSpec]:
        """Return the tensors of a layer that are made of its weight alone, as they stand in a file."""
        stored: dict[str, tuple[str, tuple[int, ...]]]
        if kbit := scheme.kbit:
            stored = {
                "weight": ("U8", (out_features, kbit.row_bytes(in_features))),
                self.absmax: ("F16", (out_features, kbit.blocks(in_features))),
                "codebook": ("F16", (2**kbit.bits,)),
            }
        else:
            stored = {
                "weight": ("I8", (out_features, in_features)),
                self.absmax: ("F32", (out_features,)),
                "weight_format": ("U8", ()),
            }
        return [TensorSpec(f"{name}.{suffix}", *stored[suffix]) for suffix in self.weight_suffixes(scheme)]

    def record_specs(
        self,
        name: str,
        out_features: int,
        in_features: int,
        outlier_count: int,
        outlier_dtype: str,
        scheme: Scheme = _INT8,
    ) -> list[TensorSpec]:
        """Return all tensors of a layer as they stand in a file, its bias excepted."""
        return [
            *self.weight_specs(name, out_features, in_features, scheme),
            *outlier_specs(name, out_features, outlier_count, outlier_dtype),
        ]


def outlier_specs(name: str, out_features: int, outlier_count: int, outlier_dtype: str) -> list[TensorSpec]:
    """Return the tensors of a layer that hold its outlier columns, as they stand in a file."""
    return [
        TensorSpec(f"{name}.outlier_dims", "I32", (outlier_count,)),
        TensorSpec(f"{name}.outlier_weight", outlier_dtype, (out_features, outlier_count)),
    ]


BITSANDBYTES = Layout(1, "bitsandbytes", "model", "SCB", weight_format=True, searches=True)
NATIVE = Layout(2, "llmint8", "llmint8-model", "absmax", weight_format=False, searches=False)
LAYOUTS = {layout.major: layout for layout in (BITSANDBYTES, NATIVE)}
