"""Weights on the CPU: the compiled functions against the reference to the bit, and the facade that picks them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmint8.kernels import reference
from llmint8.kernels import weights as facade
from llmint8.kernels.cpu import native, weights

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_it = pytest.mark.skipif(not native.kinds(), reason=native.why_not() if not native.kinds() else "")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
groups = pytest.mark.parametrize("group", [None, 64, 128, 256, 100])
SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (9, 1), (3, 7), (2, 31), (2, 33), (7, 64), (7, 513), (63, 4095), (3, 131072)]


def assert_like_the_reference(
    weight: Tensor, kind: native.Kind | None = None, rotation: reference.Rotation | None = None
) -> None:
    found, expected = weights.quantize_weight(weight, rotation, kind), reference.quantize_weight(weight, rotation)
    assert (found[0].dtype, found[1].dtype) == (torch.int8, torch.float32)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


def every_finite(dtype: torch.dtype) -> Tensor:
    """All magnitudes of a type of 16 bits, with alternating signs."""
    every = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    every[::2] *= -1
    return every


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape[0]}-K{shape[1]}")
def test_rows_are_rotated_as_by_the_reference(shape: tuple[int, int], dtype: torch.dtype, kind: native.Kind) -> None:
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    assert torch.equal(weights.rotate(x, kind), reference.rotate(x, 64))
    assert torch.equal(weights.rotate(x.t().contiguous().t(), kind), reference.rotate(x, 64))
    assert torch.equal(facade.rotate(x, 64), reference.rotate(x, 64))
    assert torch.equal(facade.rotate(x, None), x.float())
    assert torch.equal(x, before)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape[0]}-K{shape[1]}")
def test_weights_of_any_shape_are_those_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, kind: native.Kind
) -> None:
    random = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=random).to(dtype)
    assert_like_the_reference(weight, kind)
    assert_like_the_reference(weight, kind, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_weight_of_16_bits_is_that_of_the_reference(dtype: torch.dtype, kind: native.Kind) -> None:
    """Against a row's absmax of every exponent, and of random significands."""
    every, random = every_finite(dtype), torch.Generator().manual_seed(0)
    exponents = torch.arange(0, len(every), 1 << (10 if dtype == torch.float16 else 7))
    chosen = torch.cat([exponents, exponents + 1, torch.randint(1, len(every), (30,), generator=random)])
    for index in chosen.tolist():
        assert_like_the_reference(every[: index + 1][None], kind)


@dtypes
def test_ties_and_their_neighbours_are_rounded_as_by_the_reference(dtype: torch.dtype, kind: native.Kind) -> None:
    """For absmax of every magnitude, those among them for which there are ties 127 * w / absmax = n + 1/2."""
    random = torch.Generator().manual_seed(1)
    significands = [127.0, 254.0, 1.0, 129.0, *(128 + 127 * torch.rand(40, generator=random)).tolist()]
    rows = []
    for significand, exponent in itertools.product(significands, range(-156, 122, 3)):
        absmax = (torch.tensor(significand, dtype=torch.float64) * 2.0**exponent).to(dtype)
        if absmax.isfinite() and absmax:
            ties = (absmax.double() * (torch.arange(127) + 0.5) / 127).to(dtype)
            up, down = torch.nextafter(ties, absmax), torch.nextafter(ties, torch.zeros((), dtype=dtype))
            rows.append(torch.cat([absmax[None], ties, -ties, up, -down]))
    assert len(rows) > 300
    assert_like_the_reference(torch.stack(rows), kind)


def test_float32_as_near_to_a_tie_as_it_can_be_is_rounded_as_by_the_reference(kind: native.Kind) -> None:
    """127 * w / absmax is odd / 2 and 1 / absmax; absmax is 2**shift times a number of 24 bits, and w has 24, too."""
    rows = []
    for odd in (odd for odd in range(1, 254, 2) if odd != 127):
        shift = max(shift for shift in range(1, 9) if odd << (shift - 1) < 254)
        factor = odd << (shift - 1)
        # The largest absmax / 2**shift for which factor times it, and one more or less, is 127 * w, and w below 2**24.
        for sign in (1, -1):
            most = min((1 << 24) - 1, 127 * ((1 << 24) - 1) // factor - 1)
            a = most - (most + sign * pow(factor, -1, 127)) % 127
            w, rest = divmod(factor * a + sign, 127)
            assert (rest, w < 1 << 24, a < 1 << 24) == (0, True, True)
            rows.append([float(a << shift), float(w), -float(w)])
    assert_like_the_reference(torch.tensor(rows), kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_at_the_ends_of_the_range_are_those_of_the_reference(dtype: torch.dtype, kind: native.Kind) -> None:
    random = torch.Generator().manual_seed(2)
    scales = torch.cat([torch.arange(-149, -110), torch.arange(110, 128)]).double()
    row = torch.rand(len(scales), 200, generator=random, dtype=torch.float64) * 2 - 1
    weight = (row * 2 ** scales[:, None]).to(dtype)
    weight[0] = 0
    weight[1:3, 5] = torch.finfo(dtype).max
    assert_like_the_reference(weight, kind)


@dtypes
@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "expanded"])
def test_strides_do_not_matter(
    view: str, dtype: torch.dtype, kind: native.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 400)  # several blocks, the last of them smaller
    base = torch.randn(70, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = {"transposed": base.t(), "columns": base[:, 3::2], "rows": base[::3], "expanded": base[:1].expand(50, 40)}
    assert_like_the_reference(weight[view], kind)
    values = (20 * weight[view]).to(torch.int8)
    assert torch.equal(weights.row_sums(values, None, kind), values.sum(1, keepdim=True, dtype=torch.int32))


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_shows_in_its_row_only(value: float, dtype: torch.dtype, kind: native.Kind) -> None:
    weight = torch.randn(5, 70).to(dtype)
    expected = weights.quantize_weight(weight, 64, kind)
    weight[3, 44] = value
    values, absmax = weights.quantize_weight(weight, 64, kind)
    others = [0, 1, 2, 4]
    assert absmax.isfinite().tolist() == [True, True, True, False, True]
    assert torch.equal(values[others], expected[0][others])
    assert torch.equal(absmax[others], expected[1][others])


@needs_it
def test_the_result_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(201, 300).half()
    expected = weights.quantize_weight(weight)
    sums = weights.row_sums(expected[0])
    monkeypatch.setattr(weights, "_ELEMENTS_PER_THREAD", 1)
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, weights.quantize_weight(weight), expected))
        assert torch.equal(weights.row_sums(expected[0]), sums)


@groups
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64), (2, 256), (5, 300)], ids=lambda shape: f"N{shape[0]}-K{shape[1]}")
def test_sums_of_rows_and_of_groups_are_exact(shape: tuple[int, int], group: int | None, kind: native.Kind) -> None:
    n, k = shape
    random = torch.Generator().manual_seed(k)
    for values in (torch.randint(-127, 128, shape, generator=random), torch.full(shape, 127), torch.full(shape, -127)):
        found = weights.row_sums(values.to(torch.int8), group, kind)
        parts = values.split(group, 1) if group and k else [values] if group is None else []
        expected = torch.stack([part.sum(1) for part in parts], 1) if parts else torch.empty(n, 0)
        assert found.dtype == (torch.int32 if group is None else torch.int16)
        assert found.shape == expected.shape
        assert torch.equal(found.long(), expected.long())


@pytest.mark.parametrize("how", ["compiled", "reference", "under a compiler"])
def test_the_facade_returns_the_same_with_the_library_and_without(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "reference":
        monkeypatch.setattr(native, "kinds", list)
    if how == "under a compiler":  # which has no addresses
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if how != "compiled":
        for function in ("quantize_weight", "row_sums", "rotate"):
            monkeypatch.setattr(weights, function, None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = torch.randn(9, 70).to(dtype)
        assert torch.equal(facade.rotate(weight, 64), reference.rotate(weight, 64))
        values, absmax = facade.quantize_weight(weight)
        expected = reference.quantize_weight(weight)
        assert torch.equal(values, expected[0])
        assert torch.equal(absmax, expected[1])
        for found, wanted in zip(
            facade.quantize_weight(weight, 64), reference.quantize_weight(weight, 64), strict=True
        ):
            assert torch.equal(found, wanted)
        for group in (None, 64, 128):
            assert torch.equal(facade.row_sums(values, group), reference.row_sums(values, group))
        assert torch.equal(reference.row_sums(values, None), values.sum(1, keepdim=True, dtype=torch.int32))
        assert reference.row_sums(values, 64).tolist() == [[int(row[:64].sum()), int(row[64:].sum())] for row in values]


@needs_it
def test_the_facade_takes_the_compiled_functions_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "quantize_weight", lambda weight, rotation: "quantized")
    assert facade.quantize_weight(torch.ones(2, 3)) == "quantized"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("stands_for_others", ["negative", "fake", "meta", "float64"])
def test_a_weight_that_has_no_numbers_of_its_own_is_left_to_torch(stands_for_others: str) -> None:
    weight = torch.randn(4, 30)
    if stands_for_others == "negative":
        values, _ = facade.quantize_weight(torch._neg_view(weight))
        assert torch.equal(values, reference.quantize_weight(-weight)[0])
    elif stands_for_others == "fake":
        with FakeTensorMode() as mode:
            sums = facade.row_sums(mode.from_tensor(torch.ones(4, 30, dtype=torch.int8)), None)
        assert (sums.shape, sums.dtype) == ((4, 1), torch.int32)
    elif stands_for_others == "meta":
        assert facade.row_sums(torch.ones(4, 30, dtype=torch.int8, device="meta"), None).is_meta
    else:
        values, _ = facade.quantize_weight(weight.double())
        assert torch.equal(values, reference.quantize_weight(weight)[0])


@needs_it
def test_the_device_in_whose_context_it_is_called_does_not_matter() -> None:
    weight = torch.randn(4, 30).half()
    expected = facade.quantize_weight(weight)
    with torch.device("meta"):
        values, absmax = facade.quantize_weight(weight)
        sums = facade.row_sums(values, None)
    assert torch.equal(values, expected[0])
    assert torch.equal(absmax, expected[1])
    assert torch.equal(sums, reference.row_sums(values, None))
