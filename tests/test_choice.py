"""The choice of columns against another one: written from the docstrings, in NumPy and float64, and sharing no line."""

from typing import Any

import numpy as np
import pytest
import torch

from llmint8.converter.coding import round_to_nearest
from llmint8.converter.outliers.choosing import likely_outliers, select, spend
from llmint8.converter.outliers.criterion import Criterion, budget_notices, max_candidates, parse_criterion
from llmint8.converter.outliers.measuring import InputGroup, InputStatistics, column_norms, error_curve
from llmint8.formats import Scheme
from llmint8.formats.int8.schemes import KBit

GRID = [0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
FOUR_BITS = Scheme(kbit=KBit(4, "int", 32))


def restored(x: np.ndarray, activation: str, group: int | None) -> np.ndarray:
    """Quantize rows to int8, each group of dimensions on its own, and return what they stand for."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], group or x.shape[1]):
        part = x[:, start : start + (group or x.shape[1])]
        if activation == "absmax":
            scale = np.abs(part).max(1, keepdims=True) / 127
            out[:, start : start + part.shape[1]] = np.rint(part / scale) * scale
        else:
            low = np.minimum(part.min(1, keepdims=True), 0)
            high = np.maximum(part.max(1, keepdims=True), 0)
            scale = (high - low) / 254
            out[:, start : start + part.shape[1]] = np.rint(part / scale) * scale
    return out


@pytest.mark.parametrize(
    "scheme",
    [Scheme("absmax", None), Scheme("zeropoint", None), Scheme("absmax", 64), FOUR_BITS],
    ids=["absmax", "zeropoint", "absmax-64", "4-bits"],
)
def test_the_error_is_the_mean_of_that_of_each_token_and_that_of_all(scheme):
    """A token of little output and much error decides the half per token, one of huge output the half of all."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 128)) * np.exp(random.normal(size=128))
    x[3] *= 300
    x[5] *= 0.01
    dims = np.argsort(-np.abs(x).max(0), kind="stable")[:32]
    norms = [(random.random(128) + 0.1, random.random(128) * 1e-3) for _ in range(2)]
    energies = [random.random(40) * 100 + 1, random.random(40) * 10]
    energies[0][3], energies[1][7] = 1e6, 1e-4
    expected = []
    for k in (0, 2, 4, 8, 12, 16, 24, 32):
        kept = x.copy()
        kept[:, dims[:k]] = 0
        quantized = kept if scheme.kbit else restored(kept, scheme.activation, scheme.activation_group)
        total = 0.0
        for (a, e), energy in zip(norms, energies, strict=True):
            error = (kept - quantized) ** 2 @ a + quantized**2 @ e
            total += (np.mean(error / (energy + 1e-6 * energy.mean())) + error.sum() / energy.sum()) / 2
        expected.append(total)
    tensors = [tuple(torch.from_numpy(one).float() for one in pair) for pair in norms]
    found = error_curve(
        torch.from_numpy(x).float(),
        tensors,
        [torch.from_numpy(energy).float() for energy in energies],
        torch.from_numpy(dims),
        scheme,
    )
    assert found[0] == [0, 2, 4, 8, 12, 16, 24, 32]
    # One of 254 steps may round to the other side in float32, and the shift by a whole zero point moves some.
    assert found[1] == pytest.approx(expected, rel=5e-2 if scheme.activation == "zeropoint" else 2e-3)


def test_the_error_of_a_wide_layer_is_measured_with_up_to_512_columns():
    norms, nothing = (torch.ones(2048), torch.zeros(2048)), torch.ones(1, 2048)
    assert error_curve(nothing, [norms], [torch.ones(1)], torch.arange(512), Scheme("absmax"))[0] == GRID
    assert error_curve(nothing, [norms], [torch.ones(1)], torch.arange(511), Scheme("absmax"))[0] == GRID[:-1]


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_errors_are_relative_to_the_output_and_a_token_without_any_is_no_error(size):
    """Of weights so many times as large; and of tokens of nothing but zeros, as those that pad a text may be."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    norms, energies = (torch.rand(64) + 0.1, torch.rand(64) * 1e-3), torch.rand(20) + 1
    expected = error_curve(x, [norms], [energies], torch.arange(8), Scheme("absmax"))
    times = size**2
    found = error_curve(
        x, [(norms[0] * times, norms[1] * times)], [energies * times], torch.arange(8), Scheme("absmax")
    )
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    none = torch.zeros(3, 64)
    assert error_curve(none, [norms], [torch.zeros(3)], torch.arange(2), Scheme("absmax")) == ([0, 2], [0.0, 0.0])
    # What the weights make nothing of is infinitely wrong, and a number all the same.
    assert 1e20 < error_curve(x[:1], [norms], [torch.zeros(1)], torch.arange(0), Scheme("absmax"))[1][0] < float("inf")


@pytest.mark.parametrize(("rotation", "shape"), [(None, (300, 1000)), (64, (1100, 128))])
def test_norms_of_columns_and_of_what_rounding_takes_from_them(rotation, shape):
    """A weight of several blocks of rows, of which the last is not full."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    codes, grid = round_to_nearest(weight, Scheme(rotation=rotation))
    exact, step = weight.double().numpy(), (grid.absmax.double() / 127).numpy()
    if rotation:
        signs = np.array([[1]])
        while len(signs) < rotation:
            signs = np.block([[signs, signs], [signs, -signs]])
        exact = (exact.reshape(-1, rotation) @ (signs / 8)).reshape(exact.shape)
    norms, errors = column_norms(weight, codes, grid, rotation)
    assert norms.numpy() == pytest.approx((exact**2).sum(0), rel=1e-5)
    # A difference of two numbers near each other, each of 24 bits.
    assert errors.numpy() == pytest.approx(((codes.double().numpy() * step[:, None] - exact) ** 2).sum(0), rel=1e-3)


def bought(sizes: list[list[float]], errors: list[list[float]], left: float) -> tuple[list[int], float]:
    """Buy, again and again, the steepest way down that a thing has from where it is, until it cannot pay."""
    at, closed = [0] * len(sizes), [False] * len(sizes)
    while True:
        best = None
        for number, here in enumerate(at):
            for there in range(here + 1, 0 if closed[number] else len(sizes[number])):
                fall = errors[number][here] - errors[number][there]
                steepness = fall / (sizes[number][there] - sizes[number][here]), sizes[number][there]
                if fall > 0 and (best is None or steepness > best[0]):
                    best = steepness, number, there
        if best is None:
            return at, left
        _, number, there = best
        cost = sizes[number][there] - sizes[number][at[number]]
        if cost > left:
            closed[number] = True
            continue
        left -= cost
        at[number] = there


def spread(curves: list[tuple[int, list[float]]], budget: int) -> list[int]:
    """Buy columns for groups of so many layers."""
    sizes = [[float(k * layers) for k in GRID] for layers, _ in curves]
    return [GRID[one] for one in bought(sizes, [errors for _, errors in curves], budget)[0]]


@pytest.mark.parametrize("seed", range(20))
def test_bytes_go_to_the_steepest_steps_and_what_is_left_to_the_largest_that_fits(seed):
    random = np.random.default_rng(seed)
    sizes, errors = [], []
    for _ in range(int(random.integers(1, 6))):
        size = np.cumsum(random.integers(1, 40, 6)).tolist()
        sizes.append(size)
        errors.append((np.exp(-np.arange(6) * random.random()) * 5 + random.random(6)).tolist())
    names = [f"thing {number}" for number in range(len(sizes))]
    for budget in (0, 1, 15, 40, 100, 200):
        at, left = bought(sizes, errors, budget)
        falls = [(errors[n][at[n]] - e, n, place) for n, these in enumerate(errors) for place, e in enumerate(these)]
        for fall, number, place in sorted(falls, reverse=True):
            cost = sizes[number][place] - sizes[number][at[number]]
            if fall > 0 and cost <= left and errors[number][place] < errors[number][at[number]]:
                at[number] = place
                left -= cost
        found = spend(dict(zip(names, sizes, strict=True)), dict(zip(names, errors, strict=True)), budget)
        assert found == dict(zip(names, at, strict=True)), budget


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_spread_as_by_buying_the_steepest_step_each_time(seed):
    """Curves that rise in between, groups of one to four layers, budgets of which the last columns fit nowhere."""
    random = np.random.default_rng(seed)
    curves = []
    for _ in range(int(random.integers(1, 8))):
        errors = np.exp(-np.arange(len(GRID)) * random.random()) * random.random() * 5 + random.random(len(GRID)) / 20
        curves.append((int(random.integers(1, 5)), errors.tolist()))
    groups = [
        InputGroup(
            [f"{n}.{i}" for i in range(layers)], torch.arange(64), torch.zeros(64), torch.arange(64), {}, GRID, errors
        )
        for n, (layers, errors) in enumerate(curves)
    ]
    total = sum(layers for layers, _ in curves)
    for budget in (0, 1, 3.5, 8, 16, 40, 64):
        assert select(groups, Criterion("top-k", budget)) == spread(curves, int(budget * total)), budget


def test_a_point_inside_an_edge_of_the_hull_is_no_step():
    group = InputGroup(["x"], torch.arange(8), torch.zeros(8), torch.arange(8), {}, [0, 2, 4, 8], [4.0, 3.0, 2.0, 0.0])
    assert [select([group], Criterion("top-k", budget)) for budget in (2, 7, 8)] == [[0], [0], [8]]


def test_columns_that_spare_nothing_are_not_kept():
    group = InputGroup(["x"], torch.arange(8), torch.zeros(8), torch.arange(8), {}, [0, 2, 4, 8], [4.0, 4.0, 5.0, 4.0])
    other = InputGroup(["y"], torch.arange(8), torch.zeros(8), torch.arange(8), {}, [0, 2, 4, 8], [4.0, 3.0, 3.0, 3.5])
    assert select([group, other], Criterion("top-k", 8)) == [0, 2]
    assert select([group, other], Criterion("none", None)) == [0, 0]
    assert select([group, other], Criterion("proxy", 0.2)) == [0, 0]


def seen(criterion: Criterion, *calls: np.ndarray, scheme: Scheme = Scheme("absmax")) -> InputGroup:  # noqa: B008
    """Return the group of one layer that is called with these inputs, one after the other."""
    names: list[str] = []
    statistics = InputStatistics(criterion, scheme, lambda name, measure: names.append(name) or measure())
    for x in calls:
        held = torch.from_numpy(x).float()  # by the model, until the next call
        rows = held.clone()
        norms = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
        dims = statistics.see("layer", held, rows, norms, rows[:, :3] + 1)
        assert dims is not None
    (group,) = statistics.finish()
    assert group.dims.tolist() == dims.tolist()
    # What the journal of a conversion has them by.
    assert names == ["layer", *(f"layer, call {number}" for number in range(2, len(calls) + 1))]
    return group


def test_what_is_told_of_an_input_is_that_of_all_its_calls():
    random = np.random.default_rng(1)
    calls = [random.normal(size=(tokens, 32)) * 3 for tokens in (10, 30)]
    calls[0][:, 4], calls[1][:, 9] = 20, 7
    group, all_rows = seen(Criterion("top-k", 8), *calls), np.concatenate(calls)
    absmax = np.abs(all_rows).max(0)
    dims = np.argsort(-absmax, kind="stable")[:8]
    assert group.dims.tolist() == dims.tolist()
    assert group.absmax.tolist() == pytest.approx([*absmax[dims], np.delete(absmax, dims).max()])
    assert group.positions.tolist() == pytest.approx((np.abs(all_rows[:, dims]) >= 6).mean(0))
    assert group.statistics["tokens"] == 40
    assert group.statistics["outlier_features"] == int(((np.abs(all_rows) >= 6).mean(0) >= 0.06).sum())
    assert group.statistics["absmax_median"] == pytest.approx(float(np.sort(absmax)[15]), rel=1e-3)
    assert group.kept_absmax(0) == pytest.approx(absmax.max())
    assert group.kept_absmax(8) == pytest.approx(np.delete(absmax, dims).max())
    # Of several calls the mean, each with the weight of its tokens; of those only in which it was a candidate.
    earlier = np.argsort(-np.abs(calls[0]).max(0), kind="stable")[:8]
    assert not set(dims) <= set(earlier)
    for dim, found in zip(dims, group.statistics["quartiles"], strict=True):
        first, then = (np.quantile(call[:, dim], [0.25, 0.5, 0.75]) for call in calls)
        expected = (10 * first + 30 * then) / 40 if dim in earlier else then
        assert found == pytest.approx(expected, rel=2e-3), dim
    # And so with the curve: each call counts by its tokens.
    alone = [seen(Criterion("top-k", 8), call).errors[0] for call in calls]
    assert group.errors[0] == pytest.approx((10 * alone[0] + 30 * alone[1]) / 40, rel=1e-4)


def test_layers_that_share_an_input_are_a_group_and_stay_one():
    """The first input counts, as long as the model holds it: what another layer sees in between parts nobody."""
    random = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(tokens, 32, generator=random) for name, tokens in (("x", 10), ("y", 20), ("z", 30))}
    norms = {name: (torch.rand(32) + 0.1, torch.rand(32) * 1e-3) for name in "abcd"}
    out = {name: torch.randn(len(inputs[on]), 4) for name, on in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z"))}
    out_later = torch.randn(30, 4)
    statistics = InputStatistics(Criterion("top-k", 4), Scheme("absmax"))
    for layer, on in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z")):
        statistics.see(layer, inputs[on], inputs[on], norms[layer], out[layer])
    statistics.see("a", inputs["z"], inputs["z"], norms["a"], out_later)
    groups = {" ".join(group.layers): group for group in statistics.finish()}
    assert list(groups) == ["a c", "b", "d"]
    assert [group.statistics["tokens"] for group in groups.values()] == [40, 20, 30]

    def curve(on: str, layers: str, outs: list[torch.Tensor], dims: torch.Tensor) -> np.ndarray:
        energies = [one.square().sum(1) for one in outs]
        return np.array(error_curve(inputs[on], [norms[one] for one in layers], energies, dims, Scheme("absmax"))[1])

    both = torch.cat([inputs["x"], inputs["z"]]).abs().amax(0).argsort(descending=True)[:8]
    first, then = curve("x", "ac", [out["a"], out["c"]], both), curve("z", "a", [out_later], both)
    # Ten tokens for two layers and thirty for one of them: the mean of a layer, times two.
    assert groups["a c"].errors == pytest.approx(2 * (10 * first + 30 * then) / (2 * 10 + 30), rel=1e-4)
    assert groups["a c"].dims.tolist() == both.tolist()


def test_a_curve_ends_where_that_of_a_call_with_fewer_candidates_does():
    calls = np.ones((3, 64)), np.ones((3, 64))
    calls[0][:, :20], calls[1][:, :40] = 7, 8
    group = seen(Criterion("threshold", 5), *calls)
    assert (group.ks, len(group.dims)) == ([0, 2, 4, 8, 12, 16], 40)
    assert select([group], Criterion("threshold", 5)) == [40]


def rows_with(large: dict[int, tuple[int, float]]) -> np.ndarray:
    """100 tokens of 32 dimensions, some of which reach a value in so many tokens."""
    x = np.random.default_rng(2).uniform(-1, 1, size=(100, 32))
    for dim, (tokens, value) in large.items():
        x[:tokens, dim] = value
    return x


@pytest.mark.parametrize(
    ("criterion", "large", "candidates", "kept"),
    [
        ("systematic", {3: (6, 6.0), 9: (5, 9.0), 20: (100, -6.0), 21: (100, 5.99)}, 8, [3, 20]),
        ("systematic", {3: (1, 9.0)}, 8, []),
        # Of all those at least as large as the least of them, though that are more than a quarter.
        ("systematic", {**dict.fromkeys(range(12), (1, 7.0)), 20: (6, 6.5)}, 13, [20]),
        ("threshold=4", dict.fromkeys(range(12), (1, 4.0)), 12, list(range(12))),
        ("threshold=4", dict.fromkeys(range(32), (1, -9.0)), 32, list(range(32))),
        ("threshold=0.5", {}, 32, list(range(32))),
        ("threshold=4", {5: (1, 3.99)}, 8, []),
        ("top-k=8", {}, 8, None),
        ("none", {4: (1, 9.0)}, 1, []),
        ("proxy=0.1", {4: (1, 9.0)}, 1, []),
    ],
)
def test_which_columns_a_criterion_keeps_and_among_how_many(criterion, large, candidates, kept):
    parsed, x = parse_criterion(criterion), rows_with(large)
    group = seen(parsed, x)
    (count,) = select([group], parsed)
    assert len(group.dims) == candidates
    assert len(group.absmax) == min(candidates + 1, 32)
    chosen = group.dims[group.order[:count]].tolist()
    if kept is not None:
        assert sorted(chosen) == kept
    others = np.delete(np.abs(x).max(0), chosen)
    assert group.kept_absmax(count) == pytest.approx(others.max() if len(others) else 0)
    features = ((np.abs(x) >= 6).sum(0) >= 6).sum()
    assert group.statistics["outlier_features"] == features


def test_of_inputs_that_are_not_quantized_the_mean_square_ranks():
    """One large token in dimension 3, and all of dimension 5; where a magnitude is asked for, it is what counts."""
    x = rows_with({3: (1, 5.0), 5: (100, 2.0)})
    squares = np.argsort(-(x**2).sum(0), kind="stable")[:8].tolist()
    magnitudes = np.argsort(-np.abs(x).max(0), kind="stable")[:8].tolist()
    assert (squares[0], magnitudes[0]) == (5, 3)
    for criterion, scheme, expected in (
        (Criterion("top-k", 4), FOUR_BITS, squares),
        (Criterion("top-k", 4), Scheme("absmax"), magnitudes),
        (Criterion("threshold", 1.5), FOUR_BITS, magnitudes),
    ):
        assert seen(criterion, x, scheme=scheme).dims.tolist() == expected
    rows = torch.from_numpy(x).float()
    assert likely_outliers(rows, Criterion("top-k", 1), by_square=True).tolist() == [5]
    assert likely_outliers(rows, Criterion("top-k", 1)).tolist() == [3]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Criterion("top-k", 2), [7, 3]),
        (Criterion("top-k", 100), [7, 3, 5, 0]),  # no more than a quarter
        (Criterion("threshold", 5.0), [3, 5, 7]),
        (Criterion("threshold", 6.5), [7]),
        (Criterion("systematic", None), [3, 7]),
        (Criterion("none", None), []),
    ],
)
def test_likely_outliers(criterion, expected):
    x = torch.zeros(4, 16)
    x[0, 7], x[1, 3], x[2, 5], x[3, 0] = -9.0, 6.0, 5.0, 1.0
    assert likely_outliers(x, criterion).tolist() == expected


def test_a_quarter_of_a_layer_and_512_columns_at_most():
    assert [max_candidates(width) for width in (1, 3, 4, 7, 8, 2047, 2048, 9000)] == [1, 1, 1, 1, 2, 511, 512, 512]


@pytest.mark.parametrize(
    ("text", "kind", "value", "measured"),
    [
        ("none", "none", None, False),
        ("systematic", "systematic", None, True),
        ("top-k=16", "top-k", 16, True),
        ("top-k=0.5", "top-k", 0.5, True),
        ("threshold=3.5", "threshold", 3.5, True),
        ("proxy=0.02", "proxy", 0.02, False),
        ("proxy=0.25", "proxy", 0.25, False),
    ],
)
def test_a_criterion_is_written_as_it_is_read(text, kind, value, measured):
    found: Any = parse_criterion(text)
    assert (found.kind, found.value, found.measured, found.amount) == (kind, value, measured, value or 0)
    assert str(found) == text


@pytest.mark.parametrize(
    "text", ["top-k", "top-k=0", "top-k=-1", "threshold=x", "threshold=0.0", "proxy=0", "all", "systematic=3", ""]
)
def test_bad_criteria(text):
    with pytest.raises(ValueError, match="expected none, systematic, top-k=16, threshold"):
        parse_criterion(text)


def test_a_share_of_the_columns_is_a_quarter_at_most():
    with pytest.raises(ValueError, match=r"'proxy=0\.26', expected a share of at most 0\.25"):
        parse_criterion("proxy=0.26")


@pytest.mark.parametrize(
    ("criterion", "widths", "average"),
    [
        (Criterion("top-k", 4), [16, 16], None),
        (Criterion("top-k", 4.5), [16, 16], "4"),
        (Criterion("top-k", 5), [16, 24], None),
        (Criterion("top-k", 513), [4096], "512"),
        (Criterion("top-k", 9), [8], "2"),
        (Criterion("threshold", 1000), [16], None),
        (Criterion("systematic", None), [16], None),
    ],
)
def test_a_budget_that_no_layer_can_spend_is_said(criterion, widths, average):
    expected = (
        f"--outliers {criterion} is more than there can be: a layer keeps 512 columns at most, and no more than one in "
        f"4, which is {average} on average here"
    )
    assert budget_notices(criterion, widths) == ([] if average is None else [expected])
