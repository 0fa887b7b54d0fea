"""The compiled functions of the CPU under the address and undefined-behaviour sanitizers of gcc: none reads too far.

It is compiled with them and put in the place of the library; the table of all layers and the tests of its integers run
on it. That they find what they are there for is tried first, with a weight that claims a row more than it has.
"""

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmint8.kernels.cpu import native

ROOT = Path(__file__).parent.parent
FLAGS = ["-O1", "-g", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fopenmp"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
PLUGIN = """
from llmint8.kernels.cpu import native
native.__file__ = {path!r}
assert native.kinds()
"""
TOO_MANY_ROWS = """
import torch, sanitized
from llmint8.kernels.cpu import native
from llmint8.kernels.operands import Operands
from llmint8.kernels.reference import Int8Weight
dims = torch.empty(0, dtype=torch.int32)
weight = Int8Weight(torch.ones(9, 64, dtype=torch.int8), torch.ones(9), dims, torch.empty(9, 0))
layer = native.NativeLinear(Operands.prepare(weight))
layer.layout.of(layer.operands).n = 10
layer.run(torch.ones(1, 64), True, native.kinds()[-1], 1)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which a plugin `sanitized` puts the instrumented library in its place."""
    gcc = shutil.which("gcc")
    if gcc is None or not native.kinds():
        pytest.skip("needs gcc and the compiled layer")
    folder = tmp_path_factory.mktemp("sanitized")
    library = folder / ("_layer" + importlib.machinery.EXTENSION_SUFFIXES[0])
    sources = [str(ROOT / "kernels" / "cpu" / "csrc" / name) for name in ("kbit.c", "layer.c", "weight.c")]
    subprocess.run([gcc, *FLAGS, *SANITIZERS, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
    (folder / "sanitized.py").write_text(PLUGIN.format(path=str(folder / "native.py")))
    # The sanitizer looks for what throws in libstdc++ when it is loaded, so that comes with it.
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run([gcc, name], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    return os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }


def test_an_access_beyond_a_tensor_is_found(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOO_MANY_ROWS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        ("tests/test_operators.py", "AMX or AVX or dotprod or compiled"),
        ("tests/test_native.py", "integers or threads or finite or quotients or longest"),
        ("tests/test_weights.py", "shape or nearest or range or strides or threads or sums"),
        ("tests/test_kbit_cpu.py", "agrees or dequantized or threads"),
    ],
)
def test_the_tests_of_the_layer_find_none(environment: dict[str, str], tests: str, chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "sanitized", tests, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
