"""The converter's promises: what is quantized, what is kept, what is refused, and what is left behind."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmint8 import converter, formats

CONFIG = transformers.LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).half().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit_tensors(source, **changes):
    """Replace or, with None, remove tensors; dots in names are written `__`."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_bits_of_every_tensor(source, tmp_path):
    converter.convert(source, tmp_path / "out", outliers="none")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    original = load_file(source / "model.safetensors")
    assert len(checkpoint.records) == 14
    for name, tensor in original.items():
        module = name.removesuffix(".weight")
        if module not in checkpoint.records:
            assert torch.equal(checkpoint.read(name), tensor), name
            continue
        absmax = tensor.float().abs().amax(1)
        values = (tensor.double() * 127 / absmax.double()[:, None]).round().to(torch.int8)
        assert torch.equal(checkpoint.read(name), values), name
        assert torch.equal(checkpoint.read(f"{module}.SCB"), absmax), name
        assert checkpoint.read(f"{module}.outlier_weight").shape == (len(tensor), 0)
    assert checkpoint.quantization.skip_modules == ["lm_head"]
    assert formats.check_values(checkpoint) == []


def test_same_input_same_bytes(source, tmp_path):
    for out in ("a", "b"):
        converter.convert(source, tmp_path / out)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shards_have_hub_names_and_an_index(source, tmp_path):
    converter.convert(source, tmp_path / "out", max_shard_size="10KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    data = {name: load_file(tmp_path / "out" / name) for name in files}
    assert {name: file for file, tensors in data.items() for name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in data.values() for t in tensors.values())
    assert formats.check_values(formats.open_checkpoint(tmp_path / "out")) == []


def test_sharded_source_and_torch_source_give_the_same_tensors(source, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    (tmp_path / "zip").mkdir()
    (tmp_path / "legacy").mkdir()
    for layout in ("zip", "legacy"):
        shutil.copy(source / "config.json", tmp_path / layout)
        state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().t().contiguous().t()}
        file = tmp_path / layout / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=layout == "zip")
    (tmp_path / "shards").mkdir()
    shutil.copy(source / "config.json", tmp_path / "shards")
    names = sorted(state)
    weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: state[n] for n in names if weight_map[n] == file}, tmp_path / "shards" / file)
    index = tmp_path / "shards" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    hashes = []
    for number, directory in enumerate([source, *(tmp_path / n for n in ("sharded", "zip", "legacy", "shards"))]):
        converter.convert(directory, tmp_path / f"out{number}")
        manifest = formats.read_manifest(tmp_path / f"out{number}")
        hashes.append({name: entry.sha256 for name, entry in manifest.tensors.items()})
    assert all(found == hashes[0] for found in hashes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_quantized_keeps_its_dtype(dtype, tmp_path):
    transformers.LlamaForCausalLM(CONFIG).to(dtype).save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert checkpoint.read("model.norm.weight").dtype == dtype
    assert checkpoint.read(f"{DOWN}.outlier_weight").dtype == dtype


def test_dtype_casts_tensors_and_config(source, tmp_path):
    converter.convert(source, tmp_path / "out", dtype="bfloat16")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert {checkpoint.tensors[n].dtype for n in ("lm_head.weight", f"{DOWN}.outlier_weight")} == {"BF16"}
    assert checkpoint.config["dtype"] == "bfloat16"
    original = load_file(source / "model.safetensors")["lm_head.weight"]
    assert torch.equal(checkpoint.read("lm_head.weight"), original.bfloat16())


def test_dtype_that_overflows_is_refused_by_name(tmp_path):
    model = transformers.LlamaForCausalLM(CONFIG).bfloat16()
    with torch.no_grad():
        model.model.norm.weight[3] = 2.0**100
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(formats.SourceError, match=r"model\.safetensors: model\.norm\.weight: 1\.26765e\+30 .* float16"):
        converter.convert(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()


def test_skip_and_only(source, tmp_path):
    report = converter.convert(source, tmp_path / "a", skip=[r"layers\.0", "q_proj$"])
    assert report.layers == 6
    assert report.kept["model.layers.0.mlp.up_proj"] == "--skip"
    skipped = formats.open_checkpoint(tmp_path / "a").quantization.skip_modules
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"} <= set(skipped)
    assert converter.convert(source, tmp_path / "b", only=["down_proj", "up_proj"], skip=["1.mlp.up"]).layers == 3
    with pytest.raises(formats.SourceError, match="no linear layer is left"):
        converter.convert(source, tmp_path / "c", only=["nothing of the kind"])
    for option in ("only", "skip"):
        with pytest.raises(ValueError, match=rf"--{option} is the string 'q_proj', expected a list: \['q_proj'\]"):
            converter.convert(source, tmp_path / "d", **{option: "q_proj"})


def test_subclasses_of_linear_are_left_alone_and_named(tmp_path):
    """bitsandbytes does not replace FalconLinear, and would take int8 values for its weights."""
    config = transformers.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.FalconForCausalLM(config).half().save_pretrained(tmp_path / "source")
    with pytest.raises(formats.SourceError, match=r"no linear layer is left .*a FalconLinear, not a plain Linear"):
        converter.convert(tmp_path / "source", tmp_path / "out")


def test_tied_head_is_kept_and_stored_once(tmp_path):
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    assert converter.convert(tmp_path / "source", tmp_path / "out").kept == {"lm_head": "output head"}
    assert "lm_head.weight" not in formats.open_checkpoint(tmp_path / "out").tensors


def test_unknown_model_is_selected_by_name_and_shape(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "never-heard-of"}))
    report = converter.convert(source, tmp_path / "out")
    assert "never-heard-of" in report.notices[0]
    assert "chosen by name and shape" in report.notices[0]
    assert report.layers == 10  # k and v have 16 rows, too few to be sure
    assert {"lm_head", "model.embed_tokens"} <= report.kept.keys()


def test_rows_longer_than_sums_in_32_bits_stay_in_16_bit(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "never-heard-of"}))
    edit_tensors(source, h__0__long__weight=torch.ones(32, 133_145).half())
    report = converter.convert(source, tmp_path / "out", outliers="none")
    assert report.kept["h.0.long"] == "more input features than sums in 32 bits can hold"
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert checkpoint.tensors["h.0.long.weight"].dtype == "F16"


def test_infinity_in_a_config_goes_along(source, tmp_path):
    """Mamba 2 has it; JSON has not."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    converter.convert(source, tmp_path / "out", outliers="none")
    assert '"time_step_limit":[0.0,Infinity]' in "".join((tmp_path / "out" / "config.json").read_text().split())
    assert formats.open_checkpoint(tmp_path / "out").config["time_step_limit"] == [0.0, float("inf")]


def test_a_byte_order_mark_is_told(source, tmp_path):
    config = source / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    with pytest.raises(formats.CorruptFileError, match=r"config\.json: .*byte-order mark; save it as UTF-8 without"):
        converter.convert(source, tmp_path / "out")


def test_small_files_are_copied_and_other_weights_are_not(source, tmp_path):
    wanted = {"tokenizer.json": "{}", "LICENSE": "free", "chat_template.jinja": "{{ x }}", "tokenizer.model": "sp"}
    unwanted = ["pytorch_model.bin", "consolidated.00.pth", "flax_model.msgpack", "model.gguf", ".gitattributes"]
    for name, text in wanted.items():
        (source / name).write_text(text)
    for name in unwanted:
        (source / name).write_text("weights")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tools")
    converter.convert(source, tmp_path / "out")
    for name, text in wanted.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "tools"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not any((tmp_path / "out" / name).exists() for name in unwanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weight(value, source, tmp_path):
    weight = load_file(source / "model.safetensors")[f"{DOWN}.weight"]
    weight[5, 7] = value
    edit_tensors(source, **{f"{DOWN}.weight".replace(".", "__"): weight})
    with pytest.raises(formats.SourceError, match=rf"{DOWN}\.weight: output row 5 .*--on-nonfinite keep"):
        converter.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    report = converter.convert(source, tmp_path / "out", on_nonfinite="keep")
    assert report.kept[DOWN] == "holds NaN or infinity"
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert DOWN in checkpoint.quantization.skip_modules
    assert torch.equal(checkpoint.read(f"{DOWN}.weight").view(torch.int16), weight.view(torch.int16))


def test_missing_linear_weight_is_named(source, tmp_path):
    edit_tensors(source, **{f"{DOWN}.weight".replace(".", "__"): None})
    with pytest.raises(formats.SourceError, match=rf"{DOWN}\.weight is in no file, and LlamaForCausalLM needs it"):
        converter.convert(source, tmp_path / "out")


def test_weight_of_another_shape_is_named(source, tmp_path):
    edit_tensors(source, **{f"{DOWN}.weight".replace(".", "__"): torch.zeros(32, 47).half()})
    with pytest.raises(formats.SourceError, match=rf"{DOWN}\.weight has shape \[32, 47\].*\[32, 48\]"):
        converter.convert(source, tmp_path / "out")


def test_float64_weight_is_refused_by_name(source, tmp_path):
    edit_tensors(source, **{f"{DOWN}.weight".replace(".", "__"): torch.zeros(32, 48).double()})
    with pytest.raises(formats.SourceError, match=rf"{DOWN}\.weight is F64, expected F16, BF16 or F32"):
        converter.convert(source, tmp_path / "out")


def test_quantized_source_is_refused(source, tmp_path):
    converter.convert(source, tmp_path / "out")
    with pytest.raises(formats.SourceError, match="already quantized \\(bitsandbytes\\)"):
        converter.convert(tmp_path / "out", tmp_path / "again")


def test_out_must_be_new_and_elsewhere(source, tmp_path):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    for out, reason in [
        (source, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (source / "int8", "lies inside the source"),
        (full, "is not an empty directory"),
        (full / "mine.txt", "is not an empty directory"),
    ]:
        with pytest.raises(formats.OutputError, match=reason):
            converter.convert(source, out)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert [file.name for file in full.iterdir()] == ["mine.txt"]


def test_too_little_disk_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(formats.OutputError, match=r"1\.0 kB are free there"):
        converter.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_local_directory_has_no_revision(source, tmp_path):
    with pytest.raises(formats.SourceError, match="has no revision 'main'"):
        converter.convert(source, tmp_path / "out", revision="main")


def test_provenance(source, tmp_path):
    converter.convert(source, tmp_path / "out")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert checkpoint.quantization.source == {"name": "source", "repo": None, "commit": None}
    identity = formats.read_manifest(tmp_path / "out").source
    assert identity["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    assert identity["files"] == {"model.safetensors": (source / "model.safetensors").stat().st_size}


def test_one_block_of_rows_at_a_time(source, tmp_path, monkeypatch):
    """No two blocks of source tensors are alive at once with one job, and each tensor is read once."""
    import weakref

    alive, reads = [], []
    read_rows = formats.Source.read_rows

    def watched(self, name):
        reads.append(name)
        for block in read_rows(self, name):
            alive.append(weakref.ref(block))
            yield block
            del block
            assert not [ref for ref in alive[:-1] if ref() is not None], f"another block is alive in {name}"

    monkeypatch.setattr(formats.Source, "read_rows", watched)
    monkeypatch.setattr("llmint8.formats.containers.tensors.BLOCK_BYTES", 100)
    converter.convert(source, tmp_path / "out", outliers="none", jobs=1)
    assert sorted(reads) == sorted(load_file(source / "model.safetensors"))
    assert len(alive) > 2 * len(reads)


@pytest.mark.parametrize("size", ["5", "0GB", "GB", "-1GB", "5XB"])
def test_bad_shard_size(size, source, tmp_path):
    with pytest.raises(ValueError, match="expected a number and a unit"):
        converter.convert(source, tmp_path / "out", max_shard_size=size)


def test_where_the_source_lay_when_it_was_saved_is_not_told(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    text = {"_name_or_path": "/home/alice/text", "parts": [{"_name_or_path": "C:\\alice\\part"}], "kept": 1}
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "../models/mine", "other_config": text}))
    converter.convert(source, tmp_path / "out", outliers="none")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "_name_or_path" not in found
    assert found["other_config"] == {"parts": [{}], "kept": 1}
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "alice/tiny"}))
    converter.convert(source, tmp_path / "named", outliers="none")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["_name_or_path"] == "alice/tiny"
