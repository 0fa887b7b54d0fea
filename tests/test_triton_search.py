"""Outliers searched on the GPU: exactly the reference's dimensions, and a layer within the rounding of binary32."""

import math

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.gpu import tiles
from llmint8.kernels.gpu.tiles import Tile, shipped_rows

gpu = pytest.importorskip("llmint8.kernels.gpu.linear")
quantize = pytest.importorskip("llmint8.kernels.gpu.quantize_rows")
outlier_search = pytest.importorskip("llmint8.kernels.gpu.outlier_search")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# The step between neighbouring numbers, relative. The interpreter truncates to bfloat16, so a whole one.
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}
ACTIVATIONS: tuple[reference.Activation, ...] = ("absmax", "zeropoint")
SHIPPED = dict.fromkeys((row.architecture, row.tile) for row in shipped_rows())
TILES = [(architecture, tile) for architecture, tile in SHIPPED if tile.block_m >= tiles.TENSOR_CORE_ROWS]
# M, K; a program flags 128 columns of 1, 16 or 64 rows, and lists 4096.
SEARCHED = [(1, 1), (1, 4097), (2, 127), (16, 129), (17, 128), (65, 300), (200, 64), (3, 12289)]
# M, N, K, and how many of the columns are outliers.
LAYERS = [
    (1, 1, 1, 1),
    (1, 63, 255, 0),
    (17, 63, 4097, 16),
    (5, 33, 64, 64),
    (16, 64, 128, 17),
    (70, 100, 96, 3),
    (3, 40, 700, 350),
    (2, 130, 100, 33),
]
THRESHOLD = 6.0


def planted(m: int, k: int, outliers: int, dtype: torch.dtype) -> Tensor:
    """Rows below the threshold but for one element in each of some columns, at any row, of any sign."""
    random = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=random).clamp(-5, 5)
    dims = torch.randperm(k, generator=random)[:outliers]
    rows = torch.randint(m, (outliers,), generator=random)
    x[rows, dims] = torch.where(torch.rand(outliers, generator=random) < 0.5, -1, 1) * 40.0
    return x.to(dtype)


def assert_found(x: Tensor, threshold: float, device: torch.device) -> Tensor:
    """The flags, the list and its length say what the reference on the CPU says, which is returned."""
    expected = reference.dynamic_outlier_dims(x.cpu(), threshold)
    found = outlier_search.search(x.to(device), threshold)
    total = int(found.total)
    assert found.dims[:total].tolist() == expected.tolist()
    assert found.flags.cpu().nonzero().flatten().tolist() == expected.tolist()
    assert bool((found.flags <= 1).all())
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SEARCHED, ids=[f"M{m}-K{k}" for m, k in SEARCHED])
def test_the_dimensions_are_those_of_the_reference(m: int, k: int, dtype: str, device: torch.device) -> None:
    for outliers in {0, 1, k // 3, k}:
        x = planted(m, k, outliers, DTYPES[dtype])
        assert len(assert_found(x, THRESHOLD, device)) == outliers


@pytest.mark.parametrize("where", [(0, 0), (63, 127), (64, 128), (199, 4095), (130, 4096), (199, 8199)])
def test_one_outlier_is_found_wherever_it_is(where: tuple[int, int], device: torch.device) -> None:
    x = torch.zeros(200, 8200, dtype=torch.float16)
    x[where] = -6.0
    assert assert_found(x, THRESHOLD, device).tolist() == [where[1]]


@pytest.mark.parametrize(
    "threshold", [6.0, 6.01, 5.998, 0.1, 6 + 2**-9, 1e-8, 1e-30, 65519.9, 65520.0, 1e300, 0.0, -1.0]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_rounded_to_the_dtype_as_torch_does(
    dtype: str, threshold: float, device: torch.device
) -> None:
    here = torch.tensor(threshold, dtype=DTYPES[dtype])
    up, down = (torch.nextafter(here, torch.tensor(end, dtype=here.dtype)) for end in (math.inf, 0.0))
    values = torch.stack([here, -here, up, -up, down, -down, torch.zeros_like(here)])
    assert_found(values[None], threshold, device)
    assert_found(values.expand(3, -1), threshold, device)


def test_infinity_is_an_outlier_and_nan_is_none(device: torch.device) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, -math.nan, 1.0]], dtype=torch.float16)
    assert assert_found(x, THRESHOLD, device).tolist() == [1, 2]
    assert assert_found(x, math.inf, device).tolist() == [1, 2]
    assert assert_found(x, math.nan, device).tolist() == []


@pytest.mark.parametrize(("m", "k"), [(0, 70), (3, 0), (0, 0)], ids=["M0", "K0", "M0-K0"])
def test_nothing_is_found_where_there_is_nothing(m: int, k: int, device: torch.device) -> None:
    assert assert_found(torch.empty(m, k), -1.0, device).tolist() == []


@pytest.mark.parametrize("layout", ["columns", "every second", "slice", "one row for all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_of_any_strides(activation: reference.Activation, layout: str, device: torch.device) -> None:
    wide = planted(140, 70, 9, torch.float16).to(device)
    x = {
        "columns": wide.t(),
        "every second": wide[1::2, ::2],
        "slice": wide[:66, 1:66],
        "one row for all": wide[3:4].expand(70, 70),
    }[layout]
    assert_found(x, THRESHOLD, device)
    weight, absmax = random_weight(33, x.shape[1])
    expected = run(x.contiguous(), weight, absmax, None, activation, device)
    assert torch.equal(run(x, weight, absmax, None, activation, device), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "outliers"), [(5, 33, 4), (17, 4095, 30), (2, 16385, 40), (3, 64, 64)])
def test_rows_are_quantized_as_the_reference_does(
    m: int, k: int, outliers: int, dtype: str, device: torch.device
) -> None:
    x = planted(m, k, outliers, DTYPES[dtype])
    dims = reference.dynamic_outlier_dims(x, THRESHOLD)
    for activation in ACTIVATIONS:
        expected = reference.quantize_rows(x, dims, activation)
        there = x.to(device)
        found = quantize.quantize_rows(there, outlier_search.search(there, THRESHOLD), activation == "zeropoint")
        assert found.outliers is None
        assert torch.equal(found.values.cpu(), expected.values)
        assert torch.equal(found.scale.cpu(), expected.scale)
        if expected.zero_point is not None:
            assert torch.equal(found.zero_point.cpu(), expected.zero_point)


def random_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)))


def run(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    activation: str,
    device: torch.device,
    tile: Tile | None = None,
) -> Tensor:
    """The layer, as the operator runs it."""
    x, weight, absmax, bias = (None if part is None else part.to(device) for part in (x, weight, absmax, bias))
    found = outlier_search.search(x, THRESHOLD)
    zeropoint = activation == "zeropoint"
    return gpu.int8_linear(x, weight, absmax, found, weight[:, :0], bias, None, zeropoint=zeropoint, tile=tile).cpu()


def assert_right(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    activation: reference.Activation,
    found: Tensor,
) -> None:
    """Compare with the reference; `rounding` is what two orders of the same float32 operations may differ by."""
    expected = reference.dynamic_int8_linear(x, weight, absmax, THRESHOLD, bias, activation).double()
    dims = reference.dynamic_outlier_dims(x, THRESHOLD)
    quantized = reference.quantize_rows(x, dims, activation)
    product = reference.int8_product(quantized.values, weight).double().abs()
    if quantized.zero_point is not None:
        product += 3 * (quantized.zero_point.double()[:, None] * weight.sum(1).double()).abs()
    parts = product * quantized.scale.double()[:, None] + x[:, dims].double().abs() @ weight[:, dims].double().abs().t()
    parts = parts * (absmax.double() / 127) + (0 if bias is None else bias.double().abs())
    # Each sum of k + 4 terms is wrong by k + 6 roundings at most; tensor cores may cut off where others round.
    rounding = 2 * (len(dims) + 6) * 2.0**-24 * parts
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    difference = (found.double() - expected).abs()
    assert bool((difference <= rounding + STEP[x.dtype] * expected.abs()).all()), difference.max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=["M{}-N{}-K{}-k{}".format(*layer) for layer in LAYERS])
def test_layers_are_those_of_the_reference(
    layer: tuple[int, int, int, int], dtype: str, activation: reference.Activation, device: torch.device
) -> None:
    m, n, k, outliers = layer
    x, (weight, absmax) = planted(m, k, outliers, DTYPES[dtype]), random_weight(n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(x.dtype)
    assert_right(x, weight, absmax, bias, activation, run(x, weight, absmax, bias, activation, device))


@pytest.mark.parametrize(
    ("architecture", "tile"), TILES, ids=[f"{name}-{'x'.join(str(int(part)) for part in tile)}" for name, tile in TILES]
)
def test_every_tile_that_ships_adds_what_was_found(architecture: str, tile: Tile, device: torch.device) -> None:
    if device.type == "cuda" and architecture not in ("any", tiles.architecture(device)):
        pytest.skip("a tile for another GPU")
    x, (weight, absmax) = planted(65, 272, 40, torch.float16), random_weight(70, 272)
    assert_right(x, weight, absmax, None, "zeropoint", run(x, weight, absmax, None, "zeropoint", device, tile))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 7, 64), (3, 0, 64), (3, 7, 0)], ids=["M0", "N0", "K0"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_shapes(m: int, n: int, k: int, activation: reference.Activation, device: torch.device) -> None:
    x, weight = torch.full((m, k), 9.0, dtype=torch.float16), torch.ones(n, k, dtype=torch.int8)
    absmax, bias = torch.ones(n), torch.ones(n).half()
    assert_right(x, weight, absmax, bias, activation, run(x, weight, absmax, bias, activation, device))


def test_a_weight_that_is_part_of_another(device: torch.device) -> None:
    x, (weight, absmax) = planted(6, 70, 5, torch.float16), random_weight(40, 70)
    expected = run(x, weight, absmax, None, "absmax", device)
    wide = torch.full((40, 200), 127, dtype=torch.int8)
    wide[:, 3:73] = weight
    for part in (wide[:, 3:73], weight.t().contiguous().t()):
        assert torch.equal(run(x, part, absmax, None, "absmax", device), expected)


def test_an_outlier_of_one_row_is_an_outlier_of_all(device: torch.device) -> None:
    """Row 0 alone has none: its result changes when another row makes two of its dimensions outliers."""
    x, (weight, absmax) = planted(2, 64, 0, torch.float16), random_weight(40, 64)
    x[1, 5], x[1, 60] = 50.0, -50.0
    together, alone = (run(rows, weight, absmax, None, "absmax", device) for rows in (x, x[:1]))
    assert_right(x, weight, absmax, None, "absmax", together)
    assert not torch.equal(together[:1], alone)


# Where the interpreter multiplies infinity by 0, NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_do_not_touch_the_others(bad: float, device: torch.device) -> None:
    x, (weight, absmax) = planted(3, 65, 3, torch.float16), random_weight(33, 65)
    free = next(k for k in range(65) if k not in reference.dynamic_outlier_dims(x, THRESHOLD))
    x[0, free] = 7.0  # an outlier in both cases, so that row 1 alone differs
    clean = run(x, weight, absmax, None, "zeropoint", device)
    x[1, free] = bad
    found = run(x, weight, absmax, None, "zeropoint", device)
    assert torch.equal(found[::2], clean[::2])
    expected = reference.dynamic_int8_linear(x, weight, absmax, THRESHOLD, None, "zeropoint")
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[1].isnan(), expected[1].isnan())
