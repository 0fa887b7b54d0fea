"""The tests of numbers once more, with float products that add in another order: another processor's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent
# Tests of what the plugin leaves alone (Triton's interpreter, compiled code) or is slow for (kills) are left out.
WITHOUT = "not killed and not signal and not compile and not alive"
FILES = [
    "reference",
    "cpu_linear",
    "layer",
    "load",
    "misses",
    "bitsandbytes",
    "head",
    "outliers",
    "evaluate",
    "families",
    "convert",
    "triton_operators",
    "spec",
    "gpu_generate",
    "report",
    "streaming",
    "resume",
    "hub",
    "low_disk",
    "remote_code",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SOAK), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_sums", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=SOAK.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", FILES)
def test_nothing_depends_on_the_order_in_which_floats_are_added(name: str) -> None:
    done = run("-k", WITHOUT, f"tests/test_{name}.py")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_test_that_compares_bits_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "test_bits.py").write_text(
        "import torch\n"
        "def test_bits():\n"
        "    x, w = torch.randn(5, 300), torch.randn(7, 300)\n"
        "    assert torch.equal((x @ w.t())[:1], x[:1] @ w.t())\n"
    )
    assert "1 failed" in run("-o", "addopts=", str(tmp_path)).stdout
