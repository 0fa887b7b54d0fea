"""GGUF: what an export holds, read by others too; what is read of a file, and made of it; and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from llmint8 import converter
from llmint8.converter.export.export import export
from llmint8.converter.gguf.dialects import DIALECTS
from llmint8.converter.gguf.source import open_gguf, open_local
from llmint8.converter.gguf.splits import name_of_split, split_of_name
from llmint8.formats import CorruptFileError, LLMInt8Error, OutputError, SourceError, open_checkpoint, read_manifest
from llmint8.formats.containers.gguf import writing
from llmint8.formats.containers.gguf.header import read_gguf
from llmint8.formats.containers.gguf.rows import Rows
from llmint8.runtime.accuracy import exported as exported_form
from llmint8.runtime.commands.main import main

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
WRITTEN: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, rope_parameters=LLAMA_3),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
}
ONLY_READ: dict[str, transformers.PreTrainedConfig] = {
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "starcoder2": transformers.Starcoder2Config(**SIZES),
    "phi3": transformers.Phi3Config(**SIZES, pad_token_id=0),
    "stablelm": transformers.StableLmConfig(**SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=256),
}


def make(folder: Path, config: transformers.PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).half()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=WRITTEN)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its int8 checkpoint, and GGUF and float16 of that."""
    folder = tmp_path_factory.mktemp(request.param)
    make(folder / "source", WRITTEN[request.param])
    options: dict[str, dict[str, Any]] = {
        "llama": {"outliers": "top-k=6"},
        "qwen3": {"outliers": "none", "format": 2, "rotate": True},
    }
    converter.convert(folder / "source", folder / "out", **options.get(request.param, {"outliers": "none"}))
    export(folder / "out", folder / "float16", "float16")
    export(folder / "out", folder / "gguf", "gguf")
    return folder


def by_transformers(file: Path) -> dict[str, Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return dict(model.state_dict())


def test_an_export_is_read_as_the_weights_it_was_made_of(exported: Path) -> None:
    source = open_local(exported / "gguf")
    expected = load_file(exported / "float16" / "model.safetensors")
    assert source.tensors.keys() == expected.keys()
    records = open_checkpoint(exported / "out").records
    for name, tensor in expected.items():
        got = source.read(name).float()
        assert got.shape == tensor.shape
        if name.removesuffix(".weight") in records:
            blocks = tensor.float().reshape(len(tensor), -1, 32) if tensor.shape[1] % 32 == 0 else tensor.float()
            # Half a step of Q8_0, its scale in float16, and the float16 of the other export; or the latter alone.
            step = blocks.abs().amax(-1, keepdim=True) / 127 if tensor.shape[1] % 32 == 0 else torch.tensor(0.0)
            assert bool(((got.view_as(blocks) - blocks).abs() <= 0.57 * step + blocks.abs() / 900 + 1e-6).all()), name
        else:
            # Gemma's norms are kept with one added: what is left of them in float32.
            assert torch.allclose(got, tensor.float(), rtol=0, atol=1e-7 if "norm" in name else 0), name


def test_the_config_that_is_read_back_computes_the_same(exported: Path) -> None:
    before = transformers.AutoConfig.from_pretrained(exported / "out")
    source = open_local(exported / "gguf")
    after = transformers.AutoConfig.from_pretrained(source.beside)
    assert after.architectures == before.architectures
    for name in ("rope_parameters", "head_dim", "tie_word_embeddings", "attention_bias", "query_pre_attn_scalar"):
        assert getattr(after, name, None) == getattr(before, name, None), name


def test_transformers_reads_the_same_from_an_export(exported: Path) -> None:
    if exported.name.startswith("qwen3"):
        pytest.skip("its reader takes no head_dim of Qwen3")
    source, expected = open_local(exported / "gguf"), by_transformers(exported / "gguf" / "model-Q8_0.gguf")
    assert source.tensors.keys() - expected.keys() <= {name for name in source.tensors if name.endswith("_proj.bias")}
    for name in source.tensors.keys() & expected.keys():
        assert torch.equal(source.read(name).float(), expected[name]), name


def test_the_names_are_those_of_gguf_py_and_the_types_as_said(exported: Path) -> None:
    header = read_gguf(exported / "gguf" / "model-Q8_0.gguf")
    kinds = {name: gguf.GGMLQuantizationType(tensor.kind).name for name, tensor in header.tensors.items()}
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == "F16"  # 80 is no multiple of 32
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert ("rope_freqs.weight" in kinds) == (header.architecture == "llama")
    reader = gguf.GGUFReader(exported / "gguf" / "model-Q8_0.gguf")
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: tensor.offset for name, tensor in header.tensors.items()
    }
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def foreign(path: Path, name: str, kind: str) -> dict[str, Tensor]:
    """Write a GGUF file with gguf-py alone, its facts by transformers' table; return what it holds of a model."""
    config = ONLY_READ[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), 2)
    writer = gguf.GGUFWriter(path, name)
    for key, attribute in GGUF_CONFIG_MAPPING[name].items():
        value = getattr(config, attribute or "", None)
        if isinstance(value, int | float):
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{name}.{key}", value)
    writer.add_tokenizer_model("none")
    writer.add_token_list([f"token {number}" for number in range(96)])
    writer.add_pad_token_id(0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    expected: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor.normal_(0, 0.2)
        there = str(names.get_name(key, try_suffixes=(".weight", ".bias")))
        turned = name == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        array = (tensor.t().contiguous() if turned else tensor).numpy()
        if name == "gemma2" and there.endswith("norm.weight"):
            array = array + np.float32(1)
        if array.ndim == 2 and array.shape[1] % 32 == 0 and kind != "F32":
            packed = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(there, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
            array = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(there, array)
        array = array - np.float32(1) if name == "gemma2" and there.endswith("norm.weight") else array
        restored = torch.from_numpy(array.copy())
        expected[key] = restored.t().contiguous() if turned else restored
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(("name", "kind"), [*zip(ONLY_READ, ["Q8_0", "Q4_1", "Q5_0", "BF16", "Q4_0"], strict=True)])
def test_a_file_is_read_as_transformers_reads_it(name: str, kind: str, tmp_path: Path) -> None:
    expected = foreign(tmp_path / "x.gguf", name, kind)
    source, theirs = open_gguf(tmp_path / "x.gguf"), by_transformers(tmp_path / "x.gguf")
    assert source.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(source.read(key).float(), tensor), key
        assert torch.equal(theirs[key].float(), tensor), key
    assert {dialect.name for dialect in DIALECTS} == {*WRITTEN, *ONLY_READ}


def test_a_file_becomes_an_int8_checkpoint_that_says_what_it_was(tmp_path: Path) -> None:
    expected = foreign(tmp_path / "in.gguf", "starcoder2", "Q5_0")
    done = CliRunner().invoke(main, ["convert", str(tmp_path / "in.gguf"), str(tmp_path / "out"), "--outliers", "none"])
    assert done.exit_code == 0, done.output
    assert "tensors of the source are quantized (GGUF Q8_0), and are read as the float32" in done.output
    assert read_manifest(tmp_path / "out").source["quantized"] == "GGUF Q8_0"
    assert "The original was quantized already: GGUF Q8_0." in (tmp_path / "out" / "README.md").read_text()
    checkpoint = open_checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj"
    scale = checkpoint.read(f"{name}.SCB")[:, None] / 127
    assert (checkpoint.read(f"{name}.weight") * scale - expected[f"{name}.weight"]).abs().max() <= 0.501 * scale.max()
    again = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--source", str(tmp_path / "in.gguf")])
    assert again.exit_code == 0, again.output


def test_rows_of_heads_are_put_back_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, rows = torch.arange(48.0).reshape(24, 2), Rows(head=8)
    whole = torch.cat(list(rows.to_gguf([tensor])))
    assert whole[:4, 0].tolist() == [0, 8, 2, 10]  # dimensions 0 and 4 of the first head side by side
    for size in (1, 5, 8, 13):
        assert torch.equal(torch.cat(list(rows.to_gguf(tensor.split(size)))), whole)
        assert torch.equal(torch.cat(list(rows.from_gguf(whole.split(size)))), tensor)


TEXT = "In 2024, don't say 12345 words — grüße, 世界!  Two  spaces\n\nand\tlines"


def bytes_tokenizer(split: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|end|>", "<think>", *alphabet, "Ġs", "Ġsp", "12"])}
    made = Tokenizer(models.BPE(vocab, [("Ġ", "s"), ("Ġs", "p"), ("1", "2")]))
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<think>"])
    made.decoder = decoders.ByteLevel()
    state = json.loads(made.to_str()) | {"pre_tokenizer": split_of_name(split)}
    return Tokenizer.from_str(json.dumps(state))


def with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": tokenizer.get_vocab_size() + 3, "num_hidden_layers": 1})
    make(folder / "source", config)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder / "source")
    converter.convert(folder / "source", folder / "out", outliers="none")
    return folder / "out"


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_a_split_has_one_name(split: str) -> None:
    assert name_of_split(split_of_name(split)) == split
    assert name_of_split({"type": "Whitespace"}) is split_of_name("whitespace") is None


def test_a_tokenizer_of_bytes_goes_there_and_back(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer("smollm")
    report = export(with_tokenizer(tmp_path, tokenizer), tmp_path / "dest", "gguf")
    assert report.notices == []
    facts = read_gguf(tmp_path / "dest" / "model-Q8_0.gguf").facts
    types = gguf.TokenType
    assert facts["tokenizer.ggml.pre"] == "smollm"
    assert facts["tokenizer.ggml.token_type"][:3] == [types.CONTROL, types.USER_DEFINED, types.NORMAL]
    assert facts["tokenizer.ggml.token_type"][-3:] == [types.UNUSED] * 3
    assert (facts["tokenizer.ggml.eos_token_id"], facts["tokenizer.chat_template"]) == (0, "{{ messages }}")
    source = open_local(tmp_path / "dest")
    back = Tokenizer.from_file(str(source.beside / "tokenizer.json"))
    assert back.encode(TEXT + "<|end|><think>").ids == tokenizer.encode(TEXT + "<|end|><think>").ids


def test_a_tokenizer_of_characters_has_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    vocab = {token: n for n, token in enumerate(["<unk>", "<|end|>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<unk>", "<|end|>"])
    out = with_tokenizer(tmp_path, made)
    assert export(out, tmp_path / "dest", "gguf").notices == []
    facts = read_gguf(tmp_path / "dest" / "model-Q8_0.gguf").facts
    assert facts["tokenizer.ggml.model"] == "llama"
    assert facts["tokenizer.ggml.add_space_prefix"] is True
    score = dict(zip(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"], strict=True))
    assert score["▁a"] > score["ab"] > score["▁ab"] > score["b"]
    types = gguf.TokenType
    assert facts["tokenizer.ggml.token_type"][:4] == [types.UNKNOWN, types.CONTROL, types.BYTE, types.NORMAL]
    # Where a token is made in one way only, though another pair would give it too, SentencePiece would take both.
    state = json.loads((out / "tokenizer.json").read_text())
    del state["model"]["merges"][-1]
    (out / "tokenizer.json").write_text(json.dumps(state))
    assert "merges are not those" in export(out, tmp_path / "other", "gguf").notices[0]
    assert read_gguf(tmp_path / "other" / "model-Q8_0.gguf").facts["tokenizer.ggml.model"] == "none"


def test_layers_can_stay_in_16_bit_and_what_the_disk_gives_back_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = with_tokenizer(tmp_path, bytes_tokenizer("gpt-2"))
    dest = tmp_path / "dest"
    written = writing._written
    monkeypatch.setattr(writing, "_written", lambda file, output: written(file, output)[:-1] + b"?")
    with pytest.raises(OutputError, match="not what was written to it"):
        export(out, dest, "gguf")
    assert not any(dest.iterdir())
    monkeypatch.undo()
    (dest / "model-Q8_0.gguf.new.partial").write_bytes(b"what a kill left")
    done = CliRunner().invoke(main, ["export", str(out), str(dest), "--to", "gguf"])
    assert done.exit_code == 0, done.output
    assert "7 layers in int8, 0 layers restored to 16 bit" in done.output
    assert sorted(path.name for path in dest.iterdir()) == ["README.md", "model-Q8_0.gguf"]
    refused = CliRunner().invoke(main, ["export", str(out), str(dest), "--to", "gguf"])
    assert (refused.exit_code, "not an empty directory" in refused.output) == (1, True)


def test_without_gguf_py_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = with_tokenizer(tmp_path, bytes_tokenizer("gpt-2"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(START + le(0, 1) + NAMED)
    for command in (["export", out, tmp_path / "d", "--to", "gguf"], ["convert", tmp_path / "x.gguf", tmp_path / "d"]):
        done = CliRunner().invoke(main, [str(part) for part in command])
        assert done.exit_code == 1
        assert "pip install 'llmint8[gguf]'" in done.output
    assert not (tmp_path / "d").exists()


def test_what_a_form_has_cost_is_measured_or_why_not_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = with_tokenizer(tmp_path, bytes_tokenizer("gpt-2"))
    (tmp_path / "text.txt").write_text(TEXT * 9)
    asked = ["--text", str(tmp_path / "text.txt"), "--tokens", "64", "--window", "32"]
    done = CliRunner().invoke(main, ["export", str(out), str(tmp_path / "dest"), "--to", "gguf", *asked])
    assert done.exit_code == 0, done.output
    said = re.search(r"To the int8 checkpoint, on 62 positions: KL ([\d.e-]+) .* same top token ([\d.]+)%", done.output)
    assert said is not None
    assert 0 < float(said[1]) < 0.01 < 80 < float(said[2])
    monkeypatch.setattr(exported_form, "find_spec", lambda name: None)
    done = CliRunner().invoke(
        main, ["export", str(out), str(tmp_path / "other"), "--to", "compressed-tensors", "--quiet", *asked]
    )
    assert (
        done.output == "The loss is not measured: compressed-tensors is not installed, which runs it in transformers.\n"
    )
    refused = CliRunner().invoke(main, ["export", str(out), str(tmp_path / "x"), "--to", "float16", *asked[:3], "9999"])
    assert (refused.exit_code, (tmp_path / "x").exists()) == (1, False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            transformers.OPTConfig(
                vocab_size=96, hidden_size=64, ffn_dim=80, num_hidden_layers=1, num_attention_heads=4
            ),
            "type 'opt' is not",
        ),
        (transformers.LlamaConfig(**SIZES, hidden_act="gelu"), "its activation is 'gelu' and not 'silu'"),
        (transformers.Qwen2Config(**SIZES, rope_parameters=LLAMA_3), "positions are scaled as 'llama3'"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_not_written(
    config: transformers.PreTrainedConfig, words: str, tmp_path: Path
) -> None:
    converter.convert(make(tmp_path / "source", config), tmp_path / "out", outliers="none")
    with pytest.raises(LLMInt8Error, match=words):
        export(tmp_path / "out", tmp_path / "dest", "gguf")
    assert not (tmp_path / "dest").exists()


def facts(**changes: Any) -> Callable[[Path], None]:
    """Write a file of a Llama with other facts."""

    def write(path: Path) -> None:
        values = {"general.architecture": "llama", "llama.block_count": 1, **changes}
        writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
        for name, value in values.items():
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

    return write


def raw(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def le(*numbers: int, size: int = 8) -> bytes:
    return b"".join(number.to_bytes(size, "little") for number in numbers)


START = b"GGUF" + le(3, size=4)
NAMED = le(20) + b"general.architecture" + le(8, size=4) + le(5) + b"llama"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no GGUF": (raw(b"GGML" + bytes(60)), "does not begin as a GGUF file does"),
    "another version": (raw(b"GGUF" + le(1, size=4) + bytes(60)), "is version 1"),
    "big-endian": (raw(b"GGUF" + bytes([0, 0, 0, 3]) + bytes(60)), "little-endian"),
    "more facts than bytes": (raw(START + le(0, 2**60)), "names 1152921504606846976 facts"),
    "more tensors than bytes": (raw(START + le(2**50, 1) + NAMED), "names 1125899906842624 tensors"),
    "a long string": (raw(START + le(0, 1, 2**62) + bytes(20)), "names 4611686018427387904 bytes"),
    "a long list": (
        raw(START + le(0, 1, 1) + b"x" + le(9, 0, size=4) + le(2**40) + bytes(30)),
        "names 1099511627776 numbers",
    ),
    "a list of lists": (raw(START + le(0, 1, 1) + b"x" + le(9, 9, size=4) + le(1) + bytes(30)), "list of type 9"),
    "no architecture": (raw(START + le(0, 0)), "names no general.architecture"),
    "a tensor beyond the end": (
        raw(START + le(1, 1) + NAMED + le(1) + b"w" + le(1, size=4) + le(32) + le(0, size=4) + le(0) + bytes(20)),
        "w ends at",
    ),
    "an unknown type": (
        raw(START + le(1, 1) + NAMED + le(1) + b"w" + le(1, size=4) + le(32) + le(99, size=4) + le(0) + bytes(200)),
        "w is of type 99",
    ),
    "an unknown architecture": (facts(**{"general.architecture": "rwkv7"}), "its architecture is 'rwkv7'; read are"),
    "one of several files": (facts(**{"split.count": 4}), "llama-gguf-split --merge"),
    "experts": (facts(**{"llama.expert_count": 8}), "a mixture of experts"),
    "an alignment of 3": (facts(**{"general.alignment": 3}), "general.alignment is 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_of_a_known_model_is_refused(name: str, tmp_path: Path) -> None:
    write, words = REFUSED[name]
    write(tmp_path / "x.gguf")
    with pytest.raises((CorruptFileError, SourceError, LLMInt8Error), match=words):
        open_gguf(tmp_path / "x.gguf")


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "x.gguf", "starcoder2", "Q8_0")
    data = (tmp_path / "x.gguf").read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(tmp_path / "x.gguf").tensors.values())
    for size in range(0, end, end // 23):
        (tmp_path / "x.gguf").write_bytes(data[:size])
        with pytest.raises(CorruptFileError):
            read_gguf(tmp_path / "x.gguf")


def test_a_directory_is_read_where_it_has_one_file_and_no_other_weights(tmp_path: Path) -> None:
    foreign(tmp_path / "a.gguf", "starcoder2", "Q8_0")
    (tmp_path / "LICENSE").write_text("Apache")
    source = open_local(tmp_path)
    assert (source.beside / "LICENSE").read_text() == "Apache"
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(SourceError, match=r"2 GGUF files, a\.gguf, b\.gguf; name the one to read"):
        open_local(tmp_path)
    assert open_local(tmp_path / "b.gguf").path.name == "b.gguf"
