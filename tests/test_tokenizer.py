"""The tokenizer beside a checkpoint: it is loaded, or one learns why not."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from click.testing import CliRunner

from llmint8.converter.calibration.tokenizer import load_tokenizer
from llmint8.converter.commands.convert import convert_command
from llmint8.runtime.commands.main import main

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "bert": transformers.BertConfig,
    "t5": transformers.T5Config,
    "gpt2": transformers.GPT2Config,
}


@pytest.fixture(params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A config and a tokenizer of 16 words."""
    CONFIGS[request.param](vocab_size=16).save_pretrained(tmp_path)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0")
    backend = tokenizers.Tokenizer(words)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(tmp_path)
    return tmp_path


def remove(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()


def only_sentencepiece(directory: Path) -> None:
    remove(directory)
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def test_one_that_is_there_is_loaded(directory: Path) -> None:
    tokenizer, why = load_tokenizer(directory)
    assert why == ""
    assert tokenizer is not None
    assert tokenizer.get_vocab()["w7"] == 7


def test_none_is_none_also_where_transformers_makes_one_up(directory: Path) -> None:
    remove(directory)
    assert load_tokenizer(directory) == (None, "no tokenizer beside the source")
    (directory / "tokenizer_config.json").write_text("{}")  # without a vocabulary it is of no use
    assert load_tokenizer(directory, place="the checkpoint") == (None, "no tokenizer beside the checkpoint")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (write("tokenizer.json", '{"version": '), "tokenizer.json is not valid JSON: Expecting value: line 1"),
        (write("tokenizer_config.json", "\ufeff{"), "tokenizer_config.json is not valid JSON"),
        (write("tokenizer.json", "[]"), "TypeError: "),
        pytest.param(
            only_sentencepiece,
            "it needs the package sentencepiece: pip install sentencepiece",
            marks=pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="is installed"),
        ),
    ],
)
def test_one_that_cannot_be_loaded_says_why(
    change: Callable[[Path], None], reason: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(directory)
    tokenizer, why = load_tokenizer(directory)
    assert tokenizer is None
    assert why.startswith(f"the tokenizer beside the source cannot be loaded ({reason}")
    assert "\n" not in why
    assert capsys.readouterr().err == ""  # transformers tells at length what it tries


def test_code_of_its_own_needs_the_flag(tmp_path: Path) -> None:
    transformers.LlamaConfig(vocab_size=16).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}')
    tokenizer, why = load_tokenizer(tmp_path)
    assert (tokenizer, "--trust-remote-code runs it" in why) == (None, True)


def test_the_commands_say_why(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes)).half().save_pretrained(source)
    (source / "tokenizer.json").write_text("no JSON")
    (tmp_path / "text.txt").write_text("some text")
    why = "cannot be loaded (tokenizer.json is not valid JSON"
    done = CliRunner().invoke(convert_command, [str(source), str(out)])
    assert done.exit_code == 0
    assert f"Note: the tokenizer beside the source {why}" in done.stderr
    assert "calibrated with random token ids" in done.stderr
    for arguments in (
        ["generate", str(out), "--prompt", "x"],
        ["eval", str(out), "--reference", str(source), "--text", str(tmp_path / "text.txt")],
    ):
        failed = CliRunner().invoke(main, arguments)
        assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
        assert why in failed.stderr
