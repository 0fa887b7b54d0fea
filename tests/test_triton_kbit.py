"""The kernels for weights of 3 to 8 bits: every layer as the reference defines it, and what is Triton's own in one."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels.kbit import reference
from llmint8.kernels.kbit.levels import DataType
from llmint8.kernels.kbit.operands import KBitOperands
from llmint8.kernels.kbit.reference import KBitWeight

pytest.importorskip("triton")
linear = pytest.importorskip("llmint8.kernels.kbit.gpu.linear")
tiles = pytest.importorskip("llmint8.kernels.kbit.gpu.tiles")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# The step between neighbouring numbers, relative. Triton's interpreter truncates to bfloat16, so a whole one.
STEP = {HALF: 2.0**-10, BRAIN: 2.0**-7, SINGLE: 2.0**-23}
DECODE = tiles.KBitTile(2, 16, 1, 1, 2, 1, 1)
PRODUCT = tiles.KBitTile(16, 32, 1, 2, 4, 2, 1)


def make_layer(
    n: int, k: int, bits: int, data_type: DataType = "int", block: int | None = 64, outliers: int = 0
) -> KBitWeight:
    """A random layer [N, K] of which rows and blocks have scales of their own."""
    random = torch.Generator().manual_seed(n + k + bits)
    weight = torch.randn(n, k, generator=random) * torch.logspace(-1, 1, n)[:, None] * torch.linspace(0.5, 2, k)
    dims = torch.randperm(k, generator=random)[:outliers].sort().values.int()
    bias = torch.randn(n, generator=random) if n % 2 else None
    return reference.from_float(weight, bits, data_type, block, dims, bias)


def rows(m: int, k: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def moved(layer: KBitWeight, device: torch.device) -> KBitWeight:
    parts = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return KBitWeight(**{name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()})


def prepared(layer: KBitWeight, device: torch.device, tile: Any = None) -> Any:
    return linear.GpuKBitLinear(*KBitOperands.prepare(moved(layer, device)), tile=tile)


def check(x: Tensor, layer: KBitWeight, found: Tensor) -> None:
    """Compare what a layer returned with exact arithmetic.

    An element of the weight, and of the outlier columns, is rounded to the dtype of x; float16 has steps of 2**-24
    below 6e-5. A level of 6 bits and more is float16 before. Sums have K + c + 2 terms in float32, and tensor cores may
    cut off where others round.
    """
    exact, dims = layer.dequantize().double(), layer.outlier_dims.long()
    codes = reference.unpack(layer.packed, layer.bits, layer.in_features)
    coded = reference.dequantize_codes(codes, layer.absmax, layer.levels, layer.block).double()
    bias = torch.zeros(len(exact)) if layer.bias is None else layer.bias
    inside, size = x.double(), x.double().abs()
    expected = inside @ exact.t() + bias.double()
    parts = size @ coded.abs().t() + size[:, dims] @ (exact - coded)[:, dims].abs().t()
    step = STEP[x.dtype]
    room = 2 * (x.shape[1] + len(dims) + 2) * 2.0**-24 * (parts + bias.double().abs()) + step * expected.abs()
    if x.dtype != SINGLE:
        room += (step + (2.0**-11 if layer.bits > 5 else 0)) * parts
        absmax = reference.by_element(layer.absmax, layer.in_features, layer.block).double()
        room += 2.0**-24 * (size.sum(1, keepdim=True) + size @ absmax.t())
    assert (found.shape, found.dtype) == (expected.shape, x.dtype)
    difference = (found.double() - expected).abs()
    assert bool((difference <= room).all()), (difference / room).max()


@pytest.mark.parametrize(
    ("bits", "data_type", "block", "m", "n", "k", "outliers", "dtype", "tile"),
    [
        (3, "int", 32, 1, 33, 200, 3, HALF, None),
        (3, "quantile", 64, 17, 34, 320, 0, BRAIN, PRODUCT._replace(split_k=2, chunks=2)),
        (3, "float", None, 2, 16, 63, 1, SINGLE, DECODE._replace(split_k=3)),
        (4, "nf4", 64, 1, 33, 320, 17, BRAIN, DECODE._replace(split_k=2, chunks=2)),
        (4, "float", 32, 5, 31, 128, 0, HALF, PRODUCT._replace(chunks=2)),
        (4, "dynamic", 256, 65, 33, 320, 40, HALF, None),
        (5, "int", 32, 2, 40, 130, 0, HALF, None),
        (5, "quantile", 4096, 3, 33, 1, 1, HALF, PRODUCT),
        (6, "float", 128, 1, 17, 257, 0, HALF, DECODE._replace(split_k=2)),
        (6, "dynamic", 32, 16, 33, 192, 33, SINGLE, None),
        (7, "int", 64, 1, 16, 190, 2, SINGLE, DECODE),
        (7, "float", None, 33, 33, 100, 5, BRAIN, PRODUCT._replace(split_k=8)),
        (8, "dynamic", 32, 2, 33, 96, 3, HALF, DECODE._replace(chunks=4)),
        (8, "int", 64, 4, 1, 250, 0, HALF, PRODUCT._replace(split_k=2)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
def test_layers(
    bits: int,
    data_type: DataType,
    block: int | None,
    m: int,
    n: int,
    k: int,
    outliers: int,
    dtype: torch.dtype,
    tile: Any,
    device: torch.device,
) -> None:
    layer, x = make_layer(n, k, bits, data_type, block, outliers), rows(m, k, dtype)
    check(x, layer, prepared(layer, device, tile)(x.to(device)).cpu())


@pytest.mark.parametrize("bits", [3, 5, 7])
def test_every_byte_is_read_as_the_definition_reads_it(bits: int, device: torch.device) -> None:
    """Also codes that no converter writes. x picks one column each: products with 1 and 0 are exact."""
    layer = make_layer(8, 128, bits, "quantile", None)
    layer.packed.copy_(torch.randint(0, 256, layer.packed.shape, generator=torch.Generator().manual_seed(bits)))
    layer = dataclasses.replace(layer, levels=torch.arange(2**bits) / 2**bits, absmax=torch.ones_like(layer.absmax))
    codes = reference.unpack(layer.packed, bits, 128)
    run = prepared(layer, device, PRODUCT._replace(block_m=128, block_n=16))
    found = run(torch.eye(128, dtype=HALF, device=device))
    assert torch.equal(found.cpu().t() * 2**bits, codes.half())


@pytest.mark.parametrize("m", [2, 3])
def test_inputs_may_have_any_strides_and_a_weight_any_address(m: int, device: torch.device) -> None:
    layer = moved(make_layer(20, 70, 4, outliers=3), device)
    moved_up = torch.empty(layer.packed.numel() + 3, dtype=torch.uint8, device=device)[3:].view(layer.packed.shape)
    odd = dataclasses.replace(layer, packed=moved_up.copy_(layer.packed))
    x = rows(m, 70).to(device)
    expected = linear.GpuKBitLinear(*KBitOperands.prepare(layer))(x)
    run = linear.GpuKBitLinear(*KBitOperands.prepare(odd))
    for strided in (x, x.t().contiguous().t(), torch.stack([x, x], 2)[:, :, 1], x.repeat(1, 2)[:, :70]):
        assert torch.equal(run(strided), expected)


def test_layers_without_rows_columns_or_inputs(device: torch.device) -> None:
    run = prepared(make_layer(33, 64, 4), device)
    assert run(rows(0, 64).to(device)).shape == (0, 33)
    layer = make_layer(33, 64, 4)
    some = {name: getattr(layer, name)[:0] for name in ("packed", "absmax", "outlier_weight", "bias")}
    assert prepared(dataclasses.replace(layer, **some), device)(rows(3, 64).to(device)).shape == (3, 0)
    empty = dataclasses.replace(layer, packed=layer.packed[:, :0], absmax=layer.absmax * 0, in_features=0)
    assert layer.bias is not None
    assert torch.equal(prepared(empty, device)(rows(2, 0).to(device)).cpu(), layer.bias.half().expand(2, 33))


def test_a_row_does_not_depend_on_the_others_from_3_to_16_rows(device: torch.device) -> None:
    """To the bit, also where programs share K, and nobody's NaN goes to another."""
    layer = make_layer(33, 320, 4, outliers=3)
    run, x = prepared(layer, device, PRODUCT._replace(split_k=3)), rows(16, 320).to(device)
    together = run(x)
    x[1:13] = float("nan")
    assert torch.equal(run(x)[13:], together[13:])
    assert torch.equal(run(x[13:]), together[13:])


def test_a_bias_that_was_cast_in_its_place_gets_a_launch_of_its_own(device: torch.device) -> None:
    layer = moved(make_layer(33, 64, 4), device)
    assert layer.bias is not None
    bias = torch.nn.Parameter(layer.bias.half(), requires_grad=False)
    run = linear.GpuKBitLinear(*KBitOperands.prepare(dataclasses.replace(layer, bias=bias)))
    x = rows(2, 64).to(device)
    before = run(x)
    bias.data = bias.data.float()
    assert torch.equal(run(x), before)
    assert len(run._plans) == 2


def test_every_call_has_a_tile_that_can_run_it() -> None:
    for architecture in ("sm_80", "sm_86", "sm_90", "sm_120", "any", "gfx942"):
        for m in (1, 2, 3, 16, 17, 64, 512, 8192):
            for n in (1, 1024, 5000, 100_000):
                for float32 in (False, True):
                    tile = tiles._choose(architecture, float32, m, n)
                    assert m <= tile.block_m if m <= tiles.DECODE_ROWS else tile.block_m >= 16
                    assert (tile.block_m <= tiles.DECODE_ROWS) == (m <= tiles.DECODE_ROWS)
                    # Sums over parts of K are kept for every row.
                    assert tile.split_k == 1 or m <= 64
                    assert (tile.block_m == 16) or not (float32 and tile.block_m > tiles.DECODE_ROWS)
    assert tiles._choose("sm_90", False, 3, 4096) == tiles._choose("sm_90", False, 16, 4096)
    assert tiles._choose("sm_86", False, 1, 9999) == tiles._choose("sm_80", False, 1, 9999)
