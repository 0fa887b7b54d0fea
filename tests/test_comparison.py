"""`llmint8 verify --source`: every kind of difference is found by its name, and the errors are those of the layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter
from llmint8.converter.conversion.comparison import Comparison, compare_with_source
from llmint8.formats import open_checkpoint, open_source

LAYER = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("compared")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", outliers="threshold=2.0", calibration_tokens=16)
    return path


def stored_in(out: Path) -> Tensors:
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def compared(folder: Path, change: Callable[[Tensors], object]) -> Comparison:
    """Compare with the source after a change of the checkpoint's tensors, which is taken back."""
    out = folder / "out"
    before = {file: file.read_bytes() for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]}
    tensors = stored_in(out)
    change(tensors)
    try:
        for file in before:
            file.unlink()
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return compare_with_source(open_checkpoint(out), open_source(folder / "source"))
    finally:
        (out / "model.safetensors").unlink()
        for file, data in before.items():
            file.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "nothing": (lambda tensors: None, []),
    "a value": (
        lambda tensors: tensors[f"{LAYER}.weight"][3].neg_(),
        [f"{LAYER}.weight: not what quantizing the source gives"],
    ),
    "a scale": (
        lambda tensors: tensors[f"{LAYER}.SCB"][5:6].mul_(1 + 2**-20),
        [f"{LAYER}.weight: not what quantizing the source gives"],
    ),
    "a column": (
        lambda tensors: tensors[f"{LAYER}.outlier_weight"][7].neg_(),
        [f"{LAYER}.outlier_weight: not the source's columns"],
    ),
    "a norm": (
        lambda tensors: tensors["model.norm.weight"][0:1].neg_(),
        ["model.norm.weight: differs from the source"],
    ),
    "too many": (
        lambda tensors: tensors.update({"more": torch.ones(2)}),
        ["more: in the checkpoint, not in the source"],
    ),
    "one missing": (
        lambda tensors: tensors.pop("model.norm.weight"),
        ["model.norm.weight: in the source, not in the checkpoint"],
    ),
}


@pytest.mark.parametrize(("change", "problems"), CHANGES.values(), ids=CHANGES)
def test_each_difference_is_named(folder: Path, change: Callable[[Tensors], object], problems: list[str]) -> None:
    assert compared(folder, change).problems == problems


def test_the_error_of_a_layer_is_that_of_its_weight_with_its_columns(folder: Path) -> None:
    stored, source = stored_in(folder / "out"), stored_in(folder / "source")
    found, seen = compared(folder, lambda tensors: None).errors, []
    for name in found:
        weight = source[f"{name}.weight"].double()
        restored = stored[f"{name}.weight"].double() * stored[f"{name}.SCB"].double()[:, None] / 127
        dims = stored[f"{name}.outlier_dims"].long()
        restored[:, dims] = stored[f"{name}.outlier_weight"].double()
        assert found[name] == pytest.approx(float((restored - weight).norm() / weight.norm()), rel=1e-4)
        seen.append(len(dims))
    assert len(seen) == 7
    assert max(seen) > 0
