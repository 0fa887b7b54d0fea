"""Int8 checkpoints in the forms of other programs: what they hold, what is lost, and what an interruption leaves."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from llmint8 import converter
from llmint8.converter.export.export import export
from llmint8.converter.export.layers import layers_of
from llmint8.formats import OutputError, open_checkpoint
from llmint8.formats.containers import tensors as containers
from llmint8.formats.containers.safetensors import read_header
from llmint8.kernels.reference import dequantize_weight, quantize_weight
from llmint8.runtime.commands.main import main

_LLAMA = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_LLAMA),
    "gpt2": transformers.GPT2Config(**_GPT2),
    "mixtral": transformers.MixtralConfig(**_MOE),
    "gpt-oss": transformers.GptOssConfig(**_MOE, head_dim=16),
}
FORMATS: dict[str, dict[str, Any]] = {"1": {}, "2": {"format": 2}, "2, rotated": {"format": 2, "rotate": True}}


def make(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("export")
    source = make(folder / "source", "llama")
    converter.convert(source, folder / "out", outliers="top-k=6", max_shard_size="60KB", **FORMATS[request.param])
    return source, folder / "out"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("llama", options) for options in FORMATS.values()),
        ("gpt2", {}),
        ("mixtral", FORMATS["2"]),
        ("gpt-oss", FORMATS["2, rotated"]),
    ],
)
def test_16_bit_has_the_sources_tensors_but_for_rounding(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "BLOCK_BYTES", 500)
    source = make(tmp_path / "source", name)
    converter.convert(source, tmp_path / "out", outliers="top-k=6", **options)
    checkpoint = open_checkpoint(tmp_path / "out")
    report = export(tmp_path / "out", tmp_path / "dest", "float16")
    assert (report.int8, report.restored) == (0, len(checkpoint.records))
    expected, found = tensors(source), tensors(tmp_path / "dest")
    assert found.keys() == expected.keys()
    changed = 0
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        if torch.equal(found[key], tensor):
            continue
        changed += 1
        # Half a step of int8, and half of one of bfloat16, of values up to five deviations; a rotation mixes 64.
        assert (found[key].float() - tensor.float()).abs().max() < (0.02 if options.get("rotate") else 0.01)
    assert changed
    config = json.loads((tmp_path / "dest" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    assert "in another form, float16" in (tmp_path / "dest" / "README.md").read_text()
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dest", output_loading_info=True)
    assert not info["missing_keys"]


def test_outlier_columns_are_exact_in_16_bit(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    export(out, tmp_path / "dest", "float16")
    expected, found = tensors(source), tensors(tmp_path / "dest")
    checkpoint = open_checkpoint(out)
    for name in checkpoint.records:
        dims = checkpoint.read(f"{name}.outlier_dims").long()
        assert torch.equal(found[f"{name}.weight"][:, dims], expected[f"{name}.weight"][:, dims])


@pytest.mark.parametrize("to", ["bitsandbytes", "compressed-tensors"])
def test_int8_forms_hold_the_same_integers_and_no_columns(
    to: str, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = converted
    report = export(out, tmp_path / "dest", to)
    checkpoint, found = open_checkpoint(out), tensors(tmp_path / "dest")
    assert (report.int8, report.restored) == (14, 0)
    assert not [name for name in found if "outlier" in name or name.endswith(".absmax")]
    for name, record in checkpoint.records.items():
        values, absmax = checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.{checkpoint.layout.absmax}")
        if record.scheme.rotation is not None:
            restored = dequantize_weight(values, absmax, record.scheme.rotation)
            dims = checkpoint.read(f"{name}.outlier_dims").long()
            restored[:, dims] = checkpoint.read(f"{name}.outlier_weight").float()
            values, absmax = quantize_weight(restored)
        assert torch.equal(found[f"{name}.weight"], values)
        if to == "bitsandbytes":
            assert torch.equal(found[f"{name}.SCB"], absmax)
        else:
            assert torch.equal(found[f"{name}.weight_scale"], (absmax / 127)[:, None])
    quantization = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == to
    assert "llmint8" not in quantization
    left = quantization["llm_int8_skip_modules" if to == "bitsandbytes" else "ignore"]
    assert left == ["lm_head"]


def test_bitsandbytes_runs_its_form(converted: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source, out = converted
    export(out, tmp_path / "dest", "bitsandbytes")
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "dest")]
    assert type(loaded[1].model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert type(loaded[1].lm_head) is nn.Linear
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        expected, got = (model(tokens).logits.float() for model in loaded)
    assert (got - expected).norm() / expected.norm() < 0.1  # int8 without columns


def test_layers_that_lose_most_are_restored_and_those_of_one_input_together(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = converted
    report = export(out, tmp_path / "dest", "compressed-tensors", keep_outlier_layers=0.5)
    ignored = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization_config"]["ignore"]
    layers = [name for name in ignored if name != "lm_head"]
    assert 0 < len(layers) == report.restored <= 7
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        blocks = [{re.sub(r"\w+$", "", name) for name in layers if name.endswith(part)} for part in parts]
        assert all(block == blocks[0] for block in blocks)
    found = tensors(tmp_path / "dest")
    assert all(found[f"{name}.weight"].dtype == torch.bfloat16 for name in layers)
    assert any("lose their outlier columns" in notice for notice in report.notices)


def test_one_layer_to_restore_is_the_one_that_loses_most(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted
    export(out, tmp_path / "dest", "compressed-tensors", keep_outlier_layers=1 / 14)
    ignored = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization_config"]["ignore"]
    counts = {name: record.outlier_count or 0 for name, record in open_checkpoint(out).records.items()}
    statistics = json.loads((out / "llmint8_manifest.json").read_text())["modules"]
    loss = {}
    for name in counts:
        if name.endswith(("o_proj", "down_proj")):  # the others come in twos and threes
            ks, errors = statistics[name]["ks"], statistics[name]["errors"]
            loss[name] = errors[0] - errors[max(place for place, k in enumerate(ks) if k <= counts[name])]
    assert ignored == [max(loss, key=lambda name: loss[name]), "lm_head"]


def test_experts_are_restored_for_those_who_have_no_place_for_them(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt-oss")
    converter.convert(source, tmp_path / "out", outliers="top-k=4", format=2)
    report = export(tmp_path / "out", tmp_path / "dest", "compressed-tensors")
    assert report.restored == 16
    assert any("16 matrices of experts in 16 bit" in notice for notice in report.notices)
    assert tensors(tmp_path / "dest").keys() >= {
        name for name in tensors(source) if "experts" in name and "bias" not in name
    }


def test_an_interrupted_export_goes_on_to_the_same_bytes(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted
    options: dict[str, Any] = {"to": "bitsandbytes", "max_shard_size": "50KB"}
    export(out, tmp_path / "whole", **options)
    seen: list[str] = []

    def interrupt(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(out, tmp_path / "dest", **options, progress=interrupt)
    assert not (tmp_path / "dest" / "config.json").exists()
    with pytest.raises(OutputError, match="the form"):
        export(out, tmp_path / "dest", "float16", max_shard_size="50KB")
    export(out, tmp_path / "dest", **options)
    contents = [
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (tmp_path / "whole", tmp_path / "dest")
    ]
    assert contents[0] == contents[1]
    assert len([name for name in contents[0] if name.endswith(".safetensors")]) > 1


def test_matrices_of_a_stack_are_put_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt-oss")
    converter.convert(source, tmp_path / "out", outliers="none", format=2)
    checkpoint = open_checkpoint(tmp_path / "out")
    backwards = dataclasses.replace(checkpoint, records=dict(reversed(checkpoint.records.items())))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MODELS["gpt-oss"])
    _, stacks, _ = layers_of(backwards, model)
    for name, stack in stacks.items():
        assert [layer.name for layer in stack.layers] == [f"{name}.{number}" for number in range(4)]


def test_what_the_disk_gives_back_is_compared(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted

    def damage(name: str, nbytes: int) -> None:
        if name == "model.norm.weight":
            file = tmp_path / "dest" / "model-00001.safetensors.partial"
            content = bytearray(file.read_bytes())
            content[read_header(file)[name].offset] ^= 1
            file.write_bytes(content)

    with pytest.raises(OutputError, match="not what was written to it"):
        export(out, tmp_path / "dest", "float16", progress=damage)
    assert not (tmp_path / "dest" / "config.json").exists()


def test_the_command_says_what_it_wrote_and_refuses_to_write_elsewhere(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = converted
    dest = tmp_path / "dest"
    done = CliRunner().invoke(main, ["export", str(out), str(dest), "--to", "compressed-tensors"])
    assert done.exit_code == 0, done.output
    assert "14 layers in int8, 0 layers restored to 16 bit" in done.output
    assert "layers lose their outlier columns: on the calibration the squared relative error" in done.output
    for where, words in ((out / "inside", "lies inside"), (dest, "not an empty directory")):
        refused = CliRunner().invoke(main, ["export", str(out), str(where), "--to", "float16"])
        assert refused.exit_code == 1
        assert words in refused.output
