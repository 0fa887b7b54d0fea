"""`llmint8 verify` names the parameters that `runtime.load` would miss, without a source and without reading them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.formats import LLMInt8Error, read_manifest
from llmint8.formats.writing.saved import write_manifest
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def llama(path: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, **sizes, **changes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    converter.convert(llama(tmp_path / "source"), tmp_path / "out", outliers="none")
    return tmp_path / "out"


def change(path: Path, tensors: Callable[[dict[str, Tensor]], Any], config: dict[str, Any] | None = None) -> None:
    """Change tensors and config of a checkpoint, which stays valid by all rules of spec.md."""
    manifest = read_manifest(path)
    found = load_file(path / "model.safetensors")
    tensors(found)
    save_file(found, path / "model.safetensors", {"format": "pt"})
    described = json.loads((path / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(described))
    write_manifest(path, manifest.source, manifest.modules, ["config.json"])


def verify(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(path), *options])


def test_a_whole_model_is_good(checkpoint: Path) -> None:
    for options in ([], ["--quiet"], ["--quick"]):
        result = verify(checkpoint, *options)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "Not checked" not in result.stdout


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["model.norm.weight"], {}),
        (["lm_head.weight"], {}),
        (["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"], {}),
        ([], {"num_hidden_layers": 3}),
    ],
    ids=["norm", "head", "two", "layer"],
)
def test_what_load_would_miss_is_named(checkpoint: Path, names: list[str], config: dict[str, Any]) -> None:
    change(checkpoint, lambda tensors: [tensors.pop(name) for name in names], config)
    assert verify(checkpoint, "--quick").exit_code == 0  # valid, but no model
    result = verify(checkpoint)
    missing = names or [f"model.layers.2.{name}" for name in ("input_layernorm.weight", "mlp.down_proj.weight")]
    for name in missing:
        assert f"{checkpoint}: {name}: missing, LlamaForCausalLM needs it\n" in result.stderr
    assert result.exit_code == 1
    with pytest.raises(LLMInt8Error) as caught:
        runtime.load(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}: {missing[0]}")


def test_a_foreign_tensor_hides_nothing(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.update({"foo.weight": tensors.pop("model.norm.weight")}))
    assert "model.norm.weight: missing" in verify(checkpoint).stderr


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    converter.convert(llama(tmp_path / "source", tie_word_embeddings=True), tmp_path / "out", outliers="none")
    assert verify(tmp_path / "out").exit_code == 0


def test_a_tensor_of_another_shape_and_a_layer_that_the_model_lacks(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31, dtype=torch.bfloat16)}))
    result = verify(checkpoint)
    assert "model.norm.weight: shape [31], LlamaForCausalLM wants [32]" in result.stderr
    change(checkpoint, lambda tensors: tensors, {"num_hidden_layers": 1})
    assert "model.layers.1" in verify(checkpoint).stderr


@pytest.mark.parametrize("config", [{"model_type": "unheard_of"}, {"architectures": ["Unheard"], "model_type": "x"}])
def test_of_an_unknown_model_it_says_that_this_was_not_checked(checkpoint: Path, config: dict[str, Any]) -> None:
    change(checkpoint, lambda tensors: tensors.pop("model.norm.weight"), config)
    result = verify(checkpoint)
    assert result.exit_code == 0
    assert "Not checked whether its model has all parameters: transformers does not know" in result.stdout
    assert verify(checkpoint, "--quiet").output == ""


def test_no_value_is_read_for_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmint8.formats import Checkpoint, open_checkpoint
    from llmint8.runtime.model.pretrained import missing_parameters

    opened = open_checkpoint(checkpoint)
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
    (checkpoint / "model.safetensors").unlink()
    assert missing_parameters(opened) == []
