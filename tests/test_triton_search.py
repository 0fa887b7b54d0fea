"""Outliers searched on the GPU: exactly the reference's dimensions. `test_operators.py` has the layers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.gpu import tiles
from llmint8.kernels.gpu.tiles import MatmulTile, shipped_table
from llmint8.kernels.operands import Operands

gpu = pytest.importorskip("llmint8.kernels.gpu.linear")
quantize = pytest.importorskip("llmint8.kernels.gpu.quantize_rows")
outlier_search = pytest.importorskip("llmint8.kernels.gpu.outlier_search")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ACTIVATIONS: tuple[reference.Activation, ...] = ("absmax", "zeropoint")
SHIPPED = dict.fromkeys((entry.architecture, entry.tile) for entry in shipped_table())
TILES = [(architecture, tile) for architecture, tile in SHIPPED if isinstance(tile, MatmulTile)]
# M, K; a program flags 128 columns of 1, 16 or 64 rows, and lists 4096.
SEARCHED = [(1, 1), (1, 4097), (2, 127), (16, 129), (17, 128), (65, 300), (200, 64), (3, 12289)]
THRESHOLD = 6.0


def planted(m: int, k: int, outliers: int, dtype: torch.dtype) -> Tensor:
    """Rows below the threshold but for one element in each of some columns, at any row, of any sign."""
    random = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=random).clamp(-5, 5)
    dims = torch.randperm(k, generator=random)[:outliers]
    rows = torch.randint(m, (outliers,), generator=random)
    x[rows, dims] = torch.where(torch.rand(outliers, generator=random) < 0.5, -1, 1) * 40.0
    return x.to(dtype)


def search(x: Tensor, threshold: float) -> Any:
    return outlier_search.OutlierSearch(threshold, x.dtype, len(x))(x, x.stride())


def assert_found(x: Tensor, threshold: float, device: torch.device) -> Tensor:
    """The flags, the list and its length say what the reference on the CPU says, which is returned."""
    expected = reference.dynamic_outlier_dims(x.cpu(), threshold)
    found = search(x.to(device), threshold)
    total = int(found.total)
    assert found.dims[:total].tolist() == expected.tolist()
    assert found.flags.cpu().nonzero().flatten().tolist() == expected.tolist()
    assert bool((found.flags <= 1).all())
    return expected


@pytest.mark.parametrize(
    ("m", "k", "dtype"), [(m, k, ("F16", "BF16", "F32")[number % 3]) for number, (m, k) in enumerate(SEARCHED)]
)
def test_the_dimensions_are_those_of_the_reference(m: int, k: int, dtype: str, device: torch.device) -> None:
    for outliers in {0, 1, k // 3, k}:
        x = planted(m, k, outliers, DTYPES[dtype])
        assert len(assert_found(x, THRESHOLD, device)) == outliers


@pytest.mark.parametrize("where", [(0, 0), (63, 127), (64, 128), (0, 4095), (64, 4096), (63, 8199)])
def test_one_outlier_is_found_wherever_it_is(where: tuple[int, int], device: torch.device) -> None:
    x = torch.zeros(65, 8200, dtype=torch.float16)
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
def test_rows_of_any_strides(layout: str, device: torch.device) -> None:
    wide = planted(140, 70, 9, torch.float16).to(device)
    x = {
        "columns": wide.t(),
        "every second": wide[1::2, ::2],
        "slice": wide[:66, 1:66],
        "one row for all": wide[3:4].expand(70, 70),
    }[layout]
    assert_found(x, THRESHOLD, device)


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
        no_dims = torch.empty(0, dtype=torch.int32, device=device)
        launch = quantize.QuantizeRows(k, no_dims, activation == "zeropoint")
        found = launch(there, there.stride(), search(there, THRESHOLD))
        assert found.outliers is None
        assert torch.equal(found.values.cpu(), expected.values)
        assert torch.equal(found.scale.cpu(), expected.scale[:, 0])
        if expected.zero_point is not None:
            assert torch.equal(found.zero_point.cpu(), expected.zero_point[:, 0])


def make_layer(n: int, k: int) -> reference.Int8Weight:
    full = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    nothing = torch.empty(0, dtype=torch.int32), torch.empty(n, 0)
    return reference.Int8Weight(*reference.quantize_weight(full), *nothing, threshold=THRESHOLD)


def run(layer: reference.Int8Weight, x: Tensor, device: torch.device, tile: MatmulTile | None = None) -> Tensor:
    parts = (layer.values, layer.absmax, layer.outlier_dims, layer.outlier_weight)
    there = reference.Int8Weight(*(part.to(device) for part in parts), threshold=THRESHOLD)
    found: Tensor = gpu.GpuLinear(Operands.prepare(there), tile)(x.to(device), True)
    return found.cpu()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("architecture", "tile"), TILES, ids=[f"{name}-{'x'.join(str(int(part)) for part in tile)}" for name, tile in TILES]
)
def test_every_tile_that_ships_adds_what_was_found(
    architecture: str, tile: MatmulTile, device: torch.device, assert_right: Any
) -> None:
    if device.type == "cuda" and architecture not in ("any", tiles.gpu_of(device).architecture):
        pytest.skip("a tile for another GPU")
    x, layer = planted(17, 272, 40, torch.float16), make_layer(70, 272)
    assert_right(x, layer, "zeropoint", run(layer, x, device, tile))


def test_an_outlier_of_one_row_is_an_outlier_of_all(device: torch.device, assert_right: Any) -> None:
    """Row 0 alone has none: its result changes when another row makes two of its dimensions outliers."""
    x, layer = planted(2, 64, 0, torch.float16), make_layer(40, 64)
    x[1, 5], x[1, 60] = 50.0, -50.0
    together, alone = (run(layer, some, device) for some in (x, x[:1]))
    assert_right(x, layer, "zeropoint", together)
    assert not torch.equal(together[:1], alone)


# Where the interpreter multiplies infinity by 0, NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_do_not_touch_the_others(bad: float, device: torch.device) -> None:
    x, layer = planted(3, 65, 3, torch.float16), make_layer(33, 65)
    free = next(k for k in range(65) if k not in reference.dynamic_outlier_dims(x, THRESHOLD))
    x[0, free] = 7.0  # an outlier in both cases, so that row 1 alone differs
    clean = run(layer, x, device)
    x[1, free] = bad
    found = run(layer, x, device)
    assert torch.equal(found[::2], clean[::2])
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[1].isnan(), reference.int8_linear(x, layer, "zeropoint")[1].isnan())
