"""The streamed forward pass sees what the ordinary model sees, with one weight at a time."""

import gc
import weakref

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from llmint8 import formats
from llmint8.converter.calibration.streaming import streamed
from llmint8.converter.model.build import meta_model, model_class
from llmint8.converter.model.config import load_config
from llmint8.converter.model.names import fused_parameters, parameter_tensors
from llmint8.converter.planning.selection import select_layers

_SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "opt": transformers.OPTConfig(**_SMALL, ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=64),
    "bloom": transformers.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4),
    "gpt2": transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": transformers.GPTNeoXConfig(**_SMALL, intermediate_size=96, max_position_embeddings=64),
    "llama": transformers.LlamaConfig(**_LLAMA),
    "gemma2": transformers.Gemma2Config(**_LLAMA, head_dim=16),
    "phi": transformers.PhiConfig(**{**_LLAMA, "num_key_value_heads": 4}),
    "t5": transformers.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    "mixtral": transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),  # experts are fused
    "mamba": transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8),
    "bert": transformers.BertConfig(**_SMALL, intermediate_size=96, max_position_embeddings=64),
}
ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "bert": "BertForMaskedLM"}


@pytest.fixture(params=MODELS)
def source(request, tmp_path):
    config = MODELS[request.param]
    name = ARCHITECTURES.get(request.param)
    auto = transformers.AutoModelForCausalLM if name is None else getattr(transformers, name)
    torch.manual_seed(0)
    model = auto.from_config(config) if name is None else auto(config)
    model.half().save_pretrained(tmp_path)
    return formats.open_source(tmp_path)


def _inputs(config):
    ids = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


def _stream(source, read, on_linear):
    config = load_config(source.path)
    model = meta_model(config)
    tensor_of = parameter_tensors(model, source.tensors)
    selection = select_layers(source, model, (), ())
    layers = {selection.module_of[name]: layer.weight.name for name, layer in selection.layers.items()}
    fused = fused_parameters(model, source.tensors)
    with streamed(model, tensor_of, fused, layers, {}, {}, read, on_linear, torch.device("cpu")) as call:
        call("forward", _inputs(config))
    return layers


def test_every_layer_sees_its_input_and_its_weight(source):
    seen = {}
    layers = _stream(
        source, source.read, lambda call: seen.__setitem__(call.name, (call.rows.clone(), call.weight.clone()))
    )
    assert seen.keys() == layers.keys()
    config = load_config(source.path)
    model = model_class(config).from_pretrained(source.path, dtype=torch.float32).eval()
    expected = {}
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: expected.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).clone())
        )
    with torch.no_grad():
        model(**_inputs(config))
    for name, (x, weight) in seen.items():
        assert torch.allclose(x, expected[name], rtol=1e-4, atol=1e-5), name
        module = model.get_submodule(name)
        original = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert torch.equal(weight.float(), original), name


@pytest.mark.parametrize("source", ["gpt2", "t5", "mixtral"], indirect=True)
def test_at_most_two_linear_weights_are_alive(source):
    """The one in use, and the one that is read ahead."""
    selection = select_layers(source, meta_model(load_config(source.path)), (), ())
    linear = {layer.weight.name for layer in selection.layers.values()}
    alive = []

    def read(name):
        tensor = source.read(name)
        if name in linear:
            alive.append(weakref.ref(tensor))
        return tensor

    # What was there before, all modules of transformers, is not looked through again for every layer.
    gc.collect()
    gc.freeze()

    def on_linear(call):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2

    try:
        _stream(source, read, on_linear)
    finally:
        gc.unfreeze()
    assert len(alive) >= len(linear) >= 6


def test_a_parameter_that_is_in_no_file_ends_the_pass(tmp_path):
    """On the meta device some operations would give whatever lies in memory instead."""
    config = MODELS["llama"]
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    source = formats.open_source(tmp_path)
    del source.tensors["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"a parameter of shape \[64\] is not in the checkpoint"):
        _stream(source, source.read, lambda call: None)


def test_weights_that_the_models_code_takes_itself_are_left_alone(tmp_path):
    transformers.MambaForCausalLM(MODELS["mamba"]).half().save_pretrained(tmp_path)
    source = formats.open_source(tmp_path)
    selection = select_layers(source, meta_model(load_config(tmp_path)), (), ())
    kept = {name for name, reason in selection.kept.items() if reason == "its weight is used by the model's own code"}
    assert kept == {f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)}
    assert len(selection.layers) == 6
