"""What a command has loaded when it ends: help, mistakes and headers are answered without the large libraries."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers

from llmint8 import converter, runtime
from llmint8.runtime.commands.main import main

LARGE = ("torch", "transformers", "huggingface_hub", "matplotlib", "triton", "bitsandbytes", "torchao")
COMMANDS = """
import json, sys
from {module} import {name}
for arguments in json.loads(sys.argv[1]):
    try:
        {name}(arguments)
    except SystemExit as end:
        print("ended:", end.code, *[library for library in {large} if library in sys.modules])
"""
PROGRAMS = {
    "llmint8": ("llmint8.runtime.commands.main", "main"),
    "llmint8-convert": ("llmint8.converter.commands.convert", "convert_command"),
}


def run(*commands: Sequence[object], program: str = "llmint8", **environment: str) -> list[tuple[int, set[str]]]:
    """Run commands in one process of their own: each one's exit code, and the large libraries imported by its end."""
    module, name = PROGRAMS[program]
    script = COMMANDS.format(module=module, name=name, large=LARGE)
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    ends = [line.split() for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert len(ends) == len(commands), done.stderr
    return [(int(code), set(libraries)) for _, code, *libraries in ends]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("imports") / "source"
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    converter.convert(source, source.parent / "out", outliers="none")
    return source.parent / "out"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_version_load_nothing(program: str) -> None:
    assert run(["--help"], ["--version"], program=program) == [(0, set())] * 2


def test_the_help_of_every_command_loads_nothing() -> None:
    assert run(*([name, "--help"] for name in main.commands)) == [(0, set())] * len(main.commands)


def test_a_mistake_in_the_command_line_loads_nothing() -> None:
    mistakes = [
        (2, ["unheard-of"]),
        (2, ["inspect"]),
        (2, ["convert", "a", "b", "--dtype", "float8"]),
        (2, ["verify", "/nowhere"]),
        (2, ["generate", "out"]),
        (1, ["convert", "a", "b", "--private"]),
        (1, ["verify", ".", "--quick", "--source", "."]),
    ]
    assert run(*(arguments for _, arguments in mistakes)) == [(code, set()) for code, _ in mistakes]


def test_headers_are_read_without_transformers_and_without_the_hub(checkpoint: Path) -> None:
    commands = ["inspect", checkpoint], ["verify", checkpoint, "--quick"], ["inspect", checkpoint.parent / "source"]
    assert run(*commands) == [(0, {"torch"}), (0, {"torch"}), (1, {"torch"})]


def test_libraries_that_no_command_needs_are_not_imported(source: Path, tmp_path: Path) -> None:
    """transformers imports torchao with its first model, where it is installed, and that prints warnings."""
    optional = {"torchao", "bitsandbytes"}
    for name in optional:
        for folder in (tmp_path / name, tmp_path / f"{name}-99.0.dist-info"):
            folder.mkdir()
        (tmp_path / name / "__init__.py").write_text(f"print('{name} is here')\n__version__ = '99.0'\n")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ((code, found),) = run(["convert", source, tmp_path / "out"], PYTHONPATH=path)
    assert code == 0
    assert found >= {"torch", "transformers", "huggingface_hub"}  # so what is looked for in these tests can be found
    assert not found & optional
    # A script of the user's, which is free to use torchao, gets it as always.
    command = [sys.executable, "-c", "from transformers import PreTrainedModel"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert "torchao is here" in done.stdout


def test_an_error_is_one_line_where_torch_itself_is_broken(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such library')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run(["inspect", checkpoint], PYTHONPATH=path) == [(1, set())]


def test_every_public_name_is_where_the_package_says() -> None:
    """Type checkers read one list of the public names, and Python the other."""
    for package in (converter, runtime):
        tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
        block = next(node for node in tree.body if isinstance(node, ast.If))
        seen = {
            alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert seen == package._HOMES
        assert set(dir(package)) > set(package.__all__)
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
        with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
            _ = package.unheard_of
