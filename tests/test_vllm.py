"""The plugin for vLLM without vLLM: layers that are merged and divided, versions. `make test-vllm` starts servers."""

import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmint8.kernels.reference import Int8Weight
from llmint8.runtime import vllm as plugin
from llmint8.runtime.vllm.shards import How, Int8Rows, Matrix, joined, of_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

N, K = 6, 128
HOW = How()
GENERATOR = torch.Generator().manual_seed(0)


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def exact_input(dims: list[int]) -> Tensor:
    """Rows whose halves have a scale of 1 each, and outliers far from what int8 could hold."""
    x = integers(-126, 127, 3, K).float()
    kept = [next(k for k in range(start, K) if k not in dims) for start in (0, K // 2)]
    x[:, kept] = 127.0
    x[:, dims] = 1000.5
    return x


def product(x: Tensor, values: Tensor, dims: list[int], columns: Tensor) -> Tensor:
    """The layer in floating point, where absmax is 127: the weight is its int8 values, but for the outlier columns."""
    weight = values.double()
    weight[:, dims] = columns[:, : len(dims)].double()
    return (x.double() @ weight.t()).float()


@pytest.mark.parametrize("dims", [[[3, 70], [3, 70]], [[3, 70], [5]], [[3, 70], []]], ids=str)
def test_merged_matrices_keep_their_own_outlier_dims(dims: list[list[int]]) -> None:
    values, columns = integers(-127, 128, 2 * N, K).to(torch.int8), integers(-9, 10, 2 * N, 2) / 2
    matrices = [Matrix(N, torch.tensor(own, dtype=torch.int32), HOW) for own in dims]
    bias = integers(-9, 10, 2 * N).float()
    products = list(joined(values, torch.full((2 * N,), 127.0), columns, matrices))
    assert len(products) == (1 if dims[0] == dims[1] else 2)
    for own, rows in zip(dims, (slice(N), slice(N, 2 * N)), strict=True):
        x = exact_input(own)
        made = torch.cat([Int8Rows(weight, activation)(x, bias[where]) for where, weight, activation in products], 1)
        expected = product(x, values[rows], own, columns[rows]) + bias[rows]
        torch.testing.assert_close(made[:, rows], expected, rtol=0, atol=0)


def test_matrices_that_are_multiplied_otherwise_are_not_one_product() -> None:
    dims = torch.tensor([3], dtype=torch.int32)
    hows = [HOW, How(threshold=6.0), How(group=128), How(rotation=64), How("zeropoint")]
    values, columns = torch.ones(5 * N, K, dtype=torch.int8), torch.ones(5 * N, 1)
    found = list(joined(values, torch.ones(5 * N), columns, [Matrix(N, dims, how) for how in hows]))
    assert [rows for rows, _, _ in found] == [slice(n * N, (n + 1) * N) for n in range(5)]
    assert [How(activation, w.threshold, w.group, w.rotation) for _, w, activation in found] == hows


@pytest.mark.parametrize("dims", [[], [3], [70], [3, 63, 64, 127]], ids=str)
def test_ranks_that_have_some_of_the_inputs_add_up_to_the_layer(dims: list[int]) -> None:
    values, columns = integers(-127, 128, N, K).to(torch.int8), integers(-9, 10, N, len(dims)) / 2
    outlier_dims = torch.tensor(dims, dtype=torch.int32)
    x, total = exact_input(dims), torch.zeros(3, N)
    for start in (0, K // 2):
        own = slice(start, start + K // 2)
        whole = Int8Weight(values[:, own], torch.full((N,), 127.0), outlier_dims, columns)
        part = of_inputs(whole, start, K)
        total += Int8Rows(part, "absmax")(x[:, own], None)
    torch.testing.assert_close(total, product(x, values, dims, columns), rtol=0, atol=0)


def test_a_rotated_layer_is_divided_between_blocks_only() -> None:
    none = torch.empty(0, dtype=torch.int32), torch.empty(N, 0)
    weight = Int8Weight(torch.ones(N, 32, dtype=torch.int8), torch.ones(N), *none, rotation=64)
    with pytest.raises(ValueError, match="32 of 128 inputs are no whole blocks of 64"):
        of_inputs(weight, 32, K)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.31.2", "vLLM is 0.31.2, expected 0.32 or newer; update vLLM"),
        ("0.99.0", "vLLM 0.99.0 has other interfaces"),  # a vLLM in which nothing is where it was
    ],
)
def test_a_vllm_that_cannot_do_is_named_in_one_line(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
    monkeypatch.setattr(plugin, "_registered", False)
    with caplog.at_level(logging.INFO):
        plugin.register()
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_vllm_built_from_a_checkout_is_not_judged_by_its_version() -> None:
    assert [plugin.unfit_version(version) for version in ("dev", "0.32.0", "0.32.1rc1", "1.0")] == [None] * 4


def test_the_entry_point_is_there_and_loads_nothing() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["llmint8"].partition(":")
    code = f"import sys, {module} as plugin; plugin.{name}; assert not {{'torch', 'vllm'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
