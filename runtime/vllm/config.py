"""What vLLM asks a checkpoint's config: which of its layers are int8, and how they run."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from llmint8.formats import NATIVE, LLMInt8Error, Quantization, open_checkpoint, read_manifest
from llmint8.formats.disk.names import MANIFEST_NAME

from ..layers.arguments import group_to_run, kernels_group
from ..model.calibration import missed_layers
from .experts import Int8ExpertsMethod
from .linear import Int8LinearMethod
from .shards import How

METHOD = NATIVE.method
log = logging.getLogger("vllm.llmint8")


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfig):  # type: ignore[misc]
    """An int8 checkpoint of format 1, whose config says bitsandbytes, or 2."""

    def __init__(self, quantization: Quantization) -> None:
        """Take what the checkpoint says; names of layers become vLLM's later, with `apply_vllm_mapper`."""
        super().__init__()
        self._quantization = quantization
        device = torch.device(current_platform.device_type)
        self._group = kernels_group(group_to_run(quantization, device, "config.json"))
        self._hows = {name: self._how(name) for name in quantization.outliers}
        self._counts = dict(quantization.outliers)

    @classmethod
    def get_name(cls) -> str:
        """Return what `--quantization` calls it."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a model may run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest architecture of NVIDIA's that has int8 products in its tensor cores."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: all of it is in config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints of format 1; what bitsandbytes itself wrote is left to its own plugin."""
        ours = hf_quant_cfg.get("quant_method") == METHOD or "llmint8" in hf_quant_cfg
        return METHOD if ours and user_quant in (None, METHOD) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int8Config":
        """Read `quantization_config`. Raises LLMInt8Error: it is not what spec.md says."""
        try:
            quantization = Quantization.from_dict(config)
            block = config if quantization.layout == NATIVE else config.get("llmint8")
            return cls(quantization.with_block(block))
        except ValueError as error:
            raise LLMInt8Error(f"config.json: quantization_config: {error}") from None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the structure of a checkpoint that is a directory, and find what its calibration did not reach.

        Raises:
            LLMInt8Error: it breaks a rule of spec.md.

        """
        path = Path(model_name)
        if not path.is_dir():
            log.info("%s: of a repository only config.json is checked; llmint8 verify checks a directory", model_name)
            return
        checkpoint = open_checkpoint(path)
        quantization = self._quantization
        if not (checkpoint.layout.searches and quantization.threshold and (path / MANIFEST_NAME).exists()):
            return
        for name in missed_layers(checkpoint, read_manifest(path)):
            how = self._hows[name]
            self._hows[name] = How(how.activation, quantization.threshold, how.group)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take on vLLM's names of the layers."""
        self._hows = hf_to_vllm_mapper.apply_dict(self._hows)
        self._counts = hf_to_vllm_mapper.apply_dict(self._counts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what runs a layer; None for what is neither a linear layer nor int8.

        Raises:
            LLMInt8Error: of the matrices that vLLM merges only some are int8.

        """
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        names = self._matrices(prefix)
        if not self._all_int8(names):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        counts, hows = [self._counts[name] for name in names], [self._hows[name] for name in names]
        return Int8LinearMethod(prefix, self._quantization.layout, counts, hows)

    def _experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        up = [layer.ckpt_gate_proj_name, *([layer.ckpt_up_proj_name] if layer.ckpt_up_proj_name else [])]
        experts = range(layer.moe_config.num_logical_experts)
        names = {
            stem: [f"{prefix}.{expert}.{part}" for expert in experts for part in parts]
            for stem, parts in {"w13": up, "w2": [layer.ckpt_down_proj_name]}.items()
        }
        if not self._all_int8([name for own in names.values() for name in own]):
            return None
        most = {stem: max(self._counts[name] for name in own) for stem, own in names.items()}
        hows = {stem: self._hows[own[0]] for stem, own in names.items()}
        return Int8ExpertsMethod(layer, prefix, self._quantization.layout, most, hows)

    def _all_int8(self, names: list[str]) -> bool:
        """Tell whether matrices that vLLM merges are int8. Raises LLMInt8Error: only some are."""
        int8 = [name for name in names if name in self._hows]
        if int8 and len(int8) < len(names):
            left = next(name for name in names if name not in self._hows)
            raise LLMInt8Error(f"{left}: not int8, as {int8[0]} is, and vLLM merges them; convert both or neither")
        return bool(int8)

    def _matrices(self, prefix: str) -> list[str]:
        """Return the layers of the checkpoint that a layer of vLLM's is made of."""
        stem, _, name = prefix.rpartition(".")
        if prefix in self._hows or name not in self.packed_modules_mapping:
            return [prefix]
        return [f"{stem}.{part}" if stem else part for part in self.packed_modules_mapping[name]]

    def _how(self, name: str) -> How:
        scheme = self._quantization.scheme_of(name)
        if scheme.lookup is not None:
            raise ValueError(f"{name} is an embedding in int8, which vLLM cannot look up; convert it without")
        if scheme.kbit is not None:
            raise ValueError(f"{name} has a weight of {scheme.kbit.bits} bits, which this plugin has no layer for")
        return How(scheme.activation, None, self._group, scheme.rotation)


def _leave_ours(normalize: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let vLLM take the config of format 2 as it is: it looks for ModelOpt's, of which `producer` is an object."""

    @functools.wraps(normalize)
    def normalized(self: Any, config: Any) -> Any:
        found = getattr(config, "quantization_config", None)
        return found if isinstance(found, dict) and found.get("quant_method") == METHOD else normalize(self, config)

    return normalized


ModelArchConfigConvertorBase._normalize_quantization_config = _leave_ours(
    ModelArchConfigConvertorBase._normalize_quantization_config
)
