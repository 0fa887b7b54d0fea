"""The commands as a user runs them: output, exit codes, one line per error."""

import json
import re
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmint8 import formats
from llmint8.converter import words
from llmint8.converter.commands.convert import convert_command
from llmint8.kernels.cpu import native
from llmint8.runtime.commands.main import main

CONFIG = transformers.LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).half().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def converted(source, tmp_path):
    assert run(convert_command, source, tmp_path / "out", "--outliers", "none").exit_code == 0
    return tmp_path / "out"


@pytest.fixture
def byte_tokenizer():
    """One token for each ASCII character."""
    model = models.WordLevel({chr(code): code for code in range(128)}, unk_token="?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def assert_one_line_error(result, *words):
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    for word in words:
        assert word in result.stderr


def test_convert_says_what_it_did(source, tmp_path):
    result = run(convert_command, source, tmp_path / "out")
    assert result.exit_code == 0
    assert "7 linear layers in int8 with 25.0% of their columns in 16 bit, 1 layer left in 16 bit" in result.stdout
    assert f"runtime.load('{tmp_path / 'out'}')" in result.stdout
    # No progress bar where there is no terminal; and this source has no tokenizer.
    assert result.stderr == "Note: no tokenizer beside the source: calibrated with random token ids, which is worse\n"


def test_convert_is_also_a_command_of_the_group(source, tmp_path):
    assert run(main, "convert", source, tmp_path / "out", "--quiet").output == ""
    assert (tmp_path / "out" / "config.json").exists()


def test_dry_run_writes_nothing_and_tells_the_truth(source, tmp_path):
    plan = run(convert_command, source, tmp_path / "out", "--outliers", "none", "--dry-run", "--verbose").stdout
    assert not (tmp_path / "out").exists()
    assert "7 linear layers to int8, 1 left in 16 bit" in plan
    assert "lm_head: output head" in plan
    for word in ("Peak memory", "Disk space", "free"):
        assert word in plan
    read = (source / "model.safetensors").stat().st_size
    found = re.search(r"^Disk time    1 s at 500\.0 MB/s: (.*) read, (.*) kB written$", plan, re.MULTILINE)
    assert found
    assert found[1] == words.size(read)
    done = run(convert_command, source, tmp_path / "out", "--outliers", "none").stdout
    size = done.split(" -> ")[1].split(" (")[0]
    assert f"Result       {size}," in plan
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    # A header has at most a kilobyte for each tensor.
    assert 0 <= 1000 * float(found[2]) - written <= 1024 * len(formats.open_checkpoint(tmp_path / "out").tensors)


def test_verbose_names_the_layers_left_alone(source, tmp_path):
    result = run(convert_command, source, tmp_path / "out", "--verbose", "--skip", "up_proj")
    assert "model.layers.0.mlp.up_proj: --skip" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-shard-size", "many"], ["size 'many'", "5GB"]),
        (["--outliers", "some"], ["outliers 'some'"]),
        (["--only", "x^"], ["no linear layer is left"]),
        (["--skip", "("], ["--skip", "'('"]),
        (["--revision", "v1"], ["has no revision 'v1'"]),
        (["--device", "abacus"], ["device 'abacus'", "cannot be used here"]),
    ],
)
def test_bad_options_are_one_line(options, words, source, tmp_path):
    assert_one_line_error(run(convert_command, source, tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


def test_missing_source_is_one_line(tmp_path):
    assert_one_line_error(run(convert_command, tmp_path / "nothing", tmp_path / "out"), "nothing")


def test_missing_shard_is_one_line(source, tmp_path):
    (source / "model.safetensors").unlink()  # it would be taken, whatever an index says
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run(convert_command, source, tmp_path / "out")
    assert_one_line_error(result, "model-00001-of-00001.safetensors", "missing", "download")


def test_names_cannot_drive_the_terminal(source, tmp_path):
    (source / "model.safetensors").unlink()  # it would be taken, whatever an index says
    index = {"weight_map": {"\x1b[2Jgone": "../../etc/\x1b]0;x\x07passwd"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run(convert_command, source, tmp_path / "out")
    assert_one_line_error(result, "etc")
    assert result.stderr.rstrip("\n").isprintable()


def test_inspect_table(converted):
    result = run(main, "inspect", converted)
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.startswith("model.layers.*.mlp.down_proj"))
    assert row.split()[1:5] == ["1", "32", "48", "0"]
    assert "LlamaForCausalLM, from source" in result.stdout
    assert "Not quantized lm_head" in result.stdout
    runs_on = native.kinds()[0] if native.kinds() else f"plain torch ({native.why_not()})"
    assert f"\nOn this CPU   {runs_on}\n" in result.stdout
    assert "\nActivations   zeropoint in groups of 128\n" in result.stdout


def test_inspect_says_where_inputs_have_no_groups_and_that_they_may(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    block = config["quantization_config"]["llmint8"]
    del block["activation_group"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    found = "zeropoint, one scale for the whole row; it loads with activation_group=64, 128 or 256 too"
    assert f"\nActivations   {found}\n" in run(main, "inspect", tmp_path / "copy").stdout
    assert json.loads(run(main, "inspect", tmp_path / "copy", "--json").stdout)["activation_group"] is None


def write_checkpoint(path, layers, others):
    """Write int8 layers, name -> (out, in, number of outliers), and other tensors, name -> shape in float16."""
    writer = formats.CheckpointWriter(path, 1 << 30)
    counts = {name: outliers for name, (_, _, outliers) in layers.items()}
    with writer:
        specs = [formats.BITSANDBYTES.record_specs(name, *sizes, "F16") for name, sizes in layers.items()]
        writer.plan([*specs, [formats.TensorSpec(name, "F16", shape) for name, shape in others.items()]])
        for spec in [spec for group in specs for spec in group]:
            ones = torch.arange(spec.shape[0]) if spec.name.endswith("dims") else torch.ones(spec.shape)
            zeros = torch.zeros(spec.shape)
            tensor = zeros if spec.name.endswith("weight_format") else ones * 127 if spec.dtype == "I8" else ones
            writer.write(spec.name, tensor.to(formats.DTYPES[spec.dtype]))
        for name, shape in others.items():
            writer.write(name, torch.ones(shape, dtype=torch.float16))
        source = {"name": "s", "repo": None, "commit": None}
        quantization = formats.Quantization(["lm_head"], counts, source=source)
        identity = {**source, "config_sha256": "0" * 64, "files": {}}
        writer.commit({"model_type": "made-up"}, quantization, identity, {}, {})


def test_inspect_sums_up_repeated_layers_and_says_what_a_block_takes(tmp_path):
    layers = {f"model.layers.{i}.up": (1000, 500, 3 + i) for i in range(12)}
    layers |= {f"model.layers.{i}.experts.{j}.w1": (1000, 10, 0) for i in (0, 1) for j in (0, 1)}
    layers |= {"model.layers.5.odd": (1000, 600, 2), "vision.0.fc": (2000, 1000, 1), "connector": (10, 20, 0)}
    others = {"model.layers.3.norm.weight": (100_000,), "model.embed.weight": (1000, 800), "model.norm.weight": (8,)}
    write_checkpoint(tmp_path / "out", layers, others)
    said = run(main, "inspect", tmp_path / "out").stdout
    # Bytes: the weight, four for a row's scale, one for the format, two for an element of a column, four for a dim.
    assert [line.split() for line in said.partition("\n\n")[0].splitlines()] == [
        ["layer", "number", "out", "in", "16-bit", "columns", "size", "of", "each"],
        ["connector", "1", "10", "20", "0", "241", "bytes"],
        ["model.layers.*.experts.*.w1", "4", "1000", "10", "0", "14.0", "kB"],
        ["model.layers.*.up", "12", "1000", "500", "3", "to", "14", "510.0", "to", "532.1", "kB"],
        ["model.layers.*.odd", "1", "1000", "600", "2", "608.0", "kB"],
        ["vision.*.fc", "1", "2000", "1000", "1", "2.0", "MB"],
    ]
    assert "\nBlocks        12 x model.layers.*, 0.5 to 1.1 MB each\nBlocks        1 x vision.*, 2.0 MB each\n" in said
    assert "\nOutside       1.6 MB: model.embed 1.6 MB, and 2 smaller\n" in said


def test_inspect_all_lists_every_layer_in_natural_order(tmp_path):
    names = ["a.9.x", "a.10.x", "a.10.y", "a.100.x", "b"]
    write_checkpoint(tmp_path / "out", dict.fromkeys(reversed(names), (4, 8, 0)), {})
    said = run(main, "inspect", tmp_path / "out", "--all").stdout
    assert [line.split()[0] for line in said.partition("\n\n")[0].splitlines()[1:]] == names
    facts = json.loads(run(main, "inspect", tmp_path / "out", "--json").stdout)
    assert [layer["name"] for layer in facts["layers"]] == names
    size = 4 * 8 + 4 * 4 + 1
    assert facts["block_bytes"] == {"a.9": size, "a.10": 2 * size, "a.100": size}
    assert facts["outside_bytes"] == {"b": size}


def test_inspect_finds_blocks_behind_names_with_digits(tmp_path):
    layers = {f"{stack}.{i}.fc": (100, 1000, 0) for stack in ("wav2vec2.encoder.layers", "h2o") for i in (0, 1)}
    others = {f"other{i}.weight": (500,) for i in range(30)} | {"alone": (500,)}
    write_checkpoint(tmp_path / "out", layers, others)
    said = run(main, "inspect", tmp_path / "out").stdout
    assert "\nBlocks        2 x h2o.*, 100.4 kB each\n" in said
    assert "\nBlocks        2 x wav2vec2.encoder.layers.*, 100.4 kB each\n" in said
    # So many of one size that none stands out; and a tensor that is in no module has a name all the same.
    assert "\nOutside       31.0 kB\n" in said
    facts = json.loads(run(main, "inspect", tmp_path / "out", "--json").stdout)
    assert facts["outside_bytes"].keys() == {f"other{i}" for i in range(30)} | {"alone"}


def test_inspect_json(converted):
    facts = json.loads(run(main, "inspect", converted, "--json").stdout)
    assert (facts["format"], facts["activation"], facts["activation_group"]) == ("llmint8 1.1", "zeropoint", 128)
    assert len(facts["layers"]) == 7
    assert facts["layers"][0].keys() >= {"name", "out_features", "in_features", "outliers", "bytes"}
    sizes = sum(layer["bytes"] for layer in facts["layers"])
    assert sizes == facts["int8_layers_bytes"]
    assert facts["bytes"] == sizes + sum(facts["other_bytes_by_dtype"].values())


def test_inspect_of_something_else_is_one_line(source):
    assert_one_line_error(run(main, "inspect", source), "E02", "not an int8 checkpoint; llmint8-convert makes one")


def test_verify(converted, source):
    result = run(main, "verify", converted)
    assert (result.exit_code, result.stdout.count("all good")) == (0, 1)
    result = run(main, "verify", converted, "--source", source)
    assert result.exit_code == 0
    error = next(line for line in result.stdout.splitlines() if line.startswith("model.layers.0.mlp.down_proj"))
    assert 0.001 < float(error.split()[-1]) < 0.02


def test_a_source_in_float32_is_told_as_such_with_what_half_of_it_would_take(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "source")
    plan = run(convert_command, tmp_path / "source", tmp_path / "out", "--dry-run", "--verbose")
    assert "1 left in float32" in plan.stdout
    assert "In float32   lm_head: output head" in plan.stdout
    done = run(convert_command, tmp_path / "source", tmp_path / "out")
    assert "25.0% of their columns in float32, 1 layer left in float32" in done.stdout
    said = re.search(
        r"stays in float32, as it is in the source: OUT takes (\S+ kB), .*; with --dtype bfloat16 (.*)\n", done.stderr
    )
    assert said[0] in plan.stderr
    for takes, dtype in zip(said.groups(), ([], ["--dtype", "bfloat16"]), strict=True):
        again = run(convert_command, tmp_path / "source", tmp_path / "new", *dtype, "--dry-run")
        assert f"Result       {takes}," in again.stdout
    assert "bfloat16" not in again.stderr
    looked_at = run(main, "inspect", tmp_path / "out").stdout
    assert "float32 columns" in looked_at
    assert "25.00% of the columns in float32" in looked_at


def test_what_an_int8_head_takes_beside_its_embedding_is_told(tmp_path):
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    done = run(convert_command, tmp_path / "source", tmp_path / "out", "--outliers", "none", "--quantize-head")
    added = 128 * 32 + 4 * 128 + 1  # int8, scales, and the format
    assert (
        f"Note: --quantize-head adds {words.size(added)}: the embedding it shares stays beside it. OUT takes"
        in done.stderr
    )
    takes = [sum(info.nbytes for info in formats.open_checkpoint(tmp_path / "out").tensors.values())]
    run(convert_command, tmp_path / "source", tmp_path / "less", "--outliers", "none")
    takes += [sum(info.nbytes for info in formats.open_checkpoint(tmp_path / "less").tensors.values())]
    assert takes[0] - takes[1] == added
    assert f"OUT takes {words.size(takes[0])}, " in done.stderr
    assert f"without it {words.size(takes[1])}\n" in done.stderr


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({}, "Load it with: llmint8.runtime.load({out!r}), a LlamaForCausalLM\n"),
        ({"model_type": "own"}, "transformers has no class for it: it can be verified and read here, and loaded where"),
    ],
)
def test_the_hint_says_what_loads(change, hint, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    out = tmp_path / "out"
    said = run(convert_command, source, out, "--outliers", "none").stdout
    assert hint.format(out=str(out)) in said
    assert said.count("runtime.load") == (not change)


def test_what_an_earlier_version_did_not_record_is_one_clause(source, converted):
    manifest = json.loads((converted / "llmint8_manifest.json").read_text())
    for name in [*manifest["source"]["options"]][:6]:
        del manifest["source"]["options"][name]
    (converted / "llmint8_manifest.json").write_text(json.dumps(manifest))
    result = run(convert_command, source, converted, "--outliers", "none")
    assert_one_line_error(result, "and 3 things more were not recorded, as in earlier versions. Name another directory")
    assert result.stderr.count("recorded") == 1


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        *[
            (0, "0 bytes"),
            (1, "1 byte"),
            (999, "999 bytes"),
            (999.7, "1.0 kB"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
        ],
        *[(999_950, "1.0 MB"), (4_260_000_000, "4.26 GB"), (999_999_999, "1.00 GB"), (2.5e12, "2.50 TB")],
    ],
)
def test_sizes_have_units_that_fit(nbytes, said):
    assert words.size(nbytes) == said


def test_numbers_and_their_nouns():
    assert [words.count(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert [words.count(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]
    assert words.sizes([510_013, 532_057]) == "510.0 to 532.1 kB"
    assert words.sizes([1000, 1_100_000]) == "0.0 to 1.1 MB"
    assert [words.precision(d) for d in ([], ["F16"], ["F32"], ["F32", "BF16"])] == [
        *("16 bit", "16 bit", "float32", "16 bit and float32"),
    ]


def test_verify_finds_one_flipped_bit(converted):
    file = converted / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = run(main, "verify", converted)
    assert result.exit_code == 1
    assert "E18" in result.stderr
    assert "1 problem in " in result.stderr


def test_verify_against_another_source(converted, tmp_path):
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(CONFIG).half().save_pretrained(tmp_path / "other")
    result = run(main, "verify", converted, "--source", tmp_path / "other")
    assert result.exit_code == 1
    assert "model.layers.0.mlp.down_proj.weight: not what quantizing the source gives" in result.stderr
    assert "lm_head.weight: differs from the source" in result.stderr


def test_generate_streams_text(converted, byte_tokenizer):
    byte_tokenizer.save_pretrained(converted)
    result = run(main, "generate", converted, "--prompt", "abc", "--max-new-tokens", 5)
    assert result.exit_code == 0
    assert "5 tokens" in result.stderr
    again = run(main, "generate", converted, "--prompt", "abc", "--max-new-tokens", 5, "--quiet")
    assert again.stdout == result.stdout
    assert again.stderr == ""


def test_generate_without_tokenizer_is_one_line(converted):
    assert_one_line_error(run(main, "generate", converted, "--prompt", "abc"), "tokenizer")


def test_generate_with_a_model_that_does_not_is_one_line(converted, byte_tokenizer, monkeypatch):
    byte_tokenizer.save_pretrained(converted)
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    monkeypatch.setattr("llmint8.runtime.model.load.load", None)
    result = run(main, "generate", converted, "--prompt", "abc")
    assert_one_line_error(result, "LlamaModel does not generate text", "runtime.load")


def test_a_defect_names_its_place_where_no_option_shows_it(converted, monkeypatch):
    monkeypatch.setattr("llmint8.formats.check_values", lambda *arguments: {}["gone"])
    result = run(main, "verify", converted)
    assert_one_line_error(result, "unexpected: KeyError: 'gone' (test_cli.py, line ")
    assert "convert" not in result.stderr


def test_a_defect_is_one_line_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr("llmint8.converter.conversion.convert.execute", lambda *arguments: {}["gone"])
    assert_one_line_error(run(convert_command, source, tmp_path / "out"), "unexpected: KeyError: 'gone'", "--verbose")
