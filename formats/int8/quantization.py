"""The `quantization_config` of an int8 checkpoint.

In format 1 it has bitsandbytes' keys, and our block `llmint8` among them; in format 2 it is that block, which says in
addition by which scheme each layer is coded.
"""

import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from ..containers.tensors import is_tensor_name
from ..disk.strict_json import member
from .layouts import BITSANDBYTES, LAYOUTS, NATIVE, Layout
from .schemes import Scheme, format_1

# The newest of each MAJOR.
FORMAT_VERSIONS = ("1.1", "2.2")
ROUNDINGS = ("nearest", "gptq")
PRODUCER_NAME = "llmint8"
# What stock bitsandbytes uses for its dynamic search; the value of the paper.
BITSANDBYTES_THRESHOLD = 6.0
_HEAD_NAMES = ("lm_head", "embed_out", "proj_out", "output_projection")


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says about its quantization; spec.md, section "config.json", gives each field's meaning.

    `llmint8` is False for a checkpoint that bitsandbytes wrote: then only `threshold` and `skip_modules` are known,
    which are nothing of format 2. `read_version` is the version that a checkpoint says it has; None for one that is to
    be written.
    """

    skip_modules: list[str]
    outliers: dict[str, int]  # module -> number of 16-bit columns
    criterion: str = "none"
    schemes: dict[str, Scheme] = field(default_factory=lambda: {"int8": Scheme()})  # the one of most layers first
    layers: dict[str, str] = field(default_factory=dict)  # module -> its scheme; in format 1 there is only one
    in_features: dict[str, int] = field(default_factory=dict)  # of k-bit modules, where the packed weight is wider
    rounding: str = "nearest"  # how the values were found
    layout: Layout = BITSANDBYTES
    threshold: float = BITSANDBYTES_THRESHOLD
    read_version: str | None = None
    producer: str = PRODUCER_NAME
    source: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    llmint8: bool = True

    @property
    def format_version(self) -> str:
        """The version that was read; of what is written, the oldest that has all of it."""
        if self.layout == NATIVE:
            schemes = self.schemes.values()
            oldest = "2.2" if any(s.kbit for s in schemes) else "2.1" if any(s.lookup for s in schemes) else "2.0"
            return self.read_version or oldest
        return self.read_version or ("1.0" if self.scheme.activation_group is None else "1.1")

    @property
    def scheme(self) -> Scheme:
        """The scheme of most layers."""
        return next(iter(self.schemes.values()))

    def scheme_of(self, module: str) -> Scheme:
        """Return the scheme of a quantized layer; of one that no scheme is said of, that of most."""
        return self.schemes[self.layers[module]] if module in self.layers else self.scheme

    def is_quantized(self, module: str, dtype: str) -> bool:
        """Tell of a weight's dtype whether it is quantized: int8, or bytes of what is said to be of k bits."""
        return dtype == "I8" or (dtype == "U8" and module in self.layers and self.scheme_of(module).kbit is not None)

    def width_of(self, module: str, row_bytes: int) -> int:
        """Return the K of a layer of k bits: what config.json says, or else as many codes as its rows hold.

        Raises:
            ValueError: rows of K codes have another size.

        """
        kbit = self.scheme_of(module).kbit
        most = kbit.most_features(row_bytes) if kbit else None
        in_features = self.in_features.get(module, most)
        if kbit is None or in_features is None or kbit.row_bytes(in_features) != row_bytes:
            said = f", for {in_features} in_features" if in_features else ""
            raise ValueError(f"has rows of {row_bytes} bytes, expected those of whole chunks of 64 codes{said}")
        return in_features

    @property
    def int8_head(self) -> str | None:
        """The output head, where it is among the quantized layers: an embedding tied to it, or a name in use for it."""
        tied = (name for name in self.outliers if self.scheme_of(name).lookup == "too")
        return next(tied, next((name for name in self.outliers if name.rpartition(".")[2] in _HEAD_NAMES), None))

    def to_dict(self) -> dict[str, Any]:
        """Return the object that goes into config.json."""
        if self.layout == NATIVE:
            return {"quant_method": NATIVE.method, **self._block()}
        return {
            "quant_method": BITSANDBYTES.method,
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llmint8": self._block(),
        }

    def _block(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "producer": self.producer,
            **self._coding(),
            "outliers": {"criterion": self.criterion, "counts": self.outliers},
            "calibration": self.calibration,
            "source": self.source,
        }

    def _coding(self) -> dict[str, Any]:
        if self.layout == NATIVE:
            schemes = {name: scheme.to_dict() for name, scheme in self.schemes.items()}
            coded = {"schemes": schemes, "layers": self.layers, "not_quantized": self.skip_modules}
            widths = {"in_features": self.in_features} if self.in_features else {}
            return {**coded, **widths, "rounding": self.rounding}
        group = self.scheme.activation_group
        return {"activation": self.scheme.activation, **({} if group is None else {"activation_group": group})}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Quantization":
        """Read the object in config.json, but for what our block or format 2 says; see `with_block`.

        Raises:
            ValueError: saying which value is wrong and what would be right.

        """
        if raw.get("quant_method") == NATIVE.method:
            return cls([], {}, layout=NATIVE)
        for key, expected in {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_has_fp16_weight": False}.items():
            if raw.get(key, False) is not expected:
                raise ValueError(f"{key} is {raw.get(key)!r}, expected {str(expected).lower()}")
        if "llm_int8_enable_fp32_cpu_offload" in raw:
            member(raw, "llm_int8_enable_fp32_cpu_offload", bool)
        method = raw.get("quant_method", None if "llmint8" in raw else "bitsandbytes")
        if method != "bitsandbytes":
            raise ValueError(f"quant_method is {method!r}, expected 'bitsandbytes' or 'llmint8'")
        threshold = raw.get("llm_int8_threshold", BITSANDBYTES_THRESHOLD)
        if type(threshold) not in (int, float) or not 0 <= threshold <= sys.float_info.max:
            raise ValueError(f"llm_int8_threshold is {threshold!r}, expected a number that is not negative")
        skip_modules = raw.get("llm_int8_skip_modules")
        if skip_modules is None:
            skip_modules = []
        if not isinstance(skip_modules, list) or not all(isinstance(name, str) for name in skip_modules):
            raise ValueError(
                f"llm_int8_skip_modules is {str(skip_modules)[:80]!r}, expected a list of module names or null"
            )
        return cls(skip_modules, {}, threshold=float(threshold), producer="bitsandbytes", llmint8=False)

    def with_block(self, block: Any) -> "Quantization":
        """Add what our block `llmint8` says, or format 2 in its place. Raises ValueError, as `from_dict` does."""
        version = member(block, "format_version", str)
        if major(version) != self.layout.major:
            newest = FORMAT_VERSIONS[self.layout.major - 1]
            raise ValueError(f"format_version is {version!r}, this program reads {newest} here; update llmint8")
        counts = member(block, "outliers.counts", dict)
        for name, count in counts.items():
            if not is_tensor_name(name):
                raise ValueError(f"outliers.counts names {name[:80]!r}, which is not the name of a module")
            if type(count) is not int or count < 0:
                raise ValueError(f"outliers.counts[{name!r}] is {count!r}, expected a whole number >= 0")
        if self.layout == NATIVE:
            coding = _native_coding(block, counts)
        else:
            coding = {"schemes": {"int8": format_1(member(block, "activation", str), block.get("activation_group"))}}
        if "calibration" in block:
            member(block, "calibration", dict, type(None))
        return replace(
            self,
            outliers=counts,
            criterion=member(block, "outliers.criterion", str),
            **coding,
            read_version=version,
            producer=member(block, "producer", str),
            source=check_source(block),
            calibration=block.get("calibration"),
            llmint8=True,
        )


def _native_coding(block: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Return what format 2 says of how the layers are coded. Every layer has a scheme, and every scheme is known."""
    schemes = {}
    for name, raw in member(block, "schemes", dict).items():
        if not is_tensor_name(name):
            raise ValueError(f"schemes names {name[:80]!r}, which is empty, too long or not printable")
        try:
            schemes[name] = Scheme.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"schemes[{name!r}] {error}") from None
    if not schemes:
        raise ValueError("schemes is empty, expected at least one")
    layers = member(block, "layers", dict)
    if layers.keys() != counts.keys():
        name = min(layers.keys() ^ counts.keys())
        raise ValueError(f"{name[:80]!r} is in one of layers and outliers.counts, expected it in both")
    for name, scheme in layers.items():
        if not isinstance(scheme, str) or scheme not in schemes:
            raise ValueError(f"layers[{name!r}] is {str(scheme)[:80]!r}, expected one of {', '.join(schemes)[:200]}")
    widths = member(block, "in_features", dict) if "in_features" in block else {}
    for name, width in widths.items():
        if name not in layers or schemes[layers[name]].kbit is None:
            raise ValueError(f"in_features names {name[:80]!r}, expected layers of k bits")
        if type(width) is not int or width < 1:
            raise ValueError(f"in_features[{name!r}] is {str(width)[:80]}, expected a whole number >= 1")
    rounding = member(block, "rounding", str)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding[:80]!r}, expected one of {', '.join(ROUNDINGS)}")
    skipped = member(block, "not_quantized", list)
    if not all(isinstance(name, str) for name in skipped):
        raise ValueError(f"not_quantized is {str(skipped)[:80]!r}, expected a list of module names")
    coding = {"schemes": schemes, "layers": layers, "in_features": widths}
    return {**coding, "rounding": rounding, "skip_modules": skipped}


def major(version: str) -> int | None:
    """Return the major number of a format version, MAJOR.MINOR; None where it is of another form, or not known here."""
    match = re.fullmatch(r"([0-9]+)\.[0-9]+", version)
    return int(match[1]) if match is not None and match[1] in map(str, LAYOUTS) else None


def check_source(holder: dict[str, Any]) -> dict[str, Any]:
    """Return the `source` of the block or of the manifest, which say the same. Raises ValueError."""
    member(holder, "source.name", str)
    for key in ("source.repo", "source.commit"):
        member(holder, key, str, type(None))
    return dict(holder["source"])
