"""The pages of docs/ that are for a task: each of their commands runs, in the order of the index, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmint8.converter.commands.convert import convert_command
from llmint8.runtime import load
from llmint8.runtime.commands.main import main

DOCS = Path(__file__).parent.parent / "docs"
INDEX = (DOCS / "README.md").read_text(encoding="utf-8")
PAGES = re.findall(r"\]\(([\w-]+\.md)\)", INDEX)
PROGRAMS = {"llmint8": main, "llmint8-convert": convert_command}


def commands(page: str) -> list[str]:
    found = re.findall(r"^```sh\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "".join(found).splitlines()


def make_model(path: Path) -> None:
    torch.manual_seed(0)
    words = ["<unk>", "</s>", "The", "capital", "of", "France", "is", "Paris"]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).half().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    make_model(folder / "path" / "to" / "model")
    (folder / "text.txt").write_text("The capital of France is Paris \n" * 20)
    return folder


def test_every_page_is_in_the_index() -> None:
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(PAGES)


def test_the_commands_of_all_pages_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(folder)
    ran = 0
    for page in PAGES:
        for line in commands(page):
            program, *arguments = shlex.split(line)
            if "model-int8" in arguments and not Path("model-int8").exists():  # the README has made it
                CliRunner().invoke(convert_command, ["path/to/model", "model-int8"])
            result = CliRunner().invoke(PROGRAMS[program], arguments)
            assert result.exit_code == 0, (page, line, result.output)
            assert result.output.strip(), line
            ran += 1
    assert ran >= 12
    assert load("model-from-gguf")(torch.tensor([[2, 3, 4]])).logits.shape == (1, 3, 8)
