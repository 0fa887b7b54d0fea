"""A plan launches the kernels that Triton itself would choose for the call, and Triton is asked once for each kind.

Without a GPU: another process compiles for one, and launches into a driver that only looks at what it gets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.soak

CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import host_overhead, torch, triton
from llmint8.kernels.operators import GpuWeight
from llmint8.kernels.reference import Int8Weight
from triton.runtime.jit import JITFunction

asked, launched, wrong = [], [], []

def launcher(source, metadata):
    names = source.fn.arg_names

    def launch(*arguments):
        launched.append(source.fn.fn.__name__)
        if len(arguments) != 9 + len(names):
            wrong.append([source.fn.fn.__name__, len(arguments)])
        for position, value in enumerate(arguments[9:]):
            name, tensor = names[position], isinstance(value, torch.Tensor)
            kind, constant = source.signature[name], source.constants.get((position,), launch)
            divides = any(name == "tt.divisibility" for name, _ in source.attrs.get((position,), ()))
            divided = (value.data_ptr() if tensor else value) if divides else 0
            short = {torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.int16: "i16",
                     torch.int32: "i32"}
            right = constant == value if kind == "constexpr" else kind == "*" + short[value.dtype] if tensor else (
                isinstance(value, float) if kind == "fp32" else kind == "i32" and -(2**31) <= value < 2**31
            )
            if not right or divided % 16:
                wrong.append([source.fn.fn.__name__, name, kind, str(constant), str(value)])

    return launch

driver = host_overhead.StubDriver()
driver.launcher_cls = launcher
triton.runtime.driver.set_active(driver)
run = JITFunction.run
JITFunction.run = lambda self, *a, **k: (asked.append(self.fn.__name__), run(self, *a, **k))[1]

def layer(threshold, group):
    k = 64 if group is None else 192
    values, dims = torch.ones(48, k, dtype=torch.int8), torch.tensor([3, 9], dtype=torch.int32)
    return GpuWeight.prepare(Int8Weight(values, torch.ones(48), dims, torch.ones(48, 2).half(), None, threshold, group))

def calls(m, k, dtype):
    room = torch.empty(m * k + 1, dtype=dtype)
    yield torch.empty(m, k, dtype=dtype)
    yield room[1:].view(m, k)
    yield torch.empty_strided((m, k), (k + 3, 1), dtype=dtype)
    yield torch.empty_strided((m, k), (k + 16, 1), dtype=dtype)
    yield torch.empty_strided((m, k), (1, m), dtype=dtype)

found = {}
half, whole = torch.float16, torch.float32
stored, grouped = [(1, half), (2, whole), (17, half)], [(1, whole), (5, half), (17, whole)]
for threshold, group, kinds in ((None, None, stored), (6.0, None, [(2, whole)]), (None, 64, grouped)):
    weight = layer(threshold, group)
    for repeat in range(2):
        before = len(asked), len(launched)
        for m, dtype in kinds:
            for x in calls(m, weight.in_features, dtype):
                weight.linear(x, "zeropoint")
        found[f"{threshold} {group} {repeat}"] = [len(asked) - before[0], len(launched) - before[1]]
    for m in (3, 4) if threshold is group is None else ():  # one plan for both
        weight.linear(torch.empty(m, 64, dtype=torch.float16), "zeropoint")
print(json.dumps({"wrong": wrong, "found": found, "kernels": sorted(set(launched))}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CODE, str(benchmarks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_is_of_the_kernel_for_its_arguments(report: Any) -> None:
    """Of their dtypes, of pointers and strides that are multiples of 16 where the kernel counts on it, and of ones."""
    assert report["wrong"] == []
    assert set(report["kernels"]) == {
        "flag_kernel",
        "int8_decode_kernel",
        "int8_matmul_kernel",
        "list_kernel",
        "quantize_rows_kernel",
    }


def test_triton_is_asked_once_for_each_kind_of_call(report: Any) -> None:
    for kind in ("None None", "6.0 None", "None 64"):
        asked, launched = report["found"][f"{kind} 0"]
        assert 0 < asked <= launched
        assert report["found"][f"{kind} 1"] == [0, launched]
