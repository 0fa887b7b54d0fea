"""`runtime.load` on tiny models: what it builds, what it keeps, what it refuses."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter, formats, runtime
from llmint8.formats import CheckpointError, open_checkpoint
from llmint8.kernels.cpu import native, product
from llmint8.runtime import Int8Linear

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TOKENS = torch.arange(3, 19)[None]
LAYER = "model.layers.1.mlp.down_proj"
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"

Tensors = dict[str, Tensor]


def make_llama(**changes: Any) -> transformers.PreTrainedModel:
    arguments: dict[str, Any] = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "head_dim": 10}
    arguments |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    arguments |= {"initializer_range": 0.2, "tie_word_embeddings": True, **changes}
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "source"
    make_llama().half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    """What the converter writes, without outliers."""
    converter.convert(source, source.parent / "plain", outliers="none")
    return source.parent / "plain"


@pytest.fixture(scope="module")
def checkpoint(source: Path, plain: Path) -> Path:
    """The same with outliers: 4 in one layer, 1 in the others of the MLPs, 0 in the attention."""
    original = load_file(source / WEIGHTS)

    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        counts = config["quantization_config"]["llmint8"]["outliers"]["counts"]
        for name in counts:
            counts[name] = 4 if name == LAYER else int(".mlp." in name)
            weight = original[f"{name}.weight"]
            dims = torch.randperm(weight.shape[1])[: counts[name]].sort().values
            tensors[f"{name}.outlier_dims"] = dims.int()
            tensors[f"{name}.outlier_weight"] = weight[:, dims].contiguous()

    return edit(plain, source.parent / "checkpoint", plant)


@pytest.fixture(scope="module")
def bitsandbytes_checkpoint(plain: Path) -> Path:
    """As bitsandbytes writes it, and as it did before it wrote `weight_format`."""

    def strip(tensors: Tensors, config: dict[str, Any]) -> None:
        del config["quantization_config"]["llmint8"]
        for name in list(tensors):
            if name.endswith(("outlier_dims", "outlier_weight", "weight_format")):
                del tensors[name]

    return edit(plain, plain.parent / "bitsandbytes", strip)


def edit(path: Path, out: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """Copy a checkpoint and change its tensors and config.json."""
    shutil.copytree(path, out)
    tensors, config = load_file(out / WEIGHTS), json.loads((out / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config))
    return out


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS, **inputs).logits
    return result


def int8_layers(model: torch.nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_gives_the_ordinary_class_with_int8_layers(source: Path, checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert set(int8_layers(model)) == set(formats.open_checkpoint(checkpoint).records)
    assert model.dtype == torch.float16
    reference = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert relative_error(logits(model), logits(reference)) < 0.05
    generated = model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == TOKENS.shape[1] + 4


def test_layers_hold_and_use_what_the_checkpoint_stores(source: Path, checkpoint: Path) -> None:
    stored, original = load_file(checkpoint / WEIGHTS), load_file(source / WEIGHTS)
    model = runtime.load(checkpoint, activation="absmax", activation_group="row")
    for name, layer in int8_layers(model).items():
        for part, tensor in layer.state_dict().items():
            assert tensor.dtype == stored[f"{name}.{part}"].dtype
            assert torch.equal(tensor, stored[f"{name}.{part}"])
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float16)
        linear.weight.data = original[f"{name}.weight"]
        x = torch.randn(3, layer.in_features).half()
        assert torch.equal(layer(x), Int8Linear.from_linear(linear, layer.outlier_dims)(x))


def test_modes_reach_every_layer(checkpoint: Path) -> None:
    static = runtime.load(checkpoint)
    none = runtime.load(checkpoint, outliers="none")
    dynamic = runtime.load(checkpoint, outliers="dynamic", threshold=0.5, activation="zeropoint")
    assert {layer.outliers for layer in int8_layers(static).values()} == {"static"}
    assert {layer.outliers for layer in int8_layers(none).values()} == {"none"}
    modes = {(layer.outliers, layer.threshold, layer.activation) for layer in int8_layers(dynamic).values()}
    assert modes == {("dynamic", 0.5, "zeropoint")}
    results = [logits(model) for model in (static, none, dynamic)]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_what_the_checkpoint_records_is_the_default(checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"]["llmint8"]["activation"] = "zeropoint"
        config["quantization_config"]["llm_int8_threshold"] = 4.5

    path = edit(checkpoint, tmp_path / "out", change)
    assert {layer.activation for layer in int8_layers(runtime.load(path)).values()} == {"zeropoint"}
    dynamic = int8_layers(runtime.load(path, outliers="dynamic", activation="absmax"))
    assert {(layer.activation, layer.threshold) for layer in dynamic.values()} == {("absmax", 4.5)}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_inputs_are_quantized_in_the_groups_asked_for_or_recorded(
    checkpoint: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmint8.runtime.layers.arguments.has_groups", lambda device: True)

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        block = config["quantization_config"]["llmint8"]
        assert (block["format_version"], block.pop("activation_group")) == ("1.1", 128)
        block["format_version"] = version
        block |= {"activation_group": 64} if version == "1.1" else {}

    path = edit(checkpoint, tmp_path / "out", change)
    expected: dict[Any, Any] = {None: 64 if version == "1.1" else "row", 64: 64, 128: 128, 256: 256, "row": "row"}
    for given, found in expected.items():
        model = runtime.load(path, activation_group=given)
        assert {layer.activation_group for layer in int8_layers(model).values()} == {found}
        groups = {layer.stored().group for layer in int8_layers(model).values()}
        assert groups == {None if found == "row" else found}
        model.save_pretrained(tmp_path / "saved")  # which keeps what the checkpoint records
        saved = formats.open_checkpoint(tmp_path / "saved")
        assert formats.check_values(saved) == []  # and the manifest says the same
        assert saved.quantization.format_version == version
        assert saved.quantization.scheme.activation_group == (64 if version == "1.1" else None)


def test_without_kernels_for_groups_those_recorded_are_left_and_those_asked_for_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "kinds", list)
    with caplog.at_level(logging.INFO, logger="llmint8"):
        model = runtime.load(checkpoint)
    assert {layer.activation_group for layer in int8_layers(model).values()} == {"row"}
    assert "one scale for each input, and not one for each 128 dimensions as recorded" in caplog.text
    caplog.clear()
    model = runtime.load(checkpoint, activation_group=128)
    assert {layer.activation_group for layer in int8_layers(model).values()} == {128}
    assert "one scale for each" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32"], ids=str)
def test_dtype_casts_everything_but_the_quantized_weight(checkpoint: Path, dtype: torch.dtype | str) -> None:
    model, stored = runtime.load(checkpoint, dtype=dtype), load_file(checkpoint / WEIGHTS)
    wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied, so not stored
            continue
        kept = name.endswith(("SCB", "outlier_dims", "weight_format")) or stored[name].dtype == torch.int8
        assert tensor.dtype == (stored[name].dtype if kept else wanted), name
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    assert logits(model).dtype == wanted


def test_dtype_without_one_in_the_config(tmp_path: Path) -> None:
    make_llama(vocab_size=8, pad_token_id=0).half().save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "plain", outliers="none")
    path = edit(tmp_path / "plain", tmp_path / "out", lambda tensors, config: config.pop("dtype"))
    sizes = {"float16": 0, "float32": 0}
    for tensor in load_file(path / WEIGHTS).values():
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    assert sizes["float32"] > sizes["float16"]  # all of it scales, which say nothing about the model
    assert runtime.load(path).dtype == torch.float16


def test_tied_head_stays_tied(checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head, Int8Linear)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("which", ["plain", "checkpoint", "bitsandbytes_checkpoint"])
def test_save_pretrained_round_trip(
    which: str, shard_size: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    model = runtime.load(path)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    saved, original = (json.loads((where / CONFIG).read_text()) for where in (tmp_path, path))
    assert saved["quantization_config"] == original["quantization_config"]
    again = runtime.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert formats.check_values(formats.open_checkpoint(tmp_path)) == []


def test_cast_model_saves_and_loads(checkpoint: Path, tmp_path: Path) -> None:
    model = runtime.load(checkpoint, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = runtime.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


DISK_MAP = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu"}
DISK_MAP |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("placement", [{"device": "cpu"}, {"device_map": "cpu"}, {"device_map": DISK_MAP}], ids=str)
def test_placement(checkpoint: Path, tmp_path: Path, placement: dict[str, Any]) -> None:
    expected = logits(runtime.load(checkpoint))
    model = runtime.load(checkpoint, **placement)
    offloaded = placement.get("device_map") is DISK_MAP
    assert model.get_submodule(LAYER).weight.is_meta == offloaded
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)  # the hooks have put the layers away and fetch them again
    model.save_pretrained(tmp_path)
    assert formats.check_values(open_checkpoint(tmp_path)) == []
    assert torch.equal(logits(runtime.load(tmp_path)), expected)


def test_gpt2_with_conv1d_under_its_old_names(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=36, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    original = transformers.GPT2LMHeadModel(config).half().eval()
    original.transformer.save_pretrained(tmp_path / "source")  # `h.0`, not `transformer.h.0`
    written = json.loads((tmp_path / "source" / CONFIG).read_text())
    (tmp_path / "source" / CONFIG).write_text(json.dumps(written | {"architectures": ["GPT2LMHeadModel"]}))
    converter.convert(tmp_path / "source", tmp_path / "out")
    model = runtime.load(tmp_path / "out")
    assert set(int8_layers(model)) == {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (144, 36)  # Conv1D has [in, out]
    assert relative_error(logits(model), logits(original.float())) < 0.02
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(runtime.load(tmp_path / "saved")), logits(model))


def test_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.T5Config(vocab_size=97, d_model=36, d_kv=9, d_ff=44, num_layers=2, num_heads=4)
    original = transformers.T5ForConditionalGeneration(config).bfloat16()
    original.save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out")
    model = runtime.load(tmp_path / "out")
    assert type(model) is transformers.T5ForConditionalGeneration
    assert int8_layers(model)
    inputs = {"decoder_input_ids": TOKENS[:, :5]}
    assert relative_error(logits(model, **inputs), logits(original.eval().float(), **inputs)) < 0.06


def test_class_without_architectures_is_a_causal_lm(checkpoint: Path, tmp_path: Path) -> None:
    path = edit(checkpoint, tmp_path / "out", lambda tensors, config: config.pop("architectures"))
    assert type(runtime.load(path)) is transformers.LlamaForCausalLM


def test_bitsandbytes_checkpoint_without_weight_format(bitsandbytes_checkpoint: Path, checkpoint: Path) -> None:
    model = runtime.load(bitsandbytes_checkpoint)
    for layer in int8_layers(model).values():
        assert (layer.outliers, layer.threshold, layer.activation) == ("dynamic", 6.0, "absmax")
        assert layer.weight_format.dtype == torch.uint8
        assert int(layer.weight_format) == 0
        assert layer.outlier_dims is None
        assert not any(name.startswith("outlier") for name in layer.state_dict())
    assert torch.equal(logits(model), logits(runtime.load(checkpoint, outliers="dynamic", activation="absmax")))


def test_bitsandbytes_threshold_zero_means_no_outliers(bitsandbytes_checkpoint: Path, tmp_path: Path) -> None:
    path = edit(
        bitsandbytes_checkpoint,
        tmp_path / "out",
        lambda tensors, config: config["quantization_config"].update(llm_int8_threshold=0.0),
    )
    assert {layer.outliers for layer in int8_layers(runtime.load(path)).values()} == {"none"}
    modes = {(layer.outliers, layer.threshold) for layer in int8_layers(runtime.load(path, threshold=5.0)).values()}
    assert modes == {("dynamic", 5.0)}


def test_values_only_bitsandbytes_writes(bitsandbytes_checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.weight"][0] = -128
        tensors[f"{LAYER}.weight"][1] = 0
        tensors[f"{LAYER}.SCB"][1] = 0

    layer = runtime.load(edit(bitsandbytes_checkpoint, tmp_path / "out", change)).get_submodule(LAYER)
    out = layer(torch.ones(1, 56).half())
    assert float(out[0, 0]) == pytest.approx(float(-128 * 56 * layer.SCB[0] / 127), rel=1e-3)
    assert float(out[0, 1]) == 0.0


def test_quantization_config_in_a_file_of_its_own(bitsandbytes_checkpoint: Path, tmp_path: Path) -> None:
    def move(tensors: Tensors, config: dict[str, Any]) -> None:
        legacy = config.pop("quantization_config")
        (tmp_path / "out" / "quantization_config.json").write_text(json.dumps(legacy))

    model = runtime.load(edit(bitsandbytes_checkpoint, tmp_path / "out", move))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / CONFIG).read_text())["quantization_config"]["load_in_8bit"] is True
    assert torch.equal(logits(runtime.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outliers": "sometimes"}, "outliers is 'sometimes', expected one of 'static', 'dynamic', 'none'"),
        ({"activation": "minmax"}, "activation is 'minmax', expected one of 'absmax', 'zeropoint'"),
        ({"activation_group": 32}, "activation_group is 32, expected one of 64, 128, 256, 'row'"),
        ({"outliers": "dynamic", "threshold": 0.0}, "threshold is 0.0, expected a number above 0"),
        ({"outliers": "dynamic", "threshold": -1.0}, "threshold is -1.0, expected a number above 0"),
        ({"outliers": "dynamic", "threshold": float("nan")}, "threshold is nan, expected a number above 0"),
        ({"threshold": 6.0}, "threshold is 6.0, which only outliers='dynamic' uses, not 'static'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bfloat16, float16, float32"),
        ({"dtype": torch.float64}, "dtype is torch.float64, expected one of bfloat16, float16, float32"),
        ({"device": "cpu", "device_map": "auto"}, "device is 'cpu' and device_map is 'auto'; give one"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_arguments_name_the_value(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        runtime.load(checkpoint, **arguments)
    assert str(caught.value).startswith(message)


def test_static_outliers_need_to_be_stored(bitsandbytes_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"threshold is -1\.0, expected a number above 0"):
        runtime.load(bitsandbytes_checkpoint, threshold=-1.0)
    with pytest.raises(ValueError, match="outliers is 'static', but bitsandbytes stores none"):
        runtime.load(bitsandbytes_checkpoint, outliers="static")


def refuse(path: Path) -> str:
    with pytest.raises(formats.LLMInt8Error) as caught:
        runtime.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("model.norm.weight"), "model.norm.weight: missing, LlamaForCausalLM needs it"),
        (lambda t, c: c.update(num_hidden_layers=3), "model.layers.2.input_layernorm.weight and 8 more: missing"),
        (lambda t, c: c.update(num_hidden_layers=1), "has no layer of its own for it"),
        (lambda t, c: c.update(intermediate_size=55), "LlamaForCausalLM wants shape [40, 55], not [40, 56]"),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(3)}), "shape [3], LlamaForCausalLM wants [40]"),
        (lambda t, c: c.update(model_type="hal9000"), "is no model that transformers has"),
    ],
    ids=["tensor", "layers-missing", "layers-too-many", "int8-shape", "shape", "model-type"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_the_model(
    checkpoint: Path, tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], object], message: str
) -> None:
    assert message in refuse(edit(checkpoint, tmp_path / "out", change))


def test_an_int8_layer_that_the_model_uses_as_something_else(checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        layer = Int8Linear.from_linear(torch.nn.Linear(40, 97, bias=False))
        tensors |= {f"model.embed_tokens.{name}": tensor for name, tensor in layer.state_dict().items()}
        config["quantization_config"]["llmint8"]["outliers"]["counts"]["model.embed_tokens"] = 0

    message = refuse(edit(checkpoint, tmp_path / "out", change))
    assert "model.embed_tokens: int8 in the checkpoint, but LlamaForCausalLM has Embedding there" in message


def test_an_unexpected_tensor_is_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog does not see it
    path = edit(checkpoint, tmp_path / "out", lambda tensors, config: tensors.update(extra=torch.ones(1)))
    model = runtime.load(path)
    assert re.search(r"extra +\| UNEXPECTED", caplog.text)
    assert torch.equal(logits(model), logits(runtime.load(checkpoint)))


def test_an_index_that_leads_outside_never_reaches_transformers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    runtime.load(checkpoint).save_pretrained(path, max_shard_size="20KB")
    index = json.loads((path / INDEX).read_text())
    _, file = next(iter(index["weight_map"].items()))
    shutil.move(path / file, tmp_path / file)
    index["weight_map"] = {n: f"../{f}" if f == file else f for n, f in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("reached"))
    assert repr(f"../{file}") in refuse(path)


def test_config_cannot_point_to_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["transformers_weights"] = "other.safetensors"
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        save_file(zeros, tmp_path / "out" / "other.safetensors", metadata={"format": "pt"})

    model = runtime.load(edit(checkpoint, tmp_path / "out", change))
    assert torch.equal(logits(model), logits(runtime.load(checkpoint)))


@pytest.mark.parametrize("dims", [[5, 10_000_000], [5, 5], [9, 5], [-1, 5]], ids=str)
def test_dims_that_are_not_in_the_layer_are_refused_by_name(checkpoint: Path, tmp_path: Path, dims: list[int]) -> None:
    """On a GPU the kernels would read foreign memory."""
    counts = open_checkpoint(checkpoint).quantization.outliers
    name = next(name for name, count in counts.items() if count >= 2)

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{name}.outlier_dims"][:2] = torch.tensor(dims)

    edit(checkpoint, tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=rf"E14 .*out: {name}: outlier_dims is \[{dims[0]}, {dims[1]}.*expected"):
        runtime.load(tmp_path / "out")


def test_one_log_line_says_how_the_model_runs(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llmint8"):
        runtime.load(checkpoint, outliers="dynamic")
        runtime.load(checkpoint, activation="absmax", activation_group="row")
    lines = [record.getMessage() for record in caplog.records if record.name == "llmint8"]
    assert len(lines) == 2
    start = "14 Int8Linear layers, outliers dynamic (|x| >= 6), activation zeropoint in groups of 128, 14 x "
    assert lines[0].startswith(start)
    assert lines[1].startswith("14 Int8Linear layers, outliers static, activation absmax, 14 x ")


def test_nothing_is_printed(checkpoint: Path, bitsandbytes_checkpoint: Path) -> None:
    code = """
import sys
from transformers.utils.logging import is_progress_bar_enabled
from llmint8 import runtime
for path in sys.argv[1:]:
    runtime.load(path)
assert is_progress_bar_enabled()  # as it was
"""
    command = [sys.executable, "-c", code, str(checkpoint), str(bitsandbytes_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


MEASURE = """
import gc, sys
import torch, transformers.models.llama.modeling_llama
from llmint8 import runtime
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
runtime.load(sys.argv[1])  # whatever is imported late
for dtype in sys.argv[3:]:
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS:")
    anonymous = status("RssAnon:")
    model = runtime.load(sys.argv[2], dtype=dtype)
    print(dtype, status("VmHWM:") - before, status("RssAnon:") - anonymous)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_while_loading(plain: Path, tmp_path: Path) -> None:
    big = make_llama(hidden_size=1024, head_dim=256, intermediate_size=4096, vocab_size=16384)
    big.half().save_pretrained(tmp_path / "source")
    del big
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="none")
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert size > 60e6  # well above the noise
    dtypes = ["float16", "bfloat16"]
    command = [sys.executable, "-c", MEASURE, str(plain), str(tmp_path / "out"), *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {dtype: (int(peak), int(own)) for dtype, peak, own in map(str.split, done.stdout.splitlines())}
    assert found.keys() == set(dtypes)
    assert max(peak for peak, _ in found.values()) <= 1.2 * size, found
    # In the dtype they are stored in, tensors stay in the file, but for those that are laid out anew.
    if native.kinds():
        assert found["float16"][1] <= 0.2 * size, found


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_loaded_model_runs_on_when_its_directory_is_gone(checkpoint: Path, tmp_path: Path) -> None:
    expected = logits(runtime.load(checkpoint))
    moved = tmp_path / "out"
    shutil.copytree(checkpoint, moved)
    model = runtime.load(moved)
    shutil.rmtree(moved)
    assert torch.equal(logits(model), expected)


def test_packed_layers_are_saved_as_they_were(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not product._is_exact("packed"):
        pytest.skip("this machine has no exact packed product")
    monkeypatch.setattr(native, "kinds", list)
    plain = runtime.load(checkpoint)
    monkeypatch.setattr(product, "_PACK_ELEMENTS", 0)
    with caplog.at_level(logging.INFO, logger="llmint8"):
        model = runtime.load(checkpoint)
    assert "14 x packed on the CPU" in caplog.text
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    saved, original = open_checkpoint(tmp_path), open_checkpoint(checkpoint)
    for record in original.records:
        assert torch.equal(saved.read(f"{record}.weight"), original.read(f"{record}.weight"))
