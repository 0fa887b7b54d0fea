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
    "before_the_work",
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
        "x, w, bias = torch.randn(5, 300), torch.randn(7, 300), torch.randn(7)\n"
        "def test_products():\n"
        "    assert torch.equal((x @ w.t())[:1], x[:1] @ w.t())\n"
        "def test_layers():\n"
        "    linear = torch.nn.functional.linear\n"
        "    assert torch.equal(linear(x, w, bias)[:1], linear(x[:1], w, bias))\n"
        "def test_a_product_in_the_sum():\n"
        "    assert torch.equal(torch.addmm(bias, x[:, :1], w[:, :1].t()), bias + x[:, :1] * w[:, 0])\n"
        "def test_integers_stay_exact():\n"
        "    assert torch.equal((x.round() @ w.round().t())[:1], x[:1].round() @ w.round().t())\n"
    )
    assert "3 failed, 1 passed" in run("-o", "addopts=", str(tmp_path)).stdout
