"""`llmint8 plan`: what a model takes and which GPUs hold it, against the LLM.int8() paper and against what runs."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from llmint8 import converter, formats
from llmint8.converter.model.build import meta_model, model_class
from llmint8.runtime.commands.main import main
from llmint8.runtime.placement.cache import cache_of
from llmint8.runtime.placement.gpus import Gpu, parse_machine
from llmint8.runtime.placement.opened import open_sized
from llmint8.runtime.placement.plan import Plan
from llmint8.runtime.placement.split import Unit, split

Facts = Callable[..., dict[str, Any]]


def plan(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    path = tmp_path_factory.mktemp("plan") / "source"
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    path = tmp_path_factory.mktemp("plan") / "mixture"
    transformers.MixtralForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    converter.convert(source, source.parent / "out", calibration_tokens=16)
    return source.parent / "out"


@pytest.fixture(scope="module")
def in_one_file(source: Path) -> Path:
    converter.convert(source, source.parent / "one", outliers="none")
    assert not (source.parent / "one" / "model.safetensors.index.json").exists()
    return source.parent / "one"


@pytest.fixture(scope="module")
def converted_mixture(mixture: Path) -> Path:
    converter.convert(mixture, mixture.parent / "out", calibration_tokens=16, format=2, rotate=True)
    return mixture.parent / "out"


def bytes_on_disk(checkpoint: Path) -> int:
    return sum(info.nbytes for info in formats.open_checkpoint(checkpoint).tensors.values())


@pytest.mark.parametrize("which", ["source", "mixture"])
def test_what_a_plan_has_in_int8_is_what_the_converter_makes_of_it(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    out = request.getfixturevalue({"source": "converted", "mixture": "converted_mixture"}[which])
    before, after = open_sized(str(path)), open_sized(str(out))
    records = formats.open_checkpoint(out).records
    for found in (before, after):
        assert {part.name for part in found.parts if part.int8} == records.keys()
    assert before.outliers == 16
    assert after.outliers == sum(record.outlier_count or 0 for record in records.values()) / len(records)
    assert Plan(after, 8, 1).on_disk == bytes_on_disk(out)
    planned, made = (Plan(found, 8, 1) for found in (before, after))
    assert (
        planned.taken(False)
        == made.taken(False)
        == 2 * sum(info.nbytes // 2 for info in formats.open_source(path).tensors.values())
    )
    for one, int8 in itertools.product((planned, made), (True, False)):
        assert sum(row["int8" if int8 else "half"] for row in one.by_kind()) == one.taken(int8)
    assert [row["what"] for row in planned.by_kind()] == [row["what"] for row in made.by_kind()]
    assert planned.cache == made.cache
    assert [unit.name for unit in planned.units(True)] == [unit.name for unit in made.units(True)]
    # How many columns a layer gets of those that there are on average, only the calibration knows.
    assert planned.on_disk == pytest.approx(made.on_disk, rel=0.01)


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**TINY, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("bloom", {**TINY, "n_layer": 3, "n_head": 4}),
    "llama": ("llama", {**GQA, "head_dim": 24}),
    "falcon": ("falcon", {**TINY, "multi_query": True}),
    "sliding": ("mistral", {**GQA, "sliding_window": 8}),
    "some sliding": ("qwen2", {**GQA, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "states": ("mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 2}),
    "encoder-decoder": ("t5", {**TINY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_takes_what_is_in_one(family: str) -> None:
    model_type, settings = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    cls: Any = model_class(config)
    model = cls(config).to(torch.bfloat16).eval()
    tokens = torch.ones(2, 20, dtype=torch.long)
    arguments = {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
    with torch.no_grad():
        out = model(**arguments, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache_params
    both = [cache.self_attention_cache, cache.cross_attention_cache] if config.is_encoder_decoder else [cache]
    tensors = tree_leaves([vars(layer) for one in both for layer in one.layers])
    expected = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    found = cache_of(meta_model(config))
    assert found is not None
    assert sum(found.taken(20, 2).values()) == expected > 0
    assert len(found.states) == len(both[0].layers)
    assert not any("encoder.block" in block.replace("decoder", "") for block in found.taken(20, 2))


def test_a_model_that_generates_nothing_has_no_cache_and_one_that_nobody_knows_none_that_is_known() -> None:
    encoder = meta_model(transformers.BertConfig(**TINY, architectures=["BertForMaskedLM"]))
    assert cache_of(encoder) is not None
    assert cache_of(encoder).taken(20, 1) == {}  # type: ignore[union-attr]
    assert cache_of(None) is None


def loads(shares: Sequence[Any]) -> list[int]:
    return [share.weights + share.cache for share in shares]


def test_accelerate_places_blocks_where_the_plan_has_them(source: Path) -> None:
    planned = Plan(open_sized(str(source)), 1, 1)
    shares = split([Unit(unit.name, unit.weights, 0) for unit in planned.units(False)], [Gpu("", 1 << 30)] * 3, 0)
    model = meta_model(transformers.AutoConfig.from_pretrained(source)).half()  # type: ignore[union-attr]
    # It counts buffers, too. And it keeps room for the largest block on the first GPU, through which others may pass.
    most = {gpu: load + 4096 for gpu, load in enumerate(loads(shares))}
    most[0] += max(unit.weights for unit in planned.units(False))
    placed = accelerate.infer_auto_device_map(model, {**most, "cpu": 0}, ["LlamaDecoderLayer"])
    found = {unit.name: gpu for gpu, share in enumerate(shares) for unit in share.units}
    assert len(set(found.values())) == 3
    assert found == {name: placed.get(name) for name in found}


@pytest.mark.parametrize("which", ["source", "converted", "in_one_file", "mixture", "converted_mixture"])
def test_of_a_hub_id_no_weights_are_fetched(which: str, hub: Any, request: pytest.FixtureRequest, facts: Facts) -> None:
    path: Path = request.getfixturevalue(which)
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    hub.add("alice/tiny", files)
    found, expected = facts("alice/tiny", "--gpu", "24GB"), facts(path, "--gpu", "24GB")
    assert "on the Hub, commit" in found["origin"]
    for same in ("class", "parameters", "by_kind", "int8_bytes", "cache_bytes", "machines", "smallest_sets", "notices"):
        assert found[same] == expected[same]
    assert not [file for file in Path(constants.HF_HUB_CACHE).rglob("*") if file.suffix == ".safetensors"]


def test_a_head_that_is_in_the_file_beside_its_embedding_is_in_memory_once(tmp_path: Path, facts: Facts) -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(**{**FAMILIES["opt"][1], "hidden_size": 64, "word_embed_proj_dim": 64})
    model = transformers.OPTForCausalLM(config).half()
    model.save_pretrained(tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "twice", ignore=shutil.ignore_patterns("*.safetensors"))
    state = model.state_dict()
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "twice" / "pytorch_model.bin")
    once, twice = (facts(tmp_path / name, "--gpu", "2x24GB") for name in ("once", "twice"))
    for same in ("parameters", "half_bytes", "int8_bytes", "machines"):
        assert once[same] == twice[same]
    converter.convert(tmp_path / "twice", tmp_path / "out", outliers="none")
    embedding = 2 * 64 * 64
    assert twice["int8_bytes_on_disk"] - once["int8_bytes_on_disk"] == embedding
    assert facts(tmp_path / "out")["int8_bytes_on_disk"] == bytes_on_disk(tmp_path / "out")
    assert facts(tmp_path / "out")["parameters"] == once["parameters"]


def test_a_checkpoint_of_bitsandbytes_is_one_in_int8(in_one_file: Path, tmp_path: Path, facts: Facts) -> None:
    path = Path(shutil.copytree(in_one_file, tmp_path / "theirs"))
    tensors = load_file(path / "model.safetensors")
    theirs = {name: tensor for name, tensor in tensors.items() if ".outlier_" not in name}
    assert theirs.keys() != tensors.keys()
    save_file(theirs, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"].pop("llmint8")
    (path / "config.json").write_text(json.dumps(config))
    found, known = facts(path), facts(in_one_file)
    assert found["origin"] == known["origin"] == "a directory, int8"
    assert found["int8_bytes_on_disk"] == known["int8_bytes_on_disk"] == bytes_on_disk(path)
    # Inputs are not quantized in groups there, so there is one sum for each row.
    assert found["int8_bytes"] < known["int8_bytes"]


def test_a_config_that_says_int8_over_weights_in_16_bit_is_not_believed(
    source: Path, tmp_path: Path, facts: Facts
) -> None:
    path = Path(shutil.copytree(source, tmp_path / "merged"))
    config = json.loads((path / "config.json").read_text())
    stale = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": stale}))
    found = facts(path)
    assert found["origin"] == "a directory"
    assert found["int8_bytes"] == facts(source)["int8_bytes"]
    assert any("no tensor is quantized" in notice for notice in found["notices"])


def test_the_text_says_what_the_json_says(source: Path, facts: Facts) -> None:
    result = plan(source, "--gpu", "2xT4", "--gpu", "24GB", "--context", "100", "--batch", "3")
    assert result.exit_code == 0
    lines, found = result.stdout.splitlines(), facts(source, "--gpu", "2xT4", "--context", "100", "--batch", "3")
    assert lines[0].startswith("Model         source (a directory): LlamaForCausalLM, ")
    assert f"{found['parameters']:,} parameters, 3 blocks" in lines[0]
    assert found["int8_layers"] == 21
    assert found["cache_bytes"] == 3 * 100 * 3 * 2 * 2 * 40 * 2
    assert "100 tokens of context, 3 texts at a time" in result.stdout
    first = lines.index(next(line for line in lines if line.startswith("2xT4, int8: fits")))
    assert lines[first + 2].endswith("model.embed_tokens, model.layers.0") or "model.layers.0 to 1" in lines[first + 2]
    assert lines[first + 3].endswith("model.norm, lm_head")
    assert [one["name"] for one in found["machines"]] == ["2xT4"]
    assert all(one["int8"] == one["half"] == 1 for one in found["smallest_sets"])
    assert [gpu["name"] for gpu in found["machines"][0]["int8"]["gpus"]] == ["T4", "T4"]
    for gpu in found["machines"][0]["int8"]["gpus"]:
        parts = ("weights", "cache", "reserved", "activations", "free")
        assert sum(gpu[part] for part in parts) == gpu["memory"]


def test_a_longer_text_than_the_model_allows_is_told() -> None:
    result = plan("opt-125m", "--context", "4096")
    assert "Note: the model allows 2,048 tokens, and not 4,096" in result.stderr


def test_experts_that_take_format_2_are_told(mixture: Path, facts: Facts) -> None:
    result = plan(mixture)
    assert "takes llmint8-convert --format 2; in format 1 they stay in 16 bit" in result.stderr
    assert facts(mixture)["format"] == 2


def test_a_source_in_float32_is_counted_in_16_bit_and_told(source: Path, tmp_path: Path, facts: Facts) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "float32")
    result = plan(tmp_path / "float32")
    assert "--dtype bfloat16 makes it so" in result.stderr
    assert facts(tmp_path / "float32")["half_bytes"] == facts(source)["half_bytes"]
    assert facts(tmp_path / "float32")["int8_bytes"] == facts(source)["int8_bytes"]


def test_a_model_that_transformers_does_not_know_is_planned_by_names(
    source: Path, tmp_path: Path, facts: Facts
) -> None:
    path = Path(shutil.copytree(source, tmp_path / "unknown"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of", "architectures": ["Unheard"]}))
    (path / "adapter_config.json").write_text("{}")
    found, known = facts(path, "--gpu", "2x24GB"), facts(source, "--gpu", "2x24GB")
    assert any("adapter_config.json" in notice for notice in found["notices"])
    assert (found["class"], found["cache_bytes"]) == (None, None)
    assert any("none are counted" in notice for notice in found["notices"])
    for same in ("parameters", "int8_layers", "int8_bytes", "half_bytes", "blocks", "by_kind"):
        assert found[same] == known[same]
    held = found["machines"][0]["int8"]["gpus"][0]["holds"]
    assert held == ["model.embed_tokens", "model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["opt-176b"], ["opt-176b", "sizes that are known by name: opt-125m"]),
        (["opt-125m", "--gpu", "A100"], ["'A100' is several of A100-40GB, A100-80GB"]),
        (["opt-125m", "--gpu", "Voodoo"], ["'Voodoo' is none of T4"]),
        (["opt-125m", "--gpu", "8x24GB:2"], ["expected such as 8x24GB, A100-80GB:4"]),
        (["opt-125m", "--gpu", "0x24GB"], ["0 GPUs, expected 1 to"]),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: list[str], words: list[str], hub: Any) -> None:
    result = plan(*arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8x24GB", ["24 GB"] * 8),
        ("A100-80GB:4", ["A100-80GB"] * 4),
        ("3090", ["RTX-3090"]),
        ("NVIDIA GeForce RTX 4090:2", ["RTX-4090"] * 2),
        ("h200", ["H200"]),
        ("2xT4, 48GB", ["T4", "T4", "48 GB"]),
    ],
)
def test_a_machine_is_named_in_many_ways(text: str, names: list[str]) -> None:
    assert [gpu.name for gpu in parse_machine(text)] == names
