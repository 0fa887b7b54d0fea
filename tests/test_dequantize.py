"""The way back to floating point: exact in the stored columns, and within a step of the source in the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, runtime
from llmint8.formats import LLMInt8Error, SourceError, open_checkpoint, open_source

pytestmark = pytest.mark.usefixtures("quiet_transformers")
TOKENS = torch.arange(3, 19)[None]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON: dict[str, Any] = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}


def converted(path: Path, name: str, dtype: torch.dtype, **options: Any) -> Path:
    torch.manual_seed(3)
    models: dict[str, Any] = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **COMMON, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=36, n_layer=2, n_head=2, **COMMON)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, **COMMON, num_key_value_heads=2, num_local_experts=4)
        ),
        "gpt-oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**SIZES, **COMMON, num_key_value_heads=2, head_dim=16, num_local_experts=4)
        ),
    }
    models[name]().to(dtype).save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", **{"outliers": "top-k=4", "calibration_tokens": 48, **options})
    return path / "out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    return converted(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float16, {"format": 2, "rotate": True}),
        ("gpt2", torch.float32, {}),
        ("mixtral", torch.bfloat16, {"format": 2}),
        ("gpt-oss", torch.float32, {"format": 2}),
        ("llama", torch.float32, {"quantize_head": True}),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else " ".join(value) or "format 1",
)
def test_it_is_near_the_source_and_a_model_like_any_other(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    model = runtime.load(converted(tmp_path, name, dtype, **options))
    int8 = {name: layer for name, layer in model.named_modules() if isinstance(layer, runtime.Int8Linear)}
    columns = {name: layer.outlier_dims.tolist() for name, layer in int8.items()}
    assert any(columns.values())
    source = type(model).from_pretrained(tmp_path / "source")
    expected = logits(model)
    back = runtime.dequantize(model)
    assert back is model
    assert not any(isinstance(module, runtime.Int8Linear) for module in back.modules())
    # An untied head is one parameter more.
    head = {"lm_head.weight"} if "quantize_head" in options else set()
    assert {n: (p.dtype, p.shape) for n, p in back.named_parameters() if n not in head} == {
        n: (p.dtype, p.shape) for n, p in source.named_parameters()
    }
    assert {str(module) for module in back.children()} == {str(module) for module in source.children()}
    for layer, dims in columns.items():
        if name in ("mixtral", "gpt-oss") and "experts" in layer:
            continue
        weights = [one.get_submodule(layer).weight.detach().float() for one in (back, source)]
        found, original = (weight.t() if name == "gpt2" else weight for weight in weights)
        assert torch.equal(found[:, dims], original[:, dims])
        # Half a step, of up to 64 rotated back an eighth each, and the rounding of the dtype.
        steps = 4 if "rotate" in options else 0.5
        step = original.abs().amax(1, keepdim=True) / 127 * (8 if "rotate" in options else 1)
        room = steps * step + 2.0**-8 * original.abs()
        assert bool(((found - original).abs() <= room).all())
    for stack, parameter in back.state_dict().items():
        other = source.get_parameter(stack).detach() if stack not in head else parameter
        assert float((parameter - other).float().norm()) <= 0.02 * float(other.float().norm())
    # Inputs are no longer quantized.
    assert float((logits(back) - expected).float().norm()) < 0.2 * float(expected.float().norm())
    back.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "llmint8_manifest.json").exists()
    names = [set(open_source(tmp_path / folder).tensors) for folder in ("saved", "source")]
    assert names[0] - head == names[1]
    again = type(model).from_pretrained(tmp_path / "saved")
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again), logits(back))
    back(TOKENS, labels=TOKENS).loss.backward()  # and it trains
    converter.convert(tmp_path / "saved", tmp_path / "twice", outliers="none")


def test_model_dequantize_is_the_same(checkpoint: Path) -> None:
    one, other = runtime.load(checkpoint).dequantize(), runtime.dequantize(runtime.load(checkpoint))
    assert torch.equal(logits(one), logits(other))
    assert not hasattr(one, "hf_quantizer")
    assert one.half().dtype == torch.float16


def test_a_dtype_is_that_of_all(checkpoint: Path) -> None:
    model = runtime.load(checkpoint).dequantize(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    layer = runtime.load(checkpoint).model.layers[0].mlp.down_proj
    # From int8 at once, and not by way of bfloat16.
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, layer.dequantize(torch.float32))


def test_what_was_cast_stays_so(checkpoint: Path) -> None:
    model = runtime.dequantize(runtime.load(checkpoint).half())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_what_bitsandbytes_wrote(checkpoint: Path, tmp_path: Path) -> None:
    runtime.load(checkpoint).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["llmint8"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "llmint8_manifest.json").unlink()
    assert not open_checkpoint(tmp_path).quantization.llmint8
    model = runtime.dequantize(runtime.load(tmp_path))
    assert torch.equal(logits(model), logits(runtime.dequantize(runtime.load(checkpoint))))


def test_quantized_again_it_is_what_it_was(checkpoint: Path) -> None:
    """Values on the grid of a row find that grid again, where the row's largest element is not an outlier's."""
    model = runtime.load(checkpoint, dtype="float32")
    layer = model.model.layers[0].mlp.gate_proj
    values = layer.unpacked_weight().clone()
    kept = [dim for dim in range(64) if dim not in layer.outlier_dims.tolist()]
    model = runtime.quantize(runtime.dequantize(model), outliers="top-k=4", calibration_tokens=48)
    found = model.model.layers[0].mlp.gate_proj.unpacked_weight()
    assert int((found - values)[:, kept].abs().max()) <= 1


def test_what_cannot_be_turned_back(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: has no quantized layers; expected a model from runtime"):
        runtime.dequantize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **COMMON)))
    model = runtime.load(checkpoint, device_map="disk")
    with pytest.raises(LLMInt8Error, match=r"q_proj: offloaded, and has no numbers here; load the model without"):
        runtime.dequantize(model)
    logits(model)  # it still runs


def test_an_adapter_is_taken_off_before(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(runtime.load(checkpoint), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LLMInt8Error, match=r"q_proj.base_layer: an adapter is on it; merge_and_unload\(\) takes"):
        runtime.dequantize(model.base_model.model)
    with pytest.raises(SourceError, match=r"^LlamaForCausalLM: quantized already$"):
        runtime.quantize(model.base_model.model)
    back = runtime.dequantize(model.merge_and_unload())
    assert torch.equal(logits(back), logits(runtime.dequantize(runtime.load(checkpoint))))  # B begins as zeros
