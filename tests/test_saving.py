"""A loaded model that is saved is a checkpoint like any other, manifest and statistics included."""

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmint8 import converter, runtime
from llmint8.formats import LLMInt8Error, Manifest, check_values, open_checkpoint, read_manifest
from llmint8.runtime.commands.main import main
from llmint8.runtime.model.saving import provenance_of

pytestmark = pytest.mark.usefixtures("quiet_transformers")
MANIFEST = "llmint8_manifest.json"
TOKENS = torch.arange(3, 19)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.3, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", outliers="top-k=4", calibration_tokens=48)
    return path / "out"


def assert_saved(model: Any, path: Path, expected: torch.Tensor) -> None:
    assert check_values(open_checkpoint(path)) == []
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert (result.exit_code, result.stderr) == (0, "")
    again = runtime.load(path, verify=True)
    assert torch.equal(logits(again), expected)
    kept = {n: m.kept_limit for n, m in model.named_modules() if isinstance(m, runtime.Int8Linear)}
    assert kept == {n: m.kept_limit for n, m in again.named_modules() if isinstance(m, runtime.Int8Linear)}
    assert None not in kept.values()


def test_other_models_are_saved_as_ever(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, True, None, False, "1KB")  # arguments by position, as it has them
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / MANIFEST).exists()


def test_arguments_by_position_count_for_ours_too(checkpoint: Path, tmp_path: Path) -> None:
    model = runtime.load(checkpoint)
    model.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / MANIFEST).exists()
    with pytest.raises(LLMInt8Error, match="uploads no manifest"):
        model.save_pretrained(tmp_path / "hub", True, None, True)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_it_verifies_and_computes_the_same(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = runtime.load(checkpoint)
    assert type(model) is transformers.LlamaForCausalLM
    expected = logits(model)
    for _ in range(2):  # once more over what is there
        model.save_pretrained(tmp_path / "saved", **options)
    assert len(open_checkpoint(tmp_path / "saved").files) == (2 if options else 1)
    assert_saved(model, tmp_path / "saved", expected)
    before, after = read_manifest(checkpoint), read_manifest(tmp_path / "saved")
    assert after.modules == before.modules
    assert {**after.source, "options": before.source["options"]} == before.source
    assert after.files.keys() == {"config.json", "generation_config.json"} | (
        {"model.safetensors.index.json"} if options else set()
    )
    # A model that was loaded from there is saved like the first one.
    runtime.load(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert_saved(model, tmp_path / "again", expected)


def test_names_that_change_on_loading_change_in_the_manifest(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=36, n_layer=2, n_head=2, initializer_range=0.2)
    torch.manual_seed(3)
    transformers.GPT2LMHeadModel(config).transformer.save_pretrained(
        tmp_path / "source"
    )  # `h.0`, not `transformer.h.0`
    described = json.loads((tmp_path / "source" / "config.json").read_text())
    described["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(described))
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="top-k=4", calibration_tokens=48)
    assert "h.0.mlp.c_fc" in read_manifest(tmp_path / "out").modules
    model = runtime.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    modules = read_manifest(tmp_path / "saved").modules
    assert modules.keys() == open_checkpoint(tmp_path / "saved").records.keys()
    assert_saved(model, tmp_path / "saved", logits(model))


def test_statistics_of_layers_that_share_an_input_go_with_their_names(checkpoint: Path, tmp_path: Path) -> None:
    runtime.load(checkpoint).save_pretrained(tmp_path)
    statistics = read_manifest(tmp_path).modules["model.layers.1.self_attn.v_proj"]
    assert statistics == {"shares_input_with": "model.layers.1.self_attn.q_proj"}
    modules: dict[str, Any] = {"h.0.q": {"kept_absmax": 2.0}, "h.0.v": {"shares_input_with": "h.0.q"}}
    manifest = Manifest("1.0", "somebody", {"name": "x", "options": {}}, {}, modules)
    kept = json.loads(provenance_of(manifest, {name: f"model.{name}" for name in modules}))
    assert kept["source"] == {"name": "x"}
    assert kept["modules"] == {
        "model.h.0.q": {"kept_absmax": 2.0},
        "model.h.0.v": {"shares_input_with": "model.h.0.q"},
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_model_in_another_dtype(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    model = runtime.load(checkpoint, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert_saved(model, tmp_path, logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_saves_itself(checkpoint: Path, tmp_path: Path, duplicate: Any) -> None:
    model = runtime.load(checkpoint)
    other = duplicate(model)
    for parameter in model.model.norm.parameters():
        parameter.data.fill_(0)  # of the first one only
    expected = logits(other)
    assert not torch.equal(expected, logits(model))
    other.save_pretrained(tmp_path)
    assert_saved(other, tmp_path, expected)


def test_a_model_that_nobody_holds_is_gone_at_once(checkpoint: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        model = runtime.load(checkpoint)
        gone = weakref.ref(model.model.layers[0].mlp.up_proj)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_uploaded_at_once_would_have_no_manifest(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMInt8Error, match=r"push_to_hub=True uploads no manifest; call model\.push_to_hub"):
        runtime.load(checkpoint).save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def test_who_saves_from_another_process_writes_no_manifest(checkpoint: Path, tmp_path: Path) -> None:
    runtime.load(checkpoint).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / MANIFEST).exists()


def test_without_a_manifest_there_is_none_to_keep(checkpoint: Path, tmp_path: Path) -> None:
    model = runtime.load(checkpoint)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["llmint8"]  # as bitsandbytes writes it
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / MANIFEST).unlink()
    runtime.load(tmp_path).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / MANIFEST).exists()
    assert check_values(open_checkpoint(tmp_path / "saved")) == []
