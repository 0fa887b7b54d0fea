"""The choice of columns against another one: written from the docstrings, in NumPy and float64, and sharing no line."""

import numpy as np
import pytest
import torch

from llmint8.converter.outliers.choosing import likely_outliers, select
from llmint8.converter.outliers.criterion import Criterion, max_candidates
from llmint8.converter.outliers.measuring import InputGroup, InputStatistics, error_curve
from llmint8.formats import Scheme

GRID = [0, 2, 4, 8, 12, 16, 24, 32, 48, 64]


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


@pytest.mark.parametrize(("activation", "group"), [("absmax", None), ("zeropoint", None), ("absmax", 64)])
def test_the_error_is_the_mean_of_that_of_each_token_and_that_of_all(activation, group):
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
        quantized = restored(kept, activation, group)
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
        Scheme(activation, group),
    )
    assert found[0] == [0, 2, 4, 8, 12, 16, 24, 32]
    # One of 254 steps may round to the other side in float32, and the shift by a whole zero point moves some.
    assert found[1] == pytest.approx(expected, rel=2e-3 if activation == "absmax" else 5e-2)


def spread(curves: list[tuple[int, list[float]]], budget: int) -> list[int]:
    """Buy, again and again, the steepest way down that a group has from where it is, until a group cannot pay."""
    at, closed = [0] * len(curves), [False] * len(curves)
    while True:
        best = None
        for number, (layers, errors) in enumerate(curves):
            if closed[number]:
                continue
            here = at[number]
            for there in range(here + 1, len(errors)):
                fall = (errors[here] - errors[there]) / (GRID[there] - GRID[here]) / layers
                if fall > 0 and (best is None or (fall, GRID[there]) > best[0]):
                    best = (fall, GRID[there]), number, there
        if best is None:
            return [GRID[one] for one in at]
        _, number, there = best
        cost = (GRID[there] - GRID[at[number]]) * curves[number][0]
        if cost > budget:
            closed[number] = True
            continue
        budget -= cost
        at[number] = there


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_spread_as_by_buying_the_steepest_step_each_time(seed):
    """Curves that rise in between, groups of one to four layers, budgets of which the last columns fit nowhere."""
    random = np.random.default_rng(seed)
    curves = []
    for _ in range(int(random.integers(1, 8))):
        errors = np.exp(-np.arange(len(GRID)) * random.random()) * random.random() * 5 + random.random(len(GRID)) / 20
        curves.append((int(random.integers(1, 5)), [float(error) for error in errors]))
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


def seen(criterion: Criterion, *calls: np.ndarray) -> InputGroup:
    """Return the group of one layer that is called with these inputs, one after the other."""
    names: list[str] = []
    statistics = InputStatistics(criterion, Scheme("absmax"), lambda name, measure: names.append(name) or measure())
    for x in calls:
        rows = torch.from_numpy(x).float()
        norms = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
        dims = statistics.see("layer", rows, rows, norms, rows[:, :3] + 1)
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
    # Of several calls the mean, each with the weight of its tokens.
    quartiles = [np.quantile(call[:, 4], [0.25, 0.5, 0.75]) for call in calls]
    assert group.statistics["quartiles"][0] == pytest.approx((10 * quartiles[0] + 30 * quartiles[1]) / 40, rel=2e-3)
    # And so with the curve: each call counts by its tokens.
    alone = [seen(Criterion("top-k", 8), call).errors[0] for call in calls]
    assert group.errors[0] == pytest.approx((10 * alone[0] + 30 * alone[1]) / 40, rel=1e-4)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Criterion("top-k", 2), [7, 3]),
        (Criterion("top-k", 100), [7, 3, 5, 0]),  # no more than a quarter
        (Criterion("threshold", 5.0), [3, 5, 7]),
        (Criterion("systematic", None), [3, 7]),
    ],
)
def test_likely_outliers(criterion, expected):
    x = torch.zeros(4, 16)
    x[0, 7], x[1, 3], x[2, 5], x[3, 0] = -9.0, 6.0, 5.0, 1.0
    assert likely_outliers(x, criterion).tolist() == expected


def test_a_quarter_of_a_layer_and_512_columns_at_most():
    assert [max_candidates(width) for width in (1, 3, 4, 7, 8, 2047, 2048, 9000)] == [1, 1, 1, 1, 2, 511, 512, 512]
