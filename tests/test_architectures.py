"""Architectures that the calibrated pass once did not get through; `soak/test_architectures.py` has the whole table."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmint8 import converter, formats, runtime
from llmint8.converter.model.buffers import computed_parameters
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.config import load_config
from llmint8.converter.model.limits import longest_text
from llmint8.converter.model.own_use import weights_used_directly

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# name -> layers, those that only entities or other languages reach, how the others are calibrated
HARD = {
    "roberta": (12, 0, None),  # positions begin behind the index of padding
    "mpnet": (12, 0, None),
    "longformer": (18, 0, None),  # layers for tokens that all others look at
    "led": (38, 0, None),
    "prophetnet": (34, 0, None),  # takes less than its config says
    "marian": (32, 0, None),  # sinusoids are parameters that nobody saves
    "fsmt": (33, 0, None),  # calls its embedding the output head
    "xlnet": (4, 0, None),  # parameters outside of the meta device
    "reformer": (9, 0, None),  # buffers that float16 cannot hold
    "xmod": (20, 4, None),
    "nomic-bert": (8, 0, None),  # q, k and v are one tensor on the disk
    "canine": (25, 0, None),  # no vocabulary
    "vit": (12, 0, "made-up pixel_values"),
    "wav2vec2-conformer": (19, 0, "made-up input_values"),  # buffers on the disk in float16
    "whisper": (32, 0, "made-up input_features"),
    "clip": (26, 0, "made-up pixel_values"),
    "siglip2": (27, 0, "made-up pixel_values"),
    "llava": (28, 0, "made-up pixel_values"),
    "qwen2-vl": (23, 0, "made-up pixel_values"),
    "pix2struct": (37, 0, "made-up flattened_patches"),
}


def config_of(name: str, architectures: ModuleType) -> Any:
    model = architectures.tiny_model(name)
    model.config.architectures = [type(model).__name__]
    return model.config


@pytest.mark.parametrize("name", HARD)
def test_all_that_a_model_runs_is_calibrated(name: str, architectures: ModuleType, tmp_path: Path) -> None:
    layers, unreached, made_up = HARD[name]
    architectures.save(architectures.tiny_model(name), tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out", calibration_tokens=128)
    assert (report.layers, len(report.uncalibrated)) == (layers, unreached)
    assert not any("ended early" in notice or "NaN" in notice for notice in report.notices)
    assert [notice for notice in report.notices if "made-up" in notice] == (
        [] if made_up is None else [next(notice for notice in report.notices if f"with {made_up}, which is" in notice)]
    )
    calibration: Any = formats.open_checkpoint(tmp_path / "out").quantization.calibration
    assert made_up in calibration.get("inputs", [None])
    assert calibration["layers"] == layers - unreached


@pytest.mark.parametrize("name", ["marian", "xlnet", "llava", "siglip2"])
def test_it_stays_close_to_its_source(name: str, architectures: ModuleType, tmp_path: Path) -> None:
    model = architectures.tiny_model(name)
    architectures.save(model, tmp_path / "source")
    expected = architectures.outputs(type(model).from_pretrained(tmp_path / "source", dtype=torch.float32).eval())
    converter.convert(tmp_path / "source", tmp_path / "out")
    got = architectures.outputs(runtime.load(tmp_path / "out", dtype=torch.float32))
    assert float((got - expected).norm() / expected.norm()) < 0.04


def test_the_pass_sees_what_xlnet_sees(architectures: ModuleType, tmp_path: Path) -> None:
    """Its parameters outside of the meta device were memory that nobody wrote to; the checkpoint has them."""
    model = architectures.tiny_model("xlnet")
    architectures.save(model, tmp_path / "source")
    largest: dict[str, float] = {}
    model = type(model).from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.endswith("layer_1"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: largest.__setitem__(name, float(args[0].abs().max()))
            )
    converter.convert(tmp_path / "source", tmp_path / "out")
    from llmint8.converter.calibration.text import load_calibration

    config: Any = load_config(tmp_path / "source")
    with torch.no_grad():
        model(load_calibration(tmp_path / "source", config, None, 512).tokens)
    modules = formats.read_manifest(tmp_path / "out").modules
    assert len(largest) == 2
    for name, value in largest.items():
        assert modules[name]["absmax"][0] == pytest.approx(value, rel=1e-3)


def test_sinusoids_are_computed_as_the_models_code_does(architectures: ModuleType, tmp_path: Path) -> None:
    model = architectures.tiny_model("marian")
    name = "model.encoder.embed_positions.weight"
    architectures.save(model, tmp_path)
    meta: Any = meta_model(load_config(tmp_path))
    norm = "model.encoder.layers.0.fc1.weight"
    found = computed_parameters(
        meta, [name, norm, "model.encoder.layers.0.final_layer_norm.weight", "model.shared.weight"]
    )
    assert found.keys() == {name}  # neither what is drawn nor what is one everywhere
    expected = model.get_parameter(name).float()
    assert torch.allclose(found[name], expected, atol=1e-3)  # the other one is in float16
    assert 0.9 < float(found[name].abs().max()) <= 1


@pytest.mark.parametrize(
    ("name", "longest"), [("roberta", 126), ("mpnet", 126), ("bert", 128), ("gpt2", 128), ("clip", 128), ("t5", None)]
)
def test_a_row_is_as_long_as_the_model_has_positions(name: str, longest: int | None, architectures: ModuleType) -> None:
    config = config_of(name, architectures)
    assert longest_text(config, meta_model(config)) == longest


USED = {
    "mamba": {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"},  # not what training takes
    "dots3-note": {f"model.layers.{i}.self_attn.indexer.weights_proj" for i in (0, 1)},
    "siglip2": {"vision_model.embeddings.patch_embedding"},
    "qwen2-vl": {"model.visual.blocks.0.mlp.fc2"},
    "reformer": {f"reformer.encoder.layers.1.attention.self_attention.{name}" for name in ("query_key", "value")},
    # What looks at the dtype with int8 in mind, or has a branch that its config closes, keeps nothing.
    **{
        name: set() for name in ("llama", "opt", "bloom", "t5", "bert", "gpt2", "qwen2", "mixtral", "gemma3", "whisper")
    },
}


@pytest.mark.parametrize("name", USED)
def test_weights_that_the_code_takes_in_any_branch_are_kept(name: str, architectures: ModuleType) -> None:
    model: Any = meta_model(config_of(name, architectures))
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    linear = [key for key, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert weights_used_directly(model, [key for key in linear if f"{key}.weight" not in tied]) == USED[name]
