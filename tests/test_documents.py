"""The pages of docs/ that are for a task: each of their commands runs, in the order of the index, on a tiny model."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_of_words: Callable[[Path, int], None]) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    model_of_words(folder / "path" / "to" / "model", 64)
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
