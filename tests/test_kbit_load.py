"""Checkpoints of 3 to 8 bits, loaded: they run as the definition says, are saved, compiled, adapted and turned back."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.formats import LLMInt8Error, check_values, open_checkpoint
from llmint8.runtime.commands.main import main
from llmint8.runtime.layers.embedding import Int8Embedding

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 100,  # not a multiple of 64, so config.json says how wide layers are
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
IDS = torch.arange(24)[None] % 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("k-bits") / "source"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    how: dict[str, Any] = {"format": 2, "bits": 4, "data_type": "quantile", "block_size": 32}
    converter.convert(source, source.parent / "out", **how, outliers="top-k=3", quantize_embeddings=True)
    return source.parent / "out"


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    converter.convert(source, source.parent / "plain", format=2, bits=6, data_type="float")
    return source.parent / "plain"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def simulated(path: Path) -> Any:
    """Return the model in float32 with the weights that a loaded one dequantizes: an independent way to the logits."""
    return runtime.dequantize(runtime.load(path, dtype=torch.float32))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_loaded_model_computes_with_the_dequantized_weights(converted: Path, source: Path) -> None:
    model = runtime.load(converted, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, runtime.KBitLinear)]
    assert len(layers) == 15  # 7 in each of two blocks, and the head
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    down = model.model.layers[1].mlp.down_proj
    assert (down.in_features, down.kbit.name, down.unpacked_weight().shape) == (100, "quantile4-block32", (64, 64))
    # Compiled, inputs are whole numbers of 2^-14 of the largest in 64, through two blocks.
    assert apart(logits(model), logits(simulated(converted))) < 1e-3
    exact = logits(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert 1e-3 < apart(logits(model), exact) < 0.2
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert model.lm_head.unpacked_weight() is model.model.embed_tokens.unpacked_weight()


def test_more_bits_are_nearer(converted: Path, plain: Path, source: Path) -> None:
    exact = logits(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    errors = [apart(logits(runtime.load(path, dtype=torch.float32)), exact) for path in (plain, converted)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["converted", "plain"])
def test_a_saved_model_is_a_checkpoint_and_loads_as_it_was(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(name)
    model = runtime.load(path)
    model.save_pretrained(tmp_path / "saved")
    first, second = open_checkpoint(path), open_checkpoint(tmp_path / "saved")
    assert check_values(second) == []
    assert second.quantization.format_version == "2.2"
    assert second.records == first.records
    assert second.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(second.read(tensor), first.read(tensor)) for tensor in first.tensors)
    assert torch.equal(logits(runtime.load(tmp_path / "saved")), logits(model))


def test_casts_and_moves_leave_the_codes_and_their_absmax_alone(converted: Path) -> None:
    model = runtime.load(converted)
    layer = model.model.layers[0].mlp.up_proj
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model.half().float().bfloat16()
    for name in ("weight", "absmax", "codebook", "outlier_dims"):
        assert torch.equal(layer.state_dict()[name], before[name]), name
    assert layer.outlier_weight.dtype == torch.bfloat16


def test_a_compiled_model_decodes_what_an_eager_one_does(plain: Path) -> None:
    model = runtime.load(plain, dtype=torch.float32)
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert apart(logits(compiled), expected) < 1e-3  # of the operators around the layers the order of sums may differ


def test_outliers_may_be_left_out_and_not_be_searched(converted: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llmint8"):
        model = runtime.load(converted, dtype=torch.float32)
    assert re.search(r"^15 KBitLinear layers, outliers static, 15 x 4 bits: ", caplog.messages[-1])
    expected = logits(model)
    runtime.configure(model, outliers="none")
    assert apart(logits(model), expected) > 1e-4
    runtime.configure(model, outliers="static")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="the inputs of layers of k bits are not quantized"):
        runtime.configure(model, outliers="dynamic")
    with pytest.raises(ValueError, match="activation is 'absmax', and the inputs of these layers are not quantized"):
        runtime.configure(model, activation="absmax")
    with pytest.raises(ValueError, match="nothing is known of its calibration"):
        runtime.outlier_misses(model)
    with pytest.raises(ValueError, match="the inputs of layers of k bits are not quantized"):
        runtime.load(converted, outliers="dynamic")


def test_an_adapter_is_trained_on_top_and_merged(plain: Path) -> None:
    torch.manual_seed(0)
    model = runtime.load(plain, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj", "v_proj"]))
    adapted(IDS, labels=IDS).loss.backward()
    learned = {name: p for name, p in adapted.named_parameters() if p.grad is not None}
    assert learned.keys() == {name for name, p in adapted.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in learned.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, runtime.KBitLinear)
    assert apart(logits(merged), expected) < 0.05  # rounded to 6 bits once more


def test_what_is_said_of_it(converted: Path) -> None:
    said = CliRunner().invoke(main, ["inspect", str(converted)])
    assert said.exit_code == 0
    assert re.search(r"^Weights +4 bits \(quantile, blocks of 32\) in 15 layers$", said.stdout, re.MULTILINE)
    assert re.search(r"^Activations +in floating point, as they are$", said.stdout, re.MULTILINE)
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(converted), "--json"]).stdout)
    assert {layer["scheme"] for layer in facts["layers"]} == {"quantile4-block32", "quantile4-block32-tied"}
    planned = json.loads(CliRunner().invoke(main, ["plan", str(converted), "--json"]).stdout)
    total = sum(info.nbytes for info in open_checkpoint(converted).tensors.values())
    assert (planned["int8_bytes_on_disk"], planned["coded"]) == (total, "4 bits")


def test_it_is_exported_in_16_bit_and_as_int8(converted: Path, tmp_path: Path) -> None:
    from llmint8.converter.export.export import export

    export(converted, tmp_path / "float", to="float16")
    restored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    assert apart(logits(restored), logits(simulated(converted))) < 0.01  # rounded to bfloat16
    export(converted, tmp_path / "int8", to="bitsandbytes")
    assert apart(logits(runtime.load(tmp_path / "int8", dtype=torch.float32)), logits(restored)) < 0.1


def test_it_is_not_cut_for_several_processes(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmint8.runtime.model.load.settle", lambda *arguments: object())
    with pytest.raises(LLMInt8Error, match="layers of k bits are not cut; load it without tp_plan"):
        runtime.load(plain, tp_plan="auto")
