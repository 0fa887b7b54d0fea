"""The layer in Triton: int32 sums bit for bit, the rest within the rounding of binary32 and of its output."""

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.gpu import tiles
from llmint8.kernels.gpu.tiles import Tile, shipped_rows

gpu = pytest.importorskip("llmint8.kernels.gpu.linear")
matmul = pytest.importorskip("llmint8.kernels.gpu.matmul")
quantize = pytest.importorskip("llmint8.kernels.gpu.quantize_rows")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# The step between neighbouring numbers, relative. The interpreter truncates to bfloat16, so a whole one.
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}
ACTIVATIONS: tuple[reference.Activation, ...] = ("absmax", "zeropoint")
SHIPPED = dict.fromkeys((row.architecture, row.tile) for row in shipped_rows())
TILES = [(architecture, tile) for architecture, tile in SHIPPED if tile.block_m >= tiles.TENSOR_CORE_ROWS]
LAYERS = [
    (1, 1, 1, 1),
    (1, 63, 255, 0),
    (17, 63, 4095, 16),
    (5, 33, 64, 5),
    (16, 64, 128, 32),
    (33, 100, 96, 17),
    (3, 40, 700, 512),
    (2, 130, 100, 70),
]


class Layer:
    """A random layer [N, K] with k outlier columns. It stays on the CPU, where the reference divides as IEEE does."""

    def __init__(self, n: int, k: int, outliers: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(n + k)
        weight = torch.randn(n, k, generator=random).to(dtype)
        dims = torch.randperm(k, generator=random)[:outliers].sort().values
        self.weight, self.absmax = reference.quantize_weight(weight)
        self.dims, self.columns = dims.int(), weight[:, dims]
        self.bias: Tensor | None = torch.randn(n, generator=random).to(dtype)

    def rows(self, m: int) -> Tensor:
        x = torch.randn(m, self.weight.shape[1], generator=torch.Generator().manual_seed(m)) + 0.5
        x[:, self.dims.long()] *= 20
        return x.to(self.columns.dtype)

    def run(
        self,
        x: Tensor,
        activation: str,
        device: torch.device,
        row_sum: Tensor | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        tensors = x, self.weight, self.absmax, self.dims, self.columns, self.bias, row_sum
        there = (None if tensor is None else tensor.to(device) for tensor in tensors)
        return gpu.int8_linear(*there, zeropoint=activation == "zeropoint", tile=tile).cpu()

    def assert_right(self, x: Tensor, activation: reference.Activation, found: Tensor) -> None:
        """Compare with the reference; `rounding` is what two orders of the same float32 operations may differ by."""
        expected = reference.int8_linear(
            x, self.weight, self.absmax, self.dims, self.columns, self.bias, activation
        ).double()
        quantized = reference.quantize_rows(x, self.dims, activation)
        product = reference.int8_product(quantized.values, self.weight).double().abs()
        if quantized.zero_point is not None:
            row_sum = self.weight.sum(1, dtype=torch.int32).double()
            product += 3 * (quantized.zero_point.double()[:, None] * row_sum).abs()
        outliers = x[:, self.dims.long()].double().abs() @ self.columns.double().abs().t()
        parts = product * quantized.scale.double()[:, None] * (self.absmax.double() / 127) + outliers
        parts += 0 if self.bias is None else self.bias.double().abs()
        # Each sum of k + 4 terms is wrong by k + 4 roundings at most; tensor cores may cut off where others round.
        rounding = 2 * (len(self.dims) + 4) * 2.0**-24 * parts
        assert found.shape == expected.shape
        assert found.dtype == x.dtype
        difference = (found.double() - expected).abs()
        assert bool((difference <= rounding + STEP[x.dtype] * expected.abs()).all()), difference.max()


def layer_id(layer: tuple[int, int, int, int]) -> str:
    return "M{}-N{}-K{}-k{}".format(*layer)


def sums(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The int32 product alone."""
    nothing = torch.empty(0, device=x.device)
    count = matmul.counters(tile, len(x), len(weight))
    counters = torch.zeros(count, dtype=torch.int32, device=x.device) if count else None
    rows = quantize.Rows(x, nothing, None, None, counters)
    return matmul.int8_matmul(rows, weight, nothing, None, nothing[None], None, torch.int32, tile)


@pytest.mark.parametrize(
    ("architecture", "tile"), TILES, ids=[f"{name}-{'x'.join(str(int(part)) for part in tile)}" for name, tile in TILES]
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (65, 70, 272), (17, 300, 255)], ids=lambda size: str(size))
def test_sums_are_exact_for_every_tile_that_ships(
    m: int, n: int, k: int, architecture: str, tile: Tile, device: torch.device
) -> None:
    if device.type == "cuda" and architecture not in ("any", tiles.architecture(device)):
        pytest.skip("a tile for another GPU")
    random = torch.Generator().manual_seed(m)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=random)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=random)
    assert torch.equal(sums(x.to(device), weight.to(device), tile).cpu(), reference.int8_product(x, weight))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int, device: torch.device) -> None:
    """K = 133,000 is the most that 32 bits hold, and far more than 24 bits do."""
    x = torch.full((2, 133_000), 127, dtype=torch.int8, device=device)
    weight = torch.full((3, 133_000), 127 * sign, dtype=torch.int8, device=device)
    weight[1, ::2] *= -1
    expected = torch.tensor([133_000, 0, 133_000], dtype=torch.int64) * 127 * 127 * sign
    found = sums(x, weight, Tile(16, 16, 2048, 1, 4, 2, False))
    assert torch.equal(found.cpu().long(), expected.expand(2, 3))


@pytest.mark.parametrize(("n", "k"), [(70, 272), (300, 255), (20, 31)], ids=lambda size: str(size))
@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_sums_are_exact_where_programs_share_k(split_k: int, n: int, k: int, device: torch.device) -> None:
    """Some of them are left without any, too."""
    random = torch.Generator().manual_seed(k)
    x = torch.randint(-127, 128, (33, k), dtype=torch.int8, generator=random)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=random)
    tile = Tile(16, 32, 64, 8, 4, 2, False, split_k)
    assert torch.equal(sums(x.to(device), weight.to(device), tile).cpu(), reference.int8_product(x, weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [0, 1, 17, 100])
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (1, 1, 16, Tile(1, 16, 64, 1, 4, 1, False)),
        (1, 63, 4112, Tile(1, 8, 1024, 1, 1, 1, False)),
        (2, 40, 1008, Tile(2, 32, 512, 1, 4, 1, False)),
        (3, 17, 128, Tile(4, 16, 128, 1, 2, 1, False)),
        (4, 32, 96, Tile(4, 32, 32, 1, 4, 1, False)),
    ],
    ids=lambda value: "x".join(map(str, value[:3])) if isinstance(value, Tile) else str(value),
)
def test_layers_in_one_launch_are_those_of_the_reference(
    m: int,
    n: int,
    k: int,
    tile: Tile,
    outliers: int,
    dtype: str,
    activation: reference.Activation,
    device: torch.device,
) -> None:
    layer = Layer(n, k, min(outliers, k), DTYPES[dtype])
    x = layer.rows(m)
    row_sum = layer.weight.sum(1, dtype=torch.int32)
    layer.assert_right(x, activation, layer.run(x, activation, device, row_sum, tile))


def test_one_launch_does_all_for_one_row(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(gpu, "quantize_rows", None)
    layer = Layer(40, 64, 3, torch.float16)
    row_sum = layer.weight.sum(1, dtype=torch.int32)
    layer.assert_right(layer.rows(1), "zeropoint", layer.run(layer.rows(1), "zeropoint", device, row_sum))


@pytest.mark.parametrize("k", [70, 64], ids=["K70", "a part of another"])
def test_weights_that_are_not_aligned_take_two_launches(
    k: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(gpu, "int8_decode", None)
    layer = Layer(40, k, 5, torch.float16)
    wide = torch.full((40, 80), 127, dtype=torch.int8, device=device)
    wide[:, 3 : 3 + k] = layer.weight.to(device)
    layer.weight = layer.weight if k == 70 else wide[:, 3:67]
    found = layer.run(layer.rows(1), "absmax", device)
    layer.weight = layer.weight.cpu()
    layer.assert_right(layer.rows(1), "absmax", found)


def test_more_outliers_than_one_step_multiplies_take_two_launches(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Shared memory has no room for any number of them."""
    monkeypatch.setattr(gpu, "int8_decode", None)
    layer = Layer(40, 528, 300, torch.float16)
    layer.assert_right(layer.rows(1), "absmax", layer.run(layer.rows(1), "absmax", device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outliers", [0, 1, 40])
def test_a_row_does_not_depend_on_up_to_16_rows_it_is_called_with(
    outliers: int, activation: reference.Activation, device: torch.device
) -> None:
    """To the bit: one launch, two, and programs that share K. The outlier sums are exact in the interpreter, whose
    own order of adding follows the shapes."""
    layer = Layer(70, 160, outliers, torch.float16)
    if outliers > 1 and device.type == "cpu":
        layer.columns = layer.columns.mul(4).round()
    x = layer.rows(16)
    x[:, layer.dims.long()] = x[:, layer.dims.long()].round()
    row_sum = layer.weight.sum(1, dtype=torch.int32)
    together = layer.run(x, activation, device, row_sum)
    for m in (1, 2, 3, 5, 16):
        assert torch.equal(layer.run(x[16 - m :], activation, device, row_sum), together[16 - m :]), m
    for tile in (Tile(4, 16, 32, 1, 4, 1, False), Tile(1, 8, 64, 1, 4, 1, False), Tile(16, 32, 32, 1, 4, 2, False, 3)):
        rows = x[: tile.block_m]
        assert torch.equal(layer.run(rows, activation, device, row_sum, tile), together[: tile.block_m]), tile


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=layer_id)
def test_layers_are_those_of_the_reference(
    layer: tuple[int, int, int, int], dtype: str, activation: reference.Activation, device: torch.device
) -> None:
    m, n, k, outliers = layer
    made = Layer(n, k, outliers, DTYPES[dtype])
    x = made.rows(m)
    made.assert_right(x, activation, made.run(x, activation, device))


def test_a_layer_without_bias(device: torch.device) -> None:
    layer = Layer(33, 65, 3, torch.float16)
    layer.bias = None
    x = layer.rows(5)
    layer.assert_right(x, "zeropoint", layer.run(x, "zeropoint", device))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 7, 64), (3, 0, 64), (3, 7, 0)], ids=["M0", "N0", "K0"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_shapes(m: int, n: int, k: int, activation: reference.Activation, device: torch.device) -> None:
    layer = Layer(n, k, min(2, k), torch.float16)
    x = layer.rows(m)
    layer.assert_right(x, activation, layer.run(x, activation, device))


# Rows of a tile that are no rows of x are computed, and overflow; they are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_that_float16_cannot_hold_may_cancel(activation: reference.Activation, device: torch.device) -> None:
    """The int8 part is 20 x 64 x 100 = 128,000 and the outlier part takes nearly all of it away."""
    layer = Layer(17, 65, 0, torch.float16)
    weight = torch.full((17, 65), 20.0, dtype=torch.float16)
    weight[:, 64] = -127.0
    layer.weight, layer.absmax = reference.quantize_weight(weight)
    layer.dims, layer.columns = torch.tensor([64], dtype=torch.int32), weight[:, 64:]
    x = torch.full((3, 65), 100.0, dtype=torch.float16)
    x[:, 64] = 1000.0
    out = layer.run(x, activation, device)
    assert bool(((out - 1000).abs() < 50).all())
    layer.assert_right(x, activation, out)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_sums_that_float16_cannot_hold_overflow_to_infinity(device: torch.device) -> None:
    layer = Layer(3, 64, 0, torch.float16)
    layer.absmax *= 1e6
    x = layer.rows(2)
    out, wide = layer.run(x, "absmax", device), layer.run(x.float(), "absmax", device)
    assert torch.equal(out.isinf(), wide.abs() >= 65520)
    assert bool(out.isinf().any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_and_weights_that_are_parts_of_others(activation: reference.Activation, device: torch.device) -> None:
    layer = Layer(40, 70, 5, torch.float16)
    x = layer.rows(6)
    expected = layer.run(x, activation, device)
    wide = torch.full((40, 200), 127, dtype=torch.int8, device=device)
    wide[:, 3:73] = layer.weight.to(device)
    x = x.to(device).t().contiguous().t()
    for weight in (wide[:, 3:73], layer.weight.to(device).t().contiguous().t()):
        layer.weight = weight
        assert torch.equal(layer.run(x, activation, device), expected)


def test_the_row_sums_may_be_given(device: torch.device) -> None:
    layer = Layer(33, 65, 3, torch.float16)
    row_sum = layer.weight.sum(1, dtype=torch.int32)
    for m in (1, 4):
        x = layer.rows(m)
        expected = layer.run(x, "zeropoint", device)
        assert torch.equal(layer.run(x, "zeropoint", device, row_sum), expected)
        assert not torch.equal(layer.run(x, "zeropoint", device, row_sum + 10), expected)


@pytest.mark.parametrize(("x_dtype", "columns"), [("F16", "F32"), ("BF16", "F16"), ("F32", "BF16")])
def test_outlier_columns_of_another_dtype(x_dtype: str, columns: str, device: torch.device) -> None:
    layer = Layer(33, 65, 20, DTYPES[columns])
    x = layer.rows(3).to(DTYPES[x_dtype])
    layer.assert_right(x, "absmax", layer.run(x, "absmax", device))


@pytest.mark.parametrize("tile", [None, Tile(4, 16, 64, 1, 4, 1, False)], ids=["two launches", "one"])
def test_rows_that_are_not_finite_do_not_touch_the_others(tile: Tile | None, device: torch.device) -> None:
    layer = Layer(33, 80, 3, torch.float16)
    x = layer.rows(3)
    clean = layer.run(x, "absmax", device, tile=tile)
    x[1] = float("nan")
    out = layer.run(x, "absmax", device, tile=tile)
    assert bool(out[1].isnan().all())
    assert torch.equal(out[::2], clean[::2])
