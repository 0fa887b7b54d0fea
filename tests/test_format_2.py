"""Format 2, end to end: rotated layers and GPTQ, converted, loaded, saved, published; and format 1 as it has been."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.calibration import calibrator, gptq
from llmint8.converter.coding import Int8Grid
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.hub import push
from llmint8.formats import (
    NATIVE,
    CheckpointError,
    LLMInt8Error,
    Scheme,
    SourceError,
    check_values,
    open_checkpoint,
    open_source,
)
from llmint8.kernels import reference
from llmint8.runtime import Int8Linear
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = torch.arange(48)[None] % 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose inputs have a large dimension, so that there is something to rotate away."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] = 30
        layer.post_attention_layernorm.weight.data[9] = 30
    path = tmp_path_factory.mktemp("format-2") / "source"
    model.half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rotated(source: Path) -> Path:
    converter.convert(source, source.parent / "rotated", format=2, rotate=True, outliers="top-k=2")
    return source.parent / "rotated"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS.clamp(max=model.config.vocab_size - 1)).logits.float()
    return found


def of_source(source: Path) -> Tensor:
    return logits(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))


def error(model: Any, exact: Tensor) -> float:
    return float((logits(model) - exact).norm() / exact.norm())


def test_what_is_written_is_the_definition(source: Path, rotated: Path) -> None:
    assert not list(rotated.glob("model*"))
    checkpoint, original = open_checkpoint(rotated), open_source(source)
    assert check_values(checkpoint) == []
    assert len(checkpoint.records) == 14
    assert checkpoint.quantization.layout == NATIVE
    for name, record in checkpoint.records.items():
        weight = original.read(f"{name}.weight")
        values, absmax = reference.quantize_weight(weight, 64)
        assert record.scheme == Scheme("zeropoint", 128, 64)
        assert torch.equal(checkpoint.read(f"{name}.weight"), values)
        assert torch.equal(checkpoint.read(f"{name}.absmax"), absmax)
        dims = checkpoint.read(f"{name}.outlier_dims").long()
        assert torch.equal(checkpoint.read(f"{name}.outlier_weight"), weight[:, dims])
    assert sum(record.outlier_count or 0 for record in checkpoint.records.values()) == 28


def test_a_rotated_model_is_nearer_and_generates(source: Path, rotated: Path) -> None:
    exact = of_source(source)
    converter.convert(source, rotated.parent / "plain", format=2, outliers="none")
    converter.convert(source, rotated.parent / "turned", format=2, rotate=True, outliers="none")
    errors = []
    for name in ("plain", "turned"):
        model = runtime.load(rotated.parent / name, dtype=torch.float32, activation_group="row")
        errors.append(error(model, exact))
    assert errors[1] < 0.9 * errors[0]
    model = runtime.load(rotated, dtype=torch.float32)
    assert {layer.rotation for layer in model.modules() if isinstance(layer, Int8Linear)} == {64}
    assert error(model, exact) < 0.02
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("shards", [None, "20KB"], ids=["one file", "shards"])
def test_a_saved_model_loads_as_it_was(rotated: Path, tmp_path: Path, shards: str | None) -> None:
    model = runtime.load(rotated)
    expected = logits(model)
    (tmp_path / "llmint8-model-00001-of-00001.safetensors").write_bytes(b"of an earlier time")
    model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if name.startswith((".", "model"))]
    assert ("llmint8-model.safetensors" in names) == (shards is None)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path)
    assert check_values(checkpoint) == []
    assert checkpoint.quantization.schemes == open_checkpoint(rotated).quantization.schemes
    assert torch.equal(logits(runtime.load(tmp_path)), expected)


def test_a_loader_that_does_not_know_it_fails(rotated: Path) -> None:
    """In a process of its own, where nothing of ours has been imported; with bitsandbytes, if it is installed."""
    code = (
        "import sys, transformers\n"
        "try:\n"
        "    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, rotated], capture_output=True, text=True, cwd=rotated.parent)
    assert "model.safetensors" in done.stdout
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr


def test_where_ours_is_imported_the_auto_class_says_what_loads_it(rotated: Path) -> None:
    assert callable(runtime.load)  # which imports it
    with pytest.raises(LLMInt8Error, match=r"load it with llmint8.runtime.load\(path\)"):
        transformers.AutoModelForCausalLM.from_pretrained(rotated)


def test_no_outliers_are_searched_in_a_rotated_layer(rotated: Path) -> None:
    with pytest.raises(ValueError, match="outliers is 'dynamic', and the layer is rotated"):
        runtime.load(rotated, outliers="dynamic")
    layer = Int8Linear.from_linear(torch.nn.Linear(64, 8), rotation=64)
    with pytest.raises(ValueError, match="expected 'static' or 'none'"):
        layer.outliers = "dynamic"
    assert "rotation=64" in repr(layer)
    model = runtime.load(rotated, outliers="none", dtype=torch.float32)
    assert logits(model).isfinite().all()


def test_model_code_that_takes_the_weight_gets_it_rotated_back() -> None:
    linear = torch.nn.Linear(200, 30)
    layer = Int8Linear.from_linear(linear, torch.tensor([3, 199]), rotation=64)
    for weight in (layer.dequantize(), layer.weight + 0):
        assert float((weight - linear.weight).detach().abs().max()) < 0.01
        assert torch.equal(weight[:, [3, 199]], linear.weight[:, [3, 199]])


@pytest.mark.parametrize("layout", [1, 2])
def test_layers_that_the_calibration_missed_search_for_outliers_in_format_1_only(
    source: Path, tmp_path: Path, layout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrator, "runs", lambda *_: [])
    said = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "int8"), "--format", str(layout)])
    assert "0 of 14 layers are calibrated; the others have no outlier columns" in said.stderr
    assert ("and search for outliers in every call" in said.stderr) == (layout == 1)
    model = runtime.load(tmp_path / "int8")
    modes = {module.outliers for module in model.modules() if isinstance(module, Int8Linear)}
    assert modes == {"dynamic" if layout == 1 else "static"}
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "int8")]).stdout
    assert ("Uncalibrated  14 layers, without outlier columns" in shown) == (layout == 2)


def test_the_manifest_and_the_card_say_what_it_is(rotated: Path) -> None:
    said = CliRunner().invoke(main, ["inspect", str(rotated)]).stdout
    assert "Format        llmint8 2.0" in said
    assert "Weights       rotated, as their inputs, in blocks of 64\n" in said
    card = (rotated / "README.md").read_text()
    assert "read by llmint8 alone" in card
    assert "bitsandbytes" not in card
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(rotated), "--json"]).stdout)
    assert facts["schemes"] == {"int8-hadamard64": Scheme("zeropoint", 128, 64).to_dict()}
    options = json.loads((rotated / "llmint8_manifest.json").read_text())["source"]["options"]
    assert (options["--format"], options["--rotate"], options["--rounding"]) == ("2", "True", "nearest")


@pytest.mark.parametrize("options", [{"rotate": True}, {"rounding": "gptq"}], ids=["rotate", "gptq"])
def test_what_takes_format_2_says_so(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    arguments = ["--rotate"] if "rotate" in options else ["--rounding", "gptq"]
    said = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "out"), *arguments])
    assert said.exit_code == 1
    assert said.stderr.startswith(f"Error: {' '.join(arguments)} takes --format 2")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="format 3, expected 1 or 2"):
        converter.convert(source, tmp_path / "out", format=3)


def test_a_checkpoint_of_format_2_is_no_source(rotated: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"already quantized \(llmint8\)"):
        converter.convert(rotated, tmp_path / "again")


@pytest.mark.parametrize(
    ("path", "value", "code", "message"),
    [
        (["schemes", "int8-hadamard64", "bits"], 4, "E03", "which this program cannot compute; update llmint8"),
        (["schemes", "int8-hadamard64", "bits"], 8.0, "E03", "which this program cannot compute"),
        (["schemes", "int8-hadamard64", "rotation", "block"], 128, "E03", "which this program cannot compute"),
        (["schemes", "int8-hadamard64", "more"], None, "E03", "which this program cannot compute"),
        (["schemes", "other"], 7, "E03", r"schemes\['other'\] is '7', expected an object"),
        (["schemes"], {}, "E03", "schemes is empty"),
        (["layers", "model.layers.0.mlp.up_proj"], "int8", "E03", "expected one of int8-hadamard64"),
        (["layers", "more"], "int8-hadamard64", "E03", "'more' is in one of layers and outliers.counts"),
        (["rounding"], "up", "E03", "rounding is 'up', expected one of nearest, gptq"),
        (["not_quantized"], [1], "E03", "not_quantized is"),
        (["format_version"], "1.1", "E03", "format_version is '1.1', this program reads 2.2 here"),
        (["format_version"], "3.0", "E03", "format_version is '3.0', this program reads 2.2 here"),
        (["quant_method"], "bitsandbytes", "E02", "load_in_8bit"),
        (["quant_method"], "llmint9", "E02", "load_in_8bit"),
    ],
)
def test_what_a_config_may_not_say(
    rotated: Path, tmp_path: Path, path: list[str], value: Any, code: str, message: str
) -> None:
    for file in rotated.iterdir():
        os.link(file, tmp_path / file.name)
    config = json.loads((rotated / "config.json").read_text())
    holder = config["quantization_config"]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert raised.value.code == code
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_of_both_formats_are_refused(rotated: Path, tmp_path: Path, name: str) -> None:
    for file in rotated.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^E04 .*{name}: a weight file of format 1, where config.json says 2"):
        open_checkpoint(tmp_path)


def test_columns_that_are_not_those_of_the_rotated_weight_are_found(rotated: Path, tmp_path: Path) -> None:
    for file in rotated.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    name = next(name for name, record in checkpoint.records.items() if record.outlier_count)
    info = checkpoint.tensors[f"{name}.outlier_weight"]
    assert [problem.code for problem in check_values(checkpoint)] == []
    with (tmp_path / info.file).open("r+b") as file:
        file.seek(info.offset)
        file.write(torch.tensor(9.0).half().numpy().tobytes())
    assert [problem.code for problem in check_values(checkpoint)] == ["E18", "E15"]


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}], ids=["nearest", "gptq"])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"format": 2, "rotate": True, "outliers": "top-k=2", "jobs": 1, **options}
    converter.convert(source, tmp_path / "whole", **how)
    for count in (3, 9, 17):
        done: list[str] = []

        def stop(name: str, nbytes: int, done: list[str] = done, count: int = count) -> None:
            done.append(name)
            if len(done) == count:
                raise KeyboardInterrupt

        out = tmp_path / str(count)
        with pytest.raises(KeyboardInterrupt):
            converter.convert(source, out, progress=stop, **how)
        assert not (out / "config.json").exists()
        converter.convert(source, out, **how)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
        }
    assert converter.convert(source, tmp_path / "whole", **how).already


def test_it_goes_to_the_hub_and_back(rotated: Path, tmp_path: Path, hub: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in rotated.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    push.send(push.prepare(out, "alice/rotated", have_right=True))
    expected = logits(runtime.load(rotated))
    assert torch.equal(logits(runtime.load("alice/rotated")), expected)
    push.send(push.prepare(out, "alice/rotated", have_right=True))  # what is there is known for int8


# GPTQ.


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 150) @ torch.randn(150, 150) / 12
    weight = torch.randn(40, 150)
    values, absmax = reference.quantize_weight(weight)
    rounded = gptq.Correlations(x).round(weight, Int8Grid(absmax))
    errors = [float(((reference.dequantize_weight(v, absmax) - weight) @ x.t()).norm()) for v in (values, rounded)]
    assert rounded.dtype == torch.int8
    assert int(rounded.abs().max()) <= 127
    assert errors[1] < 0.8 * errors[0]


def test_gptq_of_inputs_that_are_not_correlated_is_rounding_to_nearest() -> None:
    weight = torch.randn(9, 64)
    weight[3] = 0
    values, absmax = reference.quantize_weight(weight)
    assert torch.equal(gptq.Correlations(torch.eye(64)).round(weight, Int8Grid(absmax)), values)
    assert torch.equal(gptq.Correlations(torch.zeros(5, 64)).round(weight, Int8Grid(absmax)), values)


def test_gptq_of_wide_layers_is_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, 150), torch.randn(9, 150)
    _, absmax = reference.quantize_weight(weight)
    parts = [
        gptq.Correlations(x[:, part]).round(weight[:, part], Int8Grid(absmax))
        for part in (slice(0, 64), slice(64, 128), slice(128, 150))
    ]
    monkeypatch.setattr(gptq, "MAX_DIMENSIONS", 64)
    assert torch.equal(gptq.Correlations(x).round(weight, Int8Grid(absmax)), torch.cat(parts, 1))


def test_wide_layers_are_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MAX_DIMENSIONS", 128)
    report = converter.convert(source, tmp_path / "out", format=2, rounding="gptq")
    notice = (
        "GPTQ takes the 200 inputs of model.layers.0.mlp.down_proj and 1 more in blocks of 128, as if they had nothing"
    )
    assert [one for one in report.notices if one.startswith(notice)]


@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
def test_gptq_comes_nearer_and_is_checked_by_its_own_rules(source: Path, tmp_path: Path, rotate: bool) -> None:
    exact = of_source(source)
    text = tmp_path / "text.txt"
    errors = []
    text.write_text("unused: random ids, for want of a tokenizer")
    for rounding in ("nearest", "gptq"):
        out = tmp_path / rounding
        converter.convert(source, out, format=2, rotate=rotate, rounding=rounding, calibration_tokens=2048)
        model = runtime.load(out, dtype=torch.float32)
        for layer in model.modules():
            if isinstance(layer, Int8Linear):  # what is left is the error of the weights
                layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.dequantize())  # type: ignore[method-assign]
        errors.append(error(model, exact))
    assert errors[1] < errors[0]
    checkpoint = open_checkpoint(tmp_path / "gptq")
    assert check_values(checkpoint) == []
    said = CliRunner().invoke(main, ["verify", str(tmp_path / "gptq"), "--source", str(source)])
    assert said.exit_code == 0, said.output
    for name in checkpoint.records:
        values, absmax = reference.quantize_weight(open_source(source).read(f"{name}.weight"), 64 if rotate else None)
        assert torch.equal(checkpoint.read(f"{name}.absmax"), absmax)
    assert not torch.equal(checkpoint.read(f"{name}.weight"), values)


# Format 1 has not changed.

BYTES = {
    "none/README.md": "0419a264cea8446e",
    "none/config.json": "878fb8c3a4c585a5",
    "none/llmint8_manifest.json": "95f564b91d9861dc",
    "none/model.safetensors": "fde1d0d759912893",
    "lm_head.weight": "ad32bc65ab7687e6",
    "model.embed_tokens.weight": "ad32bc65ab7687e6",
    "model.layers.0.input_layernorm.weight": "78be707212b007c8",
    "model.layers.0.mlp.down_proj.SCB": "b281686facc49f17",
    "model.layers.0.mlp.down_proj.weight": "79926bbde3397d39",
    "model.layers.0.mlp.gate_proj.SCB": "c65d3f5cbb665048",
    "model.layers.0.mlp.gate_proj.weight": "7710c8e1071bd479",
    "model.layers.0.mlp.up_proj.SCB": "c65d3f5cbb665048",
    "model.layers.0.mlp.up_proj.weight": "7710c8e1071bd479",
    "model.layers.0.post_attention_layernorm.weight": "78be707212b007c8",
    "model.layers.0.self_attn.k_proj.SCB": "7aa9c17c1e366ab7",
    "model.layers.0.self_attn.k_proj.weight": "126d0661c0fc2fc1",
    "model.layers.0.self_attn.o_proj.SCB": "7aa9c17c1e366ab7",
    "model.layers.0.self_attn.o_proj.weight": "126d0661c0fc2fc1",
    "model.layers.0.self_attn.q_proj.SCB": "7aa9c17c1e366ab7",
    "model.layers.0.self_attn.q_proj.weight": "126d0661c0fc2fc1",
    "model.layers.0.self_attn.v_proj.SCB": "7aa9c17c1e366ab7",
    "model.layers.0.self_attn.v_proj.weight": "126d0661c0fc2fc1",
    "model.norm.weight": "78be707212b007c8",
}

KEYS = ["quant_method", "load_in_8bit", "load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules"]
KEYS += ["llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload", "llmint8", "format_version", "producer"]
KEYS += ["activation", "activation_group", "outliers", "calibration", "source"]


def made_up() -> dict[str, Tensor]:
    """Weights that are the same on every machine."""

    def tensor(*shape: int) -> Tensor:
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return (((numbers * 7919 + 13) % 2003 - 1001) / 4004).to(torch.float16).reshape(shape)

    tensors = {"model.embed_tokens.weight": tensor(64, 64), "lm_head.weight": tensor(64, 64)}
    tensors["model.norm.weight"] = tensor(64) + 1
    layer = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64)}
    layer |= {
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (200, 64),
        "mlp.up_proj": (200, 64),
        "mlp.down_proj": (64, 200),
    }
    for name, shape in layer.items():
        tensors[f"model.layers.0.{name}.weight"] = tensor(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = tensor(64) + 1
    return tensors


def test_the_bytes_of_format_1_are_what_they_were(tmp_path: Path) -> None:
    """Recorded with the version before format 2; what is measured in the calibration differs between machines."""
    (tmp_path / "source").mkdir()
    config = LLAMA | {"num_hidden_layers": 1, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save_file(made_up(), tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    converter.convert(tmp_path / "source", tmp_path / "none", outliers="none")
    converter.convert(tmp_path / "source", tmp_path / "calibrated")
    found = {
        f"none/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted((tmp_path / "none").iterdir())
    }
    calibrated = open_checkpoint(tmp_path / "calibrated")
    for name in sorted(calibrated.tensors):
        if name.endswith((".weight", ".SCB")):
            data = calibrated.read(name).contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(data).hexdigest()[:16]
    keys = json.loads((tmp_path / "calibrated" / "config.json").read_text())["quantization_config"]
    assert found == BYTES
    assert [*keys, *keys["llmint8"]] == KEYS
