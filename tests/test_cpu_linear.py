"""What is the CPU's own: its products and their layout, its row quantization, blocks, and what it does to a module.

`test_operators.py` has the layers of every shape.
"""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.cpu import linear as cpu
from llmint8.kernels.cpu import native
from llmint8.kernels.cpu import product as products
from llmint8.kernels.reference import Activation, Int8Weight
from llmint8.runtime import Int8Linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [  # M, K, N, k
    (1, 576, 192, 13),
    (1, 1, 5, 0),
    (17, 95, 63, 16),
    (33, 4095, 63, 1),
    (2, 33, 1, 33),
    (0, 8, 4, 1),
    (700, 640, 31, 0),
]
shapes = pytest.mark.parametrize(("m", "k_in", "n", "k"), SHAPES, ids=lambda size: str(size))
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
activations = pytest.mark.parametrize("activation", ["absmax", "zeropoint"])


@pytest.fixture(params=["packed", "int_mm", "reference"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let one product run wherever it can, on a machine without the compiled layer."""
    wanted: Literal["packed", "int_mm", "reference"] = request.param
    if wanted != "reference" and not products._is_exact(wanted):
        pytest.skip(f"this machine has no exact {wanted}")
    monkeypatch.setattr(products, "_is_exact", lambda name: name == wanted)
    for module in (products, cpu):
        monkeypatch.setattr(module, "unpacked_product", lambda: "int_mm" if wanted == "int_mm" else "reference")
    monkeypatch.setattr(products, "_PACK_ELEMENTS", 1)
    monkeypatch.setattr(native, "kinds", list)
    return wanted


def int8s(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def random_layer(m: int, k_in: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Int8Weight]:
    torch.manual_seed(m + k_in + n)
    dims = torch.randperm(k_in)[:k].sort().values.to(torch.int32)
    x = torch.randn(m, k_in) + 0.3
    x[:, dims.long()] *= 40
    columns, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    return x.to(dtype), Int8Weight(int8s(n, k_in), torch.rand(n), dims, columns, bias)


def laid_out(product: str, weight: Tensor) -> Tensor:
    assert products.packable(weight) == (product == "packed")
    return products.pack(weight) if product == "packed" else weight


def multiplied(product: str, x: Tensor, weight: Tensor) -> Tensor:
    return products.multiply(x, laid_out(product, weight), len(weight), product)  # type: ignore[arg-type]


def assert_close(got: Tensor, expected: Tensor) -> None:
    """A few units in the last place of float32, the order of its sums, and one of the dtype, the last rounding."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    room = torch.finfo(expected.dtype).eps + 2.0**-20
    size = float(expected.abs().max()) if expected.numel() else 0.0
    assert torch.allclose(got.double(), expected.double(), rtol=room, atol=2.0**-20 * size)


@shapes
def test_the_product_is_that_of_the_integers(product: str, m: int, k_in: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = int8s(m, k_in), int8s(n, k_in)
    got = multiplied(product, x, weight)
    assert torch.equal(got.to(torch.float32), reference.int8_product(x, weight).float())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_rounded_once(product: str, sign: int) -> None:
    # 127 * 127 * 4097 lies beyond 2**24 and beyond what 16 bits hold; float32 has it rounded to a multiple of 4.
    x, weight = torch.full((3, 4097), 127, dtype=torch.int8), torch.full((5, 4097), sign * 127, dtype=torch.int8)
    got = multiplied(product, x, weight)
    assert torch.equal(got.float(), torch.full((3, 5), float(sign * 127 * 127 * 4097)))


@shapes
@dtypes
@activations
@pytest.mark.parametrize("block", [1, 700, 1 << 18])
def test_rows_are_quantized_to_the_bit(
    m: int, k_in: int, n: int, k: int, dtype: torch.dtype, activation: Activation, block: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu, "_QUANTIZE_ELEMENTS", block)
    x, weight = random_layer(m, k_in, n, k, dtype)
    dims = weight.outlier_dims.long()
    if m:
        x[0] = 0
    before = x.clone()
    got, expected = cpu.quantize_in_blocks(x, dims, activation), reference.quantize_rows(x, dims, activation)
    assert torch.equal(x, before)
    assert torch.equal(got.values, expected.values)
    normal = expected.scale[:, 0] > 0
    assert torch.equal(got.scale[normal], expected.scale[normal])
    assert (got.scale[~normal] < 2.0**-125).all()
    if expected.zero_point is not None:
        assert torch.equal(got.zero_point, expected.zero_point)  # type: ignore[index]


@activations
def test_rotated_rows_are_quantized_to_the_bit(activation: Activation) -> None:
    """Rotated, 1 is 1 / 8 in all places of its block, so no row has a zero in it, outliers or not."""
    x, dims = torch.randn(4, 64), torch.tensor([5])
    x[:2] = 0
    x[0, 0], x[1, 0] = 1, -1
    got = cpu.quantize_rows(x, dims, activation, 64)
    expected = reference.quantize_rows(x, dims, activation, None, 64)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale, expected.scale)
    assert got.zero_point is None or torch.equal(got.zero_point, expected.zero_point)  # type: ignore[arg-type]


def test_blocks_of_output_are_joined(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random_layer(17, 95, 63, 4, torch.float32)
    prepared = cpu.CpuWeight.prepare(weight)
    whole, rows = prepared.linear(x, "zeropoint"), []
    monkeypatch.setattr(cpu, "_OUTPUT_ELEMENTS", 63 * 5)
    multiply = cpu.multiply
    monkeypatch.setattr(cpu, "multiply", lambda x, *of: (rows.append(len(x)), multiply(x, *of))[1])
    assert_close(prepared.linear(x, "zeropoint"), whole)
    assert rows == [5, 5, 5, 2]


def test_a_row_does_not_depend_on_the_others(product: str) -> None:
    x, weight = random_layer(17, 300, 63, 0, torch.float32)
    prepared = cpu.CpuWeight.prepare(weight)
    whole = prepared.linear(x, "zeropoint")
    assert torch.equal(prepared.linear(x[5:6], "zeropoint"), whole[5:6])


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (63, 4095), (192, 576)], ids=str)
def test_packing_is_undone_to_the_bit(shape: tuple[int, int]) -> None:
    if not products._is_exact("packed"):
        pytest.skip("this machine has no exact packed product")
    weight = int8s(*shape)
    unpacked = products.unpack(products.pack(weight))
    assert torch.equal(unpacked, weight)
    assert unpacked.is_contiguous()


def test_only_large_weights_are_packed() -> None:
    assert not products.packable(int8s(1024, 1024))
    assert not products.packable(torch.empty(4096, 4096, dtype=torch.int8, device="meta"))
    assert products.packable(torch.empty(4096, 4096, dtype=torch.int8)) == products._is_exact("packed")


@pytest.mark.skipif(sys.platform == "win32", reason="sets the instruction set of oneDNN on Linux and macOS")
def test_a_machine_without_8_bit_instructions_gets_exact_sums() -> None:
    """Without VNNI torch._int_mm saturates: it must not be chosen, and the result must be right."""
    code = """
import torch
from llmint8.kernels.cpu import product
x, weight = torch.full((3, 4096), 127, dtype=torch.int8), torch.full((5, 4096), 127, dtype=torch.int8)
assert product.int8_product(x, weight).eq(127 * 127 * 4096).all()
print(product.unpacked_product(), product.packable(torch.empty(4096, 4096, dtype=torch.int8)))
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert done.stdout.split() == ["reference", "False"]


def test_the_loop_of_scalars_of_processors_with_avx2_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `_int_mm` is exact, and many times slower than the reference."""
    monkeypatch.setattr(products, "_is_exact", lambda name: True)
    for capability, expected in (("AVX2", "reference"), ("AVX512", "int_mm"), ("DEFAULT", "int_mm")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert products.unpacked_product() == expected


@activations
@pytest.mark.parametrize("outliers", ["static", "none"])
def test_the_layer_compiles_in_one_graph(product: str, activation: Activation, outliers: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = make_layer(96, 40, 5)
    layer.configure(outliers=outliers, activation=activation)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for m in (1, 7):
        x = torch.randn(m, 96, dtype=torch.float16)
        assert_close(compiled(x), layer(x))


def make_layer(k_in: int, n: int, k: int) -> Int8Linear:
    linear = torch.nn.Linear(k_in, n).half().requires_grad_(False)
    return Int8Linear.from_linear(linear, torch.arange(k))


def test_a_layer_is_the_same_whatever_the_layout(product: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(96, 40, 5)
    assert layer._parameters["weight"].is_mkldnn == (product == "packed")
    assert layer.prepared.runs_on.startswith(f"{product} on the CPU (")  # type: ignore[union-attr]
    plain = make_layer(96, 40, 5).state_dict()["weight"]
    assert (plain.shape, plain.dtype, plain.is_mkldnn) == ((40, 96), torch.int8, False)
    assert torch.equal(layer.state_dict()["weight"], layer.unpacked_weight())
    assert layer.dequantize().shape == (40, 96)
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) == 40 * 96 + 2 * 40
    assert layer.float()._parameters["weight"].is_mkldnn == (product == "packed")
    assert layer.to("meta").weight.shape == (40, 96)


def test_loading_other_values_replaces_a_packed_weight(product: str) -> None:
    torch.manual_seed(0)
    layer, other = make_layer(96, 40, 5), make_layer(96, 40, 5)
    x = torch.randn(3, 96, dtype=torch.float16)
    layer.configure(activation="zeropoint")
    other.configure(activation="zeropoint")
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_search_has_the_weight_in_its_own_layout(product: str) -> None:
    """It takes columns of it in every call."""
    torch.manual_seed(0)
    layer = make_layer(96, 40, 5)
    x = torch.randn(3, 96, dtype=torch.float16) * 4
    expected = reference.int8_linear(x, replace(layer.stored(), threshold=6.0), "absmax")
    layer.configure(outliers="dynamic", threshold=6.0)
    assert not layer._parameters["weight"].is_mkldnn
    assert_close(layer(x), expected)
    layer.configure(outliers="static")
    assert layer._parameters["weight"].is_mkldnn == (product == "packed")
