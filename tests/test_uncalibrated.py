"""A layer that should have been calibrated and was not searches its outliers; what float16 cannot hold is said."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor, nn

from llmint8 import converter, runtime
from llmint8.runtime.accuracy import compare
from llmint8.runtime.accuracy.runs import Runs
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")
MANIFEST = "llmint8_manifest.json"
BLOCK = ("quantization_config", "llmint8", "outliers")
PLANTED = [5, 17]


def edit(path: Path, file: str, change: Any) -> None:
    """Change a JSON file of a checkpoint. The hashes in the manifest are not looked at by `load`."""
    content = json.loads((path / file).read_text())
    change(content)
    (path / file).write_text(json.dumps(content))


def modes(model: Any) -> dict[str, str]:
    return {name: layer.outliers for name, layer in model.named_modules() if isinstance(layer, runtime.Int8Linear)}


def last_line(caplog: pytest.LogCaptureFixture) -> str:
    return [record.getMessage() for record in caplog.records if "Int8Linear layers" in record.getMessage()][-1]


def llama(path: Path) -> Path:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.5, max_position_embeddings=48, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    converter.convert(llama(tmp_path / "source"), tmp_path / "out", outliers="top-k=4", calibration_tokens=48)
    return tmp_path / "out"


def test_a_layer_without_statistics_searches_and_load_says_so(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llmint8")
    assert set(modes(runtime.load(checkpoint)).values()) == {"static"}
    assert "outliers static, activation" in last_line(caplog)
    missed = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
    edit(checkpoint, MANIFEST, lambda manifest: [manifest["modules"].pop(name) for name in missed])
    edit(checkpoint, "config.json", lambda c: c["quantization_config"].update(llm_int8_threshold=2.5))
    model = runtime.load(checkpoint)
    assert sorted(name for name, mode in modes(model).items() if mode == "dynamic") == missed
    assert "outliers static (but in 2 that were not calibrated: dynamic, |x| >= 2.5), activation" in last_line(caplog)
    layer, x = model.get_submodule(missed[0]), torch.randn(3, 48).bfloat16()
    assert (layer.threshold, layer.activation, layer.activation_group) == (2.5, "zeropoint", 128)
    found = layer(x)
    layer.configure(outliers="none")
    assert not torch.equal(found, layer(x))
    assert model.config.quantization_config.outliers == "static"


def test_eval_lets_such_layers_search_in_the_mode_of_the_checkpoint_and_all_in_that_of_the_paper(
    checkpoint: Path,
) -> None:
    missed = "model.layers.0.mlp.down_proj"
    edit(checkpoint, MANIFEST, lambda manifest: manifest["modules"].pop(missed))
    model, windows = runtime.load(checkpoint), torch.arange(8)[None]
    layers = [module for module in model.modules() if isinstance(module, runtime.Int8Linear)]
    modes_to_run = compare.modes_of(model.config.quantization_config, True, layers)
    assert len(modes_to_run) == 4
    runs = Runs(model, model, modes_to_run, (), windows)
    for label, mode in [*modes_to_run.items(), *modes_to_run.items()]:
        runs._in_mode(label, windows, lambda name: None)
        searching = {name for name, outliers in modes(model).items() if outliers == "dynamic"}
        assert searching == ({missed} if mode.outliers == "static" else set(modes(model)))
        layers = [model.get_submodule(name) for name in modes(model)]
        assert {(layer.activation, layer.activation_group) for layer in layers} == {
            (mode.activation, mode.activation_group)
        }


def test_inspect_says_how_many_layers_search(checkpoint: Path) -> None:
    def inspect(*options: str) -> str:
        result = CliRunner().invoke(main, ["inspect", str(checkpoint), *options])
        assert result.exit_code == 0
        return result.stdout

    assert "Searched" not in inspect()
    assert json.loads(inspect("--json"))["not_calibrated"] == 0
    edit(checkpoint, MANIFEST, lambda manifest: manifest["modules"].pop("model.layers.0.mlp.down_proj"))
    assert "Searched      in 1 layer that was not calibrated, |x| >= 6\n" in inspect()
    assert json.loads(inspect("--json"))["not_calibrated"] == 1
    (checkpoint / MANIFEST).write_text("{}")
    assert json.loads(inspect("--json"))["not_calibrated"] == 0


@pytest.mark.parametrize("why", ["told so", "none", "threshold", "manifest"])
def test_no_layer_searches_where_nobody_wanted_it_or_nothing_is_known(checkpoint: Path, why: str) -> None:
    edit(checkpoint, MANIFEST, lambda manifest: manifest["modules"].clear())
    assert set(modes(runtime.load(checkpoint)).values()) == {"dynamic"}
    if why == "none":  # --outliers none
        edit(checkpoint, "config.json", lambda c: functools.reduce(dict.get, BLOCK, c).update(criterion="none"))
    if why == "threshold":  # in bitsandbytes 0 means that nothing is an outlier
        edit(checkpoint, "config.json", lambda c: c["quantization_config"].update(llm_int8_threshold=0.0))
    if why == "manifest":
        (checkpoint / MANIFEST).unlink()
    model = runtime.load(checkpoint, outliers="static" if why == "told so" else None)
    assert set(modes(model).values()) == {"static"}


def clip() -> tuple[Any, dict[str, Tensor]]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 4, "projection_dim": 32},
        projection_dim=32,
    )
    ids = torch.randint(0, 60, (2, 12))
    return transformers.CLIPModel(config), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def whisper() -> tuple[Any, dict[str, Tensor]]:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    ids = torch.randint(3, 60, (2, 12))
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids}
    return transformers.WhisperForConditionalGeneration(config), inputs


def plant_outliers(model: Any) -> None:
    """Make two dimensions of what follows each norm in a block large, and the columns that read them small."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and "layers" in name:
            module.weight.data[PLANTED] = 30
        if isinstance(module, nn.Linear) and "layers" in name:
            module.weight.data.normal_(0, 0.2)
            if module.in_features == 64 and "out_proj" not in name:
                module.weight.data[:, PLANTED] /= 30


@pytest.mark.parametrize("make", [clip, whisper], ids=lambda make: make.__name__)
def test_a_model_that_could_not_be_calibrated_is_not_worse_than_llm_int8(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, inputs = make()
    plant_outliers(model)
    model = model.eval().float()
    model.save_pretrained(tmp_path / "source")
    # As a conversion writes it that was asked for outliers and could not look for any.
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="none")
    edit(tmp_path / "out", "config.json", lambda c: functools.reduce(dict.get, BLOCK, c).update(criterion="top-k=16"))

    def outputs(model: Any) -> Tensor:
        with torch.no_grad():
            found = model(**inputs)
        return found.logits if make is whisper else torch.cat([found.image_embeds, found.text_embeds])

    expected = outputs(model)

    def error(**options: Any) -> float:
        found = outputs(runtime.load(tmp_path / "out", **options))
        return float((found - expected).norm() / expected.norm())

    ours, published, without = error(), error(outliers="dynamic", activation="absmax"), error(outliers="static")
    # Zeropoint and absmax round differently, here by 3 % at most; without a search it is 1.4 to 2 times as much.
    assert ours <= 1.1 * published <= 0.9 * without, (ours, published, without)


def with_largest(checkpoint: Path, values: dict[str, list[Any]]) -> None:
    edit(checkpoint, MANIFEST, lambda m: [m["modules"][name].update(absmax=v) for name, v in values.items()])


FIRST, SHARED = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


def test_inputs_that_float16_cannot_hold_are_named(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime.load(checkpoint, dtype="float16")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with_largest(checkpoint, {FIRST: [70000.0, 3.0], "model.layers.1.mlp.down_proj": [65500.0]})
    caplog.clear()
    runtime.load(checkpoint)  # bfloat16
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    runtime.load(checkpoint, dtype=torch.float16, outliers="none")
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message == (
        f"{FIRST}: its input reached 70000 in the calibration, and so did those of 1 more; float16 ends at 65504, so "
        "expect NaN: load with dtype='bfloat16'"
    )  # the other one shares its input


@pytest.mark.parametrize(
    ("values", "said"),
    [([None, 1.0], "reached inf"), ([65504.0], ""), ("70000", ""), (70000.0, ""), ([True], ""), ([], "")],
    ids=str,
)
def test_what_overflowed_float32_counts_and_foreign_statistics_do_not(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, values: Any, said: str
) -> None:
    with_largest(checkpoint, {FIRST: values})
    runtime.load(checkpoint, dtype=torch.float16)
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == bool(said)
    assert said in "".join(found)
