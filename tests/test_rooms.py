"""The tree is the architecture: which room may import which, and a checkout on sys.path breaks nobody."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "formats": set(),
    "kernels": set(),
    "converter": {"formats", "kernels"},
    "runtime": {"formats", "kernels", "converter"},
}
# The rooms that know no model, so not the libraries that do either.
KNOW_NO_MODEL = {"formats", "kernels"}
MODEL_LIBRARIES = {"accelerate", "bitsandbytes", "huggingface_hub", "transformers"}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a module in the tree, at any depth, as (line, dotted name); relative ones resolved."""
    package = ["llmint8", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = []
    for path in modules(room):
        for line, name in imported_names(path):
            library, _, rest = name.partition(".")
            outside = library == "llmint8" and rest.partition(".")[0] not in allowed
            # The folders are no packages of their own: `import formats` would work only inside a checkout.
            bare = library in MAY_IMPORT
            knows_models = room in KNOW_NO_MODEL and library in MODEL_LIBRARIES
            if outside or bare or knows_models:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_every_folder_of_a_room_is_a_package_that_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for room in MAY_IMPORT for path in modules(room)}
    assert setuptools["package-dir"] == {f"llmint8.{folder.replace('/', '.')}": folder for folder in folders}
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])


def test_the_typing_links_name_every_room() -> None:
    links = {path.name: os.readlink(path) for path in (ROOT / ".typing" / "llmint8").iterdir()}
    assert links == {room: f"../../{room}" for room in MAY_IMPORT}


def test_kernels_stays_a_namespace() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_checkout_shadows_no_kernels_package(tmp_path: Path) -> None:
    """transformers imports PyPI's `kernels` when there is one; the checkout must not stand before it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'PyPI'\n")
    run_at_the_root("import kernels; assert kernels.WHOSE == 'PyPI'", PYTHONPATH=str(tmp_path))


def test_transformers_works_from_the_checkout() -> None:
    run_at_the_root("import torch, transformers; transformers.LlamaForCausalLM")


def run_at_the_root(code: str, **environment: str) -> None:
    """Run `code` in a fresh interpreter whose sys.path begins with the repository root."""
    command = [sys.executable, "-c", f"import sys; assert sys.path[0] == '', sys.path; {code}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
