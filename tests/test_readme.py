"""Documents cannot drift: the README's commands and Python run, tables name what programs have, paths are there."""

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from llmint8 import runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.planning.options import Options
from llmint8.runtime.commands.main import main
from llmint8.runtime.model.on_the_fly import OPTIONS as OPTIONS_IN_MEMORY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
PROGRAMS = {"llmint8": main, "llmint8-convert": convert_command}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def reference() -> dict[str, dict[str, list[str]]]:
    """The sections of docs/cli.md: heading -> first word of each table row -> the row's cells."""
    sections = re.split(r"^## `(.+)`$", OPTIONS, flags=re.MULTILINE)
    found = {}
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*", text, re.MULTILINE)]
        found[heading] = {re.split(r"[` ]", row[0])[1]: row for row in rows}
    return found


def commands() -> dict[str, click.Command]:
    """Command line up to the options, as docs/cli.md heads its sections -> the command."""
    named = {f"llmint8 {name}": command for name, command in main.commands.items() if command is not convert_command}
    named["llmint8-convert"] = convert_command
    return {
        " ".join([name, *(p.human_readable_name for p in command.params if isinstance(p, click.Argument))]): command
        for name, command in named.items()
    }


def test_every_command_has_a_section_and_every_section_a_command() -> None:
    headings = {heading for heading in reference() if heading.startswith("llmint8")}
    assert headings == set(commands())
    assert main.commands["convert"] is convert_command


@pytest.mark.parametrize("heading", commands())
def test_the_table_names_every_option_with_its_default_and_choices(heading: str) -> None:
    options = {option.opts[0]: option for option in commands()[heading].params if isinstance(option, click.Option)}
    rows = reference()[heading]
    assert rows.keys() == options.keys()
    for name, option in options.items():
        _, default, meaning = rows[name]
        plain = option.default if isinstance(option.default, str | int | float) and not option.is_flag else None
        expected = "required" if option.required else "" if plain is None else f"`{plain}`"
        assert default == expected, name
        choices = option.type.choices if isinstance(option.type, click.Choice) else ()
        assert all(f"`{choice}`" in meaning for choice in choices), name


@pytest.mark.parametrize("name", ["load", "configure", "quantize", "dequantize"])
def test_the_table_names_every_argument_of_a_function(name: str) -> None:
    parameters = dict(inspect.signature(getattr(runtime, name)).parameters)
    first = next(iter(parameters))
    rows = reference()[f"runtime.{name}({first})"]
    del parameters[first]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    if defaults.pop("options", None) is not None:  # those of a conversion
        defaults |= {option: getattr(Options(), option) for option in OPTIONS_IN_MEMORY}
    assert {name: row[1] for name, row in rows.items()} == {name: f"`{value!r}`" for name, value in defaults.items()}


def test_every_public_name_is_explained() -> None:
    explained = {re.match(r"runtime\.(\w+)", heading) for heading in reference()}
    left = set(runtime.__all__) - {match[1] for match in explained if match} - {"OutlierMisses"}  # what misses are
    assert left == set()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_make_targets_that_are_named_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make (\w+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_is_there(document: str) -> None:
    text, folder = (ROOT / document).read_text(encoding="utf-8"), (ROOT / document).parent
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (folder / link).exists(), link
    for path in re.findall(r"`((?:formats|kernels|converter|runtime|tests|benchmarks|soak|docs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def after_the_commands(tmp_path_factory: pytest.TempPathFactory, model_of_words: Callable[[Path, int], None]) -> Path:
    """A folder in which the README's shell commands ran, on a tiny model in place of `path/to/model`."""
    folder = tmp_path_factory.mktemp("readme")
    model_of_words(folder / "path" / "to" / "model", 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in "".join(blocks("sh")).splitlines():
            program, *arguments = shlex.split(line)
            result = CliRunner().invoke(PROGRAMS[program], arguments)
            assert result.exit_code == 0, (line, result.output)
            assert result.output.strip(), line
    return folder


def test_the_shell_commands_run(after_the_commands: Path) -> None:
    assert (after_the_commands / "model-int8" / "config.json").exists()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int, after_the_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks("python")[number]
    if "llmint8" not in code:
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(after_the_commands)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], LlamaForCausalLM)
    assert next(names["model"].get_submodule("model.layers.0.mlp.up_proj").parameters()).dtype == torch.int8
