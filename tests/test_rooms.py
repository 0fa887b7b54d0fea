"""The tree is the architecture: which room may import which, no circles, and a checkout on sys.path breaks nobody."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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


def arrows() -> dict[str, set[str]]:
    """Every module of the four rooms, as `room/folder/module`, and the modules it imports at any depth."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix(): path for room in MAY_IMPORT for path in modules(room)}
    found: dict[str, set[str]] = {}
    for here, path in files.items():
        found[here] = set()
        for _, name in imported_names(path):
            parts = name.split(".")[1:] if name.startswith("llmint8.") else []
            # `from llmint8.formats import Source` is an arrow to the package, `from ..disk import names` to a module.
            there = ["/".join(parts), "/".join(parts[:-1]), "/".join([*parts[:-1], "__init__"])]
            found[here].update([module for module in there if module in files][:1])
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a graph that lead back to the first of them; none where there are no circles."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def folder_of(module: str) -> str:
    """The inner room of a module; one that lies in a room itself stands for itself."""
    return module if module.count("/") == 1 else module.rpartition("/")[0]


def test_modules_import_each_other_in_no_circle() -> None:
    graph = arrows()
    # A graph without arrows has no circles either.
    assert "formats/disk/reading" in graph["formats/containers/tensors"]
    assert "converter/commands/push" in graph["converter/commands/convert"]
    assert "formats/__init__" in graph["runtime/model/load"]
    assert not circle(graph)


def test_inner_rooms_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for here, there in arrows().items():
        folder = folder_of(here)
        graph.setdefault(folder, set()).update(folder_of(module) for module in there if folder_of(module) != folder)
    assert "formats/int8" in graph["formats/writing"]
    assert not circle(graph)


def test_contributing_lists_every_inner_room_below_those_it_imports() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = [path.rstrip("/").removesuffix(".py") for path in re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE)]
    place = {path: number for number, path in enumerate(listed) if path.partition("/")[0] in MAY_IMPORT}
    for here, there in arrows().items():
        folder = "/".join(folder_of(here).split("/")[:2])  # what is in containers/pytorch/ belongs to containers/
        if here.endswith("/__init__") and here.count("/") == 1:
            continue  # the room's public names
        assert folder in place, folder
        for other in {"/".join(folder_of(module).split("/")[:2]) for module in there} - {folder}:
            if other.partition("/")[0] == folder.partition("/")[0]:
                assert place[other] < place[folder], f"{folder} imports {other}"


def test_a_room_holds_a_dozen_modules_at_most_and_no_two_of_one_prefix() -> None:
    for folder in {path.parent for room in MAY_IMPORT for path in modules(room)}:
        names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(names) <= 12, folder
        # A prefix that several files share is a folder that is missing.
        prefixes = Counter(name.partition("_")[0] for name in names)
        assert max(prefixes.values(), default=0) <= 1, f"{folder}: {prefixes.most_common(1)}"


def test_a_module_of_more_than_250_lines_says_why() -> None:
    for path in [path for room in MAY_IMPORT for path in modules(room)]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 250:
            assert "250 lines" in str(ast.get_docstring(ast.parse(text))), path


def test_every_folder_of_a_room_is_a_package_that_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for room in MAY_IMPORT for path in modules(room)}
    assert set(setuptools["packages"]) == {f"llmint8.{folder.replace('/', '.')}" for folder in folders}
    # Of the folders in a room setuptools finds the place by itself.
    assert setuptools["package-dir"] == {f"llmint8.{room}": room for room in MAY_IMPORT}


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
