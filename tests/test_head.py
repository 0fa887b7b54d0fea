"""`--quantize-head`: the output head in int8, and the embedding it shares beside it as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.calibration.streaming import LinearCall, streamed
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.converter.hub.front_matter import read_card
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.config import load_config
from llmint8.converter.model.names import parameter_tensors
from llmint8.converter.planning.head import own_head
from llmint8.converter.planning.selection import select_layers
from llmint8.formats import SourceError, check_values, open_checkpoint, open_source, read_manifest
from llmint8.kernels.reference import quantize_weight
from llmint8.runtime import Int8Linear
from llmint8.runtime.commands.main import main
from llmint8.runtime.report.statistics import hidden_inputs, read_inputs, table4

_SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
TIED = {
    "llama": transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "opt": transformers.OPTConfig(**_SMALL, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
    "gemma2": transformers.Gemma2Config(**_LLAMA, head_dim=16),
    "bloom": transformers.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4),
}
UNTIED = {
    "llama": transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "gpt-neox": transformers.GPTNeoXConfig(**_SMALL, intermediate_size=96, max_position_embeddings=64),
    "phi": transformers.PhiConfig(**{**_LLAMA, "num_key_value_heads": 4}, pad_token_id=0),  # its head has a bias
}
TOKENS = torch.arange(3, 35)[None]


def save(config: Any, path: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).half()
    model.save_pretrained(path)
    return model.float().eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("name", "outliers"), [*dict.fromkeys(TIED, "top-k=4").items(), ("llama", "none")])
def test_a_tied_head_becomes_a_layer_beside_its_embedding(name: str, outliers: str, tmp_path: Path) -> None:
    model = save(TIED[name], tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out", outliers=outliers, quantize_head=True)
    ordinary = converter.convert(tmp_path / "source", tmp_path / "ordinary", outliers=outliers)
    assert report.layers == ordinary.layers + 1
    assert not any("lm_head" in notice for notice in report.notices)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert check_values(checkpoint) == []
    source = load_file(tmp_path / "source" / "model.safetensors")
    layers = {f"{name}.weight" for name in checkpoint.records}
    (embedding,) = (name for name, tensor in source.items() if tensor.shape == (256, 64) and name not in layers)
    assert torch.equal(checkpoint.read(embedding), source[embedding])
    values, absmax = quantize_weight(source[embedding])
    assert torch.equal(checkpoint.read("lm_head.weight"), values)
    assert torch.equal(checkpoint.read("lm_head.SCB"), absmax)
    dims = checkpoint.read("lm_head.outlier_dims").long()
    assert torch.equal(checkpoint.read("lm_head.outlier_weight"), source[embedding][:, dims])
    assert "lm_head" not in checkpoint.quantization.skip_modules
    assert checkpoint.config["tie_word_embeddings"] is False
    loaded = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(loaded.get_output_embeddings(), Int8Linear)
    assert loaded.get_input_embeddings().weight.dtype == torch.float32
    assert relative_error(logits(loaded), logits(model)) < 0.03


@pytest.mark.parametrize("name", UNTIED)
def test_a_head_of_its_own_is_one_layer_more(name: str, tmp_path: Path) -> None:
    model = save(UNTIED[name], tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out", quantize_head=True)
    source, made = (set(load_tensors(tmp_path / name)) for name in ("source", "out"))
    suffixes = (".SCB", ".weight_format", ".outlier_dims", ".outlier_weight")
    assert {name for name in made if not name.endswith(suffixes)} == source
    kept = json.loads((tmp_path / "source" / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in kept} == kept
    loaded = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(loaded.get_output_embeddings(), Int8Linear)
    assert relative_error(logits(loaded), logits(model)) < 0.03


@pytest.mark.parametrize("name", [*TIED, "falcon"])
def test_the_streamed_head_sees_what_the_model_gives_it(name: str, tmp_path: Path) -> None:
    """Falcon's other layers are no plain linear ones: they take the transpose of their weight, an attribute."""
    falcon = transformers.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = save(TIED.get(name, falcon), tmp_path)
    expected: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: expected.append(inputs[0]))
    logits(model)
    source, config = open_source(tmp_path), load_config(tmp_path)
    config, untied, head = own_head(config, meta_model(config))
    selection = select_layers(source, untied, (), (), head)
    layers = {selection.module_of[name]: layer.weight.name for name, layer in selection.layers.items()}
    seen: dict[str, Tensor] = {}

    def see(call: LinearCall) -> None:
        seen[call.name] = call.rows

    tensor_of, device = parameter_tensors(untied, source.tensors), torch.device("cpu")
    with streamed(meta_model(config), tensor_of, {}, layers, {}, {}, source.read, see, device) as call:
        call("forward", {"input_ids": TOKENS})
    assert relative_error(seen[head.module], expected[0].flatten(0, 1)) < 1e-3  # its weights are in float16 on the disk


def load_tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head")
    save(TIED["llama"], path / "source")
    converter.convert(path / "source", path / "out", outliers="top-k=4", quantize_head=True)
    return path


def test_the_head_takes_part_in_the_calibration_and_the_budget(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "out")
    counts = checkpoint.quantization.outliers
    assert sum(counts.values()) <= 4 * len(counts)
    modules = json.loads((folder / "out" / "llmint8_manifest.json").read_text())["modules"]
    assert len(modules["lm_head"]["ks"]) > 2
    assert modules["lm_head"]["tokens"] > 100


def test_saved_again_it_loads_again(folder: Path, tmp_path: Path) -> None:
    model = runtime.load(folder / "out")
    model.save_pretrained(tmp_path / "saved")
    before, after = load_tensors(folder / "out"), load_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(runtime.load(tmp_path / "saved")), logits(model))


def test_stock_transformers_and_bitsandbytes_run_it(folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float16, device_map="cpu")
    head = model.get_output_embeddings()
    assert isinstance(head, bitsandbytes.nn.Linear8bitLt)
    stored = load_tensors(folder / "out")
    assert torch.equal(head.weight, stored["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    ours = runtime.load(folder / "out", outliers="dynamic", activation="absmax")
    assert relative_error(logits(model), logits(ours)) < 0.01
    assert model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 36)


def test_verify_compares_the_head_with_the_embedding(folder: Path, tmp_path: Path) -> None:
    found = compare_with_source(open_checkpoint(folder / "out"), open_source(folder / "source"))
    assert found.problems == []
    assert 0 < found.errors["lm_head"] < 0.02
    save(TIED["llama"], tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 5] = 1.0
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    found = compare_with_source(open_checkpoint(folder / "out"), open_source(tmp_path / "source"))
    assert [problem.split(":")[0] for problem in found.problems] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(["lm_head.outlier_weight"] if 5 in open_checkpoint(folder / "out").read("lm_head.outlier_dims") else []),
    ]


def test_verify_names_a_layer_that_the_source_has_not(folder: Path, tmp_path: Path) -> None:
    transformers.LlamaModel(TIED["llama"]).half().save_pretrained(tmp_path / "source")
    found = compare_with_source(open_checkpoint(folder / "out"), open_source(tmp_path / "source"))
    assert "lm_head.weight: in the checkpoint, not in the source" in found.problems


def test_inspect_and_card_mention_it(folder: Path) -> None:
    assert "the output head among them" in read_card(folder / "out")
    result = CliRunner().invoke(main, ["inspect", str(folder / "out")])
    assert "Output head   lm_head, in int8 too" in result.stdout
    assert json.loads(CliRunner().invoke(main, ["inspect", str(folder / "out"), "--json"]).stdout)["int8_head"]


def test_the_report_counts_the_head_as_a_layer_and_not_as_a_block(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "out")
    inputs = read_inputs(checkpoint, read_manifest(folder / "out"), folder)
    assert any(found.layers == ("lm_head",) for found in inputs)
    assert table4(hidden_inputs(inputs, checkpoint)).blocks == 2


def test_with_shards_from_the_hub_too(folder: Path, hub: Any, tmp_path: Path) -> None:
    """The embedding is written first and quantized last, and is let go only then."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "source", dtype=torch.float16)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    hub.add("alice/tiny", {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()})
    converter.convert("alice/tiny", tmp_path / "out", outliers="top-k=4", quantize_head=True, low_disk=True)
    one, two = load_tensors(folder / "out"), load_tensors(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out" / "source.partial").exists()


def test_two_names_for_one_head_become_one_layer_and_the_embedding(tmp_path: Path) -> None:
    save(TIED["llama"], tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    converter.convert(tmp_path / "source", tmp_path / "one", outliers="none", quantize_head=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    converter.convert(tmp_path / "source", tmp_path / "two", outliers="none", quantize_head=True)
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not open_checkpoint(tmp_path / "two").config["tie_word_embeddings"]


def test_a_head_that_stays_after_all_stays_tied(tmp_path: Path) -> None:
    save(TIED["llama"], tmp_path / "source")
    for number, options in enumerate(({"skip": ["lm_head"]}, {"on_nonfinite": "keep"})):
        if "skip" not in options:
            tensors = load_file(tmp_path / "source" / "model.safetensors")
            tensors["model.embed_tokens.weight"][0, 0] = torch.nan
            save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"out{number}"
        converter.convert(tmp_path / "source", out, quantize_head=True, **options)  # type: ignore[arg-type]
        checkpoint = open_checkpoint(out)
        assert checkpoint.config["tie_word_embeddings"]
        assert "lm_head" not in checkpoint.records
        assert "lm_head" in checkpoint.quantization.skip_modules


def test_where_there_is_no_head_to_quantize_it_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    bert = transformers.BertConfig(**_SMALL, intermediate_size=96, max_position_embeddings=64)
    mamba = transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8)
    models = {
        "mamba uses the weight of lm_head itself": transformers.MambaForCausalLM(mamba),  # casts to its dtype
        "t5 cannot do without": transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)),
        "bert cannot do without": transformers.BertForMaskedLM(bert),
        "no plain linear output head": transformers.LlamaModel(TIED["llama"]),
    }
    for words, model in models.items():
        model.half().save_pretrained(tmp_path / words)
        with pytest.raises(SourceError, match=f"--quantize-head: .*{words}.*leave it out"):
            converter.convert(tmp_path / words, tmp_path / "out", quantize_head=True)
    assert not (tmp_path / "out").exists()


def test_a_head_without_its_embedding_is_refused(tmp_path: Path) -> None:
    save(TIED["llama"], tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.embed_tokens\.weight is missing"):
        converter.convert(tmp_path / "source", tmp_path / "out", quantize_head=True)
