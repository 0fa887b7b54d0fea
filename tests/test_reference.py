"""The reference kernels against arithmetic that shares nothing with them: fractions, and 64-bit integers.

Exact where the definition is exact (weights, integer products), and within the rounding of binary32 elsewhere.
"""

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmint8.kernels.reference import (
    Activation,
    Group,
    Int8Weight,
    dequantize_weight,
    dynamic_outlier_dims,
    int8_linear,
    int8_product,
    quantize_rows,
    quantize_weight,
    rotate,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
INTS = {"F16": torch.int16, "BF16": torch.int16, "F32": torch.int32}
ACTIVATIONS: tuple[Activation, ...] = ("absmax", "zeropoint")
NO_DIMS = torch.zeros(0, dtype=torch.int32)


def exact_row(row: list[float]) -> tuple[float, list[int]]:
    """Quantize by the definition; `round` of a fraction is exact, and half to even."""
    absmax = max((abs(value) for value in row), default=0.0)
    return absmax, [round(127 * Fraction(value) / Fraction(absmax)) if absmax else 0 for value in row]


def assert_exact(weight: Tensor) -> None:
    values, absmax = quantize_weight(weight)
    assert (values.dtype, absmax.dtype) == (torch.int8, torch.float32)
    assert (values.shape, absmax.shape) == (weight.shape, weight.shape[:1])
    for n, row in enumerate(weight.tolist()):
        assert (absmax[n].item(), values[n].tolist()) == exact_row(row)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Finite weights from arbitrary bits, so of every magnitude; half of them near ties of their row."""
    name = draw(st.sampled_from(sorted(DTYPES)))
    width = 32 if name == "F32" else 16
    shape = (draw(st.integers(0, 4)), draw(st.integers(0, 9)))
    count = shape[0] * shape[1]
    bits = draw(st.lists(st.integers(-(1 << (width - 1)), (1 << (width - 1)) - 1), min_size=count, max_size=count))
    weight = torch.tensor(bits, dtype=INTS[name]).view(DTYPES[name]).reshape(shape)
    weight = weight.where(weight.isfinite(), torch.ones((), dtype=weight.dtype))
    if draw(st.booleans()) and shape[1]:
        halves = torch.tensor(draw(st.lists(st.integers(-127, 126), min_size=count, max_size=count))).reshape(shape)
        near = (weight[:, :1].double() * (halves + 0.5) / 127).to(weight.dtype)
        weight = torch.cat([weight[:, :1], near[:, 1:]], 1)
    return weight


@given(weight=weights())
@settings(max_examples=300, deadline=None)
def test_weights_of_any_bits_are_quantized_exactly(weight: Tensor) -> None:
    assert_exact(weight)


@pytest.mark.parametrize("seed", range(4))
def test_every_float16_weight_is_quantized_exactly(seed: int) -> None:
    """All finite float16 numbers against a few absmax each; float16 is an integer times 2**-24, so int64 is exact."""
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    chosen = torch.Generator().manual_seed(seed)
    for index in torch.randint(1, 0x7C00, (24,), generator=chosen).tolist():
        row = every[: index + 1].clone()
        row[::2] *= -1
        units = (row.double() * 2**24).long()
        largest = units.abs().max()
        # floor of (2 * 127 * w + a) / 2a rounds half up; take one back at odd ties.
        doubled = 254 * units + largest
        expected = doubled.div(2 * largest, rounding_mode="floor")
        expected -= ((doubled.remainder(2 * largest) == 0) & (expected % 2 == 1)).long()
        values, absmax = quantize_weight(row[None])
        assert torch.equal(values[0].long(), expected)
        assert absmax.double().item() * 2**24 == largest


def test_near_ties_of_float32_are_quantized_exactly() -> None:
    torch.manual_seed(0)
    absmax = torch.rand(40, 1) * torch.tensor([1e-30, 1.0, 1e30, 1e38]).repeat(10)[:, None] + 1e-38
    ties = (absmax.double() * (torch.arange(12) * 10.0 + 0.5) / 127).float()
    up, down = torch.nextafter(ties, torch.tensor(3e38)), torch.nextafter(ties, torch.tensor(0.0))
    assert_exact(torch.cat([absmax, ties, -up, down], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 4095), (3, 131072), (2, 200_001), (300, 1000), (0, 5), (5, 0)])
def test_blocks_are_joined_without_a_gap(n: int, k: int, dtype: str) -> None:
    torch.manual_seed(n + k)
    weight = torch.randn(n, k).to(DTYPES[dtype])
    values, absmax = quantize_weight(weight)
    assert torch.equal(absmax, weight.double().abs().amax(1).float() if k else torch.zeros(n))
    quotient = 127 * weight.double() / absmax.double()[:, None]
    assert torch.equal(values.double(), quotient.round())


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "expanded"])
def test_strides_do_not_matter(view: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(70, 40).half()
    weight = {
        "transposed": base.t(),
        "columns": base[:, 3::2],
        "rows": base[::3],
        "expanded": base[:1].expand(50, 40),
    }[view]
    for got, expected in zip(quantize_weight(weight), quantize_weight(weight.clone().contiguous()), strict=True):
        assert torch.equal(got, expected)
        assert got.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_shows_in_its_row_only(value: float, dtype: str) -> None:
    weight = torch.randn(5, 7).to(DTYPES[dtype])
    expected = quantize_weight(weight)
    weight[3, 4] = value
    values, absmax = quantize_weight(weight)
    others = [0, 1, 2, 4]
    assert absmax.isfinite().tolist() == [True, True, True, False, True]
    assert torch.equal(values[others], expected[0][others])
    assert torch.equal(absmax[others], expected[1][others])


@given(weight=weights())
@settings(max_examples=100, deadline=None)
def test_dequantizing_is_off_by_half_a_step_at_most(weight: Tensor) -> None:
    values, absmax = quantize_weight(weight)
    restored = dequantize_weight(values, absmax)
    assert restored.dtype == torch.float32
    half_step = absmax.double()[:, None] / 254
    # Steps below the smallest normal number are themselves rounded.
    allowed = half_step * (1 + 2**-15) + 127 * 2.0**-149
    assert bool(((restored.double() - weight.double()).abs() <= allowed).all())


def exact_rows(x: Tensor, dims: list[int], activation: str) -> list[tuple[Fraction, int, list[Fraction]]]:
    """Per row: the scale, the zero point, and what is rounded to give the int8 values, before the zero point."""
    result = []
    for row in x.tolist():
        kept = [Fraction(0) if j in dims else Fraction(value) for j, value in enumerate(row)]
        low, high = min([Fraction(0), *kept]), max([Fraction(0), *kept])
        if activation == "absmax":
            scale, zero_point = max(-low, high) / 127, 0
        else:
            scale = (high - low) / 254
            zero_point = round(-127 - low / (scale or 1))
        result.append((scale, zero_point, [value / scale if scale else Fraction(0) for value in kept]))
    return result


def is_near_tie(value: Fraction) -> bool:
    return abs(value - (value.numerator // value.denominator) - Fraction(1, 2)) <= Fraction(300, 2**24)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, list[int], Any]:
    """Rows of ordinary magnitudes with huge, NaN and infinite elements in the outlier dimensions."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    elements = st.floats(-60000, 60000, width=32) | st.floats(-4, 4, width=32) | st.integers(-254, 254).map(float)
    flat = draw(st.lists(elements, min_size=rows * columns, max_size=rows * columns))
    x = torch.tensor(flat, dtype=torch.float32).reshape(rows, columns)
    x = x.where(x.abs() > 1e-20, torch.zeros(()))
    dims = sorted(draw(st.sets(st.integers(0, columns - 1))))
    wild = draw(st.sampled_from([60000.0, 1e30, float("inf"), float("nan")]))
    x[:, dims] = wild
    return x, dims, draw(st.sampled_from(ACTIVATIONS))


@given(case=inputs())
@settings(max_examples=400, deadline=None)
def test_rows_are_quantized_by_the_definition(case: tuple[Tensor, list[int], Activation]) -> None:
    x, dims, activation = case
    finite = x.clone()
    finite[:, dims] = 0
    rows = quantize_rows(x, torch.tensor(dims, dtype=torch.int32), activation)
    assert (rows.values.dtype, rows.scale.dtype) == (torch.int8, torch.float32)
    assert (rows.zero_point is None) == (activation == "absmax")
    for i, (scale, zero_point, exact) in enumerate(exact_rows(finite, dims, activation)):
        assert abs(Fraction(rows.scale[i].item()) - scale) <= scale / 2**22
        got = 0 if rows.zero_point is None else int(rows.zero_point[i])
        low_end = -127 - (min(Fraction(0), *map(Fraction, finite[i].tolist())) / (scale or 1))
        assert got == zero_point or (activation == "zeropoint" and is_near_tie(low_end) and abs(got - zero_point) == 1)
        for j, value in enumerate(exact):
            expected = max(-127, min(127, round(value) + got))
            item = int(rows.values[i, j])
            assert item == expected or (is_near_tie(value) and abs(item - expected) == 1)
        assert all(int(rows.values[i, j]) == got for j in dims)


@given(case=inputs(), group=st.sampled_from([64, 128, 256]), repeats=st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_each_group_of_a_row_is_quantized_as_a_row(
    case: tuple[Tensor, list[int], Activation], group: Group, repeats: int
) -> None:
    x, dims, activation = case
    k = x.shape[1]
    x = torch.cat([x * 2.0 ** (i % 3) for i in range(repeats)], 1)
    dims = [i * k + dim for i in range(repeats) for dim in dims]
    rows = quantize_rows(x, torch.tensor(dims, dtype=torch.int32), activation, group)
    count = -(-x.shape[1] // group)
    assert rows.scale.shape == (len(x), count)
    for i in range(count):
        first, end = i * group, (i + 1) * group
        inside = torch.tensor([dim - first for dim in dims if first <= dim < end], dtype=torch.int32)
        alone = quantize_rows(x[:, first:end], inside, activation)
        assert torch.equal(rows.values[:, first:end], alone.values)
        assert torch.equal(rows.scale[:, i], alone.scale[:, 0])
        if alone.zero_point is not None:
            assert torch.equal(rows.zero_point[:, i], alone.zero_point[:, 0])  # type: ignore[index]
    assert rows.dequantize()[:, dims].eq(0).all()


def hadamard(k: int) -> Tensor:
    """The matrix of the rotation, float64 [K, K]: Sylvester's of 64 on its diagonal, and ones behind."""
    block = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / 8] * (k // 64), torch.eye(k % 64, dtype=torch.float64))


@pytest.mark.parametrize("k", [0, 1, 63, 64, 100, 128, 200])
def test_rotating_multiplies_by_blocks_of_an_orthonormal_matrix(k: int) -> None:
    matrix = hadamard(k)
    assert torch.equal(matrix @ matrix, torch.eye(k, dtype=torch.float64))
    x = torch.randint(-1000, 1000, (2, 64, k)).half()  # whose sums are exact; as many rows as a block has dimensions
    found = rotate(x, 64)
    assert rotate(x[:0], 64).shape == (0, 64, k)
    assert (found.dtype, found.shape) == (torch.float32, x.shape)
    assert torch.equal(found.double(), x.double() @ matrix)
    assert torch.equal(rotate(found, 64), x.float())
    assert torch.equal(rotate(x, None), x.float())


def test_sums_of_a_rotation_are_made_in_its_order() -> None:
    """What is next to each other is added first, so that what is lost in rounding is the same everywhere."""
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([1.0, 2.0**24, -(2.0**24)])
    assert rotate(x, 64)[0, 0] == 0  # 1 + 2**24 is 2**24
    x[0, :3] = torch.tensor([2.0**24, -(2.0**24), 1.0])
    assert rotate(x, 64)[0, 0] == 0.125


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [40, 64, 200])
def test_a_rotated_weight_is_quantized_as_what_it_is_rotated_to(k: int, dtype: str) -> None:
    weight = torch.randn(70, k).to(DTYPES[dtype])
    values, absmax = quantize_weight(weight, 64)
    expected = quantize_weight(rotate(weight, 64))
    assert torch.equal(values, expected[0])
    assert torch.equal(absmax, expected[1])
    error = (dequantize_weight(values, absmax, 64) - weight.float()).norm()
    assert error <= (absmax / 254).norm() * k**0.5 * (1 + 1e-5)  # a rotation changes no norm


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("group", [None, 64, 128])
def test_rotated_rows_are_quantized_as_what_they_are_rotated_to(group: Group | None, activation: Activation) -> None:
    x, dims = torch.randn(9, 200), torch.tensor([3, 77, 199])
    kept = x.index_fill(1, dims, 0)
    found = quantize_rows(x, dims, activation, group, 64)
    expected = quantize_rows(rotate(kept, 64), dims[:0], activation, group)
    for one, other in zip(found, expected, strict=True):
        assert one == other if not isinstance(one, Tensor) else torch.equal(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_rotated_layer_spreads_what_is_large_in_one_dimension(activation: Activation) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 200), torch.randn(30, 200)
    x[:, 5], weight[:, 5] = 500, 0
    dims, columns = torch.tensor([100]), weight[:, [100]]
    exact = x @ weight.t()
    errors = []
    for rotation in (None, 64):
        layer = Int8Weight(*quantize_weight(weight, rotation), dims, columns, rotation=rotation)
        errors.append(float((int8_linear(x, layer, activation) - exact).norm() / exact.norm()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_16_bit_are_quantized_as_their_float32_copies(dtype: torch.dtype, activation: Activation) -> None:
    torch.manual_seed(0)
    x, dims = (torch.randn(7, 33) * 4).to(dtype), torch.tensor([0, 32])
    got, expected = quantize_rows(x, dims, activation), quantize_rows(x.float(), dims, activation)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantizing_rows_leaves_the_input_alone(activation: Activation) -> None:
    x = torch.randn(3, 5)
    before = x.clone()
    quantize_rows(x, torch.tensor([1]), activation)
    assert torch.equal(x, before)


def int8s(*shape: int, low: int = -127) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [*itertools.product([1, 2, 17], [0, 1, 2, 3, 7, 64, 1025], [1, 5, 63]), (0, 4, 3), (3, 4, 0), (33, 4095, 63)],
    ids=lambda size: str(size),
)
def test_int8_product_is_exact(m: int, k: int, n: int) -> None:
    torch.manual_seed(m * 1000 + k + n)
    x, weight = int8s(m, k), int8s(n, k, low=-128)
    product = int8_product(x, weight)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), x.long() @ weight.long().t())


def test_int8_product_takes_any_strides() -> None:
    torch.manual_seed(0)
    x, weight = int8s(9, 31).t(), int8s(18, 11)[::2].t()
    assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t())


@pytest.mark.parametrize(("k", "lowest"), [(133_144, -127), (132_104, -128)])
def test_the_longest_rows_the_spec_allows_do_not_overflow(k: int, lowest: int) -> None:
    x = torch.full((2, k), 127, dtype=torch.int8)
    weight = torch.full((1, k), lowest, dtype=torch.int8)
    assert int8_product(x, weight).tolist() == [[127 * lowest * k]] * 2
    assert 127 * -lowest * k < 2**31 <= 127 * -lowest * (k + 1)


def formula(
    x: Tensor, weight: Tensor, absmax: Tensor, dims: list[int], columns: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The product as spec.md has it, in exact arithmetic until the last conversion: float64 [M, N].

    The int8 values of x are the reference's own; how they come about is tested above.
    """
    rows = quantize_rows(x, torch.tensor(dims, dtype=torch.int64), "absmax" if activation == "absmax" else "zeropoint")
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for i in range(x.shape[0]):
        zero_point = 0 if rows.zero_point is None else int(rows.zero_point[i])
        shifted = rows.values[i].long() - zero_point
        for n in range(weight.shape[0]):
            value = int((shifted * weight[n].long()).sum()) * Fraction(rows.scale[i].item())
            value *= Fraction(absmax[n].item()) / 127
            for t, dim in enumerate(dims):
                value += Fraction(x[i, dim].item()) * Fraction(columns[n, t].item())
            if bias is not None:
                value += Fraction(bias[n].item())
            out[i, n] = float(value)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n", "dims"),
    [
        (1, 1, 1, []),
        (3, 1, 5, []),
        (3, 1, 5, [0]),
        (2, 5, 3, [0, 1, 2, 3, 4]),
        (3, 17, 5, [0, 16]),
        (4, 63, 6, []),
        (5, 130, 4, [7, 64, 65, 129]),
    ],
    ids=lambda value: f"k{len(value)}" if isinstance(value, list) else str(value),
)
def test_linear_is_the_formula(m: int, k: int, n: int, dims: list[int], dtype: str, activation: Activation) -> None:
    torch.manual_seed(m + k + n)
    x = torch.randn(m, k)
    x[:, dims] *= 50
    x, full = x.to(DTYPES[dtype]), torch.randn(n, k).to(DTYPES[dtype])
    if m > 1:
        x[1] = 0
    full[0] = 0
    weight, absmax = quantize_weight(full)
    columns, index = full[:, dims], torch.tensor(dims, dtype=torch.int32)
    for bias in (None, torch.randn(n).to(DTYPES[dtype])):
        got = int8_linear(x, Int8Weight(weight, absmax, index, columns, bias), activation)
        assert (got.dtype, tuple(got.shape)) == (DTYPES[dtype], (m, n))
        expected = formula(x, weight, absmax, dims, columns, bias, activation)
        # Terms may cancel, so the allowance is relative to their sizes and not to the sum's.
        size = x.double().abs() @ full.double().abs().t() + 1
        eps = torch.finfo(DTYPES[dtype]).eps
        assert bool(((got.double() - expected).abs() <= eps * expected.abs() + 2e-6 * size).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_int8_values_at_outlier_dims_play_no_part(activation: Activation) -> None:
    torch.manual_seed(0)
    x, (weight, absmax) = torch.randn(3, 8), quantize_weight(torch.randn(4, 8))
    dims, columns = torch.tensor([2, 5], dtype=torch.int32), torch.randn(4, 2)
    layer = Int8Weight(weight, absmax, dims, columns)
    expected = int8_linear(x, layer, activation)
    weight[:, [2, 5]] = int8s(4, 2)
    torch.testing.assert_close(int8_linear(x, layer, activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stored_outliers_bring_the_result_near(activation: Activation) -> None:
    """The point of it all: one large input dimension ruins int8 rows, and not the mixed product."""
    torch.manual_seed(0)
    x, full = torch.randn(16, 256), torch.randn(32, 256)
    x[:, 100] *= 500
    weight, absmax = quantize_weight(full)
    dims = torch.tensor([100], dtype=torch.int32)
    exact = x @ full.t()
    without = int8_linear(x, Int8Weight(weight, absmax, NO_DIMS, full[:, []]), activation)
    mixed = int8_linear(x, Int8Weight(weight, absmax, dims, full[:, [100]]), activation)
    rest = (x[:, 101:] @ full[:, 101:].t()).norm()
    assert (mixed - exact).norm() < 0.05 * rest
    assert (mixed - exact).norm() < 0.1 * (without - exact).norm()


def test_dynamic_outlier_dims() -> None:
    x = torch.tensor([[1.0, -6.0, 5.99, 0.0], [0.0, 0.0, 0.0, 70.0]])
    assert dynamic_outlier_dims(x, 6.0).tolist() == [1, 3]
    assert dynamic_outlier_dims(x, 100.0).tolist() == []
    assert dynamic_outlier_dims(x, 0.0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_dynamic_product_dequantizes_the_columns_it_finds(activation: Activation) -> None:
    torch.manual_seed(0)
    x, (weight, absmax) = torch.randn(6, 8), quantize_weight(torch.randn(5, 8))
    x[5, 4] = -7.0
    columns, dims = dequantize_weight(weight, absmax)[:, [4]], torch.tensor([4])
    searching = Int8Weight(weight, absmax, NO_DIMS, torch.zeros(5, 0), torch.ones(5), threshold=6.0)
    expected = int8_linear(x, Int8Weight(weight, absmax, dims, columns, torch.ones(5)), activation)
    assert torch.equal(int8_linear(x, searching, activation), expected)


@pytest.mark.parametrize("n", [2047, 2048, 5000])
def test_blocks_of_the_product_are_joined_without_a_gap(n: int) -> None:
    torch.manual_seed(0)
    x, weight = int8s(3, 2049), int8s(n, 2049)
    assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t())


def test_autocast_changes_no_exact_product() -> None:
    """In bfloat16 the sums would be off by a thousand."""
    torch.manual_seed(0)
    x, weight = int8s(3, 2048), int8s(5, 2048)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t())
