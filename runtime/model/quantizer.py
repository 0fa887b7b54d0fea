"""How transformers is told to build `Int8Linear` layers: a quantization config and a quantizer, `llmint8`.

`from_pretrained` builds the model on the meta device and calls the quantizer, which swaps the layers; then
tensors find their places by name. `load.py` puts the config together, so that nothing here reads a file.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer

from llmint8.converter.model.limits import check_buffers
from llmint8.converter.model.names import module_names
from llmint8.formats import NATIVE, Int8Record, LLMInt8Error

from ..layers.embedding import Int8Embedding, tied_head
from ..layers.experts import replace_experts
from ..layers.linear import QuantizedLinear
from ..parallel.cut import settle_cuts
from ..parallel.state import is_cut, whole_state
from .dequantize import replace_int8
from .places import check_in_one_place, check_matrix, check_shapes, embedding_for, linear_for, matrices_of
from .saving import names_once_saved, provenance_of, rename_layers, save_as_loaded
from .settings import QUANT_METHOD as QUANT_METHOD
from .settings import LoadedConfig, let_cast


@register_quantizer(QUANT_METHOD)
class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for `Int8Linear` before transformers loads the tensors."""

    quantization_config: LoadedConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self._layers: dict[str, str] = {}
        names = module_names(model, config.shapes)
        # In format 1 there are none, and the names of its layers are those of linear modules.
        matrices = matrices_of(model, config.records, config.shapes) if config.layout == NATIVE else {}
        of_experts: dict[str, QuantizedLinear] = {}
        for record in config.records:
            if record.name in matrices:
                matrix = matrices[record.name]
                check_matrix(model, matrix, record)
                of_experts[record.name] = self._layer(record, matrix.module, False, dtype)
                continue
            name = names.get(f"{record.name}.weight", "").removesuffix(".weight")
            if record.scheme.lookup is not None:
                self._replace_embedding(model, name, record, dtype, kwargs.get("device_map"))
                continue
            linear = linear_for(model, name, record)
            layer = self._layer(record, name, linear.bias is not None, dtype)
            model.set_submodule(name, layer.train(linear.training))
        self._experts = {f"{matrix.experts}.{matrix.projection}" for matrix in matrices.values()}
        here = list(matrices.values())
        if of_experts:
            here = here if config.parallel is None else config.parallel.held(model, here)
            replace_experts(model, here, of_experts)
        check_shapes(model, config.shapes, names)
        check_buffers(model)
        # Early bitsandbytes did not write it; there is nothing to warn about.
        ignored: Any = model._keys_to_ignore_on_load_missing or ()
        model._keys_to_ignore_on_load_missing = {*ignored, r"\.weight_format$"}  # type: ignore[assignment]
        if config.parallel is not None:
            config.parallel.fit(model)

    def _layer(self, record: Int8Record, name: str, bias: bool, dtype: torch.dtype | None) -> QuantizedLinear:
        """Make the layer of a record, which will have this name in the model."""
        how = record.scheme, (record.in_features, record.out_features), bias, record.outlier_count, dtype
        layer = self.quantization_config.layer(record.name, *how)
        layer.name = self._layers[record.name] = name
        return layer

    def _replace_embedding(
        self, model: Any, name: str, record: Int8Record, dtype: torch.dtype | None, device_map: Any
    ) -> None:
        """Put an int8 table into the place of an embedding, and a head tied to it into that of the model's head."""
        embedding, head = embedding_for(model, name, record)
        if head is not None:
            check_in_one_place(name, device_map)
        stored = record.outlier_count or 0, record.scheme.rotation, self.quantization_config.layout
        made = Int8Embedding.in_place_of(embedding, *stored, device="meta", dtype=dtype, kbit=record.scheme.kbit)
        made.name = self._layers[record.name] = name
        model.set_submodule(name, made)
        if head is not None:
            tied = tied_head(made, **self.quantization_config.settings(record.name))
            tied.name = head
            model.set_submodule(head, tied.train(made.training))
            # They have one set of tensors from now on, and what is missing under the head's name is not missing.
            ties = model.all_tied_weights_keys
            model.all_tied_weights_keys = {key: ties[key] for key in ties if key != f"{head}.weight"}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Leave out the rules by which transformers would stack the matrices of experts that are layers here."""
        # Up to 5.19, which is what vLLM 0.32 asks for, it is called without the model.

        def stacks(rule: Any) -> bool:
            targets = rule.target_patterns if isinstance(rule, WeightConverter) else []
            return any(name.endswith(target) for name in self._experts for target in targets)

        return [rule for rule in weight_conversions if not stacks(rule)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.parallel is not None:
            settle_cuts(model)
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedLinear):
                continue
            if module.unpacked_weight().dtype != (torch.int8 if module.kbit is None else torch.uint8):
                raise LLMInt8Error(f"{name}: quantized in the checkpoint, but tied to another weight by the model")
            if config.layout.weight_format:
                # The formats room allows no other value, and without the tensor it would be left undefined.
                module.weight_format = torch.zeros((), dtype=torch.uint8, device=module.row_absmax.device)
        saved_names = names_once_saved(model, self._layers)
        rename_layers(config.block, saved_names)
        if config.manifest is not None and config.block:
            config.provenance = provenance_of(config.manifest, saved_names)
        config.records, config.shapes, config.manifest = [], {}, None  # large, and of no more use

    def is_serializable(self) -> bool:
        """Tell that `save_pretrained` works."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return what `save_pretrained` is to write of a model on several processes; None of any other."""
        return (whole_state(model) if is_cut(model) else None), {}

    @property
    def is_compileable(self) -> bool:
        """Tell that `generate` may compile the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that adapters on the model can be trained."""
        return True

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Turn a model back into one in floating point; see `dequantize.py`."""
        replace_int8(model, dtype)
        self.remove_quantization_config(model)
        model.config.__dict__.pop("_is_quantized", None)
        return model if dtype is None else model.to(dtype)

    def adopt(self, model: Any, layers: dict[str, str], stacks: set[str]) -> None:
        """Take on a model with its layers, name in a checkpoint -> in the model, and the stacks that some stand for."""
        self._layers, self._experts = layers, stacks
        model.hf_quantizer, model.is_quantized, model.quantization_method = self, True, QUANT_METHOD
        self.postprocess_model(model)


def _config(model: Any) -> LoadedConfig | None:
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if isinstance(quantizer, Int8Quantizer) else None


save_as_loaded(_config)
let_cast(lambda model: _config(model) is not None)
