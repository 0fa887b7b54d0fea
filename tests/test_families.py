"""Tiny random-weight models of many architectures: convert, load, and compare with the 16-bit model."""

import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8 import converter, formats, runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.planning import selection
from llmint8.converter.words import size
from llmint8.runtime.commands.verify import verify_command

_SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
# class, config arguments, quantized layers per block x blocks (+ others inside the body)
FAMILIES = {
    "opt": ("OPTForCausalLM", {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}, 12),
    "opt-350m": (  # project_in and project_out around the blocks
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        14,
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}, 8),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, 8),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_SMALL, "intermediate_size": 96, "max_position_embeddings": 64}, 8),
    "llama-tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}, 14),
    "llama-untied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": False}, 14),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA, 14),
    "mistral": ("MistralForCausalLM", _LLAMA, 14),
    "phi": ("PhiForCausalLM", {**_LLAMA, "num_key_value_heads": 4}, 12),
    "gemma": ("GemmaForCausalLM", {**_LLAMA, "head_dim": 16}, 14),
    "t5": (  # 2 x (4 attention + wi) in the encoder, 2 x (8 + wi) in the decoder; wo stays as it is
        "T5ForConditionalGeneration",
        {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        28,
    ),
    "bert": ("BertForMaskedLM", {**_SMALL, "intermediate_size": 96, "max_position_embeddings": 64}, 12),
}


def _make(family, directory, dtype):
    name, arguments, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**arguments, pad_token_id=0)).to(dtype).eval()
    with torch.no_grad():
        for module_name, module in model.named_modules():
            # Random initialisation gives logits near zero, and biases of exactly zero hide lost biases.
            if isinstance(module, nn.Linear | Conv1D):
                fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                module.weight.normal_(0, fan_in**-0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.5)
                if family == "t5" and module_name.endswith(".q"):
                    module.weight.mul_(16**-0.5)  # T5 has 1/sqrt(d_kv) in here
    model.save_pretrained(directory)
    return cls.from_pretrained(directory, dtype=torch.float32).eval()


def _logits(model):
    tokens = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_converts_loads_and_stays_close(family, tmp_path):
    expected = _logits(_make(family, tmp_path / "source", torch.float16))
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    model = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == FAMILIES[family][0]
    layers = [module for module in model.modules() if isinstance(module, runtime.Int8Linear)]
    assert len(layers) == report.layers == FAMILIES[family][2]
    error = (_logits(model) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.04  # int8 costs something, and not much


def test_t5_keeps_wo_as_transformers_asks(tmp_path):
    _make("t5", tmp_path / "source", torch.float32)
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    kept = {name for name, reason in report.kept.items() if reason == "kept in high precision by the model"}
    expected = {
        f"{part}.block.{i}.layer.{ff}.DenseReluDense.wo"
        for part, ff in (("encoder", 1), ("decoder", 2))
        for i in (0, 1)
    }
    assert kept == expected
    assert (
        formats.open_checkpoint(tmp_path / "out").tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype
        == "F32"
    )


def test_gpt2_weights_are_stored_transposed(tmp_path):
    source = _make("gpt2", tmp_path / "source", torch.float16)
    converter.convert(tmp_path / "source", tmp_path / "out")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    name = "transformer.h.0.attn.c_attn"
    assert checkpoint.tensors[f"{name}.weight"].shape == (192, 64)
    weight = source.transformer.h[0].attn.c_attn.weight.t()
    absmax = weight.abs().amax(1)
    assert torch.equal(checkpoint.read(f"{name}.SCB"), absmax)
    expected = (weight.double() * 127 / absmax.double()[:, None]).round().to(torch.int8)
    assert torch.equal(checkpoint.read(f"{name}.weight"), expected)


def test_checkpoint_without_the_models_prefix(tmp_path):
    """Old files of GPT-2 and OPT lack `transformer.` and `model.`; transformers adds it, so must we."""
    from safetensors.torch import load_file, save_file

    expected = _logits(_make("gpt2", tmp_path / "source", torch.float16))
    file = tmp_path / "source" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    assert converter.convert(tmp_path / "source", tmp_path / "out").layers == 8
    logits = _logits(runtime.load(tmp_path / "out", dtype=torch.float32))
    assert (logits - expected).norm() / expected.norm() < 0.04


def test_mixture_of_experts_leaves_router_and_experts_alone(tmp_path):
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).half().save_pretrained(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    assert report.layers == 8  # q, k, v and o of two blocks
    assert any("expert" in notice for notice in report.notices)
    model = runtime.load(tmp_path / "out", dtype=torch.float32)
    source = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert torch.allclose(_logits(model), _logits(source), atol=0.05)


_MOE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
STACKED = {  # config, matrices of experts in each block, one of the tensors
    "gpt-oss": (transformers.GptOssConfig(**_MOE, head_dim=16), 8, "mlp.experts.down_proj"),
    "granite-moe": (transformers.GraniteMoeConfig(**_MOE), 8, "block_sparse_moe.input_linear.weight"),
    "llama4": (transformers.Llama4TextConfig(**_MOE, head_dim=16), 8, "feed_forward.experts.down_proj"),
    "jetmoe": (transformers.JetMoeConfig(**_MOE, kv_channels=32), 16, "mlp.input_linear.weight"),
}


@pytest.mark.parametrize("family", STACKED)
def test_stacks_of_experts_stay_as_they_are_and_the_converter_says_so(family, tmp_path):
    config, count, name = STACKED[family]
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "source")
    source = formats.open_source(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    stacks = [info for info in source.tensors.values() if len(info.shape) == 3]
    nbytes = size(sum(info.nbytes for info in stacks))
    (notice,) = [notice for notice in report.notices if "matrices" in notice]
    what = f"{2 * count} matrices of experts ({nbytes}, model.layers.0.{name} among them) stay as they are: "
    why = "the model has them in stacks, and no linear layers for them"
    assert re.fullmatch(re.escape(what + why) + r"; they are \d\d% of it, which --format 2 halves", notice)


def test_a_model_without_experts_has_no_notice_of_them(tmp_path):
    for family in ("opt-350m", "gpt2", "t5", "bert"):
        _make(family, tmp_path / family, torch.float16)
        report = converter.convert(tmp_path / family, tmp_path / f"{family}-out", outliers="none")
        assert report.notices == []


def test_every_router_stays_in_16_bit(tmp_path):
    config = transformers.DogeConfig(**_LLAMA, is_moe=True, num_experts=16, num_experts_per_tok=2)
    transformers.DogeForCausalLM(config).half().save_pretrained(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out", outliers="none")
    assert report.kept["model.layers.0.mlp.router_gate"] == "router"


ROUTERS = ["mlp.router_gate", "moe.router.layer", "mlp.gate", "mlp.shared_expert_gate", "altup.modality_router"]
ROUTERS += ["mlp.moe_gate", "mlp.expert_gate", "router_proj", "block.gating"]
NO_ROUTERS = ["mlp.gate_proj", "self_attn.output_gate", "per_layer_input_gate", "outrouter", "mlp.experts.0.up_proj"]


def test_what_is_a_router_by_its_name():
    assert [name for name in ROUTERS + NO_ROUTERS if selection._ROUTER.search(name)] == ROUTERS


@pytest.mark.parametrize(("family", "prefix"), [("bloom", "transformer."), ("opt", "model.")])
def test_sharded_files_of_pytorch_without_the_models_prefix(family, prefix, tmp_path):
    """As BLOOM-176B and OPT-66B are on the Hub: `pytorch_model_00001-of-00072.bin`, keys such as `h.0...`."""
    from safetensors.torch import load_file

    expected = _logits(_make(family, tmp_path / "source", torch.float16))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[number::3]) for number in range(3)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"pytorch_model_{number:05d}-of-00003.bin"
        torch.save({key.removeprefix(prefix): tensor for key, tensor in part.items()}, tmp_path / "source" / name)
        weight_map |= {key.removeprefix(prefix): name for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "source" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    seen = []

    def interrupt(name, nbytes):
        seen.append(name)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converter.convert(tmp_path / "source", tmp_path / "out", progress=interrupt)
    converter.convert(tmp_path / "source", tmp_path / "out")
    converter.convert(tmp_path / "source", tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    logits = _logits(runtime.load(tmp_path / "out", dtype=torch.float32))
    assert (logits - expected).norm() / expected.norm() < 0.04
    verified = CliRunner().invoke(verify_command, [str(tmp_path / "out"), "--source", str(tmp_path / "source")])
    assert verified.exit_code == 0, verified.output
    dry = CliRunner().invoke(convert_command, [str(tmp_path / "source"), str(tmp_path / "new"), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "new").exists()
