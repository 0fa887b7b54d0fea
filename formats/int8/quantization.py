"""The `quantization_config` of an int8 checkpoint: bitsandbytes' keys, and our block `llmint8` among them."""

import re
import sys
from dataclasses import dataclass, field
from typing import Any

from ..containers.tensors import is_tensor_name
from ..disk.strict_json import member

FORMAT_VERSION = "1.1"
_ACTIVATION_GROUPS = (64, 128, 256)
PRODUCER_NAME = "llmint8"
# What stock bitsandbytes uses for its dynamic search; the value of the paper.
BITSANDBYTES_THRESHOLD = 6.0
_HEAD_NAMES = ("lm_head", "embed_out", "proj_out", "output_projection")


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says about its quantization; spec.md, section "config.json", gives each field's meaning.

    `llmint8` is False for a checkpoint that bitsandbytes wrote: then only `threshold` and `skip_modules` are known.
    `read_version` is the version that a checkpoint says it has; None for one that is to be written.
    """

    skip_modules: list[str]
    outliers: dict[str, int]  # module -> number of 16-bit columns
    criterion: str = "none"
    activation: str = "absmax"
    activation_group: int | None = None  # dimensions of an input that share a scale; None is all of them
    threshold: float = BITSANDBYTES_THRESHOLD
    read_version: str | None = None
    producer: str = PRODUCER_NAME
    source: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    llmint8: bool = True

    @property
    def format_version(self) -> str:
        """The version that was read; of what is written, the oldest that has all of it."""
        return self.read_version or ("1.0" if self.activation_group is None else "1.1")

    @property
    def int8_head(self) -> str | None:
        """The output head, where it is among the quantized layers under a name in use for it."""
        return next((name for name in self.outliers if name.rpartition(".")[2] in _HEAD_NAMES), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that goes into config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llmint8": {
                "format_version": self.format_version,
                "producer": self.producer,
                "activation": self.activation,
                **({} if self.activation_group is None else {"activation_group": self.activation_group}),
                "outliers": {"criterion": self.criterion, "counts": self.outliers},
                "calibration": self.calibration,
                "source": self.source,
            },
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Quantization":
        """Read the object in config.json. Raises ValueError, saying which value is wrong and what would be right."""
        for key, expected in {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_has_fp16_weight": False}.items():
            if raw.get(key, False) is not expected:
                raise ValueError(f"{key} is {raw.get(key)!r}, expected {str(expected).lower()}")
        if "llm_int8_enable_fp32_cpu_offload" in raw:
            member(raw, "llm_int8_enable_fp32_cpu_offload", bool)
        method = raw.get("quant_method", None if "llmint8" in raw else "bitsandbytes")
        if method != "bitsandbytes":
            raise ValueError(f"quant_method is {method!r}, expected 'bitsandbytes'")
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
        """Add what our block `llmint8` says. Raises ValueError, as `from_dict` does."""
        version = member(block, "format_version", str)
        if not is_readable(version):
            raise ValueError(f"format_version is {version!r}, this program reads {FORMAT_VERSION}; update llmint8")
        counts = member(block, "outliers.counts", dict)
        for name, count in counts.items():
            if not is_tensor_name(name):
                raise ValueError(f"outliers.counts names {name[:80]!r}, which is not the name of a module")
            if type(count) is not int or count < 0:
                raise ValueError(f"outliers.counts[{name!r}] is {count!r}, expected a whole number >= 0")
        activation = member(block, "activation", str)
        if activation not in ("absmax", "zeropoint"):
            raise ValueError(f"activation is {activation!r}, expected 'absmax' or 'zeropoint'")
        group = block.get("activation_group")
        if group is not None and (type(group) is not int or group not in _ACTIVATION_GROUPS):
            raise ValueError(f"activation_group is {str(group)[:80]!r}, expected 64, 128, 256 or null")
        if "calibration" in block:
            member(block, "calibration", dict, type(None))
        return Quantization(
            self.skip_modules,
            counts,
            criterion=member(block, "outliers.criterion", str),
            activation=activation,
            activation_group=group,
            threshold=self.threshold,
            read_version=version,
            producer=member(block, "producer", str),
            source=check_source(block),
            calibration=block.get("calibration"),
        )


def is_readable(version: str) -> bool:
    """Tell whether a format version is MAJOR.MINOR with our major number."""
    match = re.fullmatch(r"([0-9]+)\.[0-9]+", version)
    return match is not None and match[1] == FORMAT_VERSION.split(".")[0]


def check_source(holder: dict[str, Any]) -> dict[str, Any]:
    """Return the `source` of the block or of the manifest, which say the same. Raises ValueError."""
    member(holder, "source.name", str)
    for key in ("source.repo", "source.commit"):
        member(holder, key, str, type(None))
    return dict(holder["source"])
