"""What is Triton's own in a layer: tiles, launches, int32 sums bit for bit, rows that do not depend on others.

`test_operators.py` has the layers of every shape.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.gpu import tiles
from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile, Tile, shipped_table
from llmint8.kernels.operands import Operands

gpu = pytest.importorskip("llmint8.kernels.gpu.linear")
matmul = pytest.importorskip("llmint8.kernels.gpu.matmul")
quantize = pytest.importorskip("llmint8.kernels.gpu.quantize_rows")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ACTIVATIONS: tuple[reference.Activation, ...] = ("absmax", "zeropoint")
SHIPPED = dict.fromkeys((entry.architecture, entry.tile) for entry in shipped_table())
TILES = [(architecture, tile) for architecture, tile in SHIPPED if isinstance(tile, MatmulTile)]


def make_layer(
    n: int, k: int, outliers: int, dtype: torch.dtype, group: reference.Group | None = None
) -> reference.Int8Weight:
    """A random layer [N, K] with k outlier columns, on the CPU, where the reference divides as IEEE does."""
    random = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=random).to(dtype)
    dims = torch.randperm(k, generator=random)[:outliers].sort().values
    bias = torch.randn(n, generator=random).to(dtype)
    return reference.Int8Weight(*reference.quantize_weight(weight), dims.int(), weight[:, dims], bias, None, group)


def rows(m: int, layer: reference.Int8Weight) -> Tensor:
    x = torch.randn(m, layer.values.shape[1], generator=torch.Generator().manual_seed(m)) + 0.5
    x[:, layer.outlier_dims.long()] *= 20
    return x.to(layer.outlier_weight.dtype)


def moved(layer: reference.Int8Weight, device: torch.device) -> reference.Int8Weight:
    parts = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    parts = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
    return reference.Int8Weight(**parts)


def run(
    layer: reference.Int8Weight, x: Tensor, activation: str, device: torch.device, tile: Tile | None = None
) -> Tensor:
    operands = Operands.prepare(moved(layer, device))
    found: Tensor = gpu.GpuLinear(operands, tile)(x.to(device), activation == "zeropoint")
    return found.cpu()


def sums(x: Tensor, weight: Tensor, tile: MatmulTile) -> Tensor:
    """The int32 product alone."""
    n = len(weight)
    nothing = torch.empty(0, dtype=torch.int32, device=x.device), torch.empty(n, 0, device=x.device)
    layer = Operands.prepare(reference.Int8Weight(weight, torch.ones(n, device=x.device), *nothing))
    product = matmul.Int8Matmul(layer, torch.int32, tile, len(x))
    counters = torch.zeros(product.counters, dtype=torch.int32, device=x.device) if product.counters else None
    found: Tensor = product(quantize.QuantizedInput(x, nothing[1], None, None, counters))
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("architecture", "tile"), TILES, ids=[f"{name}-{'x'.join(str(int(part)) for part in tile)}" for name, tile in TILES]
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (65, 70, 272), (17, 300, 255)], ids=lambda size: str(size))
def test_sums_are_exact_for_every_tile_that_ships(
    m: int, n: int, k: int, architecture: str, tile: MatmulTile, device: torch.device
) -> None:
    if device.type == "cuda" and architecture not in ("any", tiles.gpu_of(device).architecture):
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
    found = sums(x, weight, MatmulTile(16, 16, 2048, 1, 4, 2))
    assert torch.equal(found.cpu().long(), expected.expand(2, 3))


@pytest.mark.parametrize(("split_k", "n", "k"), [(2, 70, 272), (3, 300, 255), (8, 20, 31), (8, 70, 272)])
def test_sums_are_exact_where_programs_share_k(split_k: int, n: int, k: int, device: torch.device) -> None:
    """Some of them are left without any, too."""
    random = torch.Generator().manual_seed(k)
    x = torch.randint(-127, 128, (33, k), dtype=torch.int8, generator=random)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=random)
    tile = MatmulTile(16, 32, 64, 8, 4, 2, False, split_k)
    assert torch.equal(sums(x.to(device), weight.to(device), tile).cpu(), reference.int8_product(x, weight))


@pytest.mark.parametrize(
    ("outliers", "dtype", "activation"),
    [
        (0, "F16", "absmax"),
        (0, "BF16", "zeropoint"),
        (1, "F32", "absmax"),
        (1, "F16", "zeropoint"),
        (17, "BF16", "absmax"),
        (17, "F32", "zeropoint"),
        (100, "F16", "zeropoint"),
        (100, "F32", "absmax"),
    ],
)
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (1, 1, 16, DecodeTile(1, 16, 64, 4)),
        (1, 63, 4112, DecodeTile(1, 8, 1024, 1)),
        (2, 40, 1008, DecodeTile(2, 32, 512, 4)),
        (3, 17, 128, DecodeTile(4, 16, 128, 2)),
        (4, 32, 96, DecodeTile(4, 32, 32, 4)),
    ],
    ids=lambda value: "x".join(map(str, value[:3])) if isinstance(value, tuple) else str(value),
)
def test_layers_in_one_launch(
    m: int,
    n: int,
    k: int,
    tile: DecodeTile,
    outliers: int,
    dtype: str,
    activation: reference.Activation,
    device: torch.device,
    assert_right: Any,
) -> None:
    layer = make_layer(n, k, min(outliers, k), DTYPES[dtype])
    x = rows(m, layer)
    assert_right(x, layer, activation, run(layer, x, activation, device, tile))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_is_not_finite_touches_no_other_of_its_launch(device: torch.device) -> None:
    layer = make_layer(33, 80, 3, torch.float16)
    x, tile = rows(3, layer), DecodeTile(4, 16, 64, 4)
    clean = run(layer, x, "absmax", device, tile)
    x[1] = float("nan")
    found = run(layer, x, "absmax", device, tile)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[::2], clean[::2])


def test_one_launch_does_all_for_one_row(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_right: Any
) -> None:
    monkeypatch.setattr(gpu, "QuantizeRows", None)
    layer = make_layer(40, 64, 3, torch.float16)
    assert_right(rows(1, layer), layer, "zeropoint", run(layer, rows(1, layer), "zeropoint", device))


@pytest.mark.parametrize("k", [70, 64], ids=["K70", "a part of another"])
def test_weights_that_are_not_aligned_take_two_launches(
    k: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_right: Any
) -> None:
    monkeypatch.setattr(gpu, "int8_decode", None)
    layer = make_layer(40, k, 5, torch.float16)
    there = moved(layer, device)
    if k == 64:
        odd = torch.empty(40 * 64 + 3, dtype=torch.int8, device=device)[3:].view(40, 64)
        there = dataclasses.replace(there, values=odd.copy_(there.values))
    assert not Operands.prepare(there).aligned
    assert_right(rows(1, layer), layer, "absmax", run(there, rows(1, layer), "absmax", device))


def test_more_outliers_than_one_step_multiplies_take_two_launches(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_right: Any
) -> None:
    """Shared memory has no room for any number of them."""
    monkeypatch.setattr(gpu, "int8_decode", None)
    layer = make_layer(40, 528, 300, torch.float16)
    assert_right(rows(1, layer), layer, "absmax", run(layer, rows(1, layer), "absmax", device))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("architecture", "tile"),
    SHIPPED,
    ids=[f"{name}-{'x'.join(str(int(part)) for part in tile)}" for name, tile in SHIPPED],
)
def test_groups_with_every_tile_that_ships(
    architecture: str, tile: Tile, monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_right: Any
) -> None:
    """With sums that begin as they do on that GPU."""
    if device.type == "cuda" and architecture not in ("any", tiles.gpu_of(device).architecture):
        pytest.skip("a tile for another GPU")
    monkeypatch.setattr(matmul, "gpu_of", lambda device: tiles.Gpu(architecture))
    layer = make_layer(70, 1136, 5, torch.float16, 128)
    x = rows(min(tile.block_m, 17), layer)  # the interpreter takes long for every row
    assert_right(x, layer, "zeropoint", run(layer, x, "zeropoint", device, tile))


@pytest.mark.parametrize(
    ("k", "group", "activation"),
    [(272, 64, "absmax"), (272, 128, "zeropoint"), (1040, 64, "zeropoint"), (1040, 256, "absmax")],
)
def test_in_groups_a_row_does_not_depend_on_up_to_16_rows_it_is_called_with(
    k: int, group: reference.Group, activation: reference.Activation, device: torch.device
) -> None:
    """To the bit: one launch, two, whatever the tile would divide K into. Scales of all groups differ."""
    layer = make_layer(70, k, 0, torch.float32, group)
    x = rows(16, layer) * torch.linspace(0.3, 5, k)
    together = run(layer, x, activation, device)
    for m in (1, 2, 5):
        assert torch.equal(run(layer, x[16 - m :], activation, device), together[16 - m :]), m
    for tile in (
        DecodeTile(4, 16, 32, 4),
        DecodeTile(1, 8, 2048, 4),
        MatmulTile(16, 32, 32, 1, 4, 2, False, 3),
        MatmulTile(16, 16, 512, 1, 4, 2),
    ):
        some = x[: tile.block_m]
        assert torch.equal(run(layer, some, activation, device, tile), together[: tile.block_m]), tile


@pytest.mark.parametrize(
    ("outliers", "activation"), [(0, "absmax"), (1, "zeropoint"), (40, "absmax"), (40, "zeropoint")]
)
def test_a_row_does_not_depend_on_up_to_16_rows_it_is_called_with(
    outliers: int, activation: reference.Activation, device: torch.device
) -> None:
    """To the bit: one launch, two, and programs that share K. The outlier sums are exact in the interpreter, whose
    own order of adding follows the shapes."""
    layer = make_layer(70, 160, outliers, torch.float16)
    if outliers > 1 and device.type == "cpu":
        layer = dataclasses.replace(layer, outlier_weight=layer.outlier_weight.mul(4).round())
    x = rows(16, layer)
    x[:, layer.outlier_dims.long()] = x[:, layer.outlier_dims.long()].round()
    together = run(layer, x, activation, device)
    for m in (1, 2, 5):
        assert torch.equal(run(layer, x[16 - m :], activation, device), together[16 - m :]), m
    for tile in (DecodeTile(4, 16, 32, 4), DecodeTile(1, 8, 64, 4), MatmulTile(16, 32, 32, 1, 4, 2, False, 3)):
        some = x[: tile.block_m]
        assert torch.equal(run(layer, some, activation, device, tile), together[: tile.block_m]), tile


def test_counters_are_those_of_the_largest_call_of_a_plan(device: torch.device, assert_right: Any) -> None:
    """K is divided for all M that share a plan, 33 to 64, whichever comes first."""
    layer = make_layer(70, 160, 3, torch.float16)
    linear = gpu.GpuLinear(Operands.prepare(moved(layer, device)), MatmulTile(16, 32, 32, 1, 4, 2, False, 3))
    for m in (33, 64, 40, 64):
        x = rows(m, layer)
        assert_right(x, layer, "zeropoint", linear(x.to(device), True).cpu())


# Rows of a tile that are no rows of x are computed, and overflow; they are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_that_float16_cannot_hold_may_cancel(
    activation: reference.Activation, device: torch.device, assert_right: Any
) -> None:
    """The int8 part is 20 x 64 x 100 = 128,000 and the outlier part takes nearly all of it away."""
    weight = torch.full((17, 65), 20.0, dtype=torch.float16)
    weight[:, 64] = -127.0
    dims = torch.tensor([64], dtype=torch.int32)
    layer = reference.Int8Weight(*reference.quantize_weight(weight), dims, weight[:, 64:])
    x = torch.full((3, 65), 100.0, dtype=torch.float16)
    x[:, 64] = 1000.0
    out = run(layer, x, activation, device)
    assert bool(((out - 1000).abs() < 50).all())
    assert_right(x, layer, activation, out)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_sums_that_float16_cannot_hold_overflow_to_infinity(device: torch.device) -> None:
    layer = make_layer(3, 64, 0, torch.float16)
    layer.absmax.mul_(1e6)
    x = rows(2, layer)
    out, wide = run(layer, x, "absmax", device), run(layer, x.float(), "absmax", device)
    assert torch.equal(out.isinf(), wide.abs() >= 65520)
    assert bool(out.isinf().any())


def test_a_bias_that_was_cast_in_its_place_gets_a_launch_of_its_own(device: torch.device) -> None:
    """As `prepare_model_for_kbit_training` of PEFT casts it; what is compiled for its old dtype would misread it."""
    layer = moved(make_layer(64, 128, 3, torch.bfloat16), device)
    assert layer.bias is not None
    bias = torch.nn.Parameter(layer.bias, requires_grad=False)
    operands = Operands.prepare(dataclasses.replace(layer, bias=bias))
    linear, x = gpu.GpuLinear(operands), rows(5, layer).to(device)
    before = linear(x, False)
    bias.data = bias.data.float()
    assert torch.equal(linear(x, False), before)
    assert len(linear._plans) == 2
