"""Adapters of PEFT on int8 models: nothing is registered, they are trained, saved, loaded, merged and taken out."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from llmint8 import converter, runtime
from llmint8.formats import check_values, open_checkpoint
from llmint8.runtime import Int8Linear
from llmint8.runtime.layers import writing
from llmint8.runtime.layers.experts import Int8Experts

peft = pytest.importorskip("peft", minversion="0.20")
pytestmark = pytest.mark.usefixtures("quiet_transformers")

ROOT = Path(__file__).parent.parent
TOKENS = torch.arange(3, 35).view(2, 16)
LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
FORMATS: dict[str, dict[str, Any]] = {"format-1": {}, "rotated": {"format": 2, "rotate": True}}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
METHODS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(target_modules="all-linear", **LORA),
    "DoRA": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, **LORA),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj", "up_proj"], init_weights=False),
    "biases": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="lora_only", **LORA),
    "two layers": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], init_weights=False, r=16),
}


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(path / "source")
    options = {"outliers": "top-k=4", "calibration_tokens": 48}
    converter.convert(path / "source", path / "out", **options, **FORMATS[request.param])
    return path / "out"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def layers_of(model: Any) -> dict[str, Int8Linear]:
    return {layer.name: layer for layer in model.modules() if isinstance(layer, Int8Linear)}


def with_adapter(model: Any, method: str) -> Any:
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, METHODS[method]())
    for name, parameter in adapted.named_parameters():
        if "ia3_l" in name:  # all ones
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return adapted.eval()


def gradients(model: Any, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def float_model(checkpoint: Path) -> Any:
    """The same weights in a float model: the int8 ones, dequantized."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint.parent / "source")
    for name, layer in layers_of(runtime.load(checkpoint)).items():
        model.get_submodule(name).weight.data.copy_(layer.dequantize())
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_gets_the_gradients_of_a_float_model(checkpoint: Path, method: str) -> None:
    """But for the rounding of the inputs, to which every layer adds half a percent."""
    model, other = (with_adapter(one, method) for one in (runtime.load(checkpoint), float_model(checkpoint)))
    assert not torch.equal(logits(model), logits(runtime.load(checkpoint)))
    assert distance(logits(model), logits(other)) < 0.1
    found, expected = gradients(model), gradients(other)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys() == wanted
    together = [torch.cat([each[name].flatten() for name in sorted(wanted)]) for each in (found, expected)]
    assert distance(*together) < 0.1
    assert min(float(found[name].norm()) for name in wanted) > 0


def test_all_linear_is_every_int8_layer(checkpoint: Path) -> None:
    model = with_adapter(runtime.load(checkpoint), "LoRA")
    wrapped = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == len(layers_of(model)) == 14
    assert all(type(module.base_layer) is Int8Linear for module in wrapped)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3"])
def test_a_saved_adapter_is_loaded_again(checkpoint: Path, method: str, tmp_path: Path) -> None:
    model = with_adapter(runtime.load(checkpoint), method)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(runtime.load(checkpoint), tmp_path)
    assert torch.equal(logits(again), logits(model))
    of_float = peft.PeftModel.from_pretrained(float_model(checkpoint), tmp_path)
    assert distance(logits(again), logits(of_float)) < 0.1


def test_an_adapter_of_the_16_bit_model_fits(checkpoint: Path, tmp_path: Path) -> None:
    other = with_adapter(float_model(checkpoint), "LoRA")
    other.save_pretrained(tmp_path)
    assert distance(logits(peft.PeftModel.from_pretrained(runtime.load(checkpoint), tmp_path)), logits(other)) < 0.1


def test_it_is_put_on_by_transformers_too(checkpoint: Path, tmp_path: Path) -> None:
    model = runtime.load(checkpoint)
    torch.manual_seed(5)
    model.add_adapter(METHODS["LoRA"]())
    assert gradients(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = runtime.load(checkpoint)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(checkpoint: Path, reentrant: bool) -> None:
    model = with_adapter(runtime.load(checkpoint), "LoRA")
    expected = gradients(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == expected.keys()
    # The same operations in the same order; only where gradients add up may that be another.
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)


def test_prepare_model_for_kbit_training(checkpoint: Path) -> None:
    model = runtime.load(checkpoint, dtype="bfloat16")
    before = logits(model)
    model = peft.prepare_model_for_kbit_training(model)
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    int8 = {f"{name}.weight" for name in layers_of(model)}
    assert {name for name, dtype in kept.items() if dtype == torch.int8} == int8
    assert {dtype for name, dtype in kept.items() if name not in int8} == {torch.float32}
    assert distance(logits(model), before.float()) < 0.05
    assert not model.is_gradient_checkpointing  # as docs/fine-tuning.md says
    model.gradient_checkpointing_enable()
    assert all(gradient.isfinite().all() for gradient in gradients(with_adapter(model, "LoRA").train()).values())


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3"])
def test_merged_and_taken_out_again_each_time_with_one_rounding(checkpoint: Path, method: str) -> None:
    model = with_adapter(runtime.load(checkpoint), method)
    before = {name: layer.dequantize() for name, layer in layers_of(model).items()}
    expected, alone = logits(model), logits(runtime.load(checkpoint))
    model.merge_adapter()
    assert distance(logits(model), expected) < 0.1
    for name, layer in layers_of(model).items():
        wrapper = model.base_model.model.get_submodule(name)
        if method != "LoRA" or not hasattr(wrapper, "get_delta_weight"):
            continue
        merged = before[name] + wrapper.get_delta_weight("default")
        found = layer.dequantize()
        dims = layer.outlier_dims.long()  # type: ignore[union-attr]
        assert torch.allclose(found[:, dims], merged[:, dims], rtol=1e-6, atol=1e-6)
        # Half a step in each element, rotated or not, is at most that in the mean of its squares.
        step = (layer.row_absmax / 127)[:, None]
        assert ((found - merged).pow(2).mean(1).sqrt() <= 0.501 * step[:, 0]).all()
    model.unmerge_adapter()
    assert distance(logits(model), expected) < 0.1
    with model.disable_adapter():
        assert distance(logits(model), alone) < 0.1
    for name, layer in layers_of(model).items():
        assert distance(layer.dequantize(), before[name]) < 0.02


def test_what_is_merged_and_unloaded_is_a_checkpoint_like_any_other(checkpoint: Path, tmp_path: Path) -> None:
    model = with_adapter(runtime.load(checkpoint), "LoRA")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM
    assert distance(logits(merged), expected) < 0.1
    merged.save_pretrained(tmp_path)
    assert check_values(open_checkpoint(tmp_path)) == []
    assert torch.equal(logits(runtime.load(tmp_path, verify=True)), logits(merged))


def test_an_adapter_that_is_unloaded_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    for method in METHODS:
        model = runtime.load(checkpoint)
        expected, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bare = with_adapter(model, method).unload()
        assert torch.equal(logits(bare), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in bare.state_dict().items())


def test_the_log_says_what_a_merge_cost(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_TOLD", set())
    model = with_adapter(runtime.load(checkpoint), "LoRA")
    before = {name: layer.dequantize() for name, layer in layers_of(model).items()}
    with caplog.at_level(logging.INFO, "llmint8"):
        model.merge_adapter()
    said = [record for record in caplog.records if "quantized again" in record.getMessage()]
    assert len([record for record in said if record.levelno == logging.INFO]) == 14
    warned = [record.getMessage() for record in said if record.levelno == logging.WARNING]
    assert len(warned) == 7  # q_proj of both blocks is one
    name = "model.layers.0.self_attn.q_proj"
    layer, wrapper = layers_of(model)[name], model.base_model.model.get_submodule(name)
    merged = before[name] + wrapper.get_delta_weight("default")
    figures = [f"{100 * distance(weight, merged):.2g} %" for weight in (before[name], layer.dequantize())]
    text = f"its weight was changed by {figures[0]} and quantized again, which rounds off {figures[1]}"
    assert f"{name}: {text}" in caplog.messages
    assert f"model.layers.*.self_attn.q_proj: {text}; what others of this name lose is logged at level INFO" in warned


def test_a_starting_point_that_changes_the_base_does_it_here_too(checkpoint: Path) -> None:
    """PiSSA takes the largest singular values out of the weight."""
    model = runtime.load(checkpoint)
    expected, before = logits(model), {name: layer.dequantize() for name, layer in layers_of(model).items()}
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights="pissa")
    model = peft.get_peft_model(model, config).eval()
    assert distance(logits(model), expected) < 0.1
    changed = {name for name, layer in layers_of(model).items() if distance(layer.dequantize(), before[name]) > 0.05}
    assert {name.rpartition(".")[2] for name in changed} == {"q_proj", "up_proj"}


def test_biases_are_trained_where_they_are_asked_for(checkpoint: Path) -> None:
    models = [with_adapter(one, "biases") for one in (runtime.load(checkpoint), float_model(checkpoint))]
    found, expected = ({n: g for n, g in gradients(model).items() if n.endswith("bias")} for model in models)
    assert len(found) == 2
    assert all(distance(found[name], expected[name]) < 0.2 for name in found)


def test_a_trainer_trains_it(checkpoint: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(runtime.load(checkpoint), peft.LoraConfig(target_modules="all-linear", r=4))
    options = {"per_device_train_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, **options, **quiet, lr_scheduler_type="constant")
    data = [{"input_ids": row, "labels": row} for row in TOKENS] * 8
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("checkpoint", ["rotated"], indirect=True)
def test_a_compiled_model_is_trained_in_one_graph(checkpoint: Path) -> None:
    model = with_adapter(runtime.load(checkpoint), "LoRA")
    expected = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)  # sums in any order


def test_without_an_adapter_the_trainer_says_that_one_is_needed(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="Please attach trainable adapters on top"):
        transformers.trainer_utils.validate_quantization_for_training(runtime.load(checkpoint))


def make_mixture(path: Path, family: str) -> Path:
    sizes = {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    experts = {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(4)
    config = transformers.AutoConfig.for_model(family, **sizes, **experts)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
            nn.init.normal_(parameter)  # so that no expert is chosen by a hair
    model.save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", format=2, outliers="top-k=4", calibration_tokens=48)
    return path / "out"


def switch_experts(model: Any, on: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and ".experts." in layer.base_layer.name:
            layer.enable_adapters(on)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_experts_are_trained_and_merged_like_other_layers(family: str, tmp_path: Path) -> None:
    model = runtime.load(make_mixture(tmp_path, family))
    matrices = sum(".experts." in name for name in layers_of(model))
    assert matrices == 2 * 4 * 2  # blocks, experts, projections
    model = with_adapter(model, "LoRA")
    expected, found = logits(model), gradients(model)
    of_experts = [gradient for name, gradient in found.items() if ".experts." in name]
    assert len(of_experts) == 2 * matrices
    assert sum(bool(gradient.any()) for gradient in of_experts) > matrices
    switch_experts(model, False)
    assert distance(logits(model), expected) > 0.01  # what they have learned counts
    switch_experts(model, True)
    assert distance(logits(model.merge_and_unload()), expected) < 0.15


def test_gradients_flow_through_experts_without_adapters(tmp_path: Path) -> None:
    """PEFT knows the experts of some families as stacks, which it does not find here."""
    path = make_mixture(tmp_path, "mixtral")
    model = runtime.load(path)
    assert any(isinstance(module, Int8Experts) for module in model.modules())
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    pair = [gradients(with_adapter(one, "two layers")) for one in (model, other)]
    assert pair[0].keys() == pair[1].keys()
    assert distance(*(torch.cat([one[name].flatten() for name in sorted(one)]) for one in pair)) < 0.15


def test_kernels_for_all_experts_are_left_where_a_gradient_or_an_adapter_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, used = make_mixture(tmp_path, "gpt_oss"), []
    multiply = Int8Experts._multiply_rows
    monkeypatch.setattr(Int8Experts, "_is_grouped", staticmethod(lambda x: True))
    monkeypatch.setattr(Int8Experts, "_multiply_rows", lambda *given: used.append(1) or multiply(*given))
    model = runtime.load(path)
    logits(model)
    assert used
    used.clear()
    gradients(with_adapter(model, "two layers"))
    assert not used
    logits(with_adapter(runtime.load(path), "LoRA"))
    assert not used


def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    words = {word: number for number, word in enumerate(["<unk>", "Whatever", "it", "is", "to", "learn", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(tmp_path / "model")
    converter.convert(tmp_path / "model", tmp_path / "model-int8", calibration_tokens=48)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    pair = found["model"], runtime.load("model-int8")
    with torch.no_grad():
        after, before = (float(model(input_ids=found["ids"], labels=found["ids"]).loss) for model in pair)
    assert after < 0.8 * before


def test_its_figures_are_those_of_the_benchmark() -> None:
    text = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    file = ROOT / "benchmarks" / "results" / "fine_tune-SmolLM2-135M-Instruct.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for label, row in rows.items():
        figures = row["curve"][0][1], row["curve"][-1][1], row["merged"]
        assert f"| {label} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |" in text
        kept = (figures[0] - figures[2]) / (figures[0] - figures[1])
        assert label == "16 bit" or 0.955 < kept < 0.975, "keeps 96 to 97 %"
