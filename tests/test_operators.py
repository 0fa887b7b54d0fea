"""One table for everything that computes a layer: every implementation, kind of weight, shape and dtype, and bad input.

What is right is computed in exact arithmetic; the bound, in `conftest.py`, is that of the roundings.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmint8.kernels import linear, operators
from llmint8.kernels.cpu import native
from llmint8.kernels.cpu import product as products
from llmint8.kernels.cpu.linear import CpuWeight
from llmint8.kernels.operands import Operands
from llmint8.kernels.operators import GpuWeight, NativeWeight, OperatorWeight
from llmint8.kernels.prepared import PreparedWeight, ReferenceWeight
from llmint8.kernels.reference import (
    Activation,
    Group,
    Int8Weight,
    Rotation,
    dequantize_weight,
    groups,
    quantize_weight,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
LAYERS = [  # M, N, K, k
    (1, 1, 1, 1),
    (1, 5, 1, 0),
    (1, 63, 255, 0),
    (1, 192, 576, 13),
    (2, 40, 1008, 100),
    (2, 130, 100, 70),
    (2, 1, 33, 33),
    (3, 40, 700, 512),
    (5, 33, 64, 5),
    (16, 64, 128, 32),
    (17, 63, 4095, 16),
    (33, 100, 96, 17),
    (70, 31, 640, 0),
    (0, 8, 4, 1),
    (3, 0, 64, 2),
    (3, 7, 0, 0),
]
SEARCHED = [  # M, N, K, and how many columns hold an outlier
    (1, 1, 1, 1),
    (1, 63, 255, 0),
    (2, 130, 100, 33),
    (3, 40, 700, 350),
    (5, 33, 64, 64),
    (16, 64, 128, 17),
    (27, 63, 4097, 16),
    (70, 100, 96, 3),
    (0, 7, 64, 0),
    (3, 0, 64, 2),
    (3, 7, 0, 0),
]
GROUPED = [  # M, N, K, k
    (1, 5, 64, 1),
    (1, 192, 576, 13),
    (2, 130, 130, 0),
    (3, 40, 704, 30),
    (5, 33, 1025, 5),
    (17, 63, 4095, 16),
    (27, 40, 2500, 17),
    (67, 70, 257, 0),
    (0, 8, 300, 1),
    (3, 0, 300, 2),
]
ROTATED = [  # M, N, K, k
    (1, 192, 576, 13),
    (2, 130, 130, 0),
    (3, 16, 40, 2),
    (5, 33, 1025, 5),
    (27, 100, 384, 17),
    (67, 70, 257, 0),
    (0, 8, 300, 1),
]
ROTATED_KINDS = [
    [(None, "F16", "zeropoint"), (64, "BF16", "absmax"), (128, "F32", "zeropoint")],
    [(128, "BF16", "zeropoint"), (256, "F16", "absmax"), (None, "F32", "absmax")],
]
THRESHOLD = 6.0
NATIVE = ["AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2", "Arm dotprod"]
BACKENDS = [
    "reference",
    "cpu packed",
    "cpu int_mm",
    "cpu reference",
    "operator",
    "triton",
    *NATIVE,
    "compiled operator",
]
activations = pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
# Layers take turns at two halves. Of dtype, activation and with a bias or without, any two are together in one of them.
KINDS = [
    [("F16", "absmax", True), ("BF16", "zeropoint", False), ("F32", "absmax", False)],
    [("F16", "zeropoint", False), ("BF16", "absmax", True), ("F32", "zeropoint", True)],
]
GROUP_KINDS = [
    [(64, "BF16", "absmax"), (128, "F32", "zeropoint"), (256, "BF16", "zeropoint")],
    [(64, "F32", "zeropoint"), (128, "BF16", "absmax"), (256, "F32", "absmax")],
]
Prepare = Callable[[Int8Weight], PreparedWeight]


def name(layer: tuple[int, int, int, int]) -> str:
    return "M{}-N{}-K{}-k{}".format(*layer)


def in_turns(layers: list[Any], kinds: list[Any]) -> list[Any]:
    """Each layer with one half of the kinds, and the next one with the other."""
    return [
        pytest.param(layer, *kind, id="-".join([name(layer), *map(str, kind)]))
        for number, layer in enumerate(layers)
        for kind in kinds[number % 2]
    ]


def random_weight(
    n: int,
    k: int,
    outliers: int,
    dtype: torch.dtype,
    threshold: float | None = None,
    group: Group | None = None,
    rotation: Rotation | None = None,
) -> Int8Weight:
    random = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=random).to(dtype)
    dims = torch.randperm(k, generator=random)[:outliers].sort().values.int()
    bias = torch.randn(n, generator=random).to(dtype)
    stored = dims, weight[:, dims.long()], bias
    return Int8Weight(*quantize_weight(weight, rotation), *stored, threshold, group, rotation)


def random_rows(m: int, weight: Int8Weight) -> Tensor:
    x = torch.randn(m, weight.values.shape[1], generator=torch.Generator().manual_seed(m)) + 0.5
    x[:, weight.outlier_dims.long()] *= 20
    return x.to(weight.outlier_weight.dtype)


def planted_rows(m: int, k: int, outliers: int, dtype: torch.dtype) -> Tensor:
    """Rows below the threshold but for one element in each of some columns, in any row, of any sign."""
    random = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=random).clamp(-5, 5)
    if m:
        dims = torch.randperm(k, generator=random)[:outliers]
        signs = torch.where(torch.rand(len(dims), generator=random) < 0.5, -1, 1)
        x[torch.randint(m, (len(dims),), generator=random), dims] = signs * 40.0
    return x.to(dtype)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ThroughTheOperator(OperatorWeight):
    """Calls the operator where the others call what runs them."""

    def linear(self, x: Tensor, activation: Activation) -> Tensor:
        weight, scale, row_sum, dims, columns, bias, threshold, group, rotation = self.operands
        zeropoint = activation == "zeropoint"
        if threshold is None:
            return operators.int8_linear(x, weight, scale, row_sum, dims, columns, bias, group, rotation, zeropoint)
        return operators.dynamic_int8_linear(x, weight, scale, row_sum, bias, threshold, group, zeropoint)


class GpuThroughTheOperator(ThroughTheOperator, GpuWeight):
    """On a GPU, or where Triton's interpreter stands for one."""


class NativeThroughTheOperator(ThroughTheOperator, NativeWeight):
    """With the layer that is compiled."""


@pytest.fixture(params=BACKENDS)
def prepare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares a weight for one implementation."""
    wanted: str = request.param
    if wanted == "reference":
        return ReferenceWeight.prepare
    if wanted in ("triton", "operator"):
        if not importlib.util.find_spec("triton"):
            pytest.skip("Triton is not installed")
        device = request.getfixturevalue("device")
        kind = GpuWeight if wanted == "triton" else GpuThroughTheOperator
        return lambda weight: kind.prepare(moved(weight, device))
    if wanted == "compiled operator":
        if not native.kinds():
            pytest.skip(native.why_not())
        return NativeThroughTheOperator.prepare
    if wanted in NATIVE:
        if wanted not in native.kinds():
            pytest.skip(f"no {wanted} here")
        monkeypatch.setattr(native, "kinds", lambda: [wanted])
        monkeypatch.setattr(native, "_TILE_ROWS", 1)
        return NativeWeight.prepare
    product = wanted.removeprefix("cpu ")
    if product != "reference" and not products._is_exact(product):  # type: ignore[arg-type]
        pytest.skip(f"this machine has no exact {product}")
    monkeypatch.setattr(products, "_is_exact", lambda name: name == product)
    unpacked = "int_mm" if product == "int_mm" else "reference"
    for module in (products, __import__("llmint8.kernels.cpu.linear", fromlist=["linear"])):
        monkeypatch.setattr(module, "unpacked_product", lambda: unpacked)
    monkeypatch.setattr(products, "_PACK_ELEMENTS", 1)

    def prepared(weight: Int8Weight) -> PreparedWeight:
        made = CpuWeight.prepare(weight)
        grouped = groups(weight.values.shape[1], weight.group)[0] > 1  # multiplied in float32
        packed = product == "packed" and weight.threshold is None and not grouped and weight.values.numel() > 0
        assert made.product == ("packed" if packed else unpacked)
        return made

    return prepared


def moved(weight: Int8Weight, device: torch.device) -> Int8Weight:
    parts = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return Int8Weight(**{key: part.to(device) if isinstance(part, Tensor) else part for key, part in parts.items()})


def run(prepared: PreparedWeight, x: Tensor, activation: Activation) -> Tensor:
    return linear.int8_linear(x.to(prepared.device), prepared, activation).cpu()


@pytest.mark.parametrize(("layer", "dtype", "activation", "bias"), in_turns(LAYERS, KINDS))
def test_layers(
    layer: tuple[int, int, int, int],
    dtype: str,
    activation: Activation,
    bias: bool,
    prepare: Prepare,
    assert_right: Any,
) -> None:
    m, n, k, outliers = layer
    weight = random_weight(n, k, outliers, DTYPES[dtype])
    if not bias:
        weight = dataclasses.replace(weight, bias=None)
    x = random_rows(m, weight)
    before = x.clone()
    prepared = prepare(weight)
    assert (prepared.in_features, prepared.out_features) == (k, n)
    assert torch.equal(prepared.unpack().cpu(), weight.values)
    assert_right(x, weight, activation, run(prepared, x, activation))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("layer", "dtype", "activation", "bias"), in_turns(SEARCHED, KINDS))
def test_layers_whose_outliers_are_searched(
    layer: tuple[int, int, int, int],
    dtype: str,
    activation: Activation,
    bias: bool,
    prepare: Prepare,
    assert_right: Any,
) -> None:
    m, n, k, outliers = layer
    x, weight = planted_rows(m, k, outliers, DTYPES[dtype]), random_weight(n, k, 0, DTYPES[dtype], THRESHOLD)
    if not bias:
        weight = dataclasses.replace(weight, bias=None)
    prepared = prepare(weight)
    assert_right(x, weight, activation, run(prepared, x, activation))


@pytest.mark.parametrize(("layer", "group", "dtype", "activation"), in_turns(GROUPED, GROUP_KINDS))
def test_layers_whose_inputs_are_quantized_in_groups(
    layer: tuple[int, int, int, int],
    group: Group,
    dtype: str,
    activation: Activation,
    prepare: Prepare,
    assert_right: Any,
) -> None:
    m, n, k, outliers = layer
    weight = random_weight(n, k, outliers, DTYPES[dtype], group=group)
    # Groups of magnitudes that differ: to mix up their scales is to be far off.
    x = random_rows(m, weight) * 4.0 ** (torch.arange(k) // 64 % 3).to(DTYPES[dtype])
    prepared = prepare(weight)
    assert_right(x, weight, activation, run(prepared, x, activation))
    assert torch.equal(prepared.unpack().cpu(), weight.values)
    searched = dataclasses.replace(weight, threshold=THRESHOLD)
    x = planted_rows(m, k, outliers, DTYPES[dtype])
    assert_right(x, searched, activation, run(prepare(searched), x, activation))


@pytest.mark.parametrize(("layer", "group", "dtype", "activation"), in_turns(ROTATED, ROTATED_KINDS))
def test_rotated_layers(
    layer: tuple[int, int, int, int],
    group: Group | None,
    dtype: str,
    activation: Activation,
    prepare: Prepare,
    assert_right: Any,
) -> None:
    m, n, k, outliers = layer
    weight = random_weight(n, k, outliers, DTYPES[dtype], group=group, rotation=64)
    # Of magnitudes that differ: what is rotated with others than its neighbours is far off.
    x = random_rows(m, weight) * 4.0 ** (torch.arange(k) // 64 % 3).to(DTYPES[dtype])
    prepared = prepare(weight)
    found = run(prepared, x, activation)
    assert_right(x, weight, activation, found)
    exact = x.double() @ dequantize_weight(weight.values, weight.absmax, 64).double().t()
    if not outliers and m:
        assert (found.double() - exact - weight.bias.double()).norm() < 0.02 * exact.norm()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="threshold is given for a rotated weight"):
        linear.prepare(dataclasses.replace(weight, threshold=THRESHOLD))


@activations
def test_a_group_as_long_as_the_row_is_none(activation: Activation, prepare: Prepare) -> None:
    weight = random_weight(40, 128, 5, torch.float32)
    x = random_rows(6, weight)
    expected = run(prepare(weight), x, activation)
    for group in (128, 256):
        assert torch.equal(run(prepare(dataclasses.replace(weight, group=group)), x, activation), expected)


@activations
@pytest.mark.parametrize("m", [1, 3, 20, 70])
def test_in_groups_the_integers_are_exact(m: int, activation: Activation, prepare: Prepare) -> None:
    """Scales are powers of two, and so few bits are needed that no float32 sum is rounded."""
    k, group = 700, 128
    random = torch.Generator().manual_seed(m)
    values = torch.randint(-127, 128, (70, k), dtype=torch.int8, generator=random)
    dims, absmax = torch.empty(0, dtype=torch.int32), torch.full((70,), 127.0)
    weight = Int8Weight(values, absmax, dims, torch.empty(70, 0), group=group)
    x = torch.randint(-126, 127, (m, k), generator=random).float()
    x[:, ::group], x[:, 1::group] = -127, 127
    x *= 2.0 ** (torch.arange(k) // group % 3)
    prepared = prepare(weight)
    exact = x.double() @ values.double().t()
    assert torch.equal(run(prepared, x, activation).double(), exact)


@activations
@pytest.mark.parametrize("threshold", [None, THRESHOLD], ids=["stored", "searched"])
def test_rows_and_weights_of_any_strides(threshold: float | None, activation: Activation, prepare: Prepare) -> None:
    weight = random_weight(40, 70, 5, torch.float16, threshold)
    x = random_rows(6, weight)
    expected = run(prepare(weight), x, activation)
    wide, columns = torch.full((40, 200), 127, dtype=torch.int8), torch.full((40, 9), 7, dtype=torch.float16)
    wide[:, 3:73], columns[:, 2:7] = weight.values, weight.outlier_weight
    parts = {"values": wide[:, 3:73], "outlier_weight": columns[:, 2:7]}
    turned = {"values": weight.values.t().contiguous().t(), "outlier_weight": columns.t().contiguous().t()[:, 2:7]}
    for change in (parts, turned):
        assert torch.equal(run(prepare(dataclasses.replace(weight, **change)), x, activation), expected)
    spread = torch.full((12, 210), 99.0, dtype=torch.float16)
    spread[1::2, ::3] = x
    prepared = prepare(weight)
    for view in (x.t().contiguous().t(), spread[1::2, ::3]):
        assert torch.equal(run(prepared, view, activation), expected)
    one = x[3:4].expand(6, 70)
    assert torch.equal(run(prepared, one, activation), run(prepared, one.contiguous(), activation))


def test_a_layer_is_called_with_rows_of_every_kind(prepare: Prepare, assert_right: Any) -> None:
    """One prepared weight: what it keeps for one kind of call must not serve another."""
    weight = random_weight(48, 64, 3, torch.float16)
    prepared = prepare(weight)
    buffer = torch.zeros(40 * 64 + 1, dtype=torch.float16)
    calls: list[tuple[int, Activation]] = [(1, "absmax"), (17, "zeropoint"), (0, "absmax"), (2, "zeropoint")]
    calls += [(0, "zeropoint"), (5, "zeropoint"), (18, "absmax"), (1, "zeropoint"), (2, "absmax")]
    for m, activation in calls:
        for dtype in DTYPES.values():
            x = random_rows(m, weight).to(dtype)
            assert_right(x, weight, activation, run(prepared, x, activation))
        x = random_rows(m, weight)
        misaligned = buffer[1 : 1 + m * 64].view(m, 64).copy_(x)
        apart = torch.empty_strided((m, 64), (67, 1), dtype=torch.float16).copy_(x)
        expected = run(prepared, x, activation)
        for view in (misaligned, apart, x.t().contiguous().t()):
            assert torch.equal(run(prepared, view, activation), expected)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (0, 70), (2, 0, 70)], ids=str)
def test_leading_dimensions_are_kept(shape: tuple[int, ...], prepare: Prepare) -> None:
    prepared = prepare(random_weight(40, 70, 5, torch.float16))
    x = torch.randn(shape, dtype=torch.float16)
    got = run(prepared, x, "absmax")
    assert tuple(got.shape) == (*shape[:-1], 40)
    assert torch.equal(got.reshape(-1, 40), run(prepared, x.reshape(-1, 70), "absmax"))


@pytest.mark.parametrize(("x_dtype", "columns"), [("F16", "F32"), ("BF16", "F16"), ("F32", "BF16")])
def test_columns_and_bias_of_another_dtype(x_dtype: str, columns: str, prepare: Prepare, assert_right: Any) -> None:
    weight = random_weight(33, 65, 20, DTYPES[columns])
    x = random_rows(3, weight).to(DTYPES[x_dtype])
    assert_right(x, weight, "absmax", run(prepare(weight), x, "absmax"))


@activations
def test_float64_is_computed_as_float32(activation: Activation, prepare: Prepare) -> None:
    weight = random_weight(33, 65, 3, torch.float32)
    x, prepared = random_rows(3, weight), prepare(weight)
    got = run(prepared, x.double(), activation)
    assert torch.equal(got, run(prepared, x, activation).double())


@activations
def test_rows_of_zeros_and_of_tiny_values(activation: Activation, prepare: Prepare, assert_right: Any) -> None:
    weight = random_weight(6, 48, 3, torch.float32)
    x = torch.tensor([0.0, 1e-44, -1e-38, 1e33])[:, None].expand(4, 48)
    assert_right(x, weight, activation, run(prepare(weight), x, activation))


# Where the interpreter multiplies infinity by 0, NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_touches_no_other(bad: float, prepare: Prepare) -> None:
    weight = random_weight(33, 80, 3, torch.float16)
    x, prepared = random_rows(3, weight), prepare(weight)
    free = next(k for k in range(80) if k not in weight.outlier_dims)
    for activation in ("absmax", "zeropoint"):
        clean = run(prepared, x, activation)
        broken = x.clone()
        broken[1, free] = bad
        found = run(prepared, broken, activation)
        assert not found[1].isfinite().any()
        assert torch.equal(found[::2], clean[::2])


def test_what_is_not_finite_in_an_outlier_dimension_touches_no_other_row(prepare: Prepare) -> None:
    weight = random_weight(33, 80, 3, torch.float16)
    x, prepared = random_rows(3, weight), prepare(weight)
    clean = run(prepared, x, "zeropoint")
    x[1, weight.outlier_dims[1]] = float("nan")
    found = run(prepared, x, "zeropoint")
    assert found[1].isnan().all()
    assert torch.equal(found[::2], clean[::2])


@activations
def test_autocast_casts_the_input_and_nothing_else(activation: Activation, prepare: Prepare) -> None:
    """It would round the integers of exact sums to bfloat16."""
    weight = random_weight(33, 2048, 3, torch.float32)
    x = random_rows(3, weight)
    expected = run(prepare(weight), x.bfloat16(), activation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(prepare(weight), x, activation), expected)


BAD_INPUTS = {
    "narrow": (torch.zeros(2, 63), r"x has shape \[2, 63\], expected \[\.\.\., 64\]"),
    "wide": (torch.zeros(2, 65), r"x has shape \[2, 65\], expected \[\.\.\., 64\]"),
    "turned": (torch.zeros(64, 2), r"x has shape \[64, 2\]"),
    "no dimension": (torch.zeros(()), r"x has shape \[\]"),
    "int8": (torch.zeros(2, 64, dtype=torch.int8), r"x is torch\.int8, expected one of torch\.float16"),
    "int64": (torch.zeros(2, 64, dtype=torch.int64), r"x is torch\.int64"),
    "bool": (torch.zeros(2, 64, dtype=torch.bool), r"x is torch\.bool"),
    "complex": (torch.zeros(2, 64, dtype=torch.complex64), r"x is torch\.complex64"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused(case: str, prepare: Prepare) -> None:
    x, message = BAD_INPUTS[case]
    prepared = prepare(random_weight(48, 64, 3, torch.float16))
    with pytest.raises(ValueError, match=message):
        run(prepared, x, "absmax")


def test_input_on_another_device_is_refused(prepare: Prepare) -> None:
    prepared = prepare(random_weight(48, 64, 3, torch.float16))
    with pytest.raises(ValueError, match="x is on meta, the weight on"):
        linear.int8_linear(torch.zeros(2, 64, device="meta"), prepared)


BAD_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "dim beyond": ({"outlier_dims": torch.tensor([1, 2, 64])}, r"outlier_dims is \[1, 2, 64\], expected strictly"),
    "dim far beyond": ({"outlier_dims": torch.tensor([1, 2, 10_000_000])}, "numbers from 0 to 63"),
    "dim below": ({"outlier_dims": torch.tensor([-1, 2, 3])}, "numbers from 0 to 63"),
    "dim twice": ({"outlier_dims": torch.tensor([2, 2, 3])}, "strictly increasing"),
    "dims falling": ({"outlier_dims": torch.tensor([2, 1, 3])}, "strictly increasing"),
    "dims whose difference overflows": (
        {"outlier_dims": torch.tensor([2_000_000_000, -2_000_000_000, 5], dtype=torch.int32)},
        "numbers from 0 to 63",
    ),
    "dims in 32 bits": ({"outlier_dims": torch.tensor([1, 2, 2**31 - 1], dtype=torch.int32)}, "numbers from 0 to 63"),
    "dims of floats": ({"outlier_dims": torch.tensor([1.0, 2.0, 3.0])}, r"outlier_dims is torch\.float32"),
    "a dim too many": ({"outlier_dims": torch.tensor([1, 2, 3, 4])}, r"outlier_weight has shape \[48, 3\]"),
    "columns turned": ({"outlier_weight": torch.zeros(3, 48)}, r"outlier_weight has shape \[3, 48\]"),
    "columns of integers": ({"outlier_weight": torch.zeros(48, 3).int()}, r"outlier_weight is torch\.int32"),
    "absmax short": ({"absmax": torch.zeros(47)}, r"absmax has shape \[47\], expected \[48\]"),
    "absmax in 16 bits": ({"absmax": torch.zeros(48).half()}, r"absmax is torch\.float16"),
    "bias long": ({"bias": torch.zeros(49)}, r"bias has shape \[49\], expected \[48\]"),
    "values of floats": ({"values": torch.zeros(48, 64)}, r"values is torch\.float32, expected torch\.int8"),
    "values flat": ({"values": torch.zeros(48, dtype=torch.int8)}, r"values has shape \[48\]"),
    "too long for 32 bits": ({"values": torch.zeros(48, 133_145, dtype=torch.int8)}, "133145 columns, at most 133144"),
    "another group": ({"group": 100}, r"group is 100, expected one of \(64, 128, 256\), or None"),
    "absmax elsewhere": ({"absmax": torch.zeros(48, device="meta")}, "absmax is on meta, expected cpu"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_bad_weight_is_refused(case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        linear.prepare(dataclasses.replace(random_weight(48, 64, 3, torch.float16), **change))


BAD_OPERANDS: dict[str, tuple[dict[str, Any], str]] = {
    "x narrow": ({"x": torch.zeros(2, 63)}, r"x has shape \[2, 63\], expected \[any, 64\]"),
    "x of three dimensions": ({"x": torch.zeros(1, 2, 64)}, r"x has shape \[1, 2, 64\]"),
    "x of integers": ({"x": torch.zeros(2, 64, dtype=torch.int8)}, r"x is torch\.int8"),
    "weight turned": ({"weight": torch.zeros(64, 48, dtype=torch.int8)}, r"x has shape"),
    "weight strided": ({"weight": torch.zeros(64, 48, dtype=torch.int8).t()}, r"weight has strides \[1, 48\]"),
    "scale short": ({"scale": torch.zeros(47)}, r"scale has shape \[47\]"),
    "row sums of floats": ({"row_sum": torch.zeros(48, 1)}, r"row_sum is torch\.float32, expected torch\.int32"),
    "row sums without groups": ({"row_sum": torch.zeros(48).int()}, r"row_sum has shape \[48\], expected \[48, 1\]"),
    "row sums of one group": (
        {"weight": torch.zeros(48, 65).char(), "x": torch.zeros(2, 65), "group": 64},
        r"row_sum is torch\.int32, expected torch\.int16",
    ),
    "scale strided": ({"scale": torch.zeros(96)[::2]}, r"scale has strides \[2\]"),
    "row sums strided": ({"row_sum": torch.zeros(48, 2).int()[:, :1]}, r"row_sum has strides \[2, 1\]"),
    "bias strided": ({"bias": torch.zeros(96)[::2]}, r"bias has strides \[2\]"),
    "dims strided": ({"outlier_dims": torch.zeros(6).int()[::2]}, r"outlier_dims has strides \[2\]"),
    "columns strided": ({"outlier_weight": torch.zeros(48, 32)[:, ::2]}, r"columns has strides \[32, 2\]"),
    "another group": ({"group": 100}, r"group is 100, expected one of \(64, 128, 256\)"),
    "bias long": ({"bias": torch.zeros(49)}, r"bias has shape \[49\]"),
    "dims in 64 bits": ({"outlier_dims": torch.zeros(3).long()}, r"outlier_dims is torch\.int64"),
    "columns without padding": ({"outlier_weight": torch.zeros(48, 3)}, r"has shape \[48, 3\], expected \[48, 16\]"),
    "more dims than columns": ({"outlier_dims": torch.zeros(17).int()}, r"expected \[48, 32\]"),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_a_bad_call_of_the_operators_is_refused(case: str, fake: bool) -> None:
    """By the implementation, and by what stands for it while a graph is made, in the same words."""
    change, message = BAD_OPERANDS[case]
    weight, scale, row_sum, dims, columns, bias, *_ = Operands.prepare(random_weight(48, 64, 3, torch.float32))
    arguments: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": weight, "scale": scale, "row_sum": row_sum}
    arguments |= {"outlier_dims": dims, "outlier_weight": columns, "bias": bias, "group": None} | change
    calls = [lambda given: operators.int8_linear(**given, rotation=None, zeropoint=True)]
    if not change.keys() & {"outlier_dims", "outlier_weight"}:
        stored = ("outlier_dims", "outlier_weight")
        calls.append(
            lambda given: operators.dynamic_int8_linear(
                **{key: value for key, value in given.items() if key not in stored}, threshold=6.0, zeropoint=True
            )
        )
    with FakeTensorMode() if fake else torch.no_grad() as mode:
        if fake:
            arguments = {
                key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in arguments.items()
            }
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(arguments)
