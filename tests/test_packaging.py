"""What `pip install .` gives: a wheel and an sdist, built offline, and what is in them."""

import configparser
import importlib.machinery
import itertools
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ROOMS = ("formats", "kernels", "converter", "runtime")
BUILD = "from setuptools import build_meta; build_meta.build_wheel({0!r}); build_meta.build_sdist({0!r})"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: setuptools leaves `build/` in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    copy_tree(tree)
    run([sys.executable, "-c", BUILD.format(str(out))], cwd=tree)
    return out


def copy_tree(tree: Path) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel laid out as pip lays it out."""
    target = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(next(built.glob("*.whl")), target, "zip")
    return target


def test_the_wheel_holds_every_file_of_the_four_rooms_and_no_other(site: Path) -> None:
    inside = {path.relative_to(site / "llmint8") for path in (site / "llmint8").rglob("*") if path.is_file()}
    expected = {
        path.relative_to(ROOT)
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    compiled = {Path("kernels/cpu/_layer" + importlib.machinery.EXTENSION_SUFFIXES[0])}
    assert inside - compiled == expected
    if shutil.which("cc") and sys.platform == "linux":
        assert inside & compiled
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"llmint8"}


def test_without_a_compiler_the_wheel_lacks_the_compiled_layer_and_nothing_else(built: Path, tmp_path: Path) -> None:
    copy_tree(tmp_path / "tree")
    environment = os.environ | {"CC": "/nowhere/cc"}
    run([sys.executable, "-c", BUILD.format(str(tmp_path))], cwd=tmp_path / "tree", env=environment)
    names = {
        folder: {name for name in zipfile.ZipFile(next(folder.glob("*.whl"))).namelist() if not name.endswith(".so")}
        for folder in (built, tmp_path)
    }
    assert names[built] == names[tmp_path]
    assert not [name for name in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() if name.endswith(".so")]


def test_the_wheel_carries_its_licence_and_type_markers(site: Path) -> None:
    assert next(site.glob("*.dist-info/licenses/LICENSE")).read_text() == (ROOT / "LICENSE").read_text()
    assert all((site / "llmint8" / room / "py.typed").exists() for room in ROOMS)


def test_the_commands_and_rooms_of_the_wheel_import(site: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read(next(site.glob("*.dist-info/entry_points.txt")))
    commands = entry_points["console_scripts"]
    assert set(commands) == {"llmint8", "llmint8-convert"}
    code = "from llmint8 import converter, formats, runtime\nfrom llmint8.kernels import linear\n"
    code += f"assert all({str(site)!r} in m.__file__ for m in (converter, formats, runtime, linear))\n"
    for target in commands.values():
        module, _, name = target.partition(":")
        code += f"from {module} import {name}; assert callable({name})\n"
    run([sys.executable, "-c", code], cwd=site.parent, env=os.environ | {"PYTHONPATH": str(site)})


def test_the_sdist_holds_the_spec_and_every_file_of_the_wheel(built: Path, site: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path)
    tree = next(tmp_path.iterdir())
    files = [path for path in (site / "llmint8").rglob("*.*") if path.suffix != ".so"]
    sources = {path: tree / path.relative_to(site / "llmint8") for path in files}
    papers = {ROOT / name: tree / name for name in ("spec.md", "README.md", "CHANGELOG.md", "LICENSE")}
    for original, packed in (sources | papers).items():
        assert packed.read_bytes() == original.read_bytes()


def test_every_direct_dependency_is_pinned_to_a_version_that_its_range_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert lines[0].startswith("torch==")
    for text in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
