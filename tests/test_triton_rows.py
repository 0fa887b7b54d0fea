"""The row quantization in Triton is the reference's, bit for bit: in the interpreter, or on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.checks import padded_outliers

quantize = pytest.importorskip("llmint8.kernels.gpu.quantize_rows")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SHAPES = [(1, 1, 0), (5, 1, 1), (3, 31, 5), (2, 33, 33), (17, 255, 16), (4, 4096, 17), (2, 4095, 512), (3, 0, 0)]


def outlier_dims(k: int, in_features: int, seed: int = 0) -> Tensor:
    chosen = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))[:k]
    return chosen.sort().values.int()


def random_rows(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5).to(dtype)


def quantized(x: Tensor, dims: Tensor, zeropoint: bool, *how: Any) -> Any:
    return quantize.QuantizeRows(x.shape[1], dims, zeropoint, *how)(x, x.stride())


def assert_as_the_reference(
    x: Tensor,
    dims: Tensor,
    device: torch.device,
    group: reference.Group | None = None,
    rotation: reference.Rotation | None = None,
) -> None:
    """Both modes give the reference's values, scale and zero point, and the outlier columns with zeros after them.

    The reference runs on the CPU: on a GPU torch divides by a number as it likes, not as IEEE does.
    """
    for activation in ("absmax", "zeropoint"):
        expected = reference.quantize_rows(x.cpu(), dims, activation, group, rotation)
        found = quantized(x.to(device), dims.to(device), activation == "zeropoint", group, rotation)
        rows = quantize.QuantizedInput(*(None if part is None else part.cpu() for part in found))
        assert torch.equal(rows.values, expected.values), activation
        assert torch.equal(rows.scale, by_group(expected.scale)), activation
        assert (rows.zero_point is None) == (expected.zero_point is None)
        if expected.zero_point is not None:
            assert torch.equal(rows.zero_point, by_group(expected.zero_point))
        if len(dims) == 0:
            assert rows.outliers is None
            continue
        assert rows.outliers.shape[1] == padded_outliers(len(dims))
        assert torch.equal(rows.outliers[:, : len(dims)], x.cpu()[:, dims.long()])
        assert not rows.outliers[:, len(dims) :].any()


def by_group(parameters: Tensor) -> Tensor:
    """From [M, G] to the layout of the kernels: [G, M], and [M] of one group."""
    return parameters.t().contiguous() if parameters.shape[1] > 1 else parameters[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "outliers"), SHAPES, ids=[f"M{m}-K{k}-k{o}" for m, k, o in SHAPES])
def test_rows_are_those_of_the_reference(m: int, k: int, outliers: int, dtype: str, device: torch.device) -> None:
    assert_as_the_reference(random_rows(m, k, DTYPES[dtype]), outlier_dims(outliers, k), device)


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "outliers"),
    [(3, 64, 1), (2, 40, 3), (1, 130, 0), (3, 1100, 20), (2, 17000, 5)],
    ids=lambda size: str(size),
)
def test_rotated_rows_are_those_of_the_reference(
    m: int, k: int, outliers: int, dtype: str, group: reference.Group | None, device: torch.device
) -> None:
    """To the bit: sums of a rotation are made in its order here, too. Outliers may be in what is left at the end."""
    x, dims = random_rows(m, k, DTYPES[dtype]), outlier_dims(outliers, k)
    if outliers:
        dims[-1] = k - 1
    x[:, dims.long()] *= 50
    assert_as_the_reference(x, dims, device, group, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize(
    ("m", "k", "outliers"),
    [(3, 64, 1), (1, 65, 0), (5, 300, 20), (3, 1025, 0), (2, 4096, 100), (0, 300, 2)],
    ids=lambda size: str(size),
)
def test_groups_are_those_of_the_reference(
    m: int, k: int, outliers: int, group: reference.Group, dtype: str, device: torch.device
) -> None:
    """Of magnitudes that differ, one of zeros, and some near the ends of the range, in the row of others."""
    x = random_rows(m, k, torch.float32) * 4.0 ** (torch.arange(k) // 64 % 3)
    x[:, 64:128] = 0
    if dtype != "F16" and m > 1:
        x[1, 128:256] *= 1e-36
    assert_as_the_reference(x.to(DTYPES[dtype]), outlier_dims(outliers, k), device, group)


def test_groups_of_a_row_of_more_than_one_block(device: torch.device) -> None:
    assert_as_the_reference(random_rows(2, 33_000, torch.float16), outlier_dims(70, 33_000), device, 128)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_reaches_the_scale_of_its_group_alone(device: torch.device) -> None:
    x = random_rows(2, 300, torch.float16).to(device)
    x[1, 70] = float("nan")
    for zeropoint in (False, True):
        rows = quantized(x, torch.zeros(0, dtype=torch.int32, device=device), zeropoint, 64)
        assert (~rows.scale.isfinite()).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("k", [16384, 16385, 40001])
def test_a_row_too_long_for_one_block_is_read_twice(k: int, device: torch.device) -> None:
    x, dims = random_rows(2, k, torch.float16), outlier_dims(70, k)
    x[0, k - 1], x[1, 0] = 60000, -60000  # the ends of the range, in the last and in the first block
    assert_as_the_reference(x, dims[(dims > 0) & (dims < k - 1)], device)


def test_no_rows(device: torch.device) -> None:
    assert_as_the_reference(random_rows(0, 64, torch.float16), outlier_dims(3, 64), device)


@pytest.mark.parametrize("layout", ["columns", "every second", "slice", "one row for all"])
def test_rows_of_any_strides(layout: str, device: torch.device) -> None:
    wide = random_rows(40, 130, torch.bfloat16).to(device)
    x = {
        "columns": wide.t(),
        "every second": wide[1::2, ::2],
        "slice": wide[:9, 1:66],
        "one row for all": wide[:1].expand(4, 130),
    }[layout]
    assert_as_the_reference(x, outlier_dims(7, x.shape[1]), device)


@pytest.mark.parametrize("absmax", [1.0, 6.0, 127.0, 0.1, 3e-5, 65504.0])
def test_every_float16_is_rounded_as_the_reference_does(absmax: float, device: torch.device) -> None:
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    below = every[every <= torch.tensor(absmax, dtype=torch.float16)]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float16)
    assert_as_the_reference(below * signs[:, None], outlier_dims(0, 1), device)
    assert_as_the_reference(torch.cat([below, -below[: len(below) // 2]])[None], outlier_dims(0, 1), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_round_to_even(dtype: str, device: torch.device) -> None:
    halves = torch.arange(-127, 127) + 0.5
    # absmax 127 gives the scale 1, and so does a range of 254.
    x = torch.stack([torch.cat([halves, torch.tensor([127.0, -127.0])]) * 2.0**e for e in (0, -12, 8)])
    assert_as_the_reference(x.to(DTYPES[dtype]), outlier_dims(0, 1), device)


# Not bfloat16's subnormals, which the interpreter takes for other numbers.
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [("F32", 1e-45), ("F32", 3e-39), *((d, m) for d in ("BF16", "F32") for m in (1e-36, 1e-30, 1e30, 1e35))],
)
def test_rows_at_the_ends_of_the_range(dtype: str, magnitude: float, device: torch.device) -> None:
    x = (random_rows(3, 200, torch.float32).double() * magnitude).to(DTYPES[dtype])
    assert_as_the_reference(x, outlier_dims(2, 200), device)


def test_what_rounding_carries_beyond_the_range_is_cut_off(device: torch.device) -> None:
    """Both halves round up: 101.5 to 102 and the zero point, 25.5, to 26, so that 101.5 would become 128."""
    x = torch.tensor([[101.5, -152.5, 0.0]], dtype=torch.float16)
    assert reference.quantize_rows(x, outlier_dims(0, 1), "zeropoint").values.tolist() == [[127, -126, 26]]
    assert_as_the_reference(x, outlier_dims(0, 1), device)


def test_rows_without_a_range(device: torch.device) -> None:
    x = torch.zeros(5, 70, dtype=torch.float16)
    x[1], x[2], x[3], x[4, 9] = 3.0, -3.0, -0.0, 60000.0
    # Row 4 is all zeros but for its outlier.
    assert_as_the_reference(x, torch.tensor([9], dtype=torch.int32), device)


def test_outlier_dims_in_64_bit(device: torch.device) -> None:
    assert_as_the_reference(random_rows(3, 70, torch.float16), outlier_dims(5, 70).long(), device)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gets_a_scale_that_is_not_either(bad: float, device: torch.device) -> None:
    x = random_rows(2, 100, torch.float16)
    x[1, 50] = bad
    dims = torch.zeros(0, dtype=torch.int32)
    for activation in ("absmax", "zeropoint"):
        expected = reference.quantize_rows(x, dims, activation)
        rows = quantized(x.to(device), dims.to(device), activation == "zeropoint")
        assert torch.equal(rows.values[0].cpu(), expected.values[0])
        assert rows.scale.isfinite().tolist() == [True, False]
        assert torch.equal(rows.scale.isnan().cpu(), expected.scale[:, 0].isnan())
